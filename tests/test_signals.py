"""SIGTERM and Ctrl-C before the first step: one sentence, one status."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTHING_LOST = 'nothing was lost; the same command goes on.\n'


# What a shell starts in the background ignores Ctrl-C, and what nohup starts a
# hang-up, and so would their children.
_HEARS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def _start(*command):
  return subprocess.Popen(
    [sys.executable, '-c', _HEARS, *command],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


# For a compiler: C that comes back to Python after minutes.
_BUSY = """
import hashlib
from st_moe import signals
with signals.orderly(interrupt=True):
  print('busy', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""


@pytest.mark.parametrize(
  ('number', 'status', 'said'),
  [
    (signal.SIGTERM, 75, f'Told to stop: {NOTHING_LOST}'),
    (signal.SIGHUP, 75, f'Told to stop: {NOTHING_LOST}'),
    (signal.SIGINT, 130, f'Interrupted: {NOTHING_LOST}'),
  ],
)
def test_who_is_in_a_compiler_hears_it_too(number, status, said):
  process = _start('-c', _BUSY)
  assert process.stdout.readline() == 'busy\n'
  process.send_signal(number)
  assert process.communicate(timeout=20) == (said, '')
  assert process.returncode == status


def test_a_command_that_has_not_trained_yet(tmp_path):
  """Told while it reads text: long after its first line, before any step."""
  workdir = tmp_path / 'run'
  process = _start(
    '-m',
    'st_moe.cli',
    'train',
    '--config=configs/st_moe_tiny.py:runlocal',
    f'--workdir={workdir}',
    f'--config.data.cache_dir={tmp_path / "cache"}',
  )
  until = time.monotonic() + 120
  while not (workdir / 'config.json').exists():
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=20) == (
    f'Told to stop: {NOTHING_LOST}',
    '',
  )
  assert process.returncode == 75


# A handler of the program it runs in stays; so does one that ignores.
_THEIRS = """
import signal
from st_moe import signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
with signals.orderly(interrupt=True):
  with signals.orderly():
    pass
  assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  assert signal.getsignal(signal.SIGTERM) is signals._end
  undo = signals.handle(print)  # While steps are taken.
  assert signal.getsignal(signal.SIGTERM) is print
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  undo()
  assert signal.getsignal(signal.SIGINT) is signals._end
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
signal.signal(signal.SIGTERM, print)
with signals.orderly():
  assert signal.getsignal(signal.SIGTERM) is print
"""


def test_what_was_there_before_comes_back():
  process = _start('-c', _THEIRS)
  assert process.communicate(timeout=20) == ('', '')
  assert process.returncode == 0
