"""SparseMixer: the gradient of a draw, exact for losses of its order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths
from st_moe.config import Part
from st_moe.model import parts
from st_moe.model.beside import Scaled
from st_moe.routing.sampling import mixed, mixed_sampling
from st_moe.routing.selectors import top_k
from st_moe.routing.shaping import near_best
from st_moe.routing.types import RouteContext, RouteOverride, Scores
from tests.helpers import assert_trees_close, jit, slow_softmax, tiny
from tests.methods import steps


def _ctx(shape, train=True, **changes):
  valid = jnp.full(shape, True)
  return RouteContext(valid=valid, deterministic=not train, **changes)


# The gradient, by all draws there are: three experts that say a number each.

LOGITS = np.array([0.3, -0.5, 0.1])
ANSWERS = np.array([2.0, -3.0, 1.0])


def _slopes(loss, weigh):
  """d loss(weight) / d logits of each expert [i, e], if it is the one drawn."""

  def one(logits, i):
    return loss(weigh(jax.nn.softmax(logits)[i]) * jnp.asarray(ANSWERS)[i])

  of = jax.vmap(jax.grad(one), (None, 0))
  return np.asarray(of(jnp.asarray(LOGITS), jnp.arange(3)))


def _mean_slope(loss, parts):
  """Over experts by their p and, in each, over (probability, part, slope)."""
  each = lambda part, slope: _slopes(
    loss, lambda p: mixed(p, jnp.asarray(part), slope)
  )
  over = sum(chance * each(part, slope) for chance, part, slope in parts)
  return slow_softmax(LOGITS) @ over


def test_of_a_quadratic_loss_the_mean_slope_is_exact():
  loss = lambda y: (y - 0.7) ** 2
  expected = lambda logits: sum(
    p * loss(p * answer)
    for p, answer in zip(jax.nn.softmax(logits), ANSWERS, strict=True)
  )
  exact = np.asarray(jax.grad(expected)(jnp.asarray(LOGITS)))
  found = _mean_slope(loss, [(0.5, 1.0, 2.0), (0.5, 0.5, 2.0)])
  np.testing.assert_allclose(found, exact, rtol=1e-5)
  # Switch forgets what the others would have said.
  switch = slow_softmax(LOGITS) @ _slopes(loss, lambda p: p)
  assert np.abs(switch - exact).max() > 0.1 * np.abs(exact).max()


def test_of_a_cubic_loss_the_third_order_is_exact():
  # Of who is drawn, that is: weights move the loss by the experts alone.
  loss = lambda y: y**3 - (y - 0.7) ** 2
  still = slow_softmax(LOGITS)
  expected = lambda logits: sum(
    p * loss(weight * answer)
    for p, weight, answer in zip(
      jax.nn.softmax(logits), still, ANSWERS, strict=True
    )
  )
  exact = np.asarray(jax.grad(expected)(jnp.asarray(LOGITS)))
  found = _mean_slope(loss, [(0.25, 1.0, 1.0), (0.75, 1 / 3, 1.0)])
  np.testing.assert_allclose(found, exact, rtol=1e-4)
  second = _mean_slope(loss, [(0.5, 1.0, 1.0), (0.5, 0.5, 1.0)])
  assert np.abs(second - exact).max() > 0.01 * np.abs(exact).max()


@pytest.mark.parametrize(
  ('part', 'slope'), [(1.0, 2.0), (0.5, 2.0), (1 / 3, 1)]
)
def test_value_and_slope_of_a_weight_are_apart(part, slope):
  of = lambda p: mixed(p, jnp.float32(part), float(slope))
  value, found = jax.value_and_grad(of)(jnp.float32(0.6))
  assert float(value) == pytest.approx(0.6 * part)
  assert float(found) == slope


# The selector: as many tokens as draws, all with the same scores.

N = 20_000


def _draws(k, key=0):
  """Experts and weights [N, k], and the slope of the mean of weights."""
  ctx = _ctx((1, N))

  def mean(logits):
    scores = Scores.of(jnp.broadcast_to(logits, (1, N, 3)))
    seats = mixed_sampling(scores, ctx, jax.random.key(key), N, k=k)
    return seats.weight.mean() * k, (seats.expert, seats.weight)

  found = jit(jax.grad(mean, has_aux=True))(jnp.asarray(LOGITS, jnp.float32))
  slope, (expert, weight) = jax.device_get(found)
  return slope, expert.reshape(N, k), weight.reshape(N, k)


def test_one_choice_is_drawn_by_its_probability():
  slope, expert, weight = _draws(k=1)
  p = slow_softmax(LOGITS)  # [.43, .19, .37]: 20,000 draws are within .0035.
  share = np.bincount(expert[:, 0], minlength=3) / N
  np.testing.assert_allclose(share, p, atol=0.0175)
  part = weight[:, 0] / p[expert[:, 0]]
  assert set(np.round(np.unique(part), 5)) == {0.5, 1.0}
  # The likeliest always counts in full, the others half of the time.
  full = [(part[expert[:, 0] == e] > 0.75).mean() for e in range(3)]
  np.testing.assert_allclose(full, [1, 0.5, 0.5], atol=0.041)
  # d weight = 2 d p_i, whatever the part: 2 sum_i share_i p_i (1_i - p).
  want = 2 * (share * p - p * (share @ p))
  np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-5)


def test_a_second_choice_is_drawn_of_who_is_left():
  slope, expert, weight = _draws(k=2)
  assert (expert[:, 0] != expert[:, 1]).all()
  p, want = slow_softmax(LOGITS), np.zeros(3)
  for a in range(3):
    mine = expert[:, 0] == a
    left = np.where(np.arange(3) == a, 0, p)
    left /= left.sum()
    share = np.bincount(expert[mine, 1], minlength=3) / mine.sum()
    np.testing.assert_allclose(share, left, atol=0.041)
    part = weight[mine, 1] / left[expert[mine, 1]]
    assert set(np.round(np.unique(part), 4)) == {0.3333, 1.0}
    best = expert[mine, 1] == left.argmax()
    assert (part[best] > 0.9).all()
    assert (part[~best] > 0.9).mean() == pytest.approx(0.25, abs=0.041)
    for q, of in (
      (p, mine.mean() * (np.arange(3) == a)),
      (left, mine.mean() * share),
    ):
      want += of * q - q * (of @ q)
  np.testing.assert_allclose(slope, want, rtol=1e-3, atol=1e-5)


def test_evaluation_takes_the_best():
  logits = np.random.default_rng(0).normal(size=(2, 5, 4)).astype('f4')
  ctx = _ctx((2, 5), train=False)

  def seats(select, ctx=ctx, **options):
    return jit(lambda l: select(Scores.of(l), ctx, None, 5, k=2, **options))(
      logits
    )

  ours = seats(mixed_sampling)
  plain = seats(top_k, normalize=False)
  np.testing.assert_array_equal(ours.expert, plain.expert)
  np.testing.assert_array_equal(ours.place, plain.place)
  first, second = np.asarray(plain.weight).reshape(-1, 2).T
  want = np.stack([first, second / (1 - first)], axis=-1)
  np.testing.assert_allclose(ours.weight.reshape(-1, 2), want, rtol=1e-5)
  # As an override has it: the second best alone.
  bias = jnp.zeros(4)
  steered = ctx.replace(override=RouteOverride(bias, k=1, rank=1))
  np.testing.assert_array_equal(
    seats(mixed_sampling, steered).expert, plain.expert[:, 1::2]
  )
  # Whom all but one are far from is alone.
  lonely = seats(mixed_sampling, jitter=1e-4)
  np.testing.assert_array_equal(lonely.expert[:, ::2], plain.expert[:, ::2])


def test_nobody_who_is_ruled_out_is_asked():
  logits = np.full((1, 50, 3), -np.inf, 'f4')
  logits[..., 1] = 0
  scores = Scores.of(jnp.asarray(logits))
  key = jax.random.key(0)
  seats = jit(lambda: mixed_sampling(scores, _ctx((1, 50)), key, 50, k=2))()
  np.testing.assert_array_equal(seats.load, [[0, 50, 0]])
  np.testing.assert_array_equal(seats.asked.sum(), 50)
  with pytest.raises(ValueError, match='mixed_sampling draws experts'):
    mixed_sampling(scores, _ctx((1, 50)), None, 50, k=1)


@pytest.mark.parametrize(
  ('z', 'near'),
  [
    # .35 / 2 = .175 and .5 / 2 = .25 of twice .1.
    ([2, 1.65, 1.5, -1], [1, 1, 0, 0]),
    # .2 / 1.2 = .167 and .3 / 1.3 = .23.
    ([-1, -1.2, -1.3], [1, 1, 0]),
    ([0, 0, -0.1], [1, 1, 0]),
    ([1, -np.inf, 1], [1, 0, 1]),
  ],
)
def test_who_comes_near_by_hand(z, near):
  scores = Scores.of(jnp.asarray(z, jnp.float32))
  found = near_best(scores, None, None, {}, jitter=0.1)
  np.testing.assert_array_equal(found.select > -np.inf, np.bool_(near))
  weights = np.exp(z) * near
  np.testing.assert_allclose(found.probs, weights / weights.sum(), rtol=1e-6)
  np.testing.assert_array_equal(found.logits, scores.logits)


# The whole layer.


def test_omega_is_born_1_and_multiplies():
  config = tiny()
  y = np.random.default_rng(0).standard_normal((2, 3, 16), np.float32)
  module = Scaled(config, config.moe)
  params = module.init(jax.random.key(0), y, y, None)['params']
  omega = jax.tree.leaves(params)[0]
  assert omega.shape == (16,) and (omega == 1).all()
  (found, aside) = module.apply({'params': {'scale': 2 * omega}}, y, y, None)
  np.testing.assert_array_equal(found, 2 * y)
  assert aside == {}


def test_a_step_and_an_evaluation():
  model = steps.encoder(
    2,
    group_size=8,
    moe={
      **steps.CALM,
      'shaping': (Part.of('near_best', jitter=0.4),),
      'selector': Part.of('mixed_sampling', k=1),
      'beside': Part('scaled'),
      'losses': (Part.of('load_balance', weight=1e-2),),
    },
  )
  run = steps.Run(steps.config_of(model))
  metrics = run.take()
  assert np.isfinite(metrics['loss'])
  assert metrics['encoder/load'].sum() == 2 * 48
  layer = 'encoder/layers/layer_0/moe/'
  assert all(run.moved()[layer + p] for p in ('shared/scale', 'router/kernel'))
  assert paths.role(f'{layer}shared/scale') == 'norms'
  # Evaluation draws nothing.
  assert_trees_close(*steps.both_ways(model, train=False), tolerance=2e-6)


def test_the_config():
  file = 'configs/methods/sparse_mixer.py'
  second = config_file.load(f'{file}:runlocal').model
  third = config_file.load(f'{file}:runlocal,k=2').model
  for model in (second, third):
    parts.check(model)
  assert second.moe.shaping == (Part.of('near_best', jitter=0.1),)
  assert third.moe.selector == Part.of('mixed_sampling', k=2, jitter=0.1)
  assert third.moe.shaping == ()
  base = config_file.load(f'{file}:base,runlocal').model
  assert base.moe.beside == Part('nothing') != second.moe.beside
