"""Laws of gates, shapings, selectors and weighings, on tokens one can count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.model import parts
from st_moe.model.dispatch import DISPATCHERS
from st_moe.model.rows import Room
from st_moe.routing.types import RouteOverride, Scores
from tests.conformance import chain, tables
from tests.conformance.chain import KEYS, TOKENS, VALID
from tests.helpers import jit

every = lambda *kinds: pytest.mark.parametrize(
  'case', tables.of(*kinds), ids=str
)
OTHER = np.random.default_rng(8).standard_normal(chain.WIDTH)


def _check_scores(scores: Scores, case):
  shape = *VALID.shape, case.moe.num_experts
  for role in (scores.logits, scores.select, scores.probs):
    assert role.shape == shape and role.dtype == jnp.float32
  assert (scores.probs >= 0).all() and (scores.probs <= 1 + 1e-6).all()
  for role in (scores.logits, scores.select):  # -inf rules an expert out.
    assert not (jnp.isnan(role) | (role == jnp.inf)).any()


# Gates.


@every('gate')
def test_a_gate_scores_in_three_roles(case):
  for x in (chain.inputs(), 1e4 * chain.inputs(), 0 * chain.inputs()):
    for train in (True, False):
      ctx = chain.context(train=train)
      _check_scores(chain.gate(case)(x, ctx, KEYS[0]), case)


@every('gate')
def test_a_gate_hears_of_no_padding_and_nothing_ahead(case):
  x, ctx = chain.inputs(), chain.context()
  ask = lambda x: chain.gate(case)(x, ctx)
  roles = lambda s: np.stack([s.logits, s.select, s.probs])
  before = roles(ask(x))
  padded = roles(ask(x.at[1, 6].set(OTHER)))
  np.testing.assert_array_equal(padded[:, VALID], before[:, VALID])
  later = roles(ask(x.at[0, 5].set(OTHER)))
  if case.about.causal:
    np.testing.assert_array_equal(later[:, 0, :5], before[:, 0, :5])
  np.testing.assert_array_equal(later[:, 1], before[:, 1])


# Shapings.


def _shape(case, scores, ctx, seed=None, key=KEYS[0]):
  return case.made(scores, ctx, key, chain.kept(case, seed))


@every('shaping')
@pytest.mark.parametrize('train', [True, False])
def test_a_shaping_keeps_the_shape_and_calls_nobody_back(case, train):
  ctx = chain.context(train=train)
  for kind in ('plain', 'even', 'few'):
    before = chain.random_scores(case, kind, ctx)
    after = _shape(case, before, ctx, seed=5)
    _check_scores(after, case)
    out = before.select == -jnp.inf
    assert (after.select[out] == -jnp.inf).all()


@every('shaping')
def test_a_shaping_hears_of_no_padding_and_nothing_ahead(case):
  ctx = chain.context()
  scores = chain.scores(case, ctx, until=case.part)
  roles = lambda s: np.stack([s.logits, s.select, s.probs])
  before = roles(_shape(case, scores, ctx, 5))

  def changed(g, s):
    put = lambda a: a.at[g, s].set(jnp.roll(a[g, s], 1))
    other = Scores(*map(put, (scores.logits, scores.select, scores.probs)))
    return roles(_shape(case, other.replace(aside=scores.aside), ctx, 5))

  np.testing.assert_array_equal(changed(1, 6)[:, VALID], before[:, VALID])
  if case.about.causal:
    after = changed(0, 5)
    np.testing.assert_array_equal(after[:, 0, :5], before[:, 0, :5])


def _chosen(scores):
  """Who would be asked, and how they would be weighed and judged."""
  order = np.argsort(-np.asarray(scores.select), axis=-1, kind='stable')
  return order, scores.probs, scores.logits


@every('shaping')
def test_a_shaping_is_its_base_at_its_neutral_and_else_is_not(case):
  ctx = chain.context(train=True)
  before = chain.scores(case, ctx, until=case.part)
  if isinstance(case.about.neutral, dict):
    neutral = case.at(**case.about.neutral)
    assert chain.same(_chosen(_shape(neutral, before, ctx)), _chosen(before))
  # With what it may have kept by then; early in a schedule it may be idle.
  late = [ctx.replace(step=jnp.int32(step)) for step in (0, 3, 10**6)]
  found = [_chosen(_shape(case, before, ctx, 5)) for ctx in late]
  assert not all(chain.same(each, _chosen(before)) for each in found)


# Selectors.


def _select(case, scores, ctx, capacity, key=KEYS[0]):
  return case.made(scores, ctx, key, capacity)


def _check_seats(seats, scores, ctx, capacity, e):
  """Every law of `Seats`, route by route."""
  token, expert, asked, place, weight = map(
    np.asarray,
    (seats.token, seats.expert, seats.asked, seats.place, seats.weight),
  )
  select, valid = np.asarray(scores.select), np.asarray(ctx.valid)
  assert weight.dtype == np.float32 and np.isfinite(weight).all()
  assert place.dtype == np.asarray(seats.load).dtype == np.int32
  for g in range(len(token)):
    taken, met, load = set(), set(), np.zeros(e, int)
    for n in range(token.shape[1]):
      t, x, p = token[g, n], expert[g, n], place[g, n]
      if not asked[g, n]:
        assert p == -1
        continue
      assert valid[g, t], 'padding asks for a place'
      assert 0 <= t < TOKENS and 0 <= x < e and -1 <= p < capacity
      assert (t, x) not in met, 'a token meets an expert twice'
      met.add((t, x))
      if p >= 0:
        assert select[g, t, x] > -np.inf, 'who was ruled out is seated'
        assert (x, p) not in taken, 'a place is taken twice'
        taken.add((x, p))
        load[x] += 1
    np.testing.assert_array_equal(seats.load[g], load)
  if seats.k:
    s = np.repeat(np.arange(TOKENS), seats.k)
    np.testing.assert_array_equal(token, np.broadcast_to(s, token.shape))


def _sizes(case):
  """As it is, and asking one or all, where it has a k and can."""
  yield case
  if 'k' in case.part.kwargs:
    for k in {1, case.moe.num_experts} - {case.part.kwargs['k']}:
      yield case.at(k=k)


@every('selector')
@pytest.mark.parametrize('kind', ['plain', 'even', 'few', 'padding'])
def test_seats_keep_their_laws(case, kind):
  e, valid = case.moe.num_experts, VALID
  if kind == 'padding':
    kind, valid = 'plain', np.full(VALID.shape, False)
  for train in (True, False):
    ctx = chain.context(train=train, valid=valid)
    scores = chain.random_scores(case, kind, ctx)
    for sized in _sizes(case):
      for capacity in (1, 3, TOKENS):
        try:
          seats = _select(sized, scores, ctx, capacity)
        except ValueError as e_:
          assert sized is not case and 'k' in str(e_)
          continue
        _check_seats(seats, scores, ctx, capacity, e)
        if not valid.any():
          assert not seats.asked.any() and not seats.load.any()


@every('selector')
def test_padding_and_later_tokens_move_no_seat(case):
  ctx = chain.context()
  scores = chain.random_scores(case, 'plain', ctx)
  seats = _select(case, scores, ctx, TOKENS)
  dense = np.asarray(seats.dense(TOKENS))

  def changed(g, s):
    put = lambda a: a.at[g, s].set(jnp.roll(a[g, s], 1))
    other = Scores(*map(put, (scores.logits, scores.select, scores.probs)))
    other = other.replace(aside=scores.aside)
    return np.asarray(_select(case, other, ctx, TOKENS).dense(TOKENS))

  np.testing.assert_array_equal(changed(1, 6), dense)
  after = changed(0, 5)
  np.testing.assert_array_equal(after[1], dense[1])
  if case.about.causal:
    np.testing.assert_array_equal(after[0, :5], dense[0, :5])


@every('selector')
def test_an_override_is_followed_or_refused(case):
  ctx, e = chain.context(), case.moe.num_experts
  scores = chain.random_scores(case, 'plain', ctx)
  bias = np.zeros(e, np.float32)
  bias[1] = -np.inf
  override = RouteOverride(jnp.asarray(bias))
  steered = ctx.replace(override=override)
  seats = _select(case, scores.steered(override), steered, TOKENS)
  assert not (seats.asked & (seats.expert == 1) & (seats.place >= 0)).any()
  best = np.asarray(scores.select.argmax(-1))
  for k, rank in ((1, 0), (1, 1), (2, 0)):
    override = RouteOverride(jnp.zeros(e), k, rank)
    try:
      found = _select(case, scores, ctx.replace(override=override), TOKENS)
    except ValueError as error:
      assert 'override' in str(error) or 'k' in str(error)
      continue
    asked = np.asarray(found.chosen(TOKENS))
    assert asked.sum(-1).max() <= k
    if rank:  # The best of each is passed over.
      assert not np.take_along_axis(asked, best[..., None], -1).any()


def _loop(x, seats, bank, e):
  """Answers of every expert to every token, added up route by route."""
  flat = x.reshape(1, -1, x.shape[-1]).repeat(e, axis=0)
  answers = np.asarray(bank(flat), np.float64).reshape(e, *x.shape)
  y = np.zeros(x.shape)
  routes = (seats.token, seats.expert, seats.weight, seats.place)
  token, expert, weight, place = map(np.asarray, routes)
  for g, n in np.argwhere(place >= 0):
    y[g, token[g, n]] += weight[g, n] * answers[expert[g, n], g, token[g, n]]
  return y


DISPATCH = {n: jit(f, static_argnums=3) for n, f in DISPATCHERS.items()}


@every('selector')
def test_all_dispatchers_agree_on_its_seats(case):
  ctx, x, e = chain.context(), chain.inputs(), case.moe.num_experts
  bank = chain.bank(case)
  scores = chain.random_scores(case, 'plain', ctx)
  seats = _select(case, scores, ctx, 3)
  assert (seats.place >= 0).any()
  expected = _loop(x, seats, bank, e)
  for name, dispatch in DISPATCH.items():
    y = dispatch(x, seats, bank, Room(3, e, 'auto'))
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6, err_msg=name)


# Weighings.


def _seated(case, ctx, capacity=3):
  select = parts.choose('selector', case.moe.selector)
  return select(chain.scores(case, ctx), ctx, KEYS[0], capacity)


@every('weighing')
@pytest.mark.parametrize('train', [True, False])
def test_a_weighing_changes_weights_alone(case, train):
  ctx = chain.context(train=train)
  before = _seated(case, ctx)
  after = case.made(before, ctx, KEYS[0])
  for field in dataclasses.fields(before):
    a, b = (getattr(s, field.name) for s in (before, after))
    if field.name == 'weight':
      assert a.shape == b.shape and a.dtype == b.dtype
      assert jnp.isfinite(b).all()
    else:
      np.testing.assert_array_equal(a, b)


@every('weighing')
def test_a_weighing_is_its_base_at_its_neutral_and_else_is_not(case):
  ctx = chain.context(train=True)
  before = _seated(case, ctx)
  if isinstance(case.about.neutral, dict):
    neutral = case.at(**case.about.neutral)
    assert chain.same(neutral.made(before, ctx, KEYS[0]), before)
  found = [
    case.made(_seated(case, ctx, capacity), ctx, jax.random.key(n))
    for n, capacity in enumerate((1, 3, TOKENS) * 3)
  ]
  assert not all(
    chain.same(a, _seated(case, ctx, capacity))
    for a, capacity in zip(found, (1, 3, TOKENS) * 3, strict=True)
  )
