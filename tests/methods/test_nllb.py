"""NLLB: the second expert is drawn; weights sum to 1 again after drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Capacity, StackConfig
from st_moe.routing import shaping, weighing
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, RouteOverride, Scores, Seats
from tests.helpers import jit, method_lines, tiny
from tests.methods import steps

S, E = 4000, 5


@functools.cache
def _compiled(train, after, out, **options):
  """(logits, key) -> seats, and weights by expert as they are heard."""

  def run(logits, key):
    valid = jnp.full(logits.shape[:2], True)
    ctx = RouteContext(valid, deterministic=not train)
    scores = shaping.gumbel_second(Scores.of(logits), ctx, key, {})
    if out is not None:
      bias = jnp.where(jnp.arange(E) == out, -jnp.inf, 0.0)
      scores = scores.steered(RouteOverride(bias))
    seats = top_k(scores, ctx, key, k=2, train_policy='all', **options)
    heard = weighing.renormalised(seats, ctx, key) if after else seats
    return seats, heard.dense(logits.shape[1])

  return jit(run)


def _run(logits, *, train=True, key=0, after=True, out=None, **options):
  options = {'capacity': S, 'normalize': False, **options}
  run = _compiled(train, after, out, **options)
  return jax.device_get(run(np.float32(logits), jax.random.key(key)))


PROBS = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
ALIKE = np.log(np.tile(PROBS, (1, S, 1)))


def test_the_second_is_drawn_by_what_the_first_leaves():
  seats, weights = _run(ALIKE)
  first, second = seats.expert.reshape(S, 2).T
  assert (first == 0).all()
  share = np.bincount(second, minlength=E) / S
  expected = np.append(0, PROBS[1:] / PROBS[1:].sum())
  np.testing.assert_allclose(share, expected, atol=4 * 0.5 / np.sqrt(S))
  assert share[0] == 0
  # Their weights are of the probabilities as they are, and sum to 1.
  each = PROBS[second] / (PROBS[0] + PROBS[second])
  found = weights[0, np.arange(S), second]
  np.testing.assert_allclose(found, each, rtol=1e-5)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_the_second_never_repeats_the_first():
  logits = np.random.default_rng(0).normal(size=(1, S, E))
  for key in range(3):
    first, second = _run(logits, key=key)[0].expert.reshape(S, 2).T
    np.testing.assert_array_equal(first, logits[0].argmax(-1))
    assert (first != second).all()


def test_evaluation_takes_the_two_best():
  logits = np.random.default_rng(0).normal(size=(1, S, E))
  seats, _ = _run(logits, train=False)
  best = np.argsort(-logits[0], axis=-1)[:, :2]
  np.testing.assert_array_equal(seats.expert.reshape(S, 2), best)
  # And draws nothing.
  ctx = RouteContext(np.full((1, 1), True), deterministic=True)
  scores = Scores.of(jnp.zeros((1, 1, E)))
  assert shaping.gumbel_second(scores, ctx, None, {}) is scores
  with pytest.raises(ValueError, match="'gumbel_second' draws numbers"):
    train = ctx.replace(deterministic=False)
    shaping.gumbel_second(scores, train, None, {})


def test_who_is_ruled_out_is_not_drawn():
  # Before, or after by an override, though it be the first.
  before = np.where(np.arange(E) == 2, -np.inf, ALIKE)
  for out, logits, override in [(2, before, None), (0, ALIKE, 0)]:
    seats, weights = _run(logits, out=override)
    assert not (seats.expert == out).any()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


# Weights.


def _slow(seats):
  """Weights [g, n] that sum to 1 over the seated routes of each token."""
  found = np.zeros(seats.weight.shape)
  for g, n in np.argwhere(seats.place >= 0):
    mine = (seats.token[g] == seats.token[g, n]) & (seats.place[g] >= 0)
    found[g, n] = seats.weight[g, n] / max(seats.weight[g][mine].sum(), 1e-9)
  return found


_renormalised = jit(
  lambda seats: weighing.renormalised(
    seats, RouteContext(jnp.full((2, 6), True)), None
  )
)


@pytest.mark.parametrize('k', [3, 0])
def test_weights_equal_the_plain_loop(k):
  # Three routes a token in turn, or in any order as where experts choose.
  rng = np.random.default_rng(0)
  pairs = [(t, e) for t in range(6) for e in range(3)]
  order = [rng.permutation(18) if k == 0 else np.arange(18) for _ in range(2)]
  token, expert = np.array([[pairs[i] for i in o] for o in order]).transpose(
    2, 0, 1
  )
  place = np.where(rng.random((2, 18)) < 0.5, token, -1)
  # Those of token 2 are masked, all of them.
  weight = np.where(token == 2, 0, rng.random((2, 18))).astype(np.float32)
  asked = np.full((2, 18), True)
  load = np.zeros((2, 3), np.int32)
  seats = Seats(token, expert, weight, asked, place, load, k)
  found = _renormalised(seats)
  np.testing.assert_allclose(found.weight, _slow(seats), rtol=1e-5)
  for field in ('token', 'expert', 'asked', 'place', 'load'):
    np.testing.assert_array_equal(getattr(found, field), getattr(seats, field))


def test_a_token_without_a_seat_has_no_weight_and_a_finite_slope():
  # Three tokens like experts 0 and 1; one place each.
  logits = jnp.asarray([[[2.0, 1, 0, 0, 0]] * 3])
  ctx = RouteContext(np.full((1, 3), True))

  def weights(logits):
    seats = top_k(Scores.of(logits), ctx, None, 1, k=2, normalize=False)
    return weighing.renormalised(seats, ctx, None).weight

  def first(logits):
    found = weights(logits)
    return found[0, 0], found

  (_, found), slope = jit(jax.value_and_grad(first, has_aux=True))(logits)
  p = np.exp([2, 1]) / np.exp([2, 1]).sum()
  np.testing.assert_allclose(found, [[*p, 0, 0, 0, 0]], rtol=1e-6)
  # d p / d l = p (1 - p), of the two seated alone; none of who sits nowhere.
  np.testing.assert_allclose(
    slope[0, 0], [p[0] * p[1], -p[0] * p[1], 0, 0, 0], atol=1e-6
  )
  assert not np.asarray(slope[0, 1:]).any()


def test_set_alike_it_is_the_rule_of_st_moe():
  # Nothing drawn, nobody dropped: before drops or after is the same.
  logits = np.random.default_rng(0).normal(size=(1, S, E))
  ctx = RouteContext(np.full((1, S), True))
  plain = jit(
    lambda l: top_k(Scores.of(l), ctx, None, S, k=2, normalize=True).dense(S)
  )(logits.astype(np.float32))
  _, before = _run(logits, train=False, after=False, normalize=True)
  np.testing.assert_array_equal(before, plain)
  _, after = _run(logits, train=False)
  np.testing.assert_allclose(after, plain, rtol=1e-6)
  # Where some are, after gives the one that is left all of it, before not.
  tight = dict(train=False, capacity=S // E)
  seats, before = _run(logits, after=False, normalize=True, **tight)
  _, after = _run(logits, **tight)
  alone = (seats.place.reshape(S, 2) >= 0).sum(-1) == 1
  assert alone.sum() > 100
  np.testing.assert_allclose(after[0, alone].sum(-1), 1, rtol=1e-6)
  assert (before[0, alone].sum(-1) < 0.999).all()


def test_places():
  moe = config_file.load('configs/methods/nllb.py').model.moe
  for tokens in range(8, 200, 7):
    for experts in (2, 3, 8, 64):
      places = 2 * -(-tokens // experts)
      found = moe.train_capacity.slots(tokens, experts, k=2)
      assert found == min(places, tokens)
  # In evaluation a fraction of all tokens, by `factor` = fraction * experts.
  quarter = Capacity(0.25 * 8, rounding='ceil', minimum=0)
  assert quarter.slots(100, 8, k=2) == 25


def test_a_model_trains_and_evaluates():
  moe = config_file.load('configs/methods/nllb.py:runlocal').model.moe
  stack = StackConfig(1, 1, 0, group_size=16, moe=moe)
  model = tiny(encoder=stack, decoder=None)
  run = steps.Run(steps.config_of(model))
  found, evaluated = run.take(), run.terms()
  plain = found['cross_entropy'] + 1e-4 * found['z_loss']
  routers = 1e-2 * found['load_balance']
  assert float(found['loss']) == pytest.approx(float(plain + routers), rel=1e-5)
  assert all(run.moved().values())
  assert np.isfinite(evaluated['cross_entropy'][0])


def test_the_config_changes_the_method_alone():
  assert method_lines('nllb') == [
    'model.moe.eval_capacity.dropless: False -> True',
    "model.moe.extra_ffn: 'after' -> 'none'",
    "model.moe.losses.router_z: {'weight': 0.001} -> None",
    'model.moe.selector.normalize: None -> False',
    "model.moe.selector.train_policy: None -> 'all'",
    'model.moe.shaping.gumbel_second: None -> {}',
    'model.moe.train_capacity.factor: 1.25 -> 2.0',
    'model.moe.train_capacity.minimum: 4 -> 0',
    'model.moe.train_capacity.multiple: 1 -> 2',
    "model.moe.train_capacity.rounding: 'floor' -> 'ceil'",
    "model.moe.weighing.expert_output: None -> {'rate': 0.2}",
    'model.moe.weighing.renormalised: None -> {}',
  ]
