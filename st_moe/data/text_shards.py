"""Text as shards: int32 tokens of raw chunks, to be corrupted when read.

Chunks are cut before corruption, so that every epoch can take out other spans.
"""

import collections
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from st_moe.data import shards, sources
from st_moe.data.vocabulary import Vocabulary

# A last chunk shorter than this is dropped: mostly padding, it costs a row of
# the batch like any other.
SHORTEST_CHUNK = 32

_PART_BYTES = 8 << 20  # Text per part, where that makes few enough parts.
_MOST_PARTS = 256  # Roughly: each open part holds a file descriptor.
_MOST_READS = 16  # Workers that share one file each read it whole.
_GZIP_RATIO = 3


def write_text(
  name: str,
  split: str,
  patterns: str | Sequence[str],
  *,
  vocabulary: Vocabulary,
  raw_tokens: int,
  text_field: str = 'text',
  cache_dir: str = '',
  workers: int = 1,
  progress: shards.Progress | None = None,
) -> shards.Shards:
  """Cuts documents into chunks of `raw_tokens`, unless that was done before.

  Documents follow each other without a gap or a mark, as in T5: an EOS between
  them would get into targets, and end what a model says. A chunk may begin and
  end anywhere. `patterns` may also be the embedded corpus of a split,
  '`sources.EMBEDDED`:train'.
  """
  embedded = f'{sources.EMBEDDED}:{split}'
  paths = [embedded] if patterns == embedded else sources.expand(patterns)
  stamps = [sources.stamp(path) for path in paths]
  recipe = {
    'name': name,
    'split': split,
    'files': stamps,
    'text_field': text_field,
    'raw_tokens': raw_tokens,
    'vocabulary': vocabulary.fingerprint,
  }
  jobs = [
    functools.partial(
      _chunks,
      paths=some,
      start=start,
      step=step,
      text_field=text_field,
      vocabulary=vocabulary,
      raw_tokens=raw_tokens,
    )
    for some, start, step in plan([stamp[:2] for stamp in stamps])
  ]
  return shards.write(
    recipe, jobs, cache_dir=cache_dir, workers=workers, progress=progress
  )


def plan(
  sizes: Sequence[tuple[str, int]],
) -> list[tuple[tuple[str, ...], int, int]]:
  """(files, first document, step) of each part, from the files and sizes.

  Small files share a part, large files make several.
  """
  sizes = [(p, n * _GZIP_RATIO if p.endswith('.gz') else n) for p, n in sizes]
  most = max(_PART_BYTES, sum(n for _, n in sizes) // _MOST_PARTS)
  parts, together, room = [], [], most
  for path, size in sizes:
    if size > room and together:
      parts.append((tuple(together), 0, 1))
      together, room = [], most
    if size > most:
      step = min(-(-size // most), _MOST_READS)
      parts += [((path,), start, step) for start in range(step)]
    else:
      together.append(path)
      room -= size
  return parts + ([(tuple(together), 0, 1)] if together else [])


def _chunks(
  counts: collections.Counter,
  *,
  paths: Iterable[str],
  start: int,
  step: int,
  text_field: str,
  vocabulary: Vocabulary,
  raw_tokens: int,
) -> Iterator[bytes]:
  """The raw chunks of one part."""
  held = []  # Tokens on their way into a chunk.
  for path in paths:
    for text in sources.documents_of(path, text_field, start=start, step=step):
      ids = vocabulary.encode(text)
      held += ids
      counts['documents'] += 1
      counts['tokens'] += len(ids)
      whole = len(held) // raw_tokens * raw_tokens
      for at in range(0, whole, raw_tokens):
        yield np.array(held[at : at + raw_tokens], '<i4').tobytes()
      del held[:whole]
  if len(held) >= min(SHORTEST_CHUNK, raw_tokens):
    yield np.array(held, '<i4').tobytes()


def tokens_of(record: bytes) -> np.ndarray:
  """The raw chunk of a record."""
  return np.frombuffer(record, '<i4')
