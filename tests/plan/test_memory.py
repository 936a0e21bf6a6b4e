"""Memory by arithmetic: state to the byte, and what waits for the way back."""

import dataclasses

import jax
import pytest

from st_moe import sharding
from st_moe.config import Config, DataConfig, OptimizerConfig, StackConfig
from st_moe.model.transformer import Transformer
from st_moe.plan import activations, memory
from st_moe.train import optimizer
from st_moe.train.state import parameter_axes, starting
from tests.helpers import tiny

ONE = dict.fromkeys(sharding.AXES, 1)


def config(layers=2, batch=8, **changes) -> Config:
  """A dense encoder: width 16, 2 heads of 8, 24 hidden units, 16 tokens."""
  model = dict(
    encoder=StackConfig(layers, 0, 0), decoder=None, dtype='bfloat16'
  )
  return Config(
    model=tiny(**(model | changes)),
    data=DataConfig(batch_size=batch, inputs_length=16, targets_length=8),
    optimizer=OptimizerConfig(min_dim_to_factor=8),
  )


# In bytes of one token.
NORMED = 2 * 16 * 2 + 4  # What a norm reads and writes, and 1 / rms.
HEADS = 5 * 2 * 8 * 2  # Queries, keys, values; answers, by head and by token.
SCORES = 2 * 4  # The logarithm of a sum.
HIDDEN = 3 * 24 * 2  # Gate, what it lets through, and their product.


@pytest.mark.parametrize(
  ('remat', 'token'),
  [
    ('none', 2 * NORMED + HEADS + SCORES + HIDDEN),
    # What goes into a layer, alone.
    ('full', 16 * 2),
    # And its products with weights, but for the last.
    ('dots', 16 * 2 + 3 * 2 * 8 * 2 + 16 * 2 + 2 * 24 * 2),
  ],
)
def test_what_a_layer_keeps(remat, token):
  kept = lambda layers: activations.kept(config(layers, remat=remat), ONE)
  assert kept(6) - kept(4) == 2 * 8 * 16 * token


def test_what_a_layer_needs_to_be_computed_again():
  whole = 2 * NORMED + HEADS + SCORES + HIDDEN
  layer = activations.of_a_layer(config(remat='full'), ONE)
  assert layer == 8 * 16 * whole


def test_a_device_keeps_its_share():
  split = dict(encoder=StackConfig(2, 1, 0, group_size=16))
  kept = lambda sizes, **changes: activations.kept(
    dataclasses.replace(config(**split), **changes), ONE | sizes
  )
  assert kept({}) == 4 * kept(dict(data=2, expert=2)) == 4 * kept(dict(fsdp=4))
  assert kept({}) == 2 * kept({}, microbatches=2)
  # Norms and places are whole on every device of `model`.
  assert kept({}) / 2 < kept(dict(model=2)) < kept({})


def held(tree) -> int:
  return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'sizes',
  [dict(data=8), dict(fsdp=2, expert=4), dict(fsdp=2, expert=2, model=2)],
)
def test_state_to_the_byte(sizes):
  sparse = config(encoder=StackConfig(2, 1, 0, group_size=8))
  model, mesh = Transformer(sparse.model), sharding.make_mesh(**sizes)
  with sharding.use(mesh):
    tx = optimizer.make(sparse.optimizer, parameter_axes(model))
    plan = starting(model, tx, mesh)
    state = plan.begin(plan.random_params(jax.random.key(0)))
  found = memory.state(sparse, sharding.abstract_mesh(ONE | sizes))
  assert found['parameters'] == held(state.params)
  assert found['optimizer'] == held(state.opt_state)


def test_gradients_are_those_of_what_is_trained():
  mesh = sharding.abstract_mesh(ONE | dict(data=8))
  sparse = config(encoder=StackConfig(2, 1, 0, group_size=8))
  of = lambda **changes: memory.of_step(
    dataclasses.replace(sparse, **changes), mesh
  )['gradients']
  # Of two layers: attention, an extra MLP and 4 experts, in bfloat16.
  layers = 2 * (4 * 16 * 16 + 3 * 16 * 24 + 4 * 3 * 16 * 24)
  # Vocabulary in and out, positions, routers and norms, in float32.
  rest = 2 * 32 * 16 + 32 * 2 + 2 * 16 * 4 + (2 * 3 + 1) * 16
  assert memory.state(sparse, mesh)['parameters'] == 4 * (layers + rest)
  assert of() == 2 * layers + 4 * rest
  # And the sum of all microbatches.
  assert of(microbatches=2) == 6 * layers + 8 * rest
  router = OptimizerConfig(train='router')
  assert of(optimizer=router) == 2 * 16 * 4 * 4


def test_what_fsdp_gathers_of_a_layer():
  # Queries to values and out: 4 x 16 x 16; three matrices of 16 x 24: in
  # bfloat16, and as many gradients.
  mesh = sharding.abstract_mesh(ONE | dict(fsdp=8))
  found = memory.of_step(config(), mesh)['weights of one layer, gathered']
  assert found == 2 * 2 * (4 * 16 * 16 + 3 * 16 * 24)
  alone = memory.of_step(config(), sharding.abstract_mesh(ONE | dict(data=8)))
  assert alone['weights of one layer, gathered'] == 0
