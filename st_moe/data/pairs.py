"""A user's own pairs of texts as tasks, without a line of code.

`data.pairs.NAME` has globs of rows by split, and may say which of their fields
are inputs and targets, which answers there are, and what is measured.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping

from st_moe.data import metrics, sources
from st_moe.data.task import (
  UNKNOWN,
  Example,
  Row,
  TextTask,
  label_text,
  take,
  untold,
)
from st_moe.fields import unknown

_SPLITS = ('train', 'validation', 'test')
_SETTINGS = ('inputs', 'targets', 'labels', 'metrics')
METRICS = {'accuracy': metrics.accuracy, 'rouge': metrics.rouge}


def tasks(
  pairs: Mapping[str, Mapping[str, str]], texts: Iterable[str]
) -> dict[str, TextTask]:
  """Every entry of `data.pairs` as a task; `texts` are names of data.files.

  Raises:
    ValueError: a name that is taken or cannot be one, an unknown setting.
  """
  for name in pairs:
    if name in (*texts, sources.EMBEDDED):
      raise ValueError(
        f'data.pairs.{name} is the name of a text; take another.'
      )
  return {name: _task(name, asked) for name, asked in pairs.items()}


def _task(name: str, asked: Mapping[str, str]) -> TextTask:
  where = f'data.pairs.{name}'
  if not re.fullmatch(r'\w+', name):
    raise ValueError(f'{where}: a name is made of letters, digits and _.')
  for key in asked:
    if key not in _SPLITS + _SETTINGS:
      raise unknown(f'field of {where}', key, _SPLITS + _SETTINGS)
  globs = {split: asked[split] for split in _SPLITS if split in asked}
  if not globs:
    raise ValueError(f'{where} has no files; add --config.{where}.train=GLOB')
  labels = tuple(filter(None, asked.get('labels', '').split('|')))
  found = []
  for metric in asked.get('metrics', 'accuracy').split('|'):
    if metric not in METRICS:
      raise unknown(f'metric of {where}', metric, METRICS)
    found.append(METRICS[metric])
  make = functools.partial(
    pair,
    inputs=asked.get('inputs', 'inputs'),
    targets=asked.get('targets', 'targets'),
    labels=labels,
  )
  return TextTask(
    make, tuple(found), labels, as_said, globs=globs, read=sources.read_rows
  )


def pair(
  row: Row, split: str, *, inputs: str, targets: str, labels: tuple[str, ...]
) -> Iterator[Example]:
  """A row as it is; in the test split it may lack its targets."""
  if untold(row, targets, split):
    answer = UNKNOWN
  elif labels:
    answer = label_text(row, split, labels, targets)
  else:
    answer = take(row, targets)
  index = {'idx': row['idx']} if 'idx' in row else {}
  yield {'inputs': take(row, inputs), 'targets': answer, **index}


def as_said(text: str, **_) -> str:
  """A text as far as a vocabulary can say it: NFKC, spaces folded."""
  return ' '.join(unicodedata.normalize('NFKC', text).split())
