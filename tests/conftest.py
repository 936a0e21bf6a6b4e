"""Eight CPU devices for every test, and what the rooms share."""

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
