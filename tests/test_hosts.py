"""Several processes: the numbers of one, and one end for all of them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from st_moe import hosts
from st_moe.train.report import read_rows

# Half of each expert's copies, and of each batch, on either of two processes.
_CONFIG = """
from ml_collections import config_dict

def get_config(arg=None):
  c = config_dict.ConfigDict()
  c.total_steps = 60
  c.model = dict(
      vocab_size=0, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
      moe=dict(num_experts=4, extra_ffn='none'))
  sparse = dict(num_layers=1, sparse_every=1, sparse_offset=0)
  c.model.encoder = dict(group_size=16, **sparse)
  c.model.decoder = dict(group_size=8, **sparse)
  c.data = dict(
      mixture=dict(numbers=2.0, squares=1.0), vocabulary='bytes',
      inputs_length=16, targets_length=8, batch_size=8,
      files={{name: dict(train=f'{folder}/{{name}}.txt',
                         validation=f'{folder}/{{name}}.txt')
              for name in ('numbers', 'squares')}},
      cache_dir='{folder}/cache')
  c.optimizer = dict(learning_rate=0.01, warmup_steps=10)
  c.mesh = dict(fsdp=2, expert=2)
  c.checkpoint = dict(every=10)
  c.evaluate = dict(batches=1)
  c.log = dict(every=1, tensorboard=False)
  return c
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('hosts')
  numbers = ' '.join(map(str, range(2000)))
  squares = ' '.join(str(n * n) for n in range(2000))
  (folder / 'numbers.txt').write_text(numbers)
  (folder / 'squares.txt').write_text(squares)
  (folder / 'config.py').write_text(_CONFIG.format(folder=folder))
  return folder


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


class Team:
  """Processes that run one command together."""

  def __init__(self, folder, verb, *flags, processes: int, devices: int):
    env = dict(
      os.environ,
      XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}'
      ' --xla_backend_optimization_level=0',
      JAX_COMPILATION_CACHE_DIR=str(folder / 'compiled'),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1',
    )
    port, self.all, self._logs = _free_port(), [], []
    for i in range(processes):
      log = folder / f'{time.monotonic_ns()}-{i}.txt'
      several = [
        f'--coordinator=localhost:{port}',
        f'--processes={processes}',
        f'--process={i}',
      ]
      with log.open('w') as f:
        self.all.append(
          subprocess.Popen(
            [sys.executable, '-m', 'st_moe.cli', verb, *flags]
            + several * (processes > 1),
            stdout=f,
            stderr=subprocess.STDOUT,
            env=env,
          )
        )
      self._logs.append(log)

  def wait(self, seconds: float = 240) -> list[int]:
    """Exit statuses, once all have ended."""
    until = time.monotonic() + seconds
    try:
      return [p.wait(max(until - time.monotonic(), 0)) for p in self.all]
    finally:
      self.end()

  def end(self):
    for process in self.all:
      process.kill()
      process.wait()

  def wait_for(self, happened, seconds: float = 240):
    """Waits while all of them run."""
    until = time.monotonic() + seconds
    try:
      while not happened():
        assert all(p.poll() is None for p in self.all), self.said()
        assert time.monotonic() < until, self.said()
        time.sleep(0.01)
    except BaseException:
      self.end()
      raise

  def said(self) -> list[str]:
    """What each of them printed, but for what its libraries did."""
    ours = lambda line: not re.match(r'[WEI]\d{4} |\[Gloo\]', line)
    return [
      '\n'.join(filter(ours, log.read_text().splitlines()))
      for log in self._logs
    ]


def _train(folder, workdir, *, processes, devices) -> Team:
  return Team(
    folder,
    'train',
    f'--config={folder}/config.py',
    f'--workdir={workdir}',
    processes=processes,
    devices=devices,
  )


def _rows(workdir) -> list[dict]:
  """The training steps of a run, without what the clock said."""
  clock = ('tokens_per_second', 'seconds_per_step')
  return [
    {k: v for k, v in row.items() if k not in clock}
    for row in read_rows(workdir)
    if 'loss' in row
  ]


def _same_run(one, other):
  assert [r['step'] for r in one] == [r['step'] for r in other]
  for a, b in zip(one, other, strict=True):
    for name in a:
      if name.startswith('tokens_seen/'):
        assert a[name] == b[name], (a['step'], name)
    assert a['loss'] == pytest.approx(b['loss'], rel=2e-5), a['step']


def _checkpoints(workdir) -> list[int]:
  names = [path.name for path in (workdir / 'checkpoints').glob('*')]
  return sorted(int(name) for name in names if name.isdigit())


@pytest.fixture(scope='module')
def alone(folder):
  """The workdir of one process with four devices, 60 steps."""
  team = _train(folder, folder / 'alone', processes=1, devices=4)
  assert team.wait() == [0], team.said()
  return folder / 'alone'


def test_two_processes_are_stopped_killed_and_end_as_one(folder, alone):
  """SIGTERM to one of two, kill -9 of one of two, and one alone to the end."""
  workdir = folder / 'broken'
  done = lambda: len(_rows(workdir))

  # Told to stop: both save the same step.
  team = _train(folder, workdir, processes=2, devices=2)
  team.wait_for(lambda: done() >= 3)
  team.all[1].send_signal(signal.SIGTERM)
  assert team.wait(60) == [75, 75], team.said()
  (stopped,) = _checkpoints(workdir)
  assert 3 <= stopped < 30
  assert len(_rows(workdir)) == stopped
  first, second = team.said()
  told = f'Told to stop: step {stopped} is saved; the same command goes on.'
  assert first.splitlines()[-1] == told
  assert second == ''  # Whatever there is to say is said once.

  # Killed: the other one says so and stops.
  team = _train(folder, workdir, processes=2, devices=2)
  later = (stopped // 10 + 1) * 10
  team.wait_for(lambda: later in _checkpoints(workdir))
  team.all[1].kill()
  killed = time.monotonic()
  assert team.wait(60) == [1, -9], team.said()
  assert time.monotonic() - killed < hosts.SILENCE
  first, _ = team.said()
  assert f'{stopped} of 60 steps done' in first
  assert first.splitlines()[-1].startswith(
    'st-moe: process 0 of 2 stops: process 1 has died'
  )
  assert 'Traceback' not in first

  # One process goes on with what two have saved.
  team = _train(folder, workdir, processes=1, devices=4)
  assert team.wait() == [0], team.said()
  (last,) = team.said()
  assert f'{later} of 60 steps done' in last or f'{later + 10} of 60' in last
  _same_run(_rows(workdir), _rows(alone))
