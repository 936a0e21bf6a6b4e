"""What a text-to-text task is made of; `tasks.py` registers those there are."""

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from st_moe.data import hub
from st_moe.data.sources import expand, read_jsonl

Row = Mapping[str, Any]
Example = dict[str, Any]

UNKNOWN = '<unk>'  # T5's target where the answer is not told.
# SeqIO's name of a task with a sentinel behind inputs and before targets.
SENTINEL = '_1_sentinel'


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Rows of files as text in and text out, and how answers are scored.

  An example has `inputs` and `targets`, and whatever scores need besides, under
  T5's names (`idx`, `answers`, ...): anything that JSON can hold. `choices`:
  the answers it may be given, if they are its own. Where the answer is not
  told, targets are UNKNOWN; or, as in T5's WSC, `label` is -1, and is what
  metrics compare in place of the targets.
  """

  examples: Callable[[Row, str], Iterable[Example]]  # Of a row and its split.
  metrics: tuple[Callable, ...] = ()  # (targets, predictions) -> {name: score}.
  labels: tuple[str, ...] = ()  # All answers, where they are always the same.
  # (text, example=, is_target=) -> what metrics compare; None: the number of
  # the label, or the text where there are none.
  postprocess: Callable | None = None
  # Split -> file names under the data directory; the first there is read.
  files: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  read: Callable = read_jsonl  # A file -> (line number, row) of each.
  generate: Callable[[str], list[Row]] | None = None  # In place of files.
  sizes: Mapping[str, int] | None = None  # Rows by split, where it is known.
  # In place of `files`: split -> globs, all of whose files are read.
  globs: Mapping[str, str | Sequence[str]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def splits(self) -> tuple[str, ...]:
    return tuple(self.files or self.globs or self.sizes)

  def paths(self, split: str, data_dir: str) -> list[epath.PathLike]:
    """The files of a split; raises as `file`, or where a glob finds none."""
    if self.globs:
      return expand(self.globs[split])
    return [self.file(split, data_dir)] if self.files else []

  def file(self, split: str, data_dir: str) -> epath.PathLike:
    """Where a split lies: `DIR/superglue/CB/val.jsonl` or `DIR/CB/val.jsonl`.

    A HuggingFace dataset lies nowhere: its name is the place.

    Args:
      data_dir: '' is $ST_MOE_DATA.

    Raises:
      ValueError: none of its files is there; names them.
    """
    names = self.files[split]
    if hub.is_one(names[0]):
      return names[0]
    root = data_dir or os.environ.get('ST_MOE_DATA', '')
    if not root:
      raise ValueError(
        f'Where is {names[0]}? Set --data_dir (data.data_dir) or ST_MOE_DATA to'
        ' the folder that holds it. `st-moe prepare superglue --data_dir=DIR`'
        ' fetches the files of SuperGLUE.'
      )
    root = epath.Path(root).expanduser()
    for name in names:
      for path in (root / name, root / name.partition('/')[2]):
        if path.exists():
          if name != names[0]:
            tell_once(f'{path} stands in for {names[0]}, which is not there.')
          return path
    raise ValueError(f'{root} has none of {", ".join(names)}.')

  def load(self, split: str, data_dir: str = '') -> list[Example]:
    """All examples of a split.

    Raises:
      ValueError: a missing, empty or broken file, or a row that is wrong; names
        file, line and field.
    """
    paths = self.paths(split, data_dir)
    found = [e for path in paths or [''] for e in self.examples_of(path, split)]
    if not found:
      names = ', '.join(map(str, paths))
      raise ValueError(f'{names}: no rows; a task needs at least one.')
    return found

  def examples_of(self, path, split: str) -> Iterator[Example]:
    """The examples of one file, or of `generate`; raises as `load`."""
    rows = enumerate(self.generate(split), 1) if self.generate else None
    for line, row in rows or self.read(path):
      try:
        yield from map(_checked, self.examples(row, split))
      except ValueError as error:
        where = line if isinstance(line, str) else f'line {line}'
        raise ValueError(f'{path or "generated"}, {where}: {error}') from None

  def comparable(self) -> Callable | None:
    """What makes answers comparable, as SeqIO calls it; None: nothing need."""
    if self.postprocess or not self.labels:
      return self.postprocess
    return functools.partial(class_number, labels=self.labels)


def _checked(example: Example) -> Example:
  """The example.

  Raises:
    ValueError: a field that JSON or UTF-8 cannot hold, or no text to learn.
  """
  for field in ('inputs', 'targets'):
    take(example, field)
  try:
    json.dumps(example, ensure_ascii=False).encode()
  except (TypeError, ValueError):
    for field, value in example.items():
      try:
        json.dumps(value, ensure_ascii=False).encode()
      except UnicodeEncodeError as e:
        raise ValueError(f'{field!r} is not UTF-8 ({e.reason}).') from None
      except (TypeError, ValueError):
        raise ValueError(
          f'{field!r} is {short(value)}, which JSON cannot hold.'
        ) from None
    raise
  return example


@functools.cache
def tell_once(text: str) -> None:
  """A warning, however often it is called for."""
  logging.getLogger('st_moe').warning(text)


def class_number(text: str, labels=(), **_) -> int:
  """The number of a label, -1 for any other text."""
  return labels.index(text) if text in labels else -1


def take(row: Row, field: str, kind: type = str) -> Any:
  """The value of a field of a row; `a/b` is b in a.

  Raises:
    ValueError: there is none, or it is of another kind.
  """
  value = row
  for key in field.split('/'):
    if not isinstance(value, Mapping) or key not in value:
      raise ValueError(f'no field {field!r} in {short(row)}.')
    value = value[key]
  if kind is int and isinstance(value, str) and value.isdigit():
    return int(value)
  if not isinstance(value, kind) or kind is int and isinstance(value, bool):
    what = {str: 'text', int: 'a whole number', list: 'a list'}[kind]
    raise ValueError(f'{field!r} is {short(value)}; it must be {what}.')
  if kind is str:
    try:
      value.encode()  # JSON can spell half a surrogate pair.
    except UnicodeEncodeError as e:
      raise ValueError(f'{field!r} is not UTF-8 ({e.reason}).') from None
  return value


def untold(row: Row, field: str, split: str) -> bool:
  """Whether a row of the test split keeps an answer back.

  It lacks the field, or holds null, '', -1 or an empty list in its place.
  """
  value = row
  for key in field.split('/'):
    value = value.get(key) if isinstance(value, Mapping) else None
  return split == 'test' and value in (None, '', -1, [])


def label_text(
  row: Row, split: str, labels: Sequence[str], field: str = 'label'
) -> str:
  """The text of a label given as text, truth value or class number.

  Only a row of the test split may have none (see `untold`).
  """
  if untold(row, field, split) and row.get(field) not in labels:
    return UNKNOWN
  if field not in row:
    raise ValueError(
      f'no field {field!r} in {short(row)}; only test files may lack it.'
    )
  label = row[field]
  # True and False are text here: as numbers they would pass for COPA's.
  if isinstance(label, str | bool) and str(label) in labels:
    return str(label)
  is_number = isinstance(label, int) and not isinstance(label, bool)
  if is_number and 0 <= label < len(labels):
    return labels[label]
  raise ValueError(
    f'{field} {short(label)} is none of {", ".join(map(repr, labels))} (or'
    f' their numbers, 0 to {len(labels) - 1}).'
  )


def sentences(
  row: Row,
  split: str,
  *,
  name: str,
  fields: Mapping[str, str],
  labels: tuple[str, ...],
  label: str = 'label',
) -> Iterator[Example]:
  """T5's `NAME field: text field: text`, and a label.

  Args:
    fields: what T5 calls a field -> its name in the row.
    label: the name of the label in the row.
  """
  words = [name]
  for field, source in fields.items():
    words += [f'{field}:', take(row, source)]
  yield {
    'inputs': ' '.join(words),
    'targets': label_text(row, split, labels, label),
    'idx': take(row, 'idx', int),
  }


def short(value: Any, most: int = 200) -> str:
  """A value in an error message, which a whole passage would bury."""
  shown = repr(dict(value) if isinstance(value, Mapping) else value)
  return shown if len(shown) <= most else f'{shown[:most]}...'
