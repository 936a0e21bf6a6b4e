"""`st-moe prepare superglue`: the official files, unpacked and checked."""

import hashlib
import http.client
import os
import pathlib
import struct
import tempfile
import urllib.request
import zipfile
import zlib

from etils import epath

from st_moe import terminal
from st_moe.data import files
from st_moe.data import superglue as tasks

URL = 'https://dl.fbaipublicfiles.com/glue/superglue/data/v2/combined.zip'

# How the sha256 of each official file begins. (That of BoolQ's training file
# is not known to us.)
SUMS = {
  'AX-b/AX-b.jsonl': 'c5fe470f2b131788',
  'AX-g/AX-g.jsonl': '39c7ed0b064327c1',
  'BoolQ/test.jsonl': '7e898b2585500df4',
  'BoolQ/val.jsonl': '0c86a5045886e579',
  'CB/test.jsonl': '860679c4ef6f5675',
  'CB/train.jsonl': '32017480d3a10508',
  'CB/val.jsonl': 'c6125587e9601560',
  'COPA/test.jsonl': '7c7cd9fb3aa90bb5',
  'COPA/train.jsonl': 'e74ed25f36119fff',
  'COPA/val.jsonl': 'fa61467cc2510101',
  'MultiRC/test.jsonl': '1dc6da4f23250d50',
  'MultiRC/train.jsonl': 'bb73d0838618f826',
  'MultiRC/val.jsonl': 'd2b480195b15574a',
  'RTE/test.jsonl': 'fb4025a8b072862f',
  'RTE/train.jsonl': 'fdfb03443abe3ec0',
  'RTE/val.jsonl': 'ab990507bf5f35dc',
  'ReCoRD/test.jsonl': '3847abdf4b4f2f37',
  'ReCoRD/train.jsonl': 'be40993957aa752d',
  'ReCoRD/val.jsonl': 'ed228700e8ffc6a5',
  'WSC/test.jsonl': 'e278b00238f9f017',
  'WSC/train.jsonl': '0ffaa3fd8d21e58a',
  'WSC/val.jsonl': 'e5c685ea4bdc3473',
  'WiC/test.jsonl': 'fe8fc664243b942d',
  'WiC/train.jsonl': 'ce301970aaf361ad',
  'WiC/val.jsonl': '9f7207c88beba42c',
}


_LARGEST = 1 << 30  # Bytes of the archive, and of each of its files.
_PATIENCE = 60  # Seconds without a byte.


def superglue(data_dir: str, url: str = URL) -> None:
  """Fetches what is missing of DIR/superglue/TASK/*.jsonl, and checks all.

  A file appears when all of it has come and is the official one.

  Raises:
    ValueError: no directory, no network, a file that is not the official one;
      says what to put where by hand.
  """
  data_dir = data_dir or os.environ.get('ST_MOE_DATA', '')
  if not data_dir:
    raise ValueError('Where to? Set --data_dir=DIR or ST_MOE_DATA.')
  root = epath.Path(data_dir).expanduser()
  official = (f for task in tasks.TASKS.values() for f in task.files.values())
  wanted = sorted({names[0] for names in official})
  missing = [name for name in wanted if not (root / name).exists()]
  for name in wanted:
    if name not in missing and (wrong := _wrong(root / name, name)):
      raise ValueError(
        f'{root / name} is not the official file: {wrong}. Move it away and run'
        ' this again.'
      )
  if missing:
    with tempfile.TemporaryDirectory() as folder:
      archive = pathlib.Path(folder) / 'superglue.zip'
      _fetch(url, archive, root, missing)
      _unpack(url, archive, root, missing)
  terminal.say(f'{root / "superglue"}: all {len(wanted)} files are there.')


def _fetch(url: str, archive: pathlib.Path, root, missing) -> None:
  terminal.say(f'fetching {url}')
  try:
    with (
      urllib.request.urlopen(url, timeout=_PATIENCE) as answer,
      archive.open('wb') as file,
    ):
      said = answer.headers.get('Content-Length') or ''
      _copy(answer, file)
      size = file.tell()
    if said.isdigit() and size != int(said):
      raise OSError(f'{size:,} of {said} bytes came')
  except (OSError, http.client.HTTPException) as e:
    listed = '\n  '.join(f'{root / name}' for name in missing)
    raise ValueError(
      f'Cannot fetch {url}: {getattr(e, "reason", e)}. Fetch it on a machine'
      f' with a network, unpack it into {root / "superglue"}, and run this'
      f' again. Missing:\n  {listed}'
    ) from None


def _unpack(url: str, archive: pathlib.Path, root, missing) -> None:
  try:
    with zipfile.ZipFile(archive) as opened:
      for name in missing:
        with (
          opened.open(name.partition('/')[2]) as packed,
          files.appearing(root / name) as temp,
        ):
          with temp.open('wb') as file:
            _copy(packed, file)
          if wrong := _wrong(temp, name):
            raise ValueError(
              f'{url} has another {name} than the official one: {wrong}.'
              f' Nothing is kept of it; what is right goes to {root / name}.'
            )
  except _BROKEN as e:
    raise ValueError(
      f'What came is not the archive of SuperGLUE: {e}'
    ) from None


# Whatever zipfile makes of an archive that is damaged or packed in another way.
_BROKEN = (
  zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError,
  struct.error, UnicodeDecodeError,
)  # fmt: skip


def _copy(source, target) -> None:
  """Copies what is left of `source`, which may say that it has no end."""
  size = 0
  while chunk := source.read(1 << 20):
    size += len(chunk)
    if size > _LARGEST:
      raise ValueError(
        f'More than {_LARGEST >> 20} MiB came: that is no file of SuperGLUE.'
      )
    target.write(chunk)


def _wrong(path: epath.PathLike, name: str) -> str:
  """What tells a file from the official one `name`; '' if it is that."""
  files.check_regular(path)
  with epath.Path(path).open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  expected = SUMS.get(name.partition('/')[2], '')
  if found.startswith(expected):
    return ''
  return f'its sha256 begins with {found[:16]}, not {expected}'
