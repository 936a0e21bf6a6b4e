"""One expert of each prototype, and groups first, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Capacity, Part
from st_moe.model import parts
from st_moe.routing.selectors import SELECTORS, top_k
from st_moe.routing.types import RouteContext, RouteOverride, Scores
from tests.helpers import jit, slow_seat, slow_softmax
from tests.methods import steps

G, S, E = 2, 9, 8
HAND = [0.3, 0.1, 0.04, 0.06, 0.21, 0.05, 0.15, 0.09]


def _logits(seed=0):
  rng = np.random.default_rng(seed)
  return 2 * rng.normal(size=(G, S, E)).astype(np.float32)


@functools.cache
def _compiled(name, capacity, **options):
  def select(logits, valid, bias):
    ctx = RouteContext(valid=valid)
    scores = Scores.of(logits).steered(RouteOverride(bias))
    return SELECTORS[name](scores, ctx, None, capacity, **options)

  return jit(select)


def _pick(name, logits, valid=None, *, capacity=99, bias=0, **options):
  logits = np.asarray(logits, np.float32)
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  bias = np.broadcast_to(np.float32(bias), logits.shape[-1:])
  pick = _compiled(name, capacity, **options)
  return jax.device_get(pick(logits, valid, bias))


def _hand(name, **options):
  seats = _pick(name, np.log([[HAND]]), **options)
  return dict(
    zip(seats.expert[0].tolist(), seats.weight[0].tolist(), strict=True)
  )


def _assert_close(found, expected):
  assert [*found] == [*expected]  # Best first.
  np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)


def test_one_of_each_prototype():
  # 0.3 of the 0.5 that the first four have; 0.21 of 0.5 of the others. Top-2
  # would have found the same, and weighed 0.6 and 0.4.
  _assert_close(_hand('group_top_1', k=2), {0: 0.6, 4: 0.42})
  # Of pairs: 0.3 of 0.4, 0.06 of 0.1, 0.21 of 0.26 and 0.15 of 0.24.
  _assert_close(
    _hand('group_top_1', k=4), {0: 0.75, 4: 21 / 26, 6: 0.625, 3: 0.6}
  )


def test_one_prototype_is_top_1():
  logits = _logits()
  one = _pick('group_top_1', logits, k=1, capacity=2)
  ctx = RouteContext(valid=np.full((G, S), True))
  top = jit(lambda x: top_k(Scores.of(x), ctx, None, 2, k=1))(logits)
  np.testing.assert_array_equal(one.place, top.place)
  np.testing.assert_array_equal(one.expert, top.expert)
  np.testing.assert_allclose(one.weight, top.weight, rtol=1e-5)


def test_groups_first():
  # Pairs have 0.4, 0.1, 0.26 and 0.24: the first wins; both of it share.
  _assert_close(
    _hand('two_level', k=2, groups=4), {0: 0.4 * 0.75, 1: 0.4 * 0.25}
  )
  # Two groups, one of each: their 0.4 and 0.26 renormalised, and what the one
  # has of its pair as it is.
  _assert_close(
    _hand('two_level', k=2, groups=4, chosen=2),
    {0: 0.4 / 0.66 * 0.75, 4: 0.26 / 0.66 * 21 / 26},
  )
  # Two of two of four: the hierarchical gate of Shazeer et al. (2017).
  _assert_close(
    _hand('two_level', k=4, groups=2, chosen=2),
    {0: 0.5 * 0.75, 4: 0.5 * 7 / 12, 6: 0.5 * 5 / 12, 1: 0.5 * 0.25},
  )


def _slow(p, there, k, groups, chosen):
  """{expert: weight} of one token."""
  size, inner = len(p) // groups, k // chosen
  of = [[*range(g * size, (g + 1) * size)] for g in range(groups)]
  total = lambda experts: sum(p[e] for e in experts)
  best = sorted(range(groups), key=lambda g: -total(of[g]))[:chosen]
  found = {}
  for g in best:
    first = total(of[g])
    if chosen > 1:
      first /= sum(total(of[h]) for h in best)
    taken = sorted(of[g], key=lambda e: -p[e])[:inner]
    for e in taken:
      if there[e]:
        found[e] = first * p[e] / total(taken if inner > 1 else of[g])
  return dict(sorted(found.items(), key=lambda item: -p[item[0]]))


@pytest.mark.parametrize(
  ('name', 'k', 'groups', 'chosen'),
  [
    ('two_level', 2, 4, 1),
    ('two_level', 4, 4, 2),
    ('two_level', 1, 2, 1),
    ('two_level', 4, 4, 4),
    ('group_top_1', 2, 2, None),
    ('group_top_1', 4, 4, None),
  ],
)
def test_equals_loops(name, k, groups, chosen):
  logits, off = _logits(k), np.where(np.arange(E) == 5, -np.inf, 0)
  valid = np.arange(S) < np.array([S, 6])[:, None]
  options = dict(groups=groups, chosen=chosen) if chosen else {}
  p = slow_softmax(logits.astype(float) + off)
  expert, weight = np.zeros((2, G, S, k))
  asked = np.zeros((G, S, k), bool)
  for g, s in np.ndindex(G, S):
    there = off == 0
    found = _slow(p[g, s], there, k, groups, chosen or groups)
    if not chosen:  # No level above: what each has of its prototype.
      size = E // k
      found = {
        e: p[g, s, e] / p[g, s, e // size * size :][:size].sum() for e in found
      }
    n = len(found)  # A pair may have but one left.
    expert[g, s, :n], weight[g, s, :n] = [*found], [*found.values()]
    asked[g, s, :n] = valid[g, s]
  place, load = slow_seat(expert.astype(int), asked, num_experts=E, capacity=3)
  seats = _pick(name, logits, valid, capacity=3, bias=off, k=k, **options)
  by_choice = lambda a: np.asarray(a).reshape(expert.shape)
  np.testing.assert_array_equal(by_choice(seats.asked), asked)
  np.testing.assert_array_equal(by_choice(seats.place), place)
  np.testing.assert_array_equal(seats.load, load)
  np.testing.assert_array_equal(by_choice(seats.expert)[asked], expert[asked])
  np.testing.assert_allclose(
    by_choice(seats.weight)[asked], weight[asked], rtol=1e-5
  )
  assert not seats.load[:, 5].any() and (place < 0)[asked].any()


def test_a_group_without_experts_is_not_asked():
  bias = np.where(np.arange(E) < 4, -np.inf, 0)
  seats = _pick('group_top_1', _logits(), bias=bias, k=2)
  assert seats.asked.sum(-1).tolist() == [S, S]
  assert not seats.load[:, :4].any()
  seats = _pick('two_level', _logits(), bias=bias, k=2, groups=2)
  assert seats.asked.all() and not seats.load[:, :4].any()


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('group_top_1', dict(k=2)),
    ('two_level', dict(k=2, groups=4)),
    ('two_level', dict(k=1, groups=4)),
    ('two_level', dict(k=4, groups=4, chosen=2)),
  ],
)
def test_every_choice_has_a_gradient(name, options):
  ctx = RouteContext(valid=np.full((1, 1), True))

  def weights(logits):
    seats = SELECTORS[name](Scores.of(logits), ctx, None, 1, **options)
    return (seats.weight * jnp.arange(1.0, 1 + options['k'])).sum()

  slope = np.asarray(jit(jax.grad(weights))(jnp.log(jnp.array([[HAND]]))))[0, 0]
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-2
  if name == 'two_level':  # Other groups hear of it, too.
    assert all(np.abs(slope.reshape(4, 2)[[0, 2]]).max(-1) > 1e-3)


@pytest.mark.parametrize(
  ('selector', 'message'),
  [
    (Part.of('group_top_1', k=3), 'k=3 does not divide num_experts = 4'),
    (Part.of('two_level', k=2, groups=3), 'groups=3 does not divide'),
    (Part.of('two_level', k=3, groups=4, chosen=2), 'chosen=2 does not divide'),
    (Part.of('two_level', k=4, groups=2, chosen=4), 'at most 2'),
    (Part.of('two_level', k=3, groups=2), 'at most 2'),
  ],
)
def test_sizes_that_do_not_divide(selector, message):
  with pytest.raises(ValueError, match=message):
    parts.check(_encoder(selector))


@pytest.mark.parametrize(
  ('name', 'options'),
  [('group_top_1', {}), ('two_level', {'groups': 2})],
)
def test_a_caller_has_no_k(name, options):
  override = RouteOverride(jnp.zeros(E), 3)
  ctx = RouteContext(valid=np.full((G, S), True), override=override)
  with pytest.raises(ValueError, match='takes no k=3'):
    SELECTORS[name](Scores.of(_logits()), ctx, None, 9, k=2, **options)


def _encoder(selector):
  return steps.encoder(
    moe={
      'selector': selector,
      'train_capacity': Capacity(1.0, times_k=True),
      'losses': (Part.of('load_balance_all', weight=1e-2),),
      'extra_ffn': 'none',
    }
  )


def test_it_trains_and_evaluates():
  selector = Part.of('two_level', k=2, groups=2, chosen=2)
  run = steps.Run(steps.config_of(_encoder(selector)))
  first = run.take()
  assert first['encoder/active_experts'] == 2
  assert run.take(10)['cross_entropy'] < first['cross_entropy']
  assert 0 < run.evaluated() < first['cross_entropy']


@pytest.mark.parametrize('which', ['', 'two_level,'])
def test_the_config_says_the_method_and_no_more(which):
  load = lambda arg: config_file.load(f'configs/methods/hetu_moe.py:{arg}')
  config = load(which)
  two_level = Part.of('two_level', k=2, groups=4)
  group_top_1 = Part.of('group_top_1', k=2)
  assert config.model.moe.selector == (two_level if which else group_top_1)
  parts.check(config.model)
  changed = config_file.diff(
    *(
      config_file.to_dict(load(which + a))
      for a in ('base,runlocal', 'runlocal')
    )
  )
  assert all(line.startswith('model.moe.') for line in changed)
