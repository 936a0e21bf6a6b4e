"""HuggingFace datasets, wherever a file of rows may stand.

`hf:NAME:SPLIT` or `hf:NAME/CONFIG:SPLIT`, as in
'hf:Salesforce/wikitext/wikitext-2-raw-v1:train'; NAME may be a local directory,
SPLIT a slice: 'train[:10%]'. Needs the extra `datasets`.
"""

import functools
import re
from collections.abc import Iterator

from etils import epath

_PREFIX = 'hf:'


def is_one(path) -> bool:
  return str(path).startswith(_PREFIX)


def rows(path: str) -> Iterator[tuple[str, dict]]:
  """(place, row) of each row."""
  for number, row in enumerate(_load(path), 1):
    yield f'row {number}', row


def stamp(path: str) -> list:
  """What changes when the dataset does."""
  _load.cache_clear()  # A local one may have changed since it was read.
  found = _load(path)
  return [path, found.dataset_size or 0, found._fingerprint]


@functools.lru_cache(maxsize=4)
def _load(path: str):
  """The dataset.

  Raises:
    ValueError: no such dataset, configuration or split; the extra is missing.
  """
  # Of the colons outside of brackets the last one.
  parts = re.fullmatch(
    r'(.+):((?:[^:\[\]]|\[[^\]]*\])+)', path.removeprefix(_PREFIX)
  )
  if not parts:
    raise ValueError(f'{path}: write hf:NAME:SPLIT or hf:NAME/CONFIG:SPLIT.')
  name, split = parts.groups()
  try:
    import datasets
  except ImportError:
    raise ValueError(
      f"{path} needs another package: pip install 'st_moe[datasets]'"
    ) from None
  readings, wrong = [(name,)], None
  if '/' in name and not epath.Path(name).exists():
    # 'a/b' may be a dataset of somebody, or a configuration of 'a'.
    parent, _, config = name.rpartition('/')
    readings.append((parent, config))
  for reading in readings:
    try:
      return datasets.load_dataset(*reading, split=split)
    except Exception as e:  # Of many kinds; the last one tells most.
      wrong = e
  line = (str(wrong).strip() or repr(wrong)).splitlines()[0]
  raise ValueError(f'{path} cannot be loaded: {line}')
