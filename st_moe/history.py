"""What a run has found so far: the rows of its metrics.jsonl."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable

from etils import epath

from st_moe.data import files

METRICS = 'metrics.jsonl'


class Rows:
  """metrics.jsonl; numbered parts beside it where nothing can be appended to.

  Rows past `start` are of a run that was cut off before its next checkpoint:
  they will be written again, so they go first. What is no row of numbers goes
  to damaged/metrics.jsonl. Rows that cannot be written wait until they can.
  """

  def __init__(
    self,
    workdir: epath.Path,
    *,
    start: int,
    note: Callable[[str], None] = lambda text: None,
  ):
    self._appends = not files.is_remote(workdir)
    self._workdir, self._part = workdir, 0
    self._note, self._stuck = note, False
    rows, broken = _read(workdir)
    if broken:
      aside = workdir / 'damaged' / METRICS
      lines = aside.read_bytes() if aside.exists() else b''
      lines += b''.join(line + b'\n' for _, _, line in broken)
      files.write_whole(aside, lines)
      note(f'{_where(broken)}: moved to {aside}.')
    kept = [r for r in rows if r['step'] <= start]
    old = set(workdir.glob('metrics*.jsonl'))
    # In one file, and whole before the others go: it may be killed here too.
    self._buffer: list[str] = [files.as_json(r) for r in kept]
    if kept or self._appends:
      path = self._next()
      files.write_whole(path, self._text())
      self._written()
      old.discard(path)
    for path in old:
      path.unlink()

  def _next(self) -> epath.Path:
    """The file that takes the next rows."""
    parts = f'metrics-{self._part:05d}.jsonl'
    return self._workdir / (METRICS if self._appends else parts)

  def _text(self) -> bytes:
    """The rows that wait."""
    return ''.join(f'{line}\n' for line in self._buffer).encode()

  def _written(self) -> None:
    """They do not wait any more."""
    self._buffer.clear()
    self._part += 1

  def write(self, row: dict):
    self._buffer.append(files.as_json(row))
    if self._appends or len(self._buffer) >= 100:
      self.flush()

  def flush(self):
    if not self._buffer:
      return
    try:
      put = _append if self._appends else epath.Path.write_bytes
      put(self._next(), self._text())
    except Exception as e:  # A full disk, a store that does not answer.
      if not self._stuck:
        self._note(f'Going on without {self._next()}, until it works: {e}')
      self._stuck = True
    else:
      self._stuck = False
      self._written()


def _append(path: epath.Path, data: bytes) -> None:
  """All of `data` at the end of a local file, or none of it."""
  with open(path, 'ab', buffering=0) as f:
    end = f.seek(0, os.SEEK_END)
    try:
      while data:
        data = data[f.write(data) :]
    except OSError:
      with contextlib.suppress(OSError):
        f.truncate(end)
      raise


def read_rows(workdir) -> list[dict]:
  """All rows of a run, in order.

  What is no row of numbers is left out and warned of; a last one cut short is
  that of a run which was killed, and nobody has to know.
  """
  rows, broken = _read(workdir)
  if broken:
    logging.getLogger('st_moe').warning('%s: left out.', _where(broken))
  return rows


def measured(workdir) -> dict[int, dict]:
  """Step -> what its evaluation found, of those there were."""
  return {r['step']: r for r in read_rows(workdir) if 'loss' not in r}


def _read(workdir) -> tuple[list[dict], list[tuple[epath.Path, int, bytes]]]:
  """Rows, and (file, number, line) of all other lines."""
  rows, broken = [], []
  for path in sorted(epath.Path(workdir).glob('metrics*.jsonl')):
    if path.is_dir():
      raise ValueError(
        f'{path} is a folder, where a run keeps a file: move it away.'
      )
    lines = path.read_bytes().split(b'\n')  # The last one has no end.
    for number, line in enumerate(lines, 1):
      if row := _row(line):
        rows.append(row)
      elif line.strip() and number < len(lines):
        broken.append((path, number, line))
  return rows, broken


def _row(line: bytes) -> dict | None:
  try:
    row = json.loads(line.decode())
  except ValueError:
    return None
  return row if isinstance(row, dict) and type(row.get('step')) is int else None


def _where(broken) -> str:
  path, number, _ = broken[0]
  more = f' and {len(broken) - 1} more' if broken[1:] else ''
  return f'{path}, line {number}{more}: no row of numbers'


def best_steps(by_step: dict[int, dict]) -> dict[str, tuple[int, float]]:
  """Metric -> the step at which it was best, and how good.

  The highest, of losses the lowest; the earliest of equals. What only counts
  examples or is the same at every step is left out.
  """
  found = {}
  for step, metrics in sorted(by_step.items()):
    for name, value in metrics.items():
      last = name.rpartition('/')[2]
      if last.startswith('majority_') or last == 'examples':
        continue
      if not math.isfinite(value):
        continue
      sign = -1 if last == 'loss' else 1
      if name not in found or sign * value > sign * found[name][1]:
        found[name] = step, value
  return found
