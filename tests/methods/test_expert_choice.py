"""Experts that choose their tokens, against plain loops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Capacity, Part, StackConfig
from st_moe.model import parts
from st_moe.model.dispatch import DISPATCHERS
from st_moe.model.moe import MoE
from st_moe.model.rows import Room
from st_moe.routing.losses import load_balance, load_balance_all
from st_moe.routing.selectors import SELECTORS, dropless
from st_moe.routing.types import RouteContext, Routed, RouteOverride, Scores
from tests.helpers import (
  distance,
  jit,
  random_params,
  slow_expert,
  slow_softmax,
  tiny,
  with_moe,
)
from tests.methods import steps

G, S, E = 3, 12, 4


def _logits(seed=0, shape=(G, S, E)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def _compiled(name, capacity, **options):
  def select(logits, valid, bias):
    ctx = RouteContext(valid=valid)
    scores = Scores.of(logits).steered(RouteOverride(bias))
    return SELECTORS[name](scores, ctx, None, capacity, **options)

  return jit(select)


def _pick(
  logits, valid=None, *, name='expert_choice', capacity=99, bias=0, **o
):
  logits = np.asarray(logits, np.float32)
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  bias = np.broadcast_to(np.float32(bias), logits.shape[-1:])
  pick = _compiled(name, capacity, **o)
  return jax.device_get(pick(logits, valid, bias))


def _hand(probs, **options):
  """One group with these probabilities."""
  return _pick(np.log(np.maximum(np.float32([probs]), 1e-30)), **options)


def _table(seats, tokens):
  """What each expert took, expert by expert: {token: weight} of each."""
  found = [[{} for _ in seats.load[0]] for _ in seats.load]
  for g, n in np.ndindex(seats.place.shape):
    if seats.place[g, n] >= 0:
      taken = found[g][seats.expert[g, n]]
      assert seats.token[g, n] not in taken and seats.asked[g, n]
      assert seats.token[g, n] < tokens
      taken[int(seats.token[g, n])] = float(seats.weight[g, n])
  return found


def _slow(probs, there, places):
  """Experts in turn go down the list of tokens: {token: weight} of each.

  As Flaxformer's ExpertsChooseMaskedRouter, which takes the `top_k` of
  transposed probabilities; it takes padding last, and this never.
  """
  found = []
  for p, t, n in zip(probs, there, places, strict=True):
    group = []
    for e in range(p.shape[1]):
      queue = sorted(range(len(p)), key=lambda s: (-p[s, e], s))  # noqa: B023
      queue = [s for s in queue if t[s, e]][:n]
      group.append({s: float(p[s, e]) for s in queue})
    found.append(group)
  return found


def _assert_same(found, expected):
  for group, slow in zip(found, expected, strict=True):
    for taken, wanted in zip(group, slow, strict=True):
      assert [*taken] == [*wanted]  # In the order of places.
      np.testing.assert_allclose(
        [*taken.values()], [*wanted.values()], rtol=1e-5
      )


def test_by_hand():
  # Four tokens, two experts, one expert a token on the average: two each.
  seats = _hand([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]], k=1)
  np.testing.assert_array_equal(seats.token, [[0, 1, 3, 2]])
  np.testing.assert_array_equal(seats.expert, [[0, 0, 1, 1]])
  np.testing.assert_array_equal(seats.place, [[0, 1, 0, 1]])
  np.testing.assert_allclose(seats.weight, [[0.9, 0.8, 0.4, 0.3]], rtol=1e-5)
  np.testing.assert_array_equal(seats.load, [[2, 2]])
  assert seats.k == 0


@pytest.mark.parametrize(('k', 'places'), [(0.5, 2), (1, 3), (2, 6), (4, 12)])
def test_equals_flaxformers_router(k, places):
  # round(12 k / 4); 0.5: 1.5 goes to the even 2, as Python rounds.
  logits = _logits(seed=places)
  seats = _pick(logits, k=k)
  probs = slow_softmax(logits.astype(float))
  full = np.full(logits.shape, True)
  _assert_same(_table(seats, S), _slow(probs, full, [places] * G))
  assert (seats.load == places).all()
  # A token meets 0 to e experts, and its weights sum to at most 1.
  weights = np.asarray(seats.dense(S)).sum(-1)
  assert weights.min() >= 0 and weights.max() <= 1 + 1e-6
  if k == 4:
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_of_equals_the_earlier():
  seats = _hand([[0.5, 0.5]] * 4, k=1)
  np.testing.assert_array_equal(seats.token, [[0, 1, 0, 1]])


def test_padding_is_never_chosen_and_takes_no_place():
  valid = np.arange(S) < np.array([12, 7, 0])[:, None]
  logits = _logits(1)
  logits[~valid] += 5 * np.eye(E, dtype=np.float32)[0]  # Loud.
  seats = _pick(logits, valid, k=2)
  places = [6, 4, 0]  # round(7 * 2 / 4) is 4, of 3.5.
  assert seats.load.tolist() == [[n] * E for n in places]
  probs = slow_softmax(logits.astype(float))
  there = np.repeat(valid[..., None], E, -1)
  _assert_same(_table(seats, S), _slow(probs, there, places))
  # As the same row without padding.
  alone = _pick(logits[1:2, :7], k=2)
  _assert_same(_table(seats, S)[1:2], _table(alone, 7))


def test_no_place_beyond_the_capacity():
  seats = _pick(_logits(), k=2, capacity=4)
  assert (seats.load == 4).all() and seats.place.max() == 3
  assert _pick(_logits(), k=2, capacity=0).load.sum() == 0


def test_experts_are_steered_by_bias_alone():
  logits = _logits()
  off = _pick(logits, k=1, bias=[0, -np.inf, 0, 0])
  assert off.load.tolist() == [[3, 0, 3, 3]] * G
  assert (off.place[off.expert == 1] == -1).all()
  there = np.arange(E) != 1
  probs = slow_softmax(np.where(there, logits.astype(float), -np.inf))
  there = np.broadcast_to(there, logits.shape)
  _assert_same(_table(off, S), _slow(probs, there, [3] * G))
  ctx = RouteContext(valid=np.full((G, S), True))
  for asked in (dict(k=2), dict(rank=1)):
    given = ctx.replace(override=RouteOverride(jnp.zeros(E), **asked))
    with pytest.raises(ValueError, match='takes no k='):
      SELECTORS['expert_choice'](Scores.of(logits), given, None, 9, k=1)


def test_losses_of_seats_without_k():
  # Of p: the even 1. Of f: every expert has as many as the others.
  seats = _pick(np.zeros((1, 8, E)), k=2)
  ctx = RouteContext(valid=np.full((1, 8), True))
  scores = Scores.of(jnp.zeros((1, 8, E)))
  of = Routed(None, scores, seats, ctx, None, {})
  total, weight = load_balance_all(of)
  assert float(total / weight) == pytest.approx(2)
  total, weight = load_balance(of)
  assert float(total / weight) == pytest.approx(1)


# The dispatchers.


@pytest.mark.parametrize('kind', DISPATCHERS)
def test_every_dispatcher_brings_them_their_tokens(kind):
  # Values and all gradients, of a layer of linear experts.
  rng = np.random.default_rng(3)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  d, logits = 5, _logits(2)
  valid = np.arange(S) < np.array([12, 7, 3])[:, None]
  x, dy = normal(G, S, d), normal(G, S, d)
  experts = Linear(normal(E, d, d))

  def forward(x, logits, kernel):
    seats = SELECTORS['expert_choice'](
      Scores.of(logits), RouteContext(valid=valid), None, 6, k=2
    )
    y = DISPATCHERS[kind](x, seats, Linear(kernel), Room(6, E, 'auto'))
    return (y * dy).sum(), y

  slopes, y = jit(jax.grad(forward, (0, 1, 2), has_aux=True))(
    x, logits, experts.kernel
  )
  p = slow_softmax(logits.astype(float))
  there = np.repeat(valid[..., None], E, -1)
  taken = _slow(p, there, [6, 4, 2])
  want, dx, dp = np.zeros(x.shape), np.zeros(x.shape), np.zeros(p.shape)
  dkernel = np.zeros(experts.kernel.shape)
  for g, e in itertools.product(range(G), range(E)):
    for s in taken[g][e]:
      answer = x[g, s].astype(float) @ experts.kernel[e]
      want[g, s] += p[g, s, e] * answer
      dp[g, s, e] = dy[g, s] @ answer
      dx[g, s] += p[g, s, e] * experts.kernel[e] @ dy[g, s]
      dkernel[e] += p[g, s, e] * np.outer(x[g, s], dy[g, s])
  dlogits = p * (dp - (p * dp).sum(-1, keepdims=True))
  for found, expected in zip(
    (y, *slopes), (want, dx, dlogits, dkernel), strict=True
  ):
    assert distance(found, expected) < 1e-5


@jax.tree_util.register_pytree_node_class
class Linear:
  """Experts x W_e."""

  def __init__(self, kernel):
    self.kernel = kernel

  def tree_flatten(self):
    return (self.kernel,), None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)

  def __call__(self, x, expert):
    return self.answers(self.hidden(x, expert), expert).reshape(x.shape)

  def hidden(self, x, expert):
    return x.reshape(len(x), -1, x.shape[-1])

  def answers(self, hidden, expert):
    kernel = self.kernel if expert is None else self.kernel[expert]
    return jnp.einsum('bnd,bdf->bnf', hidden, kernel)


# Rows alone and beside others.


def _encoder(name='expert_choice', **options):
  selector = Part.of(name, k=2, **options)
  capacity = Capacity(1.0, times_k=True, rounding='ceil', minimum=1)
  return steps.encoder(
    moe={
      'selector': selector,
      'train_capacity': capacity,
      'eval_capacity': capacity,
      'losses': (Part.of('router_z', weight=1e-3),),
      'extra_ffn': 'none',
    }
  )


@functools.cache
def _layer(config, length):
  module = MoE(config, config.moe, 16)
  run = lambda params, x, valid: module.apply(
    {'params': params}, x, RouteContext(valid=valid)
  )
  return jit(run)


def test_an_answer_depends_on_its_row_alone():
  limited = _encoder()
  assert limited.moe.group_by == 'tokens'
  free = dropless(limited)
  assert free.moe.group_by == 'sequence'
  ctx = RouteContext(valid=np.full((2, 8), True))
  x = _logits(4, (2, 8, 16))
  params = random_params(MoE(free, free.moe, 16), x, ctx)
  valid = np.arange(8) < np.array([5, 8])[:, None]
  run = lambda config, x, valid: np.asarray(
    _layer(config, x.shape[1])(params, x, valid)
  )
  both = run(free, x, valid)
  # Beside another row, and with more padding behind it.
  moved = np.concatenate([x[:1], -x[1:]])
  np.testing.assert_array_equal(run(free, moved, valid)[0], both[0])
  long = np.pad(x, [(0, 0), (0, 4), (0, 0)], constant_values=3)
  np.testing.assert_allclose(
    run(free, long, np.arange(12) < valid.sum(1)[:, None])[:, :8],
    both,
    atol=1e-5,
  )
  # Which is not so where rows compete.
  assert distance(run(limited, moved, valid)[0], both[0]) > 1e-3
  # And the layer as loops have it: round(5 * 2 / 4) places, half to even.
  p = slow_softmax(x[0].astype(float) @ params['router']['kernel'])
  want = np.zeros((8, 16))
  taken = _slow(p[None], np.repeat(valid[:1, :, None], E, -1), [2])[0]
  for e, tokens in enumerate(taken):
    for s, w in tokens.items():
      want[s] += w * slow_expert(
        params['experts'], e, x[0, s].astype(float), 'geglu'
      )
  assert distance(both[0], want) < 1e-5


def test_top_k_keeps_its_groups():
  # Of two stacks only the one whose experts choose.
  model = tiny(
    encoder=StackConfig(2, 2, 1, 16, moe=_encoder().moe),
    decoder=StackConfig(2, 2, 1, 8),
  )
  free = dropless(model)
  assert free.moe_of('encoder').group_by == 'sequence'
  assert free.moe_of('decoder').group_by == 'tokens'
  assert dropless(tiny()).moe.group_by == 'tokens'


def test_a_decoder_has_none():
  model = tiny(moe={'selector': Part.of('expert_choice', k=2)})
  with pytest.raises(ValueError, match='looks ahead'):
    parts.check(model)
  forced = Part.of('expert_choice', k=2, force=True)
  parts.check(with_moe(model, selector=forced))


def test_sizes_that_cannot_be():
  refused = lambda name, **o: with_moe(
    _encoder(), selector=Part.of(name, **o), num_experts=4
  )
  with pytest.raises(ValueError, match='it must be at most 4'):
    parts.check(refused('expert_choice', k=4.5))
  with pytest.raises(ValueError, match='at least k'):
    parts.check(refused('capped_choice', k=2, most=1))
  with pytest.raises(ValueError, match='above 0'):
    parts.check(refused('expert_choice', k=0.0))


def test_capacity_of_half_an_expert():
  moe = with_moe(_encoder(), selector=Part.of('expert_choice', k=0.5)).moe
  assert moe.slots(16, deterministic=False) == 2
  assert moe.expected_k == 0.5


# With a cap on the experts of a token.


def _capped(logits, valid=None, **options):
  return _pick(logits, valid, **{'name': 'capped_choice', 'k': 2, **options})


def _per_token(seats):
  return np.asarray(seats.chosen(S)).sum(-1)


def test_no_token_meets_more_than_most():
  logits = 3 * _logits(5)
  free = _pick(logits, k=2)
  assert _per_token(free).max() > 2  # Or there would be nothing to cap.
  for most, temperature in [(2, 1e-3), (3, 1e-3), (2, 1.0)]:
    seats = _capped(logits, most=most, temperature=temperature)
    assert _per_token(seats).max() <= most
    # The last experts may find too few: all 24 places of most = 2 are wanted.
    assert (seats.load == 6).all() or most == 2 and seats.load.min() >= 5
    _table(seats, S)  # Nobody twice.
  padded = _capped(logits, np.arange(S) < np.array([12, 7, 0])[:, None], most=2)
  # Seven tokens have 14 places to give, of the 16 that are wanted.
  assert padded.load[1].max() == 4 and 12 <= padded.load[1].sum() <= 14
  assert not padded.load[2].any()
  assert not _per_token(padded)[1:, 7:].any()


def test_a_cap_of_all_is_none():
  logits = _logits(6)
  free, capped = _pick(logits, k=1), _capped(logits, k=1, most=E)
  jax.tree.map(np.testing.assert_array_equal, free, capped)


def test_tokens_alike_are_shared_out():
  # Each of the same probabilities; the first two experts have the first.
  seats = _capped(np.log([[[0.4, 0.3, 0.2, 0.1]] * 4]), k=2, most=2)
  np.testing.assert_array_equal(
    seats.token.reshape(E, 2), [[0, 1], [0, 1], [2, 3], [2, 3]]
  )


def test_together_they_take_the_best():
  # Of all ways in which 3 experts take 2 of 6 tokens, no token twice.
  logits = 2 * _logits(7, (8, 6, 3))
  probs = slow_softmax(logits.astype(float))
  seats = _capped(logits, k=1, most=1, sweeps=2000)
  value = np.asarray(seats.dense(6)).sum((1, 2))
  pairs = [*itertools.combinations(range(6), 2)]
  for p, found in zip(probs, value, strict=True):
    best = max(
      sum(p[list(pair), e].sum() for e, pair in enumerate(three))
      for three in itertools.permutations(pairs, 3)
      if len({*itertools.chain(*three)}) == 6
    )
    assert found == pytest.approx(best, abs=1e-4)
  # Which the greedy do not: each takes its two best of what is left.
  greedy = np.asarray(_capped(logits, k=1, most=1, sweeps=1).dense(6))
  assert greedy.sum((1, 2)).max() < value.max() + 1e-6
  assert (greedy.sum((1, 2)) < value - 1e-3).any()


def _dykstra(score, count, most, sweeps):
  """The relaxed assignment [e, s], by projections with their corrections."""
  a = np.exp(score)
  left = [np.ones_like(a) for _ in range(3)]
  projections = (
    lambda a: a * count / a.sum(1, keepdims=True),
    lambda a: a * np.minimum(1, most / a.sum(0)),
    lambda a: np.minimum(a, 1),
  )
  for _ in range(sweeps):
    for i, project in enumerate(projections):
      before = a * left[i]
      a = project(before)
      left[i] = before / a
  return a


def test_the_order_is_that_of_dykstras_projections():
  logits = 2 * _logits(8)
  seats = _capped(logits, most=2, temperature=0.1, sweeps=20)
  probs = slow_softmax(logits.astype(float))
  for p, taken in zip(probs, _table(seats, S), strict=True):
    a = _dykstra(p.T / 0.1, 6, 2, 20)
    assert a.max() <= 1 and a.sum(0).max() < 2.2
    left = np.full(S, 2)
    for e in range(E):
      queue = sorted(range(S), key=lambda s: -round(a[e, s], 9))  # noqa: B023
      queue = [s for s in queue if left[s]][:6]
      left[queue] -= 1
      assert {*taken[e]} == {*queue}
      for s in queue:  # Weights are probabilities, not the assignment's.
        assert taken[e][s] == pytest.approx(p[s, e], rel=1e-5)


# Steps.


def test_it_trains_and_evaluates():
  # The capped one, which is the other and more.
  run = steps.Run(steps.config_of(_encoder('capped_choice', most=3)))
  first = run.take()
  assert first['encoder/dropped_routes'] == 0
  assert first['encoder/active_experts'] == pytest.approx(2, abs=0.1)
  assert run.take(10)['cross_entropy'] < first['cross_entropy']
  assert 0 < run.evaluated() < first['cross_entropy']


@pytest.mark.parametrize(
  ('name', 'selector'),
  [
    ('expert_choice', Part.of('expert_choice', k=2)),
    ('capped_expert_choice', Part.of('capped_choice', k=2, most=2)),
  ],
)
def test_the_config_says_the_method_and_no_more(name, selector):
  load = lambda arg: config_file.load(f'configs/methods/{name}.py{arg}')
  model = load('').model
  encoder, decoder = model.moe_of('encoder'), model.moe_of('decoder')
  assert encoder.selector == selector and encoder.num_experts == 8
  assert [loss.name for loss in encoder.losses] == ['router_z']
  assert encoder.slots(1024, deterministic=False) == 1024 * 2 // 8
  assert decoder == load(':base').model.moe_of('decoder')
  parts.check(model)
  changed = config_file.diff(
    *(config_file.to_dict(load(a)) for a in (':base,runlocal', ':runlocal'))
  )
  assert all(line.startswith('model.encoder.moe') for line in changed)
