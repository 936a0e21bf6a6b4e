"""V-MoE: noise, places by score or by lot, importance and load."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Part, StackConfig
from st_moe.model import parts
from st_moe.routing import losses, shaping
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, Routed, Scores, Seats
from tests.helpers import jit, method_lines, slow_softmax, tiny
from tests.methods import steps

G, S, E = 2, 12, 4


def _logits(seed=0, shape=(G, S, E)):
  # Expert 0 is liked most, so that places run out.
  drawn = np.random.default_rng(seed).normal(size=shape)
  return (1.5 * drawn - 0.7 * np.arange(shape[-1])).astype(np.float32)


def _valid(seed=0):
  valid = np.random.default_rng(seed).random((G, S)) < 0.8
  valid[:, 0] = True
  return valid


@functools.cache
def _compiled(train, **options):
  def pick(logits, valid, key):
    ctx = RouteContext(valid=valid, deterministic=not train)
    return top_k(Scores.of(logits), ctx, key, **options)

  return jit(pick)


def _pick(logits, valid=None, *, train=False, key=0, **options):
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  options = {'normalize': False, 'train_policy': 'all', **options}
  pick = _compiled(train, **options)
  return jax.device_get(pick(logits, valid, jax.random.key(key)))


def _seated(seats, s=S):
  """bool [g, s, e]: which token sits at which expert."""
  return np.asarray(seats.scattered(1.0 * (seats.place >= 0), s)) > 0


# Noise.


def _noisy(
  logits, *, std=1.0, train=True, step=None, before=None, key=0, out=0.0
):
  """Scores without noise and with it; a gate may have drawn some `before`."""
  valid = np.full(logits.shape[:2], True)
  ctx = RouteContext(valid, deterministic=not train, step=step)
  aside = {} if before is None else {'std': jnp.full(logits.shape, before)}
  scores = Scores.of(jnp.asarray(logits), **aside).plus(out)
  rng = None if key is None else jax.random.key(key)
  return scores, shaping.noise(scores, ctx, rng, {}, std=std)


def test_noise_on_the_logits_is_what_choice_and_weights_hear():
  logits = _logits(shape=(1, 4000, E))
  plain, noisy = _noisy(logits, std=2.0)
  drawn = np.asarray(noisy.select - logits)
  # Deviation 2 / 4, to four of its own errors, sqrt(1 / (2 * 16000)).
  assert drawn.std() == pytest.approx(0.5, rel=0.023)
  assert abs(drawn.mean()) < 0.016
  np.testing.assert_array_equal(noisy.logits, logits)
  np.testing.assert_allclose(
    noisy.probs, slow_softmax(logits + drawn), rtol=3e-6
  )
  np.testing.assert_array_equal(noisy.aside['std'], np.full(logits.shape, 0.5))
  assert 'std' not in plain.aside


def test_no_noise_in_evaluation_nor_of_deviation_0():
  for quiet in ({'train': False}, {'std': 0.0}):
    scores, found = _noisy(_logits(), **quiet)
    assert found is scores


def test_noise_by_a_schedule_and_on_top_of_other_noise():
  std = Part.of('linear', start=4.0, end=0.0, steps=100)
  _, found = _noisy(_logits(), std=std, step=25)
  np.testing.assert_allclose(found.aside['std'], 0.75)
  _, found = _noisy(_logits(), std=3.0, before=1.0)
  np.testing.assert_allclose(found.aside['std'], 1.25)
  with pytest.raises(ValueError, match="'noise' draws numbers: pass rngs="):
    _noisy(_logits(), key=None)


def test_noise_brings_nobody_back_who_was_ruled_out():
  out = np.array([0, -np.inf, 0, 0])
  _, found = _noisy(_logits(), std=9.0, out=out)
  assert (np.asarray(found.select[..., 1]) == -np.inf).all()
  assert np.asarray(found.probs[..., 1]).max() < 1e-30
  np.testing.assert_allclose(found.probs.sum(-1), 1, rtol=1e-6)


# Who is seated first.


def _by_score(probs, valid, k, capacity):
  """bool [g, s, e]: tokens in the order of their best probability.

  As the masked router of Flaxformer does: all first choices, then all second.
  """
  seated = np.zeros(probs.shape, bool)
  for g in range(len(probs)):
    tokens = [t for t in range(probs.shape[1]) if valid[g, t]]
    tokens.sort(key=lambda t: -probs[g, t].max())  # noqa: B023
    count = [0] * probs.shape[2]
    for choice in range(k):
      for t in tokens:
        e = np.argsort(-probs[g, t], kind='stable')[choice]
        if count[e] < capacity:
          count[e] += 1
          seated[g, t, e] = True
  return seated


@pytest.mark.parametrize(('k', 'capacity'), [(1, 2), (2, 3), (3, 1)])
def test_the_surest_tokens_are_seated_first(k, capacity):
  options = dict(k=k, capacity=capacity, priority='score')
  for seed in range(5):
    logits, valid = _logits(seed), _valid(seed)
    options['train'] = k == 2  # The same in training.
    probs = slow_softmax(logits)
    expected = _by_score(probs, valid, k, capacity)
    seats = _pick(logits, valid, **options)
    np.testing.assert_array_equal(_seated(seats), expected)
    np.testing.assert_allclose(
      seats.dense(S), np.where(expected, probs, 0), rtol=3e-6
    )


def test_a_token_that_is_torn_is_not_a_sure_one():
  # Shares of the pair: 0.9 of [0.45, 0.05], and 0.6 of [0.6, 0.4].
  torn = [0.45, 0.05, 0.0, 0.0] + [0.05] * 10
  logits = np.log(np.maximum([[torn, [0.6, 0.4] + [0.0] * 12]], 1e-30))
  options = dict(k=2, capacity=1, priority='score', normalize=True)
  seats = _pick(logits.astype('f4'), **options)
  assert _seated(seats, 2)[0, :, 0].tolist() == [False, True]
  assert seats.weight[0, 0] == pytest.approx(0.9, rel=1e-5)


def test_equals_sit_left_to_right():
  seats = _pick(np.zeros((1, 5, E), 'f4'), k=1, capacity=3, priority='score')
  assert seats.place.tolist() == [[0, 1, 2, -1, -1]]


def test_the_dropped_are_the_lowest_scores():
  logits = _logits(3)
  best, first = slow_softmax(logits).max(-1), logits.argmax(-1)
  sits = _seated(_pick(logits, k=1, capacity=2, priority='score')).any(-1)
  assert not sits.all()
  for g in range(G):
    for e in range(E):
      mine = first[g] == e
      dropped, kept = best[g][mine & ~sits[g]], best[g][mine & sits[g]]
      assert len(kept) == min(2, mine.sum())
      assert not len(dropped) or dropped.max() < kept.min()


def test_tokens_in_another_order_get_the_same_answers():
  logits, order = _logits(1), np.random.default_rng(0).permutation(S)
  move = lambda priority: (
    _pick(logits[:, order], k=2, capacity=2, priority=priority).dense(S),
    _pick(logits, k=2, capacity=2, priority=priority).dense(S)[:, order],
  )
  np.testing.assert_array_equal(*move('score'))
  moved, still = move('position')
  assert (np.asarray(moved) != np.asarray(still)).any()


@pytest.mark.parametrize('priority', ['score', 'random'])
def test_where_all_find_a_place_the_order_is_moot(priority):
  logits, valid = _logits(2), _valid(2)
  options = dict(k=2, capacity=S, train=True, train_policy='random')
  plain = _pick(logits, valid, **options)
  found = _pick(logits, valid, priority=priority, **options)
  # To the bit: the policy for second choices draws what it drew.
  np.testing.assert_array_equal(found.dense(S), plain.dense(S))


def test_by_lot_every_token_is_as_likely_to_sit():
  # 8 ask for 3 places, in 1000 groups: 0.375 each, to four deviations.
  logits = np.zeros((1000, 8, E), np.float32)
  options = dict(k=1, capacity=3, priority='random')
  sits = _pick(logits, train=True, **options).place >= 0
  assert (sits.sum(1) == 3).all()
  np.testing.assert_allclose(sits.mean(0), 3 / 8, atol=0.062)
  # In evaluation nothing is drawn.
  sits = _pick(logits[:1], **options).place >= 0
  assert sits.tolist() == [[True] * 3 + [False] * 5]


def test_the_lot_knows_nothing_of_the_policy():
  # Half of the tokens keep their second choice in one of four cases, half in
  # all, and about five ask for two places. By the draw of the policy those few
  # would all sit.
  probs = np.zeros((1000, 8, E))
  probs[:, :4, :2], probs[:, 4:, :2] = [0.95, 0.05], [0.75, 0.25]
  logits = np.log(np.maximum(probs, 1e-30)).astype(np.float32)
  options = dict(k=2, capacity=2, priority='random', train_policy='random')
  seats = _pick(logits, train=True, **options)
  asked, sits = (
    a.reshape(1000, 8, 2)[:, :4, 1] for a in (seats.asked, seats.place >= 0)
  )
  assert asked.mean() == pytest.approx(0.25, abs=0.03)
  assert sits.sum() / asked.sum() < 0.5


def test_priorities_that_cannot_be():
  pick = functools.partial(
    top_k, Scores.of(jnp.zeros((1, 2, E))), capacity=1, k=1, rng=None
  )
  ctx = RouteContext(np.full((1, 2), True), deterministic=False)
  with pytest.raises(ValueError, match="'best' is none of position, score"):
    pick(ctx, priority='best')
  with pytest.raises(ValueError, match="'random' draws numbers: pass rngs="):
    pick(ctx, priority='random')


def test_a_decoder_takes_no_order_that_looks_ahead():
  def check(**options):
    parts.check(tiny(moe={'selector': Part.of('top_k', k=2, **options)}))

  for priority in ('position', 'random'):
    check(priority=priority)
  with pytest.raises(ValueError, match="selector = 'top_k' looks ahead"):
    check(priority='score')
  check(priority='score', force=True)
  # The one of the config is the encoder's alone.
  model = config_file.load('configs/methods/vmoe.py:runlocal').model
  parts.check(model)
  of = lambda stack: model.moe_of(stack).selector.kwargs.get('priority')
  assert (of('encoder'), of('decoder')) == ('score', None)
  alike = {**model.moe_of('encoder').selector.kwargs}
  del alike['priority']
  assert alike == model.moe.selector.kwargs


# Losses.


@functools.cache
def _compiled_loss(loss, k, quiet, normalize, **options):
  def total(logits, noise, std, valid):
    scores = Scores.of(logits, **({} if quiet else {'std': std})).plus(noise)
    ctx = RouteContext(valid=valid)
    seats = top_k(scores, ctx, None, 1, k=k, normalize=normalize)
    routed = Routed(None, scores, seats, ctx, None, {})
    return losses.LOSSES[loss](routed, **options)

  return jit(jax.value_and_grad(total, has_aux=True))


def _loss(
  loss, logits, noise=0.0, std=None, *, valid=None, k=2, normalize=True, **kw
):
  """(sum, weight, slope), as if `noise` of deviation `std` had been drawn."""
  logits = np.asarray(logits, np.float32)
  wide = lambda a: np.broadcast_to(np.float32(a), logits.shape)
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  run = _compiled_loss(loss, k, std is None, normalize, **kw)
  (total, weight), slope = run(logits, wide(noise), wide(std or 0), valid)
  return float(total), float(weight), np.asarray(slope)


def _cv2(sums):
  return np.var(sums) / np.mean(sums) ** 2


def test_importance_by_hand():
  # Weights 1, 1 and 1 of expert 0, 1 of expert 1: [3, 1] has mean 2 and
  # variance 1. One place each: drops do not count.
  logits = 20 * np.array([[[1, 0], [1, 0], [1, 0], [0, 1]]])
  total, weight, _ = _loss('importance', logits, k=1)
  assert (total / weight, weight) == (pytest.approx(0.25), 4)
  # Even, and all padding.
  assert _loss('importance', np.eye(4)[None], k=1)[0] < 1e-9
  none = np.full((1, 4), False)
  assert _loss('importance', logits, k=1, valid=none)[:2] == (0, 0)


def test_importance_of_what():
  # Two tokens, choices [0, 1] and [0, 2] of 3; noise swaps the first's.
  probs = np.array([[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]])
  noise = np.log([[[0.3 / 0.5, 0.5 / 0.3, 1], [1, 1, 1]]])
  expected = {
    'weights': [0.3 + 0.6, 0.5, 0.3],
    'probs': [0.3 + 0.6, 0.5 + 0.1, 0.2 + 0.3],
    'logits': [0.5 + 0.6, 0.3 + 0.1, 0.2 + 0.3],
  }
  for by, sums in expected.items():
    measured = _loss('importance', np.log(probs), noise, normalize=False, by=by)
    assert measured[0] / 2 == pytest.approx(_cv2(sums), rel=1e-5)


def _slow_load(logits, noisy, std, valid, k, exclude):
  """Of one group, expert by expert."""
  sums = np.zeros(logits.shape[1])
  for t in np.flatnonzero(valid):
    for e in range(len(sums)):
      others = np.delete(noisy[t], e) if exclude else noisy[t]
      bar = sorted(others, reverse=True)[k - 1]
      z = (logits[t, e] - bar) / std
      sums[e] += (1 + math.erf(z / math.sqrt(2))) / 2
  return _cv2(sums)


@pytest.mark.parametrize('exclude', [True, False])
@pytest.mark.parametrize('k', [1, 3])
def test_load_equals_the_plain_loop(k, exclude):
  logits, valid, std = _logits(4), _valid(4), 0.5
  noise = std * np.random.default_rng(5).normal(size=logits.shape)
  total, weight, slope = _loss(
    'load', logits, noise, std, valid=valid, k=k, exclude=exclude
  )
  each = [
    _slow_load(logits[g], (logits + noise)[g], std, valid[g], k, exclude)
    * valid[g].sum()
    for g in range(G)
  ]
  assert total == pytest.approx(sum(each), rel=1e-5)
  assert weight == valid.sum()
  assert slope[valid].any(-1).all() and not slope[~valid].any()


def test_load_has_a_slope_where_counts_are_flat():
  # Expert 1 is never chosen, and still the slope says how to change that: P =
  # Phi(1) and Phi(-1), CV^2 = (2 Phi(1) - 1)^2.
  logits = np.tile([1.0, 0.0], (1, S, 1))
  total, _, slope = _loss('load', logits, std=1.0, k=1)
  assert total / S == pytest.approx(math.erf(0.5**0.5) ** 2, rel=1e-5)
  assert (slope[..., 0] > 0.1).all() and (slope[..., 1] < -0.1).all()


def test_load_at_its_edges():
  # Nobody drew noise: nothing to weigh, as in evaluation.
  assert _loss('load', _logits())[:2] == (0, 0)
  # All are chosen, come what may: even.
  assert _loss('load', _logits(), std=1.0, k=E)[0] == 0
  # Two are ruled out: they get none, the two that are left all: variance 1 / 4
  # over mean 1 / 4, whatever the logits.
  out = np.array([0, 0, -np.inf, -np.inf])
  total, weight, slope = _loss('load', _logits(), out, std=1.0)
  assert total == pytest.approx(weight) and not slope.any()
  # A deviation that has underflowed is no division by 0.
  assert np.isfinite(_loss('load', _logits(), std=1e-45)[2]).all()


def test_load_needs_tokens_that_choose():
  scores = Scores.of(jnp.zeros((1, 2, E)), std=jnp.ones((1, 2, E)))
  seats = Seats(*[None] * 6, k=0)  # An expert picked.
  with pytest.raises(ValueError, match="'load' asks how likely a token"):
    losses.load(Routed(None, scores, seats, None, None, {}))


# The whole.


def test_a_model_trains_and_evaluates():
  loaded = config_file.load('configs/methods/vmoe.py:runlocal').model
  stack = StackConfig(1, 1, 0, group_size=16, moe=loaded.encoder.moe)
  model = tiny(encoder=stack, decoder=None)
  run = steps.Run(steps.config_of(model))
  found, evaluated = run.take(), run.terms()
  routers = 5e-3 * (found['importance'] + found['load'])
  plain = found['cross_entropy'] + 1e-4 * found['z_loss']
  assert float(found['loss']) == pytest.approx(float(plain + routers), rel=1e-5)
  assert found['load'] > 0
  assert all(run.moved().values())
  assert not evaluated['load'][1].any()
  assert np.isfinite(evaluated['cross_entropy'][0])


def test_the_config_changes_the_method_alone():
  encoder, *lines = method_lines('vmoe')
  assert encoder.startswith('model.encoder.moe: None -> ')
  assert lines == [
    'model.moe.eval_capacity.factor: 2.0 -> 1.05',
    "model.moe.eval_capacity.rounding: 'floor' -> 'ceil'",
    'model.moe.eval_capacity.times_k: False -> True',
    "model.moe.extra_ffn: 'after' -> 'none'",
    "model.moe.losses.importance: None -> {'by': 'logits', 'weight': 0.005}",
    "model.moe.losses.load: None -> {'exclude': False, 'weight': 0.005}",
    "model.moe.losses.load_balance: {'weight': 0.01} -> None",
    "model.moe.losses.router_z: {'weight': 0.001} -> None",
    'model.moe.selector.normalize: None -> False',
    "model.moe.selector.train_policy: None -> 'all'",
    "model.moe.shaping.noise: None -> {'std': 1.0}",
    'model.moe.train_capacity.factor: 1.25 -> 1.05',
    "model.moe.train_capacity.rounding: 'floor' -> 'ceil'",
    'model.moe.train_capacity.times_k: False -> True',
  ]
  # Places: ceil(1.05 * 2 * 512 / 32) = ceil(33.6).
  moe = config_file.load('configs/methods/vmoe.py').model.moe
  assert moe.train_capacity.slots(512, 32, k=2) == 34
