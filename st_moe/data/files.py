"""Files that are whole or absent, on a disk or in an object store."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
  """True for an object store, which has neither append nor rename."""
  return '://' in os.fspath(path)


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
    stat = epath.Path(path).stat()
    return [path, stat.length, stat.mtime]
  stat = os.stat(path)
  return [path, stat.st_size, stat.st_mtime_ns]


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
  if path.exists() and (path.is_file() or any(path.iterdir())):
    raise ValueError(f'{path} is not empty; name a new directory.')
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
