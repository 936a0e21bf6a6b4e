"""Whether a checkpoint may name places of this machine: to who trained it.

`train` signs what its config says of files and folders, with a key that each
user has. So `evaluate` tells a run of one's own from a checkpoint that came
from elsewhere and names whatever it likes.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import secrets

from st_moe.config import DataConfig
from st_moe.data import shards


def signature(config: DataConfig) -> str:
  """The user's mark under the places of a config; '' where none can be kept."""
  if not (key := _key()):
    return ''
  said = json.dumps(_places(config), sort_keys=True)
  return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()


def names_places(config: DataConfig) -> bool:
  """Whether a config says where anything lies on a machine."""
  return any(_places(config))


def _places(config: DataConfig) -> tuple:
  return config.files, config.pairs, config.data_dir, config.cache_dir


def is_own(config: DataConfig, signed: object) -> bool:
  """Whether `signed` is this user's mark under the places of `config`."""
  own = signature(config)
  return bool(own) and hmac.compare_digest(own, str(signed))


def _key() -> bytes:
  """32 bytes that nobody else knows; b'' where there is no home for them."""
  path = pathlib.Path(shards.cache_root(''), 'key')
  try:
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      mine = path.with_name(f'.key.{os.getpid()}')
      mine.touch(mode=0o600)
      mine.write_bytes(secrets.token_bytes(32))
      # Of two that start at once the first one wins.
      with contextlib.suppress(FileExistsError):
        os.link(mine, path)
      mine.unlink()
    key = path.read_bytes()
  except OSError:
    return b''
  return key if len(key) == 32 else b''
