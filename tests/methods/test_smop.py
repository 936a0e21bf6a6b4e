"""Experts of their own for each task: nobody else is asked, or learns."""

import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Part
from st_moe.model import parts
from st_moe.routing.shaping import own_experts
from st_moe.routing.types import RouteContext, RouteOverride, Scores
from tests.helpers import assert_trees_close, slow_softmax, tiny
from tests.methods import steps
from tests.methods.tasks import SparseLayer, moe_of

ROUTERS = Part.of('per_task', tasks=2)
OWN = Part.of('own_experts', tasks=2)
BOTH = moe_of(ROUTERS, shaping=(OWN,))  # DEDR.


@pytest.fixture(scope='module')
def layer():
  return SparseLayer(BOTH)


def test_a_task_has_a_window_of_experts_and_probabilities_of_these():
  logits = np.random.default_rng(0).normal(size=(1, 4, 8)).astype('f4')
  ctx = RouteContext(
    valid=jnp.full((1, 4), True), task=jnp.array([[0, 1, 2, 5]])
  )
  found = own_experts(Scores.of(jnp.asarray(logits)), ctx, None, {}, tasks=3)
  windows = [(0, 3), (3, 6), (6, 8), (6, 8)]
  for t, (a, b) in enumerate(windows):
    expected = np.zeros(8)
    expected[a:b] = slow_softmax(logits[0, t, a:b])
    np.testing.assert_allclose(found.probs[0, t], expected, rtol=1e-5)
    there = np.isin(np.arange(8), range(a, b))
    for role in (found.select, found.logits):
      np.testing.assert_array_equal(np.isfinite(role[0, t]), there)
      np.testing.assert_array_equal(role[0, t, a:b], logits[0, t, a:b])
  # What all but certainly was another's is no NaN.
  far = Scores.of(jnp.full((1, 4, 8), -1e4).at[..., 0].set(1e4))
  probs = own_experts(far, ctx, None, {}, tasks=3).probs
  np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
  # Nor does whoever forces an expert bring in another's.
  forced = found.steered(RouteOverride(jnp.full(8, 0.0).at[7].set(1e4)))
  assert forced.select[0, 0, 7] == -np.inf


def test_tokens_of_one_task_teach_the_others_experts_nothing(layer):
  slopes = layer.slopes([0, 0, 0, 0])
  for path, slope in slopes.items():
    if path.startswith('experts/'):
      assert (slope[:2] != 0).any() and (slope[2:] == 0).all(), path
  router = slopes['router/kernel']
  assert (router[0][:, :2] != 0).any()
  assert (router[1] == 0).all()
  # But for the rounding of sums that cancel.
  assert abs(router[0][:, 2:]).max() < 1e-5 * abs(router[0]).max()
  # Joint experts, a router each (JEDR): all of them learn.
  joint = SparseLayer(moe_of(ROUTERS)).slopes([0, 0, 0, 0])
  assert all((joint['experts/wo/kernel'][e] != 0).any() for e in range(4))
  assert (joint['router/kernel'][1] == 0).all()


def test_each_row_asks_its_own(layer):
  weights = layer.weights([1, 0, 1, 0])
  assert (weights[[0, 2]][..., :2] == 0).all()
  assert (weights[[1, 3]][..., 2:] == 0).all()
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_a_model_takes_a_step():
  # Of both: the routers are those of M3ViT too.
  model = steps.encoder(2, moe=BOTH)
  run = steps.Run(steps.config_of(model))
  assert np.isfinite(run.take()['loss']) and all(run.moved().values())
  assert_trees_close(*steps.both_ways(model), tolerance=2e-6)


def test_more_tasks_than_experts_are_refused():
  shaping = (Part.of('own_experts', tasks=5),)
  with pytest.raises(ValueError, match='tasks = 5: .* there are 4'):
    parts.check(tiny(moe=moe_of(ROUTERS, shaping=shaping)))


def test_the_config_is_its_base_with_routers_and_windows():
  name = 'configs/methods/smop.py:{}runlocal'
  method, base = (
    config_file.load(name.format(word), {}) for word in ('', 'base,')
  )
  parts.check(method.model)
  assert config_file.diff(*map(config_file.to_dict, (base, method))) == [
    "model.moe.gate.name: 'linear' -> 'per_task'",
    'model.moe.gate.tasks: None -> 3',
    "model.moe.shaping.own_experts: None -> {'tasks': 3}",
  ]
