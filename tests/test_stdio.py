"""What is printed may be lost, and stops nothing."""

import io
import os
import sys

import pytest
from rich.console import Console

from st_moe import stdio


def _print():
  print('a step', flush=True)
  Console().print('[b]another[/b]')
  sys.stdout.write('x' * 100_000)
  sys.stdout.flush()


def test_a_reader_that_has_left(monkeypatch):
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, 'w') as pipe:
    monkeypatch.setattr(sys, 'stdout', pipe)
    with pytest.raises(BrokenPipeError):
      _print()
    with stdio.lasting():
      _print()
    assert sys.stdout is pipe
    pipe.write('What is left at the end of Python is no error either.')


def test_a_log_on_a_full_disk(monkeypatch):
  with open('/dev/full', 'w') as log:
    monkeypatch.setattr(sys, 'stderr', log)
    with stdio.lasting():
      print('no room', file=sys.stderr, flush=True)
      os.dup2(os.open(os.devnull, os.O_WRONLY), log.fileno())  # Room again.
      print('for this', file=sys.stderr, flush=True)


@pytest.mark.parametrize('gone', [None, 'closed'])
def test_a_stream_that_was_closed(monkeypatch, gone):
  stream = gone and io.StringIO()
  if stream:
    stream.close()
  monkeypatch.setattr(sys, 'stdout', stream)
  with stdio.lasting():
    _print()


def test_a_terminal_that_knows_ascii_alone(monkeypatch):
  said = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(said, 'ascii'))
  with stdio.lasting():
    print('runs/caf\xe9')
  assert said.getvalue() == b'runs/caf\\xe9\n'
