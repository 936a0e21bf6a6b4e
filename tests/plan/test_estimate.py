"""Arithmetic of a step, against what XLA compiles for eight devices."""

import math

import jax
import pytest

from st_moe import sharding
from st_moe.config import Config, DataConfig, OptimizerConfig, StackConfig
from st_moe.model.transformer import Transformer
from st_moe.plan import hlo, topology
from st_moe.plan.estimate import estimate
from st_moe.train import optimizer, step
from tests.helpers import tiny

# 8 x 16 and 8 x 8 tokens, two groups for each of the eight devices.
CONFIG = Config(
  model=tiny(
    encoder=StackConfig(2, 1, 0, group_size=8),
    decoder=StackConfig(2, 1, 0, group_size=4),
    dtype='float32',
  ),
  data=DataConfig(batch_size=8, inputs_length=16, targets_length=8),
  optimizer=OptimizerConfig(min_dim_to_factor=8),
)
SPARSE = 4  # Two layers a stack.


@pytest.fixture(scope='module')
def compiled():
  mesh = sharding.make_mesh(data=2, expert=4)
  with sharding.use(mesh):
    program = topology.lower(CONFIG, mesh).compile()
  exchanges = hlo.Program(program.as_text()).exchanges(dict(mesh.shape))
  return {(e.kind, e.axes): e for e in exchanges}


def _expected(**sizes):
  mesh = dict.fromkeys(sharding.AXES, 1) | sizes
  found = estimate(CONFIG, mesh)
  return found, {(e.kind, e.axes): e for e in found.exchanges}


def test_all_to_alls_to_the_byte(compiled):
  key = 'all-to-all', ('expert',)
  _, expected = _expected(data=2, expert=4)
  # Encoder: 2 groups x 4 experts x 4 places x 16 numbers of 4 bytes, three
  # quarters of which leave; decoder: the same.
  assert expected[key].sent == 4 * SPARSE * (2 * 4 * 4 * 16 * 4) * 3 / 4
  assert (compiled[key].count, compiled[key].sent) == (
    expected[key].count,
    expected[key].sent,
  )


def test_gradients_are_summed_where_weights_are_repeated(compiled):
  _, expected = _expected(data=2, expert=4)
  summed = ('all-reduce', ('data', 'expert')), ('all-reduce', ('data',))
  assert set(expected) == {('all-to-all', ('expert',)), *summed}
  # And nothing is gathered.
  assert {kind for kind, _ in compiled} == {'all-to-all', 'all-reduce'}
  banks, rest = summed[1], summed[0]
  assert compiled[banks].sent == expected[banks].sent
  # The embedding once for each stack, position biases before they are tables,
  # losses and norms: much of so small a model.
  assert 1 <= compiled[rest].sent / expected[rest].sent < 1.2


@pytest.mark.parametrize(
  'sizes',
  [dict(data=8), dict(fsdp=2, expert=4), dict(fsdp=2, expert=2, model=2)],
)
def test_state_to_the_byte(sizes):
  mesh = sharding.make_mesh(**sizes)
  model = Transformer(CONFIG.model)
  with sharding.use(mesh):
    tx = optimizer.make(CONFIG.optimizer, step.parameter_axes(model))
    plan = step.plan_init(model, tx, mesh)
    state = plan.begin(plan.random_params(jax.random.key(0)))
  held = lambda tree: sum(
    a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree)
  )
  found, _ = _expected(**sizes)
  assert found.memory['parameters'] == held(state.params)
  assert found.memory['optimizer'] == held(state.opt_state)


def test_flops_are_shared_by_all_devices():
  one, _ = _expected()
  many, _ = _expected(data=2, expert=2, model=2)
  assert sum(one.flops.values()) == 8 * sum(many.flops.values())


def test_what_fsdp_gathers():
  found, expected = _expected(fsdp=2, expert=4)
  gathered = expected['all-gather', ('fsdp',)]
  # Of the banks alone, which lie along `expert` anyway: 4 layers x 3 matrices,
  # half of each here, for two passes.
  bank = 16 * CONFIG.model.expert_dim * 4
  assert gathered.sent == 2 * SPARSE * 3 * bank / 2
  scattered = expected['reduce-scatter', ('fsdp',)]
  assert scattered.sent == pytest.approx(gathered.sent / 2)
  assert math.isclose(
    expected['all-gather', ('fsdp', 'expert')].sent,
    2 * expected['reduce-scatter', ('fsdp', 'expert')].sent,
  )
