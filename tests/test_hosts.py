"""Several processes: the numbers of one, and one end for all of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import st_moe
from st_moe import backend, hosts, sharding
from st_moe.history import read_rows
from tests.flags import IN_HASTE

# Half of each expert's copies, and of each batch, on either of two processes.
_CONFIG = """
from ml_collections import config_dict

def get_config(arg=None):
  c = config_dict.ConfigDict()
  c.total_steps = 100
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


# What there is, and where.

_SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}


@pytest.mark.parametrize(
  ('env', 'tpu', 'several'),
  [
    ({}, False, False),
    (_SLURM, False, True),
    ({**_SLURM, 'SLURM_NTASKS': '1'}, False, False),
    # A batch script without `srun` is one process, however many tasks it has.
    ({k: v for k, v in _SLURM.items() if 'STEP' not in k}, False, False),
    ({'OMPI_COMM_WORLD_SIZE': '4'}, False, True),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True, True),
    ({'TPU_WORKER_HOSTNAMES': 'a'}, True, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, False, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, True, False),
    ({'MEGASCALE_NUM_SLICES': '2'}, True, True),
    ({}, True, True),  # Its metadata say so.
  ],
)
def test_what_the_environment_says(monkeypatch, env, tpu, several):
  asked = []
  monkeypatch.setattr(backend, 'has_tpu', lambda: tpu)
  monkeypatch.setattr(hosts, '_metadata', lambda: asked.append(1) or 'a,b')
  assert hosts.several(env) == several
  assert bool(asked) == (tpu and env == {})  # Nobody else waits for an answer.


def test_one_process_waits_for_nobody(monkeypatch):
  monkeypatch.setattr(hosts, 'several', lambda env: False)
  monkeypatch.setattr(jax.distributed, 'initialize', None)  # Not to be called.
  hosts.start()
  hosts.start('localhost:1', 1, 0)
  assert hosts.count() == 1 and hosts.first()
  assert hosts.agreed(lambda: {'a': 1}) == {'a': 1}
  assert hosts.in_turn(lambda: 'made') == 'made'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('host:1', None, None), r'--coordinator=host:1 --processes=\? --proc'),
    (('', 2, 0), r'--coordinator=\? --processes=2 --process=0: several'),
    (('host:1', 2, 2), '--process=2 is none of --processes=2; .* from 0 to 1'),
  ],
)
def test_half_an_address_is_refused(monkeypatch, flags, message):
  monkeypatch.setattr(jax.distributed, 'initialize', None)
  with pytest.raises(ValueError, match=message):
    hosts.start(*flags)


def test_the_environment_names_them(monkeypatch):
  given = []
  initialize = lambda *args, **_: given.append(args)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(hosts._Watch, 'begin', lambda self: None)
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'host:1')
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  monkeypatch.setenv('JAX_PROCESS_ID', '1')
  hosts.start()
  hosts.start('other:1', 3, 2)
  assert given == [('host:1', 2, 1), ('other:1', 3, 2)]


def test_a_node_with_one_task_uses_all_its_gpus():
  of = lambda tasks: hosts._local_devices(
    {'SLURM_GPUS_ON_NODE': '4', 'SLURM_STEP_TASKS_PER_NODE': tasks}
  )
  assert of('1(x2)') == of('1') == [0, 1, 2, 3]
  assert of('4(x2)') is None and of('16') is None
  assert hosts._local_devices({}) is None


@pytest.mark.parametrize(
  'mesh', [dict(data=8), dict(fsdp=2, expert=2, model=2), dict(model=8)]
)
def test_rows_and_where_they_go(mesh):
  """Every device gets its rows of a batch of 16 from what its host holds."""
  split = sharding.batch_sharding(sharding.make_mesh(**mesh))
  assert hosts.rows(split, 16) == list(range(16))
  batch = {'a': np.arange(32).reshape(16, 2), 'b': np.arange(16)}
  for found in (
    hosts.spread(batch, split, range(16), 16),
    hosts.spread_whole(batch, split),
  ):
    for name, array in batch.items():
      np.testing.assert_array_equal(found[name], array)
      assert found[name].sharding.is_equivalent_to(split, array.ndim)


def test_a_host_that_holds_rows_apart(monkeypatch):
  """Devices 1, 2 and 6 are its own: rows 2-5 and 12-13 of 16."""
  split = sharding.batch_sharding(sharding.make_mesh(data=8))
  mine = [jax.devices()[n] for n in (1, 2, 6)]
  whole = type(split).addressable_devices_indices_map

  def own(self, shape):
    return {d: i for d, i in whole(self, shape).items() if d in mine}

  monkeypatch.setattr(type(split), 'addressable_devices_indices_map', own)
  assert hosts.rows(split, 16) == [2, 3, 4, 5, 12, 13]


# Whole runs.


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


class Team:
  """Processes that run one command together."""

  def __init__(self, folder, verb, *flags, processes: int, devices: int):
    env = dict(
      os.environ,
      XLA_FLAGS=f'--xla_force_host_platform_device_count={devices} {IN_HASTE}',
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
    # Gloo's threads write over each other.
    ours = lambda line: not re.search(r'^[WEI]\d{4} |Gloo|peer ranks|^$', line)
    return [
      '\n'.join(filter(ours, log.read_text().splitlines()))
      for log in self._logs
    ]


def _train(folder, workdir, *flags, processes, devices) -> Team:
  return Team(
    folder,
    'train',
    f'--config={folder}/config.py',
    f'--workdir={workdir}',
    *flags,
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
  """The workdir of one process with four devices, 100 steps."""
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
  stopped = _checkpoints(workdir)[-1]
  assert 3 <= stopped < 80
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
  assert f'{stopped} of 100 steps done' in first
  assert first.splitlines()[-1].startswith(
    'st-moe: process 0 of 2 stops: process 1 has died'
  )
  assert 'Traceback' not in first

  # One process goes on with what two have saved.
  team = _train(folder, workdir, processes=1, devices=4)
  assert team.wait() == [0], team.said()
  (last,) = team.said()
  assert f'{later} of 100 steps done' in last or f'{later + 10} of 100' in last
  _same_run(_rows(workdir), _rows(alone))


@pytest.mark.slow
def test_four_processes_lose_no_bit(folder, alone):
  """Four with a device each; two and two of them read the same rows."""
  flags = ['--config.mesh.fsdp=1', '--config.mesh.model=2']
  start = lambda name: _train(
    folder, folder / name, *flags, processes=4, devices=1
  )
  team = start('four')
  assert team.wait() == [0] * 4, team.said()
  assert team.said()[1:] == [''] * 3
  _same_run(_rows(folder / 'four'), _rows(alone))

  broken = folder / 'four-broken'
  team = start('four-broken')
  team.wait_for(lambda: 10 in _checkpoints(broken))
  team.all[0].kill()  # The one that all others are connected to.
  killed = time.monotonic()
  assert 0 not in team.wait(60), team.said()
  assert time.monotonic() - killed < hosts.SILENCE
  for i, text in enumerate(team.said()[1:], 1):
    # XLA hears of this death, and of no other, at the same moment.
    message = f'st-moe: process {i} of 4 stops: process 0 has died'
    assert message in text or 'another task died' in text
  team = start('four-broken')
  team.wait_for(lambda: 20 in _checkpoints(broken))
  team.all[2].kill()
  assert team.wait(60) == [1, 1, -9, 1], team.said()
  for i, text in enumerate(team.said()):
    message = f'st-moe: process {i} of 4 stops: process 2 has died'
    assert i == 2 or text.splitlines()[-1].startswith(message)
  team = start('four-broken')
  team.wait_for(lambda: 30 in _checkpoints(broken))
  team.all[0].send_signal(signal.SIGTERM)
  assert team.wait(60) == [75] * 4, team.said()
  team = start('four-broken')
  assert team.wait() == [0] * 4, team.said()
  assert _rows(broken) == _rows(folder / 'four')
  jax.tree.map(
    np.testing.assert_array_equal,
    st_moe.load(broken).params,
    st_moe.load(folder / 'four').params,
  )


@pytest.mark.slow
def test_two_processes_evaluate_as_one(folder, alone):
  def evaluate(name, **team):
    team = Team(
      folder,
      'evaluate',
      f'--checkpoint={alone}',
      '--mixture=numbers,squares,tiny_copa',
      '--config.evaluate.batches=4',
      f'--output={folder}/{name}',
      **team,
    )
    codes = team.wait()
    assert set(codes) == {0}, team.said()
    to = folder / name
    found = json.loads((to / 'metrics.json').read_text())['metrics']
    rows = (to / 'predictions-tiny_copa.jsonl').read_text().splitlines()
    return found, [json.loads(row) for row in rows], team.said()

  found, rows, _ = evaluate('by-two', processes=2, devices=2)
  expected, answers, (said,) = evaluate('by-one', processes=1, devices=1)
  assert found == pytest.approx(expected, rel=2e-5)
  assert len(rows) == len(answers) == 64  # 32 questions, in two ways.
  for row, answer in zip(rows, answers, strict=True):
    score = row.pop('score'), answer.pop('score')
    assert score[0] == pytest.approx(score[1], rel=2e-5)
    assert row == answer
  assert 'wrote' in said
