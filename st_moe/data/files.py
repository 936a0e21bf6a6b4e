"""Files that are whole or absent, on a disk or in an object store."""

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
  """True for an object store, which has neither append nor rename."""
  return '://' in os.fspath(path)


def is_writable(folder: epath.PathLike) -> bool:
  """Whether a directory that is there takes files, as far as one can tell."""
  return is_remote(folder) or os.access(folder, os.W_OK | os.X_OK)


def stamp(path: epath.PathLike) -> list:
  """What changes when a file does: its name, size and time of change."""
  path = os.fspath(path)
  if is_remote(path):
    stat = epath.Path(path).stat()
    return [path, stat.length, stat.mtime]
  stat = os.stat(path)
  return [path, stat.st_size, stat.st_mtime_ns]


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


_READ = 1 << 26  # Bytes; more than any JSON of ours.


def json_in(path: epath.PathLike) -> dict:
  """The object of JSON that a file holds; {} if it holds none."""
  with epath.Path(path).open('rb') as file:
    data = file.read(_READ)
  try:
    found = json.loads(data)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


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
      os.replace(temp, path)
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
