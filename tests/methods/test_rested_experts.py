"""Rested experts: who was used too much is ruled out; the KL to uniform."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths
from st_moe.config import OptimizerConfig, Part
from st_moe.model import parts
from st_moe.routing.losses import kl_uniform
from st_moe.routing.shaping import rested
from st_moe.routing.types import RouteContext, Routed, Scores
from st_moe.train.after import used
from tests.helpers import assert_trees_close, jit
from tests.methods import steps


def _shaped(usage, z=(2, 1, 0, -1), train=True, threshold=0.5):
  ctx = RouteContext(valid=jnp.full((1, 1), True), deterministic=not train)
  scores = Scores.of(jnp.asarray(z, jnp.float32)[None, None])
  kept = {'usage': jnp.asarray(usage, jnp.float32)}
  return rested(scores, ctx, None, kept, threshold=threshold), scores


def test_who_is_used_too_much_rests():
  # The mean is 2: 4 is 100 % above it, 3 is 50 % and may work at 0.5.
  found, scores = _shaped([4, 3, 0.5, 0.5])
  np.testing.assert_array_equal(found.select[0, 0], [-np.inf, 1, 0, -1])
  weights = np.exp([1.0, 0, -1])
  np.testing.assert_allclose(
    found.probs[0, 0], [0, *weights / weights.sum()], rtol=1e-6
  )
  np.testing.assert_array_equal(found.logits, scores.logits)
  # By the rule of the mean, both.
  found, _ = _shaped([4, 3, 0.5, 0.5], threshold=0.0)
  np.testing.assert_array_equal(found.select[0, 0], [-np.inf, -np.inf, 0, -1])


def test_nobody_rests_where_nobody_was_used_or_nothing_is_learnt():
  for usage, train in (([0] * 4, True), ([1] * 4, True), ([9, 0, 0, 0], False)):
    found, scores = _shaped(usage, train=train, threshold=0.0)
    np.testing.assert_array_equal(found.select, scores.select)
    np.testing.assert_allclose(found.probs, scores.probs, rtol=1e-6)


def test_never_all_rest():
  # Others have ruled out the two that are not tired.
  z = (2, 1, -np.inf, -np.inf)
  found, _ = _shaped([3, 3, 0, 0], z)
  np.testing.assert_array_equal(found.select[0, 0], z)
  rng = np.random.default_rng(0)
  for usage in rng.random((20, 4)):
    found, _ = _shaped(usage, threshold=0.0)
    assert np.isfinite(found.select).any()


def test_usage_by_hand():
  # A running share: .9 of a half and .1 of 6 of 8 are .525.
  params = {'moe': {'kept_usage': jnp.full((1, 2), 0.5), 'kernel': jnp.ones(2)}}
  moved = used(None, params, {'moe': jnp.array([[6.0, 2]])}, 0)['moe']
  np.testing.assert_allclose(moved['kept_usage'], [[0.525, 0.475]], rtol=1e-6)
  np.testing.assert_array_equal(moved['kernel'], [1, 1])
  # A batch of padding asks for nothing.
  moved = used(None, params, {'moe': jnp.zeros((1, 2))}, 0, decay=0.5)['moe']
  np.testing.assert_array_equal(moved['kept_usage'], [[0.25, 0.25]])


# The soft constraint.


@pytest.fixture(scope='module')
def kl():
  def mean(logits, valid):
    ctx = RouteContext(valid=valid)
    of = Routed(None, Scores.of(logits), None, ctx, None, {})
    total, weight = kl_uniform(of)
    return total / jnp.maximum(weight, 1)

  run = jit(mean)
  return lambda probs, valid=True: float(
    run(
      np.log(np.maximum(probs, 1e-30)).astype('f4'),
      np.broadcast_to(valid, np.shape(probs)[:2]),
    )
  )


def test_the_kl_of_the_mean_gate(kl):
  even, sure = np.full((1, 4, 4), 0.25), np.eye(4)[None]
  assert kl(even) == pytest.approx(0, abs=1e-6)
  # Sure of themselves, and even: it is of the mean.
  assert kl(sure) == pytest.approx(0, abs=1e-6)
  one = np.zeros((1, 4, 4))
  one[..., 2] = 1
  assert kl(one) == pytest.approx(math.log(4), rel=1e-5)
  # [.75, .25, 0, 0] is ln 4 - H: of whoever is no padding.
  three = np.eye(4)[None, [0, 0, 0, 1]]
  h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  assert kl(three) == pytest.approx(math.log(4) - h, rel=1e-5)
  padded = np.array([[True, True, True, False]])
  assert kl(three, padded) == pytest.approx(math.log(4), rel=1e-5)
  # Groups by themselves: one that collapses, of 4, and one that is even.
  both = np.concatenate([one, even])
  assert kl(both) == pytest.approx(math.log(4) / 2, rel=1e-5)


# The whole layer.

MODEL = steps.encoder(
  2,
  group_size=8,
  moe={
    **steps.CALM,
    'selector': Part.of('top_k', k=1),
    'shaping': (Part.of('rested', threshold=0.25),),
    'losses': (Part.of('kl_uniform', weight=1e-2),),
  },
)
RULE = OptimizerConfig('adamw', after=(Part.of('used', decay=0.0),))
KEPT = 'encoder/layers/layer_0/moe/kept_usage'


def test_a_tired_expert_gets_no_token_in_the_next_step():
  run = steps.Run(steps.config_of(MODEL, rows=16, optimizer=RULE))
  metrics = [run.take(), run.take()]
  first, second = (m['encoder/load'] for m in metrics)
  # 96 tokens, one expert each, in either layer: 24 are the mean, 30 too many.
  np.testing.assert_array_equal(first.sum(-1), [96, 96])
  tired = first > 30
  assert tired.any(-1).all() and not second[tired].any()
  # Nothing is remembered at decay 0: the usage is the last step's share.
  usage = paths.by_path(run.params)[KEPT]
  np.testing.assert_allclose(usage, second / 96, rtol=1e-6)
  assert 0 < metrics[0]['kl_uniform'] < math.log(4)
  # Evaluation hears nothing of it, and changes nothing.
  rest = lambda params, value: paths.map_by_path(
    lambda path, leaf: (
      np.full_like(leaf, value) * np.arange(4)
      if path.endswith('kept_usage')
      else leaf
    ),
    params,
  )
  one, other = (run.terms(rest(run.start, usage)) for usage in (0, 1))
  assert_trees_close(one, other, tolerance=1e-9)
  assert_trees_close(*steps.both_ways(MODEL, train=False), tolerance=2e-6)


def test_the_config():
  file = 'configs/methods/rested_experts.py'
  hard = config_file.load(f'{file}:runlocal')
  soft = config_file.load(f'{file}:soft,runlocal')
  parts.check(hard.model), parts.check(soft.model)
  base = config_file.load(f'{file}:base,runlocal')
  lines = config_file.diff(*map(config_file.to_dict, (base, hard)))
  assert [line.partition(':')[0] for line in lines] == [
    'model.moe.losses.load_balance',
    'model.moe.shaping.rested',
    'optimizer.after.used',
  ]
  assert soft.model.moe.losses[0] == Part.of('kl_uniform', weight=1e-2)
