"""Eight CPU devices for every test, and what the rooms share."""

import contextlib
import os

# Tests compile much and compute little.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  + ' --xla_backend_optimization_level=0'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# A test starts no command anew to tell its allocator something.
os.environ.setdefault('GLIBC_TUNABLES', '')

import pytest  # noqa: E402
from etils import epath  # noqa: E402
from etils.epath import gpath  # noqa: E402


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """`gs://` as an object store over a temporary folder, which is returned.

  It has neither append nor rename, like the real one.
  """
  root = tmp_path / 'bucket'
  root.mkdir()
  # With TensorFlow installed, epath would take its file system.
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)

  def local(path):
    path = os.fspath(path)
    return path.replace('gs://', f'{root}/') if '://' in path else path

  def plain(original, path, **kwargs):
    return original(local(path), **kwargs)

  def open_(original, path, mode):
    assert 'a' not in mode or '://' not in os.fspath(path), 'no append'
    return original(local(path), mode)

  def glob(original, path):
    found = original(local(path))
    remote = '://' in os.fspath(path)
    return [p.replace(f'{root}/', 'gs://') if remote else p for p in found]

  def move(original, path, target):
    assert '://' not in f'{path}{target}', 'no rename'
    return original(path, target)

  with contextlib.ExitStack() as stack:
    stack.enter_context(
      epath.testing.mock_epath(
        open=open_,
        glob=glob,
        rename=move,
        replace=move,
        **dict.fromkeys(
          (
            *('exists', 'isdir', 'listdir', 'stat'),
            *('makedirs', 'mkdir', 'remove', 'rmtree'),
          ),
          plain,
        ),
      )
    )
    yield root
