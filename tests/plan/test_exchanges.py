"""Exchanges by arithmetic, against what XLA compiles for eight devices."""

import dataclasses
import functools
import math

import pytest

from st_moe import sharding
from st_moe.config import Config, DataConfig, OptimizerConfig, StackConfig
from st_moe.plan import cost, hlo, topology
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


@functools.cache
def _compiled(**sizes):
  mesh = sharding.make_mesh(**sizes)
  with sharding.use(mesh):
    program = topology.lower(CONFIG, mesh).compile()
  exchanges = hlo.Program(program.as_text()).exchanges(dict(mesh.shape))
  return {(e.kind, e.axes): e for e in exchanges}


def _expected(config=CONFIG, **sizes):
  mesh = dict.fromkeys(sharding.AXES, 1) | sizes
  found = cost.work(config, mesh)
  return found, {(e.kind, e.axes): e for e in found.exchanges}


def test_all_to_alls_to_the_byte():
  compiled = _compiled(data=2, expert=4)
  key = 'all-to-all', ('expert',)
  _, expected = _expected(data=2, expert=4)
  # Encoder: 2 groups x 4 experts x 4 places x 16 numbers of 4 bytes, three
  # quarters of which leave; decoder: the same.
  assert expected[key].sent == 4 * SPARSE * (2 * 4 * 4 * 16 * 4) * 3 / 4
  assert (compiled[key].count, compiled[key].sent) == (
    expected[key].count,
    expected[key].sent,
  )


def test_gradients_are_summed_where_weights_are_repeated():
  compiled = _compiled(data=2, expert=4)
  _, expected = _expected(data=2, expert=4)
  summed = ('all-reduce', ('data', 'expert')), ('all-reduce', ('data',))
  assert set(expected) == {('all-to-all', ('expert',)), *summed}
  # And nothing is gathered.
  assert {kind for kind, _ in compiled} == {'all-to-all', 'all-reduce'}
  banks, rest = summed[1], summed[0]
  assert compiled[banks].sent == expected[banks].sent
  # And losses.
  assert 1 <= compiled[rest].sent / expected[rest].sent < 1.02


def test_partial_sums_along_model():
  # A device has 2 x 16 and 2 x 8 tokens of 16 numbers, in 4 and 4 groups with
  # 4 experts x 4 places each. Encoder: attention and extra MLP of 2 layers,
  # there and back, and the embedding; decoder: one more attention, whose keys
  # and values have slopes of the encoder's.
  _, expected = _expected(data=2, expert=2, model=2)
  encoder, decoder = 2 * 16 * 16 * 4, 2 * 8 * 16 * 4
  places = 4 * 4 * 4 * 16 * 4
  found = expected['all-reduce', ('model',)]
  assert found.sent == (
    (2 * 2 * 2 + 1 + 2 * 2) * encoder
    + (3 * 2 * 2 + 1) * decoder
    + 2 * 2 * 2 * places
  )
  # A layer that is computed again sums its attention up again.
  model = dataclasses.replace(CONFIG.model, remat='full')
  full = dataclasses.replace(CONFIG, model=model)
  _, again = _expected(full, data=2, expert=2, model=2)
  more = again['all-reduce', ('model',)].sent - found.sent
  assert more == 2 * 1 * encoder + 2 * 2 * decoder


def test_flops_are_shared_by_all_devices():
  one, _ = _expected()
  many, _ = _expected(data=2, expert=2, model=2)
  assert sum(one.flops.values()) == 8 * sum(many.flops.values())


def test_what_fsdp_gathers():
  _, expected = _expected(fsdp=2, expert=4)
  gathered = expected['all-gather', ('fsdp',)]
  # Of the banks alone, which lie along `expert` anyway: 4 layers x 3 matrices,
  # half of each here, for two passes.
  bank = 16 * CONFIG.model.expert_dim(CONFIG.model.moe) * 4
  assert gathered.sent == 2 * SPARSE * 3 * bank / 2
  scattered = expected['reduce-scatter', ('fsdp',)]
  assert scattered.sent == pytest.approx(gathered.sent / 2)
  rest = 'fsdp', 'expert'
  assert math.isclose(
    expected['all-gather', rest].sent,
    2 * expected['reduce-scatter', rest].sent,
  )
  # The same and 1 % more: ids of tokens, to look them up in parts.
  compiled = _compiled(fsdp=2, expert=4)
  assert compiled['all-gather', ('fsdp',)].sent == gathered.sent
  ratio = compiled['all-gather', rest].sent / expected['all-gather', rest].sent
  assert 1 <= ratio < 1.02
  # What was looked up, in both stacks, there and back.
  looked_up = 'all-to-all', rest
  assert compiled[looked_up] == expected[looked_up]


def test_what_is_frozen_sends_no_gradient():
  router = dataclasses.replace(
    CONFIG, optimizer=OptimizerConfig(train='router')
  )
  _, expected = _expected(router, data=2, expert=4)
  found = expected['all-reduce', ('data', 'expert')]
  # Four routers of 16 x 4 float32.
  assert found.sent == 4 * 16 * 4 * 4 * 2 * 7 / 8
