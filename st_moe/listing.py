"""Which checkpoints a directory has, and whether they are whole.

files.json is the guard of a checkpoint. Its first line names every other file
with its size and CRC-32, its second is the CRC-32 of the first, so that no byte
of the whole is unguarded. Older ones list sizes alone.

On a disk a checkpoint is written beside its place, and renamed when all of it
is there. An object store has no rename; there files.json, which comes last,
says that a checkpoint is finished.
"""

import concurrent.futures
import itertools
import json
import os
import time
import zlib

from etils import epath

from st_moe import hosts
from st_moe.data import files

NAME = 'files.json'

_THREADS = 4
_HALF = ('.st-moe-tmp', '.orbax-checkpoint-tmp')
# All processes write and check the same checkpoints in the same order.
_writes, _checks = itertools.count(), itertools.count()
# Directory -> stamps of its files when every byte was right. One command opens
# a checkpoint several times, and reads it for this but once.
_sound: dict[str, dict] = {}
_YOUNG = 60  # Seconds; of a younger file a change may not show in its stamp.


def place(path) -> epath.Path:
  """Where a user means, from the root: Orbax wants it so.

  Raises:
    ValueError: it is in a store that Orbax does not know, or nobody here does.
    OSError: the store does not answer, or not to this user.
  """
  path = files.absolute(path)
  if not files.is_remote(path):
    return path
  if not f'{path}'.startswith('gs://'):
    raise ValueError(
      f'{path}: checkpoints lie on a disk or in gs://; mount other stores.'
    )
  try:
    path.exists()
  except ImportError as e:
    raise ValueError(f"{path}: {e}; pip install 'st_moe[gcp]'.") from e
  except Exception as e:  # TensorFlow and gcsfs have errors of their own.
    line = (str(e).strip() or repr(e)).splitlines()[0][:200]
    raise OSError(f'{path} cannot be reached: {line}') from e
  return path


def unfinished(final: epath.Path) -> epath.Path:
  """Where a checkpoint is written."""
  if files.is_remote(final):
    return final
  return final.with_name(f'{final.name}{_HALF[0]}')


def finish(final: epath.Path) -> None:
  """Makes what was written a checkpoint. All processes call it."""
  written = unfinished(final)
  _write(written, f'listing/{next(_writes)}')
  if hosts.first() and written != final:
    os.replace(written, final)
    files.sync(final.parent)


def clear(final: epath.Path) -> None:
  """Makes way for a checkpoint."""
  for path in {final, unfinished(final)}:
    path.rmtree(missing_ok=True)


def remove(directory: epath.Path) -> None:
  """Deletes a checkpoint. A kill on the way leaves none that looks whole."""
  if files.is_remote(directory):
    (directory / NAME).unlink(missing_ok=True)
  else:
    directory = directory.rename(unfinished(directory))
  directory.rmtree()


def sweep(directory: epath.Path) -> None:
  """Deletes what killed runs left half written among checkpoints."""
  directory.mkdir(parents=True, exist_ok=True)
  for path in directory.glob('*'):
    half = path.name.endswith(_HALF)
    if files.is_remote(path) and path.name.isdigit():
      done = finished(path) or (path / 'commit_success.txt').exists()
      half = not done
    if half:
      path.rmtree()


def steps(directory: epath.Path) -> list[int]:
  """Steps of the finished checkpoints in a directory, newest first."""
  if not directory.exists():
    return []
  found = [path for path in directory.iterdir() if path.name.isdigit()]
  return sorted(
    (int(p.name) for p in found if p.is_dir() and finished(p)), reverse=True
  )


def _write(directory: epath.Path, key: str) -> None:
  """Lists a checkpoint whose files are all written, and syncs them.

  All processes call it, each reads its share; `key` is as for `gathered`.
  """
  found = sorted(_stamps(directory)) if hosts.first() else None
  names = hosts.gathered(f'{key}/names', found)[0]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    sums = pool.map(lambda name: _sum(directory / name), _share(names))
    parts = hosts.gathered(f'{key}/sums', [*sums])
  if not hosts.first():
    return
  listed = {
    name: parts[i % len(parts)][i // len(parts)] for i, name in enumerate(names)
  }
  if not files.is_remote(directory):
    for folder in {(directory / name).parent for name in names}:
      files.sync(folder)
  line = files.as_json(listed).encode()
  files.write_whole(directory / NAME, line + _guard(line))


def finished(directory: epath.Path) -> bool:
  """Whether a checkpoint was written to its end; on a disk a rename says so."""
  if files.is_remote(directory):
    return (directory / NAME).exists()
  return any(directory.iterdir())


def covers(directory: epath.Path) -> bool:
  """Whether an intact checkpoint has a checksum of every byte."""
  return (directory / NAME).exists() and all(
    checksum for _, checksum in _read(directory).values()
  )


def missing(directory: epath.Path) -> str:
  """`damage`, as far as names and sizes tell; for process 0 alone."""
  return _missing(directory, _stamps(directory))


def damage(directory: epath.Path) -> str:
  """What is wrong with the files of a checkpoint; '' if no byte of them is.

  All processes call it, each reads its share. One without a list, which a kill
  left so in older versions, has to be read to know.
  """

  began, stamps = time.time(), {}  # For process 0 alone.

  def look():
    try:
      stamps.update(_stamps(directory))
    except FileNotFoundError:
      return 'it is gone', True
    wrong = _missing(directory, stamps)
    known = NAME not in stamps or _sound.get(f'{directory}') == stamps
    return wrong, bool(wrong) or known

  wrong, done = hosts.agreed(look)
  if done:
    return wrong
  listed = _read(directory)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    found = pool.map(
      lambda name: _differs(directory, name, listed[name]), _share(listed)
    )
    wrong = next(filter(None, found), '')
  everywhere = hosts.gathered(f'damage/{next(_checks)}', wrong)
  wrong = next(filter(None, everywhere), '')
  if hosts.first() and not wrong:
    unit = 1 if files.is_remote(directory) else 1e-9
    newest = max(changed for _, changed in stamps.values()) * unit
    if 0 < newest < began - _YOUNG:
      _sound[f'{directory}'] = stamps
  return wrong


def _share(names):
  return sorted(names)[hosts.index() :: hosts.count()]


def _sum(path: epath.Path) -> list:
  if not files.is_remote(path):
    files.sync(path)
  return [files.size(path), files.checksum(path)]


def _guard(line: bytes) -> bytes:
  return f'\n{zlib.crc32(line):08x}\n'.encode()


def _read(directory: epath.Path) -> dict[str, list]:
  """Name -> size and checksum, which older lists do not have: None.

  Raises:
    ValueError: it is not as it was written.
  """
  text = (directory / NAME).read_bytes()
  line = text.partition(b'\n')[0]
  listed = json.loads(line)
  older = text == line and all(type(v) is int for v in listed.values())
  if not listed or not older and text != line + _guard(line):
    raise ValueError(text)
  return {name: [v, None] if older else v for name, v in listed.items()}


def _missing(directory: epath.Path, stamps: dict) -> str:
  if NAME not in stamps:
    return '' if finished(directory) else 'it was never finished'
  try:
    listed = _read(directory)
  except (ValueError, TypeError, AttributeError):
    return f'its {NAME} is damaged'
  for name, (size, _) in listed.items():
    if name not in stamps:
      return f'its file {name} is missing'
    if stamps[name][0] != size:
      return f'its file {name} has {stamps[name][0]} bytes instead of {size}'
  return ''


def _differs(directory: epath.Path, name: str, listed: list) -> str:
  wanted = listed[1]
  try:
    if wanted is None or files.checksum(directory / name) == wanted:
      return ''
  except OSError as e:  # A disk's own word that it lost something.
    return f'its file {name} cannot be read ({e.strerror or e})'
  return f'its file {name} has other bytes than were written'


def _stamps(directory: epath.Path) -> dict[str, list]:
  """Name -> size and time of change of every file, those in folders too."""
  found = {}
  for path in directory.iterdir():
    if path.is_dir():
      nested = _stamps(path).items()
      found.update({f'{path.name}/{name}': stamp for name, stamp in nested})
    else:
      found[path.name] = files.stamp(path)[1:]
  return found
