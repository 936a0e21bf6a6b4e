"""Mixtures of text and tasks -> batches.

Training batch n is a function of (config, n): any batch can be had without
those before it, on any number of hosts, and a run that starts again reads what
it would have read. Text is corrupted as it is read, by (seed, position in the
stream of its source), so each epoch takes out other spans.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from st_moe.data.mixture import Library
from st_moe.data.rows import Batch, Convert, stack
from st_moe.data.shards import Shards

# Raise it when batch n of a config becomes another: runs that go on are told.
BATCHES = 2


class TrainData:
  """The training stream, in batches that can be asked for in any order.

  Of each global batch a host reads the `rows` of its own devices (None: all);
  what a row is does not depend on who reads it.
  """

  def __init__(self, library: Library, *, rows: Sequence[int] | None = None):
    import grain

    config = library.config
    opened = {name: library.open(name, 'train') for name in library.sources()}
    self.info = {name: found.summary for name, found in opened.items()}
    # Of what is read, and not of where it lies.
    self.digests = {name: found.digest for name, found in opened.items()}
    # What a reader of its losses should know, a line each.
    self.notes = [
      line for x in opened.values() for line in _checked(x, config.allow_cut)
    ]
    found = library.rates({name: len(found) for name, found in opened.items()})
    self.sources = tuple(opened)
    self.rates = tuple(found[n] / sum(found.values()) for n in self.sources)
    self._size, self._seed = config.batch_size, _seed(config.seed, 'rows')
    self._rows = range(self._size) if rows is None else rows

    streams = []
    for index, (name, records) in enumerate(opened.items()):
      convert = Convert(library, library.is_text(name), index)
      streams.append(
        grain.MapDataset.source(records)
        # Both look at the position in the endless stream, not in the epoch.
        .shuffle(seed=_seed(config.seed, name, 'order'))
        .repeat()
        .random_map(convert, seed=_seed(config.seed, name, 'noise'))
      )
    self._examples = grain.MapDataset.mix(streams, self.rates)

  def batch(self, n: int) -> Batch:
    """This host's rows of global batch `n`."""
    # A mixture is an interleaving with a period: left as it is, a source would
    # have the same rows for ever, hence the same devices and turns at experts.
    order = np.random.default_rng([self._seed, n]).permutation(self._size)
    numbers = n * self._size + order
    return stack([self._examples[numbers[row]] for row in self._rows])

  def iterate(self, start: int = 0, *, threads: int = 4) -> Iterator[Batch]:
    """batch(start), batch(start + 1), ... without end, made ahead of use."""
    import grain

    batches = grain.MapDataset.range(start, sys.maxsize).map(self.batch)
    options = grain.ReadOptions(threads, 2 * threads)
    # `yield from` closes it, threads and all, when the caller stops early.
    yield from iter(batches.to_iter_dataset(options))


def prepare(
  library: Library,
  *,
  splits: Sequence[str] = ('train', 'validation'),
  note: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, dict[str, int]]]:
  """Writes every shard of a mixture; returns counts by source and split.

  Args:
    note: told what is cut, a line each.

  Raises:
    ValueError: as of `Library.check`, or more targets are cut than
      `data.allow_cut`.
  """
  wanted = {
    name: [split for split in splits if split in library.splits(name)]
    for name in library.sources()
  }
  library.check()
  for name, there in wanted.items():
    library.check_files(name, there)
  counts = {name: {} for name in wanted}
  for name, there in wanted.items():
    for split in there:
      found = library.open(name, split)
      lines = found.cut.values()
      if split == 'train':
        lines = _checked(found, library.config.allow_cut)
      for line in lines:
        note(line)
      counts[name][split] = found.summary
  return counts


def _checked(found: Shards, allow_cut: float) -> list[str]:
  """What is cut; raises if too many targets to learn from are."""
  lines = found.cut
  share = found.info.get('cut_targets', 0) / found.info['records']
  if share > allow_cut:
    allowed = math.ceil(share * 1000) / 1000
    raise ValueError(
      f'{lines["targets"]} A model would learn to stop there: set'
      f' data.targets_length={found.info["longest_targets"]}, or'
      f' data.allow_cut={allowed} to train on them as they are.'
    )
  return list(lines.values())


def _seed(seed: int, *names: str) -> int:
  """32 bits that no two streams share; Grain takes no more."""
  text = '/'.join([str(seed), *names])
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'little')
