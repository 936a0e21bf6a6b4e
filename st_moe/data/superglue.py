"""SuperGLUE rows as text in, text out: what T5 makes of them, byte for byte.

A task is one line of `FORMATS`. T5 writes the name of the task, then every
field as `name: text`, in alphabetical order (its `glue` preprocessor); the
answer is the name of the label.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from st_moe.data.sources import read_jsonl


@dataclasses.dataclass(frozen=True)
class Format:
  """How the rows of one task read."""

  name: str  # The first word of the input.
  fields: tuple[str, ...]  # In the order of the input.
  labels: tuple[str, ...]  # By class number.
  folder: str  # Of the official files.


FORMATS = {
  f.name: f
  for f in (
    Format('boolq', ('passage', 'question'), ('False', 'True'), 'BoolQ'),
    Format(
      'cb',
      ('hypothesis', 'premise'),
      ('entailment', 'contradiction', 'neutral'),
      'CB',
    ),
    Format(
      'copa',
      ('choice1', 'choice2', 'premise', 'question'),
      ('choice1', 'choice2'),
      'COPA',
    ),
  )
}

# What a split is called here -> in the names of the official files.
FILES = {'train': 'train', 'validation': 'val', 'test': 'test'}


def file_of(
  format: Format, split: str, directory: epath.PathLike
) -> epath.Path:
  """Where the official layout keeps `split`: `<directory>/CB/val.jsonl`."""
  return epath.Path(directory) / format.folder / f'{FILES[split]}.jsonl'


def to_text(format: Format, row: Mapping[str, Any]) -> dict[str, Any]:
  """One row as `inputs`, `targets` and its `idx`."""
  for field in (*format.fields, 'label', 'idx'):
    if field not in row:
      known = ', '.join((*format.fields, 'label', 'idx'))
      raise ValueError(
        f'A {format.name} row has no {field!r}: {_short(dict(row))}. It needs '
        f'{known}, as in the official files (their test files lack labels).'
      )
  words = [format.name]
  for field in format.fields:
    if not isinstance(row[field], str):
      raise ValueError(
        f'{format.name} row {row["idx"]}: {field!r} is {_short(row[field])}; '
        'it must be text.'
      )
    words += [f'{field}:', row[field]]
  return {
    'inputs': ' '.join(words),
    'targets': _label(format, row['label'], row['idx']),
    'idx': row['idx'],
  }


def _label(format: Format, label: Any, idx: Any) -> str:
  """The text of a label given as text, truth value or class number."""
  # True and False are text here: as numbers they would pass for COPA's.
  if isinstance(label, str | bool) and str(label) in format.labels:
    return str(label)
  is_number = isinstance(label, int) and not isinstance(label, bool)
  if is_number and 0 <= label < len(format.labels):
    return format.labels[label]
  raise ValueError(
    f'{format.name} row {idx}: label {_short(label)} is none of '
    f'{", ".join(map(repr, format.labels))} '
    f'(or their numbers, 0 to {len(format.labels) - 1}).'
  )


def _short(value: Any, most: int = 200) -> str:
  """A value in an error message, which a whole passage would bury."""
  shown = repr(value)
  return shown if len(shown) <= most else f'{shown[:most]}...'


def read_rows(path: epath.PathLike) -> Iterator[dict]:
  """The rows of a `.jsonl` or `.jsonl.gz`, local or `gs://`."""
  for _, row in _numbered(path):
    yield row


def read_examples(format: Format, path: epath.PathLike) -> Iterator[dict]:
  """The rows of a file as text; errors name the file and the line."""
  for line, row in _numbered(path):
    try:
      yield to_text(format, row)
    except ValueError as error:
      raise ValueError(f'{path}, line {line}: {error}') from None


def _numbered(path: epath.PathLike) -> Iterator[tuple[int, dict]]:
  line = 0
  for line, row in read_jsonl(path):
    yield line, row
  if not line:  # Fine for a text source, which has others; not for a task.
    raise ValueError(f'{path}: no rows; a task needs at least one.')
