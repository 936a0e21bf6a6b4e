"""Things of like lengths in batches of few shapes, each compiled once."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def bucket(n: int, least: int = 16) -> int:
  """The next of least * (1, 1.5, 2, 3, 4, 6, 8, ...).

  A third is padding at most, and lengths up to 512 have eleven shapes.

  Args:
    least: a power of two.
  """
  size = least
  while size < n:  # From 1 to 2.
    size = size * 4 // 3 if size & (size - 1) else -(-size * 3 // 2)
  return size


def padded(rows: Iterable[Sequence[int]], length: int) -> np.ndarray:
  """int32 [rows, length], 0 behind each row."""
  rows = list(rows)
  out = np.zeros((len(rows), length), np.int32)
  for to, row in zip(out, rows, strict=True):
    to[: len(row)] = row
  return out


def chunks(things: Sequence, size: int) -> Iterator[Sequence]:
  for start in range(0, len(things), size):
    yield things[start : start + size]
