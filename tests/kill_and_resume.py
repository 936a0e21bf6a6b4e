"""Kills a training run again and again; it must end as if nothing happened.

  python -m tests.kill_and_resume --kills=20 --directory=/tmp/kills

An unbroken run is timed first. Then the same command is started, and killed by
SIGKILL at a moment drawn uniformly over that time, start-up and checkpoint
writing included; and again, until it was killed so often and then ended by
itself. A start that follows one killed before its first new checkpoint is let
past one, so that the run gets on. The final parameters must be bit-equal.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np


def command(workdir, config: str, flags: list[str]) -> list[str]:
  return [
    sys.executable, '-m', 'st_moe.cli', 'train', f'--config={config}',
    f'--workdir={workdir}', *flags,
  ]  # fmt: skip


def newest(workdir: pathlib.Path) -> int:
  """The last finished checkpoint; 0 if there is none."""
  steps = [p.name for p in (workdir / 'checkpoints').glob('[0-9]*')]
  return max((int(s) for s in steps if s.isdigit()), default=0)


def _start(arguments, log):
  return subprocess.Popen(
    arguments, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
  )


def run(directory, *, kills: int, config: str, flags: list[str], seed: int = 0):
  """Returns the moments of the kills: (seconds after the start, phase)."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  whole, broken = directory / 'unbroken', directory / 'broken'
  moments, rng, must_pass = [], random.Random(seed), False
  with (directory / 'log.txt').open('w') as log:
    started = time.monotonic()
    if _start(command(whole, config, flags), log).wait():
      raise RuntimeError(f'The unbroken run failed; see {directory}/log.txt.')
    wall = time.monotonic() - started
    print(f'unbroken run: {wall:.1f} s', flush=True)
    while len(moments) < kills:
      before = newest(broken)
      process = _start(command(broken, config, flags), log)
      started, wait = time.monotonic(), rng.uniform(0, wall)
      while process.poll() is None:
        seconds = time.monotonic() - started
        if seconds >= wait and (not must_pass or newest(broken) > before):
          break
        time.sleep(0.005)
      if process.poll() is not None:
        if process.returncode:
          raise RuntimeError(f'A start failed; see {directory}/log.txt.')
        break  # It came to its end before its time.
      seconds = time.monotonic() - started
      writing = [p.name for p in (broken / 'checkpoints').glob('*tmp*')]
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      after = newest(broken)
      must_pass = after == before
      phase = 'writing' if writing else 'start-up' if must_pass else 'training'
      moments.append((seconds, phase))
      print(
        f'kill {len(moments)} after {seconds:.2f} s, {phase}; checkpoint'
        f' {before} -> {after}',
        flush=True,
      )
    if len(moments) < kills:
      raise RuntimeError(
        f'The run ended after {len(moments)} kills; give it more steps.'
      )
    if _start(command(broken, config, flags), log).wait():
      raise RuntimeError(f'The last start failed; see {directory}/log.txt.')
  return moments


def differences(directory) -> list[str]:
  """Names of the final parameters that are not bit-equal."""
  import jax

  from st_moe.infer.load import load

  both = [load(pathlib.Path(directory) / d) for d in ('unbroken', 'broken')]
  if both[0].step != both[1].step:
    return [f'step {both[0].step} and {both[1].step}']
  a, b = (jax.tree_util.tree_leaves_with_path(x.params) for x in both)
  return [
    jax.tree_util.keystr(path)
    for (path, x), (_, y) in zip(a, b, strict=True)
    if np.asarray(x).tobytes() != np.asarray(y).tobytes()
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--directory', required=True)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--config', default='configs/st_moe_tiny.py:runlocal')
  parser.add_argument('--steps', type=int, default=600)
  arguments = parser.parse_args()
  flags = [
    f'--config.total_steps={arguments.steps}',
    '--config.checkpoint.every=4',
    '--config.evaluate.every=100',
    '--config.data.vocabulary_size=1500',
  ]
  moments = run(
    arguments.directory,
    kills=arguments.kills,
    config=arguments.config,
    flags=flags,
    seed=arguments.seed,
  )
  phases = [phase for _, phase in moments]
  counts = {p: phases.count(p) for p in sorted(set(phases))}
  different = differences(arguments.directory)
  print(f'{len(moments)} kills: {counts}; different parameters: {different}')
  sys.exit(bool(different))


if __name__ == '__main__':
  main()
