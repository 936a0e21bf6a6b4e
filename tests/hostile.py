"""Broken and hostile files: each ends in a sentence, and nothing of it is run.

  python -m tests.hostile --output=runs/hostile.jsonl

A case is an input as people have it (checkpoints of five codes, vocabularies,
archives, texts, shards), changed with a fixed seed, and the command that reads
it: cut off, bits turned over, headers that claim what is not so, words of a
config that mean nothing, links and devices in place of files, code beside them.

A case passes where the command refuses it in a sentence, without a trace, or
where the change turns out to have changed nothing: what is made of the input is
bit for bit what is made of the whole one. The latter is no mutation and counted
apart. It fails where something else is made of it ('accepted'), with a trace,
where the process dies or takes over 60 s or 2 GB beyond the size of its files,
and where code that lay there was run.

Formats that keep no checksum (the numbers in safetensors, in the arrays of T5X,
the letters of a text) cannot tell a bit that was turned over; no such bit is
turned over here.

Each case ends as a line of JSON; those in the file already are not run again.
The exit status is 1 where a case fails.
"""

import argparse
import collections
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time
import traceback

from tests import hostile_bases
from tests.hostile_bases import Bases, Case, build
from tests.hostile_cases import table

SECONDS, BYTES = 60, 2 << 30
PASSED = ('refused', 'unchanged')
# Files that Python would run if it came by; beside every input.
MODULES = ('jax', 'json', 'numpy', 'config', 'sitecustomize', 'wandb', 'flax')


def tried(
  case: Case, bases: Bases, folder: pathlib.Path, seed: int = 0
) -> dict:
  """The outcome of a case, written to the empty `folder`."""
  rng = random.Random(f'{seed}/{case}')
  attempt = case.make(bases, folder, rng)
  for name in MODULES:
    bait = f'import os\nos.mkdir({str(folder / "canary")!r})\n'
    (folder / f'{name}.py').write_text(bait)
  size = sum(p.stat().st_blocks * 512 for p in folder.rglob('*') if p.is_file())
  before, here, path = _memory(peak=False), os.getcwd(), [*sys.path]
  start = time.monotonic()
  os.chdir(folder)
  try:
    status, said = hostile_bases.run(attempt.command)
  finally:
    os.chdir(here)
    sys.path[:] = path
  seconds = time.monotonic() - start
  grown = _memory(peak=True) - before
  outcome = 'refused'
  if 'Traceback' in said or status not in (0, 1):
    outcome = 'a trace'
  elif status == 0:
    whole = attempt.whole and bases.made(attempt.whole)
    try:
      outcome = 'unchanged' if attempt.made() == whole else 'accepted'
    except ValueError as e:  # Told when it is read, as by a run.
      said = f'st-moe: {e}'
  elif 'st-moe: ' not in said:
    outcome = 'no sentence'
  if (folder / 'canary').exists():
    outcome = 'executed'
  if attempt.never and attempt.never.exists():
    outcome = 'wrote elsewhere'
  if seconds > SECONDS or grown > BYTES + 8 * size:
    outcome = 'too much'
  return {
    'outcome': outcome,
    'passed': outcome in PASSED,
    'seconds': round(seconds, 2),
    'grown': grown,
    'said': said[-600:],
  }


def _memory(*, peak: bool) -> int:
  """Bytes held now; or at most since this was last asked for without `peak`."""
  if not peak:
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  name = 'VmHWM' if peak else 'VmRSS'
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  (line,) = (line for line in lines if line.startswith(name))
  return int(line.split()[1]) << 10


def _work(pipe, root: str, seed: int) -> None:
  """A process that tries the cases it is sent by number."""
  bases = Bases(pathlib.Path(root))
  while (number := pipe.recv()) is not None:
    with tempfile.TemporaryDirectory(dir=root) as folder:
      place = pathlib.Path(folder).resolve()
      try:
        found = tried(table()[number], bases, place, seed)
      except Exception:
        said = traceback.format_exc()[-600:]
        found = {'outcome': 'a trace', 'passed': False, 'said': said}
    pipe.send(found)


class _Worker:
  """A process for one case after another, and a new one where it dies."""

  def __init__(self, root: pathlib.Path, seed: int):
    self._arguments = str(root), seed
    self._process = None

  def try_(self, number: int) -> dict:
    if self._process is None:
      context = multiprocessing.get_context('spawn')
      self._pipe, theirs = context.Pipe()
      self._process = context.Process(
        target=_work, args=(theirs, *self._arguments), daemon=True
      )
      self._process.start()
      theirs.close()
    self._pipe.send(number)
    try:
      if self._pipe.poll(SECONDS + 40):  # To start, and to make the case.
        return self._pipe.recv()
      outcome = 'no end'
    except EOFError:
      outcome = 'died'
    self._process.kill()
    self._process.join()
    self._process = None
    return {'outcome': outcome, 'passed': False, 'said': ''}

  def close(self):
    if self._process:
      self._pipe.send(None)
      self._process.join()


def _read(path: pathlib.Path) -> dict[str, dict]:
  """What was found before; a line that a kill cut short leaves the file."""
  if not path.exists():
    return {}
  whole = path.read_text().rpartition('\n')[0]
  path.write_text(whole and f'{whole}\n')
  return {row['case']: row for row in map(json.loads, whole.splitlines())}


def _show(found: dict[Case, dict]) -> None:
  from rich.table import Table

  from st_moe import terminal

  console = terminal.console()
  kinds = collections.defaultdict(list)
  for case, row in found.items():
    kinds[case.kind].append(row)
  shown = Table(
    'input',
    'mutations',
    'refused',
    'failed',
    'unchanged',
    'longest s',
    'most MB',
  )
  for kind, rows in (*kinds.items(), ('all', [*found.values()])):
    count = collections.Counter(row['outcome'] for row in rows)
    shown.add_row(
      kind,
      f'{len(rows) - count["unchanged"]}',
      f'{count["refused"]}',
      f'{sum(not row["passed"] for row in rows)}',
      f'{count["unchanged"]}',
      f'{max(row.get("seconds", 0) for row in rows):.1f}',
      f'{max(row.get("grown", 0) for row in rows) / 1e6:.0f}',
    )
  console.print(shown)
  for case, row in found.items():
    if not row['passed']:
      console.print(f'{case}: {row["outcome"]}', soft_wrap=True)


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', default='', help='part of the names of cases')
  flags = parser.parse_args(arguments)
  from rich.progress import track

  flags.output.parent.mkdir(parents=True, exist_ok=True)
  done = _read(flags.output)
  with tempfile.TemporaryDirectory() as root, flags.output.open('a') as out:
    cases = [c for c in table() if flags.only in str(c)]
    left = [case for case in cases if str(case) not in done]
    if left:
      build(pathlib.Path(root).resolve())
    worker = _Worker(pathlib.Path(root).resolve(), flags.seed)
    for case in track(left, 'cases'):
      row = {'case': str(case), **worker.try_(table().index(case))}
      done[str(case)] = row
      out.write(json.dumps(row) + '\n')
      out.flush()
    worker.close()
  found = {case: done[str(case)] for case in cases}
  _show(found)
  return int(not all(row['passed'] for row in found.values()))


if __name__ == '__main__':
  os.environ['JAX_PLATFORMS'] = 'cpu'
  sys.exit(main())
