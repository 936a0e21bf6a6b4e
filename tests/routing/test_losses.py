"""Losses by hand, and what they must not depend on, in value and gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.routing.losses import (
  LOSSES,
  gauges,
  load_balance,
  load_balance_all,
  router_z,
)
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, Routed, Scores
from tests.helpers import jit

E, S, K = 4, 6, 2


def _route(logits, valid, capacity=99, k=K):
  ctx = RouteContext(valid=jnp.asarray(valid))
  scores = Scores.of(logits)
  seats = top_k(scores, ctx, None, capacity, k=k)
  return Routed(None, scores, seats, ctx, None, {})


def _pair(loss, logits, valid=None, **kw):
  logits = jnp.asarray(logits, jnp.float32)
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  return _compiled(loss, **kw)(logits, valid)


@functools.cache
def _compiled(loss, **kw):
  return jit(lambda logits, valid: loss(_route(logits, valid, **kw)))


def _value(loss, logits, valid=None, **kw):
  total, weight = _pair(loss, logits, valid, **kw)
  return float(total / weight)


def test_zero_logits():
  # All argmaxes tie to expert 0, and still the loss is 1, p being even.
  assert _value(load_balance, np.zeros((2, S, E))) == pytest.approx(1)
  z = _value(router_z, np.zeros((2, S, E)))
  assert z == pytest.approx(math.log(E) ** 2)
  assert _value(router_z, np.zeros((1, 2, 32))) == pytest.approx(
    12.01, abs=0.01
  )
  assert _value(router_z, np.zeros((1, 2, 64))) == pytest.approx(
    17.30, abs=0.01
  )


def test_one_expert_takes_all():
  logits = np.zeros((2, S, E))
  logits[..., 2] = 50
  assert _value(load_balance, logits) == pytest.approx(E)


def test_each_expert_takes_its_share():
  # Sure of itself and even: f = p = 1 / e each, so the loss is 1, with two
  # choices a token too (Flaxformer would count both and say 2).
  logits = 50 * np.eye(E)[None]
  assert _value(load_balance, logits) == pytest.approx(1)
  assert _value(load_balance, logits, k=1) == pytest.approx(1)


def test_two_tokens_by_hand():
  # p = [.8, .2] and [.6, .4]; both choose expert 0: f = [1, 0], mean p =
  # [.7, .3], loss = 2 * (1 * .7 + 0 * .3) = 1.4.
  logits = np.log([[[0.8, 0.2], [0.6, 0.4]]])
  assert _value(load_balance, logits, k=1) == pytest.approx(1.4)
  # logsumexp of log-probabilities is 0; shifted by 3 and by -1 it is those.
  shifted = logits + np.array([3.0, -1.0])[:, None]
  assert _value(router_z, logits) == pytest.approx(0, abs=1e-12)
  assert _value(router_z, shifted) == pytest.approx((9 + 1) / 2)


def test_all_choices_by_hand():
  # Choices 0 and 1, 0 and 2: f = [1, .5, .5], mean p = [.5, .25, .25], loss =
  # 3 * (.5 + .125 + .125); by first choices alone 3 * .5.
  logits = np.log([[[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]]])
  assert _value(load_balance_all, logits, k=2) == pytest.approx(2.25)
  assert _value(load_balance, logits, k=2) == pytest.approx(1.5)
  # Even: as many as there are choices; and with one choice no difference.
  assert _value(load_balance_all, 50 * np.eye(E)[None]) == pytest.approx(2)
  for loss in (load_balance, load_balance_all):
    assert _value(loss, logits, k=1) == pytest.approx(1.5)


def test_balance_is_counted_before_anyone_is_dropped():
  logits = np.log([[[0.8, 0.2], [0.6, 0.4]]])
  assert _value(load_balance, logits, capacity=1) == pytest.approx(1.4)


def test_balance_is_per_group():
  # Group 0 sends all to expert 0, group 1 all to expert 1. Over the whole
  # batch that would be even (loss 1); inside its group nothing is (loss 2).
  logits = np.zeros((2, 3, 2))
  logits[0, :, 0] = logits[1, :, 1] = 50
  assert _value(load_balance, logits, k=1) == pytest.approx(2)


def test_gradient_flows_through_the_mean_probability_alone():
  logits = jnp.log(jnp.array([[[0.8, 0.2], [0.6, 0.4]]]))
  valid = np.full((1, 2), True)
  loss = lambda l: load_balance(_route(l, valid, k=1))[0] / 2
  slope = jit(jax.grad(loss))(logits)
  # loss = 2 * mean p_0, and d p_0 / d l_0 = p_0 (1 - p_0).
  np.testing.assert_allclose(
    slope[0], [[0.16, -0.16], [0.24, -0.24]], atol=1e-6
  )


def test_shift_of_all_logits():
  logits = np.random.default_rng(0).normal(size=(2, S, E))
  a, b = (_value(load_balance, l) for l in (logits, logits + 2))
  assert a == pytest.approx(b, rel=1e-5)
  assert _value(router_z, logits + 2) > _value(router_z, logits) + 1


def test_padding_is_not_counted():
  # One token and one of padding that likes another expert: the loss of the
  # token alone, not (ln e)^2 for the padding either.
  logits = np.log([[[0.8, 0.2], [0.1, 0.9]]]) + 1
  valid = np.array([[True, False]])
  assert _value(load_balance, logits, valid, k=1) == pytest.approx(1.6)
  assert _value(router_z, logits, valid) == pytest.approx(1)
  for loss in LOSSES.values():
    assert float(_pair(loss, logits, valid)[1]) == 1


def test_groups_weigh_as_much_as_their_tokens():
  # A full group of loss 2 (all to one of two experts) and one that holds a
  # single token of probability .75 (loss 1.5): (3 * 2 + 1 * 1.5) / 4.
  logits = np.zeros((2, 3, 2))
  logits[0, :, 0] = 50
  logits[1, :] = np.log([0.75, 0.25])
  valid = np.array([[True] * 3, [True, False, False]])
  assert _value(load_balance, logits, valid, k=1) == pytest.approx(1.875)


# What the losses must not see. Each pair of functions gets the same tokens,
# arranged differently, and must agree in value and in gradient with respect to
# the logits of the real tokens, to float32 noise.


@pytest.fixture(scope='module')
def tokens():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(2 * rng.normal(size=(4, S, E)), jnp.float32)
  valid = rng.random((4, S)) < 0.7
  valid[:, 0] = True
  return logits, valid


@pytest.fixture(scope='module', params=sorted(LOSSES))
def losses_and_slopes(request, tokens):
  """(value, gradient) of a loss of arranged logits, and of them as they are."""
  logits, valid = tokens
  pair = lambda l, v: LOSSES[request.param](_route(l, v, capacity=3))

  def measure(arrange):
    """`arrange` makes a list of (logits, valid); sums and weights add up."""

    def mean(logits):
      parts = [pair(l, v) for l, v in arrange(logits, valid)]
      return sum(p[0] for p in parts) / sum(p[1] for p in parts)

    return jit(jax.value_and_grad(mean))(logits)

  return measure, measure(lambda l, v: [(l, v)])


def _agree(a, b):
  np.testing.assert_allclose(a[0], b[0], rtol=3e-6)
  np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-7)


def test_blind_to_what_padding_holds(losses_and_slopes, tokens):
  measure, plain = losses_and_slopes
  filled = jnp.where(tokens[1][..., None], 0, 7.0 * jnp.arange(E))

  _agree(measure(lambda l, v: [(l * v[..., None] + filled, v)]), plain)
  # And padding gets exactly no gradient.
  assert not np.asarray(plain[1])[~tokens[1]].any()


def test_blind_to_empty_groups(losses_and_slopes):
  measure, plain = losses_and_slopes

  def arrange(logits, valid):
    more = jnp.concatenate([logits, jnp.ones((3, S, E))])
    return [(more, np.concatenate([valid, np.full((3, S), False)]))]

  _agree(measure(arrange), plain)


def test_blind_to_the_order_of_groups(losses_and_slopes):
  measure, plain = losses_and_slopes
  order = np.array([2, 0, 3, 1])
  _agree(measure(lambda l, v: [(l[order], v[order])]), plain)


def test_blind_to_microbatches_of_whole_groups(losses_and_slopes):
  measure, plain = losses_and_slopes
  cut = lambda l, v: [(l[:1], v[:1]), (l[1:4], v[1:4])]
  _agree(measure(cut), plain)


def test_not_blind_to_who_shares_a_group(losses_and_slopes, request):
  # The pair of the above: regrouping changes balance, and not what is of each
  # token alone.
  measure, plain = losses_and_slopes
  regroup = lambda a: a.reshape(2, 2 * S, *a.shape[2:])
  other = measure(lambda l, v: [(regroup(l), regroup(v))])
  if any(of in request.node.name for of in ('router_z', 'entropy')):
    _agree(other, plain)
  else:
    assert abs(other[0] - plain[0]) > 1e-2


def test_all_padding_is_finite():
  for loss in LOSSES.values():
    total, weight = _pair(loss, np.zeros((1, S, E)), np.full((1, S), False))
    assert (float(total), float(weight)) == (0, 0)


def test_gauges_by_hand():
  # Three tokens and one of padding; one place each at two experts. Tokens 0
  # and 1 like expert 0, so token 1 finds neither it nor (token 2 sits there)
  # its second choice.
  logits = np.log([[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]]])
  valid = np.array([[True, True, True, False]])
  found = _pair(gauges, logits, valid, capacity=1)
  pairs = {k: tuple(map(float, v)) for k, v in found.items()}
  assert pairs['dropped_routes'] == (4, 6)
  assert pairs['dropped_tokens'] == (1, 3)
  assert pairs['router_confidence'] == pytest.approx((0.8 + 0.6 + 0.9, 3))
  h = -sum(p * math.log(p) for p in (0.8, 0.2, 0.6, 0.4, 0.1, 0.9))
  assert pairs['router_entropy'] == pytest.approx((h, 3), rel=1e-5)
