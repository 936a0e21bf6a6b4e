"""Every method on eight devices as on one, over two meshes.

  python -m pytest tests/conformance/test_devices.py -m slow --all-methods

Two quiet steps of each: losses and gradients, the load of every expert to the
token, and parameters.
"""

import functools

import jax
import pytest

from st_moe import sharding
from tests.conformance import programs, tables

pytestmark = pytest.mark.slow
TOLERANCE = 2e-5
MESHES = {
  'data 2 x expert 4': dict(data=2, expert=4),
  'fsdp 2 x expert 2 x model 2': dict(fsdp=2, expert=2, model=2),
}


@functools.cache
def _one(method):
  return programs.quiet(tables.config(method), programs.params(method))


@pytest.mark.parametrize('mesh', MESHES)
def test_eight_devices_train_as_one(method, mesh):
  assert len(jax.devices()) == 8
  config = tables.config(method)
  many = sharding.make_mesh(
    **MESHES[mesh], num_experts=config.model.num_experts
  )
  found = programs.quiet(config, programs.params(method), many)
  off = programs.differences(found, _one(method))
  worst = max(off, key=off.get)
  assert off[worst] < TOLERANCE, (worst, off[worst])
