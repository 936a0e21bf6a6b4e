"""Files on a disk or in an object store: written whole or not at all, and read
with an eye on what they may be instead: a device, a pipe, broken or endless.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import stat
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from etils import epath

LONGEST_LINE = 64 << 20  # Bytes.
LARGEST_WHOLE = 1 << 30  # Bytes of a file that is read at once.


def is_remote(path: epath.PathLike) -> bool:
  """True for an object store, which has neither append nor rename."""
  return '://' in os.fspath(path)


def is_writable(folder: epath.PathLike) -> bool:
  """Whether a directory that is there takes files, as far as one can tell."""
  return is_remote(folder) or os.access(folder, os.W_OK | os.X_OK)


def absolute(path: epath.PathLike) -> epath.Path:
  """`path` from the root, ~ expanded; one in an object store as it is.

  `resolve` would look for `gs://` in the working directory.
  """
  path = epath.Path(path).expanduser()
  return path if is_remote(path) else path.resolve()


def size(path: epath.PathLike) -> int:
  """Bytes of a file."""
  return stamp(path)[1]


def stamp(path: epath.PathLike) -> list:
  """What changes when a file does: its name, size and time of change."""
  path = os.fspath(path)
  if is_remote(path):  # Elsewhere epath would want to name the file's owner.
    found = epath.Path(path).stat()
    return [path, found.length, found.mtime]
  found = os.stat(path)
  return [path, found.st_size, found.st_mtime_ns]


def check_regular(path: epath.PathLike) -> None:
  """Raises a ValueError for a folder, a device, a pipe: what may never end."""
  if is_remote(path):
    return
  mode = os.stat(path).st_mode
  if not stat.S_ISREG(mode):
    kinds = {
      stat.S_IFDIR: 'a directory', stat.S_IFIFO: 'a pipe',
      stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device',
    }  # fmt: skip
    kind = kinds.get(stat.S_IFMT(mode), 'a socket')
    raise ValueError(f'{path} is {kind}; a file is needed.')


def read_bytes(path: epath.PathLike, most: int = LARGEST_WHOLE) -> bytes:
  """A whole file.

  Raises:
    ValueError: it is no file, or larger than `most` bytes.
  """
  check_regular(path)
  too_large = ValueError(
    f'{path} has more than {most >> 20} MiB; it is not read.'
  )
  if not is_remote(path) and os.stat(path).st_size > most:
    raise too_large
  with epath.Path(path).open('rb') as file:
    data = file.read(most + 1)
  if len(data) > most:
    raise too_large
  return data


def lines(
  file: IO[bytes], name: epath.PathLike, longest: int = 0
) -> Iterator[bytes]:
  """The lines of an open file, split at newlines only.

  Raises:
    ValueError: one has more than `longest` bytes (0: `LONGEST_LINE`); names
      file and line.
  """
  number, longest = 0, longest or LONGEST_LINE
  while line := file.readline(longest + 1):
    number += 1
    if len(line) > longest:
      raise ValueError(
        f'{name}, line {number} has more than {longest >> 20} MiB; cut it.'
      )
    yield line


def read_json(path: epath.PathLike) -> dict:
  """The object in a file of JSON; raises like `read_bytes` and `parse_json`."""
  return parse_json(read_bytes(path), path)


def parse_json(data: bytes, path: epath.PathLike) -> dict:
  """The object that is all of `data`, the content of `path`.

  Raises:
    ValueError: it is no JSON object, or has a field twice.
  """
  try:
    found = json.loads(data.decode(), object_pairs_hook=_once)
    if not isinstance(found, dict):
      raise ValueError(f'it is a {type(found).__name__}, not an object')
  except (ValueError, RecursionError) as e:
    raise ValueError(f'{path} is no JSON, or damaged: {e}.') from None
  return found


def _once(pairs: list[tuple[str, object]]) -> dict:
  found = {}
  for name, value in pairs:
    if name in found:
      raise ValueError(f'it has {name!r} twice')
    found[name] = value
  return found


def check_free(path: epath.PathLike, is_ours: Callable) -> None:
  """Refuses to write over what somebody else put at `path`.

  Args:
    is_ours: of the path of a file that is not empty, whether it is one that we
      wrote and may write again.

  Raises:
    ValueError: there is a directory, a device, or a file that is not ours.
  """
  path = epath.Path(path)
  if not path.exists():
    return
  if path.is_dir():
    raise ValueError(f'{path} is a directory; name a file.')
  if not is_remote(path) and not os.path.isfile(path):
    raise ValueError(f'{path} is a device or a pipe; name a file.')
  with path.open('rb') as file:
    empty = not file.read(1)
  if not empty and not is_ours(path):
    raise ValueError(
      f'{path} exists and it was not written by this command, or is damaged:'
      ' name another place, or move it away.'
    )


def json_in(path: epath.PathLike) -> dict:
  """The object of JSON that a file holds; {} if it holds none."""
  try:
    return read_json(path)
  except ValueError:
    return {}


def as_json(value, **options) -> str:
  """`value` as JSON, which knows no NaN: what is not finite becomes a text."""
  return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  odd = isinstance(value, float) and not math.isfinite(value)
  return str(value) if odd else value


def checksum(path: epath.PathLike) -> str:
  """The CRC-32 of a file's bytes, as 8 hexadecimal digits."""
  found = 0
  with epath.Path(path).open('rb') as file:
    while data := file.read(1 << 20):
      found = zlib.crc32(data, found)
  return f'{found:08x}'


def sync(path: epath.PathLike) -> None:
  """Returns when a local file, or the names in a folder, are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def appearing(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """A local file to write, which becomes `path` if nothing goes wrong.

  Nobody ever sees `path` half written, and of two writers the last one wins: a
  disk renames, an object store shows an object when all of it is there.
  """
  path = epath.Path(path)
  if not is_remote(path) and path.exists() and not os.path.isfile(path):
    raise ValueError(f'{path} is no file, and none can take its place.')
  path.parent.mkdir(parents=True, exist_ok=True)
  folder = tempfile.gettempdir() if is_remote(path) else path.parent
  temp = pathlib.Path(folder, f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    yield temp
    if is_remote(path):
      copy(temp, path)
    else:
      sync(temp)
      os.replace(temp, path)
      sync(path.parent)
  except (OSError, RuntimeError) as e:  # RuntimeError: ArrayRecord's.
    full = isinstance(e, OSError) and e.errno == errno.ENOSPC
    if not full and 'No space left' not in str(e):
      raise
    free = shutil.disk_usage(folder).free >> 20
    raise ValueError(
      f'No space left while writing {path} by way of {folder} ({free} MiB free'
      ' there); make room or set data.cache_dir to another disk. Parts that are'
      ' finished are kept.'
    ) from e
  finally:
    temp.unlink(missing_ok=True)


@contextlib.contextmanager
def directory_appearing(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """A local directory to fill, which becomes `path` if nothing goes wrong.

  Raises:
    ValueError: there is something at `path` already.
  """
  path = epath.Path(path).expanduser()
  check_new(path)
  folder = None if is_remote(path) else path.parent
  if folder:
    folder.mkdir(parents=True, exist_ok=True)
  temp = pathlib.Path(tempfile.mkdtemp('.tmp', f'.{path.name}.', folder))
  try:
    yield temp
    if folder:
      temp.chmod(0o755)  # mkdtemp's are private.
      os.replace(temp, path)
    else:
      copy_tree(temp, path)
  finally:
    shutil.rmtree(temp, ignore_errors=True)


def check_new(path: epath.PathLike) -> None:
  """Raises a ValueError where a new directory cannot be: something is there."""
  path = epath.Path(path)
  if path.exists() and (path.is_file() or any(path.iterdir())):
    raise ValueError(f'{path} is not empty; name a new directory.')


def write_whole(path: epath.PathLike, data: bytes) -> None:
  with appearing(path) as temp:
    temp.write_bytes(data)


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
  """Copies a file from any file system to any other."""
  with epath.Path(source).open('rb') as a, epath.Path(target).open('wb') as b:
    shutil.copyfileobj(a, b, 1 << 20)


def copy_tree(source: epath.PathLike, target: epath.PathLike) -> None:
  """Copies a directory from any file system to any other."""
  source, target = epath.Path(source), epath.Path(target)
  target.mkdir(parents=True, exist_ok=True)
  for path in source.iterdir():
    put = copy_tree if path.is_dir() else copy
    put(path, target / path.name)


def move_tree(source: epath.PathLike, target: epath.PathLike) -> None:
  """Renames a directory; copies and deletes where a store has no rename."""
  source, target = epath.Path(source), epath.Path(target)
  if not is_remote(source):
    source.rename(target)
    return
  copy_tree(source, target)
  source.rmtree()
