"""Kills training runs again and again; they must end as if nothing happened.

  python -m tests.kill_and_resume --kills=20 --directory=/tmp/kills

An unbroken run is timed first. Then the same command is started elsewhere and
killed by SIGKILL at a moment drawn uniformly over that time: start-up, writing
of checkpoints and finalising included. It is started again, killed again, and
so on; a start that follows one killed before its first new checkpoint is let
past one. A run that ends before its next kill is compared with the unbroken
one, bit by bit, and the rest of the kills fall on the next run.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np


@dataclasses.dataclass
class Kill:
  run: int  # Which of the broken runs.
  seconds: float  # After the start.
  phase: str
  before: int  # The newest checkpoint at the start,
  after: int  # and at the end.


def command(workdir, config: str, flags: list[str]) -> list[str]:
  return [
    sys.executable, '-m', 'st_moe.cli', 'train', f'--config={config}',
    f'--workdir={workdir}', *flags,
  ]  # fmt: skip


def newest(workdir: pathlib.Path) -> int:
  """The last finished checkpoint; 0 if there is none."""
  steps = [p.name for p in (workdir / 'checkpoints').glob('[0-9]*')]
  return max((int(s) for s in steps if s.isdigit()), default=0)


def run(directory, *, kills: int, config: str, flags: list[str], seed: int = 0):
  """Returns the kills, and the broken runs which must equal 'unbroken'."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  # Compiled and tokenised once, so that the timed run starts as the others do.
  env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(directory / 'compiled'))
  flags = [*flags, f'--config.data.cache_dir={directory}/shards']
  found, ended, rng, must_pass = [], [], random.Random(seed), False
  with (directory / 'log.txt').open('w') as log:

    def start(name):
      return subprocess.Popen(
        command(directory / name, config, flags),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=env,
      )

    for name in ('first', 'unbroken'):
      started = time.monotonic()
      if start(name).wait():
        raise RuntimeError(f'{name} failed; see {directory}/log.txt.')
      wall = time.monotonic() - started
    print(f'unbroken run: {wall:.1f} s', flush=True)

    while True:
      name = f'broken-{len(ended)}'
      before = newest(directory / name)
      left = kills - len(found)
      process, started = start(name), time.monotonic()
      wait = rng.uniform(0, wall) if left else float('inf')
      while process.poll() is None:
        seconds = time.monotonic() - started
        passed = newest(directory / name) > before
        if seconds >= wait and (passed or not must_pass):
          break
        time.sleep(0.005)
      if process.poll() is not None:
        if process.returncode:
          raise RuntimeError(f'A start failed; see {directory}/log.txt.')
        ended.append(directory / name)
        must_pass = False
        if not left:
          return found, ended
        continue
      seconds = time.monotonic() - started
      writing = any((directory / name / 'checkpoints').glob('*tmp*'))
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      after = newest(directory / name)
      must_pass = after == before
      phase = 'writing' if writing else 'start-up' if must_pass else 'training'
      found.append(Kill(len(ended), seconds, phase, before, after))
      print(f'{len(found)}: {found[-1]}', flush=True)


def differences(one, other) -> list[str]:
  """Names of the final parameters of two runs that are not bit-equal."""
  import jax

  from st_moe.infer.load import load

  both = load(one), load(other)
  if both[0].step != both[1].step:
    return [f'step {both[0].step} and {both[1].step}']
  a, b = (jax.tree_util.tree_leaves_with_path(x.params) for x in both)
  return [
    jax.tree_util.keystr(path)
    for (path, x), (_, y) in zip(a, b, strict=True)
    if np.asarray(x).tobytes() != np.asarray(y).tobytes()
  ]


def flags_for(steps: int) -> list[str]:
  """Of a run that is short and nearly always near a checkpoint."""
  return [
    f'--config.total_steps={steps}',
    '--config.checkpoint.every=4',
    f'--config.evaluate.every={steps // 2}',
    '--config.data.vocabulary_size=1500',
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--directory', required=True)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--config', default='configs/st_moe_tiny.py:runlocal')
  parser.add_argument('--steps', type=int, default=200)
  arguments = parser.parse_args()
  kills, runs = run(
    arguments.directory,
    kills=arguments.kills,
    config=arguments.config,
    flags=flags_for(arguments.steps),
    seed=arguments.seed,
  )
  phases = [kill.phase for kill in kills]
  counts = {p: phases.count(p) for p in sorted(set(phases))}
  unbroken = pathlib.Path(arguments.directory) / 'unbroken'
  different = [name for r in runs for name in differences(unbroken, r)]
  print(
    f'{len(kills)} kills in {len(runs)} runs: {counts}; parameters that'
    f' differ: {different or "none"}'
  )
  sys.exit(bool(different))


if __name__ == '__main__':
  main()
