"""Experts that a task lists: all of those answer, and no other learns."""

import jax
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Part, StackConfig
from st_moe.model import parts
from st_moe.model.transformer import Transformer
from tests.helpers import (
  assert_trees_close,
  examples,
  padded_batch,
  random_params,
  slow_expert,
  tiny,
)
from tests.methods import steps
from tests.methods.tasks import ROWS, SparseLayer, moe_of

# Any task past the second takes of both.
GATE = Part.of('skills', table=((2,), (0, 1), (1, 2)))


@pytest.fixture(scope='module')
def layer():
  return SparseLayer(moe_of(GATE))


def test_a_task_takes_all_that_it_lists_evenly(layer):
  weights = layer.weights([0, 1, 2, 7])
  np.testing.assert_allclose(weights[0], [[0, 0, 1, 0]] * 6)
  np.testing.assert_allclose(weights[1], [[0.5, 0.5, 0, 0]] * 6)
  np.testing.assert_allclose(weights[2], [[0, 0.5, 0.5, 0]] * 6)
  np.testing.assert_array_equal(weights[3], weights[2])


def test_one_skill_is_a_dense_layer_and_several_are_their_mean(layer):
  found = layer([0, 1, 0, 5])
  assert 'router' not in layer.params
  for row, experts in enumerate([(2,), (0, 1), (2,), (1, 2)]):
    for x, y in zip(layer.x[row], found[row], strict=True):
      each = [
        slow_expert(layer.params['experts'], e, x, 'geglu') for e in experts
      ]
      np.testing.assert_allclose(y, np.mean(each, 0), rtol=1e-4, atol=1e-5)


def test_who_is_not_asked_has_a_gradient_of_zero(layer):
  for path, slope in layer.slopes([0] * ROWS).items():
    for expert in range(4):
      assert (slope[expert] != 0).any() == (expert == 2), path


def test_a_model_takes_a_step():
  table = ((0, 3), (1, 2))
  model = steps.encoder(2, moe=moe_of(Part.of('skills', table=table)))
  run = steps.Run(steps.config_of(model))
  assert np.isfinite(run.take()['loss']) and all(run.moved().values())
  assert_trees_close(*steps.both_ways(model), tolerance=2e-6)


def test_a_model_that_is_not_told_says_so():
  model = tiny(encoder=StackConfig(1, 1, 0, 16), decoder=None, moe=moe_of(GATE))
  batch = padded_batch(model, examples(model))
  module = Transformer(model)
  params = random_params(module, task=np.zeros(4, int), **batch)
  run = lambda p: module.apply({'params': p}, **batch, enable_dropout=False)
  with pytest.raises(ValueError, match='routes by task and was not told'):
    jax.eval_shape(run, params)


@pytest.mark.parametrize(
  ('table', 'said'),
  [
    (((0, 1, 2),), 'are 3 experts, and a token asks 2'),
    (((0,), ()), r'table\[1\] = \(\): it should be experts'),
    (((0, 0),), 'each of them once'),
    (((0, 4),), 'the experts are 0 to 3'),
    ((), r'table\[0\]'),
    (((-1,),), r'table\[0\]\[0\] = -1'),
  ],
)
def test_a_table_that_cannot_be_is_refused(table, said):
  moe = moe_of(Part.of('skills', table=table))
  with pytest.raises(ValueError, match=said):
    parts.check(tiny(moe=moe))


def test_the_config_is_its_base_with_a_table():
  name = 'configs/methods/skillnet.py:{}runlocal'
  method, base = (
    config_file.load(name.format(word), {}) for word in ('', 'base,')
  )
  parts.check(method.model)
  lines = config_file.diff(*map(config_file.to_dict, (base, method)))
  assert all(line.startswith('model.moe.') for line in lines)
  assert {line.split('.')[2] for line in lines} == {
    'gate', 'selector', 'losses', 'train_capacity', 'eval_capacity',
  }  # fmt: skip
