"""Text in: whatever files a user names, one document at a time.

Every path may be local or `gs://` (`etils.epath`). Whatever is wrong with a
file is said as a ValueError that names the file and, where there is one, the
line: a run must not die an hour later of a typo in a glob.
"""

import codecs
import concurrent.futures
import contextlib
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from st_moe.data import files, hub

# The corpus that needs no file and no network; also its name in a mixture.
EMBEDDED = 'python_reference'

# A .txt without blank lines is cut into documents at the line end after this
# many characters, so that no file has to fit in memory.
_LONGEST_PARAGRAPHS = 1 << 20

_LARGEST_PACKED = 256 << 20  # Bytes of a list, as it is when unpacked.

_EXTENSIONS = ('.txt', '.jsonl', '.json')


def expand(patterns: str | Sequence[str]) -> list[str]:
  """The files that globs name, sorted, each once."""
  found = set()
  for pattern in [patterns] if isinstance(patterns, str) else patterns:
    if '**' in pattern:
      raise ValueError(
        f"{pattern}: '**' is not supported; write one * a level."
      )
    if hub.is_one(pattern):
      found.add(pattern)
      continue
    path = root = epath.Path(pattern).expanduser()
    if path.is_dir():
      raise ValueError(f'{path} is a directory; name its files: {path}/*.jsonl')
    if path.exists():
      found.add(str(path))
      continue
    while any(c in str(root) for c in '*?['):
      root = root.parent
    if root == path:
      raise ValueError(f'{path}: no such file.')
    matches = [str(p) for p in root.glob(str(path.relative_to(root)))]
    if not matches:
      raise ValueError(f'{path}: no file matches this pattern.')
    found.update(matches)
  return sorted(found)


def documents(
  patterns: str | Sequence[str], text_field: str = 'text'
) -> Iterator[str]:
  """Every document of every file; a file without any is an error."""
  for path in expand(patterns):
    empty = True
    for document in documents_of(path, text_field):
      empty = False
      yield document
    if empty:
      raise ValueError(f'{path} is empty: it holds no document.')


def documents_of(
  path: str, text_field: str = 'text', *, start: int = 0, step: int = 1
) -> Iterator[str]:
  """Documents `start`, `start + step`, ... of one file.

  Workers share a file, each from another `start`: what the others take is
  read, but not parsed.
  """
  if path.startswith(f'{EMBEDDED}:'):
    units, is_text = enumerate(embedded_corpus(path.split(':')[1])), True
  elif hub.is_one(path):
    units, is_text = hub.rows(path), False
  elif _extension(path) == '.txt':
    units, is_text = _paragraphs(path), True
  else:
    units = _rows(path) if _extension(path) == '.json' else _filled(path)
    is_text = False
  for where, unit in itertools.islice(units, start, None, step):
    text = unit
    if not is_text:
      text = _text(path, where, _parse(path, where, unit), text_field)
    if text.strip():
      yield text


def read_jsonl(path: epath.PathLike) -> Iterator[tuple[int, dict]]:
  """(line number from 1, row) of each line that is not blank."""
  path = os.fspath(path)
  if hub.is_one(path):
    yield from hub.rows(path)
    return
  for number, line in _filled(path):
    yield number, _parse(path, number, line)


def read_rows(path: epath.PathLike) -> Iterator[tuple[int | str, dict]]:
  """As `read_jsonl`, and of a .json, which may be a list of rows."""
  path = os.fspath(path)
  if hub.is_one(path) or _extension(path) == '.jsonl':
    yield from read_jsonl(path)
  elif _extension(path) == '.json':
    for where, row in _rows(path):
      yield where, _parse(path, where, row)
  else:
    raise ValueError(
      f'{path}: rows have fields: they come as .jsonl or .json, plain or .gz.'
    )


def read_text(path: epath.PathLike) -> str:
  """A whole file.

  Raises:
    ValueError: it is missing, too large or not UTF-8; names it.
  """
  try:
    return files.read_bytes(path).decode('utf-8-sig')
  except FileNotFoundError:
    raise ValueError(f'{path}: no such file.') from None
  except UnicodeDecodeError as e:
    line = e.object.count(b'\n', 0, e.start) + 1
    raise ValueError(
      f'{path}, line {line} is not UTF-8 ({e.reason}).'
    ) from None


def embedded_corpus(split: str) -> Iterator[str]:
  """The Python reference manual, which every CPython carries in `pydoc`."""
  if split not in ('train', 'validation'):
    raise ValueError(
      f'{EMBEDDED} has the splits train and validation, not {split!r}.'
    )
  try:
    from pydoc_data.topics import topics
  except ImportError:
    raise ValueError(
      f'{EMBEDDED}: this Python has no pydoc_data, the manual that the default'
      ' corpus is made of; name your own text with'
      ' --config.data.files.NAME.train=GLOB'
    ) from None
  for name in sorted(topics):
    # Of the 20 residues, 17 holds closest to 5 % of the text.
    if (zlib.crc32(name.encode()) % 20 == 17) == (split == 'validation'):
      yield topics[name]


def check(
  globs: Mapping[str, Mapping[str, str | Sequence[str]]],
  text_field: str = 'text',
) -> dict[str, dict[str, list[str]]]:
  """Looks at the head of every file of every source; returns the files.

  Cheap enough to run before anything else: three documents a file are parsed.
  """
  found = {}
  for name, splits in globs.items():
    if 'train' not in splits:
      raise ValueError(
        f'data.files.{name} has {sorted(splits)} but no train files;'
        f' add --config.data.files.{name}.train=GLOB'
      )
    found[name] = {split: expand(glob) for split, glob in splits.items()}

  def look(path):
    if not list(itertools.islice(documents_of(path, text_field), 3)):
      raise ValueError(f'{path} is empty: it holds no document.')

  paths = [p for splits in found.values() for ps in splits.values() for p in ps]
  # Threads, because a thousand remote files take a round trip each.
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(look, paths))
  return found


def stamp(path: str) -> list:
  """What changes when a file does: its name, size and time of change."""
  if path.startswith(f'{EMBEDDED}:'):
    text = '\0'.join(embedded_corpus(path.split(':')[1]))
    return [path, len(text), zlib.crc32(text.encode())]
  return hub.stamp(path) if hub.is_one(path) else files.stamp(path)


def _extension(path: str) -> str:
  """The extension that says how to read `path`, .gz put aside."""
  extension = os.path.splitext(path.removesuffix('.gz'))[1]
  if extension not in _EXTENSIONS:
    raise ValueError(
      f'{path}: {extension or "no extension"} is none of'
      f' {", ".join(_EXTENSIONS)}, plain or .gz.'
    )
  return extension


def _lines(path: str, longest: int = 0) -> Iterator[tuple[int, str]]:
  """(number from 1, line without its end) of a plain or gzipped file."""
  number = 0
  try:
    files.check_regular(path)
    with epath.Path(path).open('rb') as file:
      plain = gzip.GzipFile(fileobj=file) if path.endswith('.gz') else file
      # Bytes are split at \n only: str.splitlines knows eight line ends more.
      for line in files.lines(plain, path, longest):
        number += 1
        if number == 1:
          line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line.rstrip(b'\r\n').decode()
  except FileNotFoundError:
    raise ValueError(f'{path}: no such file.') from None
  except UnicodeDecodeError as e:
    raise ValueError(
      f'{path}, line {number} is not UTF-8 ({e.reason}); convert the file, for'
      ' example with iconv.'
    ) from None
  except (EOFError, gzip.BadGzipFile, zlib.error) as e:
    raise ValueError(f'{path}: damaged gzip after line {number} ({e}).') from e


def _filled(path: str, longest: int = 0) -> Iterator[tuple[int, str]]:
  return ((n, line) for n, line in _lines(path, longest) if line.strip())


def _paragraphs(path: str) -> Iterator[tuple[int, str]]:
  """(number of the first line, text) of what blank lines separate."""
  first, lines, length = 1, [], 0
  for number, line in itertools.chain(_lines(path), [(0, '')]):
    if line.strip():
      first = first if lines else number
      lines.append(line)
      length += len(line)
    if lines and (not line.strip() or length > _LONGEST_PARAGRAPHS):
      yield first, '\n'.join(lines)
      lines, length = [], 0


def _rows(path: str) -> Iterator[tuple[int | str, str | dict]]:
  """Rows of a .json: of its list, or one a line."""
  if _first(path) != b'[':
    return _filled(path)
  rows = _parse(path, None, _whole(path), list)
  return ((f'item {i}', row) for i, row in enumerate(rows, 1))


def _first(path: str) -> bytes:
  """The first byte that is no space, if it comes soon."""
  with contextlib.suppress(OSError, EOFError, zlib.error):  # `_lines` tells.
    files.check_regular(path)
    with epath.Path(path).open('rb') as file:
      plain = gzip.GzipFile(fileobj=file) if path.endswith('.gz') else file
      head = plain.read(1 << 16).removeprefix(codecs.BOM_UTF8)
      return head.lstrip()[:1]
  return b''


def _whole(path: str) -> str:
  """The text of a file that is one value; packed it may be any length."""
  packed = path.endswith('.gz')
  most = _LARGEST_PACKED if packed else files.LARGEST_WHOLE
  too_large = ValueError(
    f'{path} holds one list of more than {most >> 20} MiB; make it a .jsonl of'
    ' one object per line.'
  )
  if not packed and files.stamp(path)[1] > most:
    raise too_large
  found, size = [], 0
  for _, line in _lines(path, most):
    found.append(line)
    size += len(line) + 1
    if size > most:
      raise too_large
  return '\n'.join(found)


def _parse(path, where, row, kind=dict):
  """A JSON object out of a line; what is parsed already passes."""
  try:
    value = json.loads(row) if isinstance(row, str) else row
  except json.JSONDecodeError as e:
    what = 'one object per line'
    if _extension(path) == '.json':
      what += ', or a list of objects'
    raise ValueError(
      f'{path}, line {where or e.lineno}: broken JSON ({e.msg} at column'
      f' {e.colno}); expected {what}.'
    ) from None
  except (ValueError, RecursionError) as e:  # Of numbers, and of brackets.
    raise ValueError(f'{path}, {_place(where)}: broken JSON ({e}).') from None
  if not isinstance(value, kind):
    raise ValueError(
      f'{path}, {_place(where)}: a JSON {type(value).__name__} where an object'
      ' is needed.'
    )
  return value


def _text(path, where, row: Mapping, field: str) -> str:
  """The text of a row."""
  if field not in row:
    raise ValueError(
      f'{path}, {_place(where)} has no field {field!r} but {sorted(row)}; set'
      ' data.text_field to the one that holds the text.'
    )
  if not isinstance(row[field], str):
    raise ValueError(
      f'{path}, {_place(where)}: field {field!r} holds'
      f' {type(row[field]).__name__}, not text.'
    )
  try:
    row[field].encode()  # JSON can spell half a surrogate pair.
  except UnicodeEncodeError as e:
    raise ValueError(
      f'{path}, {_place(where)}: field {field!r} is not UTF-8 ({e.reason}).'
    ) from None
  if len(row[field]) > files.LONGEST_LINE:
    raise ValueError(
      f'{path}, {_place(where)}: field {field!r} has more than'
      f' {files.LONGEST_LINE >> 20} MiB; cut it into documents.'
    )
  return row[field]


def _place(where: int | str | None) -> str:
  if where is None:
    return 'the list'
  return where if isinstance(where, str) else f'line {where}'
