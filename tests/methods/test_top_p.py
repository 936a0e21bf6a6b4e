"""As many experts as it takes, in numbers that can be checked by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Capacity, Part
from st_moe.model import parts
from st_moe.routing.losses import entropy
from st_moe.routing.selectors import top_p
from st_moe.routing.types import RouteContext, Routed, RouteOverride, Scores
from tests.helpers import jit, slow_seat, slow_softmax, with_moe
from tests.methods import steps

HAND = [0.15, 0.5, 0.05, 0.3]
# One program for all: a step for each.
PS = (1e-6, 0.1, 0.4, 0.5, 0.6, 0.7, 0.9, 0.96, 1.0)
EACH_P = Part.of('steps', values=PS, at=tuple(range(1, len(PS))))


def _scores(logits):
  return Scores.of(jnp.asarray(logits, jnp.float32))


@functools.cache
def _compiled(capacity, override_k, rank, **options):
  def select(logits, valid, bias, step):
    override = RouteOverride(bias, override_k, rank)
    ctx = RouteContext(valid=valid, step=step, override=override)
    scores = Scores.of(logits).steered(override)
    return top_p(scores, ctx, None, capacity, expected=2.0, **options)

  return jit(select)


def _pick(
  probs,
  *,
  p,
  valid=None,
  capacity=99,
  k=None,
  rank=0,
  bias=0,
  step=0,
  **options,
):
  logits = np.log(np.float32([probs]))
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  bias = np.broadcast_to(np.float32(bias), logits.shape[-1:])
  if not isinstance(p, Part):
    p, step = EACH_P, PS.index(p)
  pick = _compiled(capacity, k, rank, p=p, **options)
  return jax.device_get(pick(logits, valid, bias, np.int32(step)))


def _taken(seats):
  """{expert: weight} of the tokens of one group."""
  found = [{} for _ in range(seats.token.max() + 1)]
  for n in np.flatnonzero(seats.place[0] >= 0):
    found[seats.token[0, n]][int(seats.expert[0, n])] = seats.weight[0, n]
  return found


@pytest.mark.parametrize(
  ('p', 'experts'),
  [
    (1e-6, [1]),
    (0.4, [1]),
    (0.6, [1, 3]),
    (0.9, [1, 3, 0]),
    (0.96, [1, 3, 0, 2]),
    (1.0, [1, 3, 0, 2]),
  ],
)
def test_up_to_the_one_that_reaches_p(p, experts):
  (taken,) = _taken(_pick([HAND], p=p))
  assert [*taken] == experts
  for e in experts:  # As they are: they do not sum to 1.
    assert taken[e] == pytest.approx(HAND[e], rel=1e-5)


def test_all_are_asked_where_the_sum_is_1_before_the_last():
  (taken,) = _taken(_pick([[1.0, 1e-12, 1e-13]], p=1.0))
  assert [*taken] == [0, 1, 2]


def test_a_sure_token_takes_fewer_than_one_in_doubt():
  sure, doubt = [0.97, 0.01, 0.01, 0.01], [0.25] * 4
  counts = [len(t) for t in _taken(_pick([sure, doubt], p=0.7))]
  assert counts == [1, 3]
  assert [len(t) for t in _taken(_pick([sure, doubt], p=0.7, most=2))] == [1, 2]


def test_equals_loops():
  logits = 2 * np.random.default_rng(0).normal(size=(2, 9, 5)).astype('f4')
  valid = np.arange(9) < np.array([9, 6])[:, None]
  probs = slow_softmax(logits.astype(float))
  order = np.argsort(-probs, axis=-1, kind='stable')
  active = np.zeros(order.shape, bool)
  for g, s in zip(*np.nonzero(valid), strict=True):
    total = 0.0
    for c, e in enumerate(order[g, s]):
      if total < 0.6:
        active[g, s, c] = True
      total += probs[g, s, e]
  place, load = slow_seat(order, active, num_experts=5, capacity=3)
  ctx = RouteContext(valid=valid)
  select = functools.partial(top_p, p=0.6, expected=2.0)
  seats = jax.device_get(
    jit(lambda x: select(Scores.of(x), ctx, None, 3))(logits)
  )
  np.testing.assert_array_equal(seats.place.reshape(place.shape), place)
  np.testing.assert_array_equal(seats.load, load)
  np.testing.assert_array_equal(seats.asked.reshape(place.shape), active)
  assert 1 < active.sum(-1)[valid].mean() < 5 and (place[active] < 0).any()


def test_p_may_be_a_schedule():
  p = Part.of('linear', start=0.4, end=1.0, steps=10)
  counts = [len(_taken(_pick([HAND], p=p, step=s))[0]) for s in (0, 5, 10)]
  assert counts == [1, 2, 4]


def test_callers_are_followed():
  experts = lambda **kw: [*_taken(_pick([HAND], **kw))[0]]
  # A k to the number, whatever the sum; the k from the rank-th on.
  assert experts(p=0.4, k=3) == [1, 3, 0]
  assert experts(p=1.0, k=1, rank=1) == [3]
  assert experts(p=0.1, rank=2) == [0]
  # Without expert 1 the others share its half: 0.3, 0.1 and 0.6.
  taken = _taken(_pick([HAND], p=0.5, bias=[0, -np.inf, 0, 0]))[0]
  assert [*taken] == [3] and taken[3] == pytest.approx(0.6, rel=1e-5)
  assert experts(p=1.0, bias=[0, -np.inf, 0, 0]) == [3, 0, 2]


def test_entropy():
  def loss(logits, valid):
    of = Routed(
      None, _scores(logits), None, RouteContext(valid=valid), None, {}
    )
    total, weight = entropy(of)
    return total / weight

  value = jit(jax.value_and_grad(loss))
  even, half = np.zeros((1, 1, 4)), np.float32([[[40, 40, 0, 0]]])
  valid = np.array([[True, True, False]])
  both = np.concatenate([even, half, 9 * even + 3], 1).astype(np.float32)
  both[0, 2] = [9, 0, 0, 0]  # Padding.
  found, slope = value(both, valid)
  assert found == pytest.approx((math.log(4) + math.log(2)) / 2, rel=1e-5)
  assert not slope[0, 2].any()
  # Down the slope the sure become surer.
  logits = np.log(np.float32([[HAND]]))
  _, slope = value(logits, valid[:, :1])
  p = np.array(HAND)
  h = -(p * np.log(p)).sum()
  np.testing.assert_allclose(slope[0, 0], -p * (np.log(p) + h), rtol=1e-4)


def _encoder(**changes):
  moe = {
    'selector': Part.of('top_p', p=0.5, expected=2.0),
    'train_capacity': Capacity(dropless=True),
    'eval_capacity': Capacity(dropless=True),
    'losses': (
      Part.of('load_balance_all', weight=1e-2),
      Part.of('entropy', weight=1e-2),
    ),
    'extra_ffn': 'none',
  }
  return steps.encoder(moe={**moe, **changes})


def test_it_trains_and_evaluates():
  run = steps.Run(steps.config_of(_encoder()))
  first = run.take()
  assert 1 < first['encoder/active_experts'] < 4
  assert 0 < first['entropy'] < math.log(4)
  assert run.take(10)['cross_entropy'] < first['cross_entropy']
  assert 0 < run.evaluated() < first['cross_entropy']


def test_what_it_expects_makes_capacity_and_costs():
  moe = _encoder().moe
  assert moe.expected_k == 2 and moe.k == 4
  assert moe.executed_experts(16) == 2
  limited = Capacity(1.5, times_k=True, minimum=1)
  moe = with_moe(_encoder(), train_capacity=limited).moe
  assert moe.slots(16, deterministic=False) == 12  # 1.5 * 2 * 16 / 4.
  capped = Part.of('top_p', p=0.5, expected=1.5, most=3)
  assert with_moe(_encoder(), selector=capped).moe.k == 3
  for option in (dict(expected=4.5), dict(expected=2, most=5)):
    selector = Part.of('top_p', p=0.5, **option)
    with pytest.raises(ValueError, match='must be at most 4'):
      parts.check(_encoder(selector=selector))
  with pytest.raises(ValueError, match='above 0 and at most 1'):
    parts.check(_encoder(selector=Part.of('top_p', p=1.5, expected=2.0)))


def test_the_config_says_the_method_and_no_more():
  load = lambda arg: config_file.load(f'configs/methods/top_p.py{arg}')
  moe = load('').model.moe
  assert moe.selector == Part.of('top_p', p=0.4, expected=2.0)
  assert moe.slots(1024, deterministic=False) == 320
  parts.check(load('').model)
  changed = config_file.diff(
    *(config_file.to_dict(load(a)) for a in (':base,runlocal', ':runlocal'))
  )
  assert all(line.startswith('model.moe.') for line in changed)
