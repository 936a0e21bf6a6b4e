"""Eight CPU devices for every test, and what the rooms share."""

import gc
import os
import pathlib

from tests.flags import IN_HASTE

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + f' --xla_force_host_platform_device_count=8 {IN_HASTE}'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# A test starts no command anew to tell its allocator something.
os.environ.setdefault('GLIBC_TUNABLES', '')

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.store import Store  # noqa: E402


def pytest_addoption(parser):
  parser.addoption(
    '--all-methods',
    action='store_true',
    help='try every config of configs/methods whole, and not one by turn',
  )


@pytest.fixture
def store(tmp_path):
  """What `gs://` is in a test: see `tests.store`."""
  with Store(tmp_path / 'bucket').mounted() as made:
    yield made


@pytest.fixture
def bucket(store):
  """The folder behind `gs://`, an object store without append and rename."""
  return store.root


@pytest.fixture(autouse=True, scope='module')
def _room_for_programs():
  """Every program on a CPU takes places of the process's memory map, of which
  Linux gives 65,530: a compiler that finds none left dies."""
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 20_000:
    jax.clear_caches()
    gc.collect()
