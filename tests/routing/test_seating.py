"""Seats against plain loops, and what must hold for any of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.routing.seating import seat
from st_moe.routing.types import Assignment
from tests.helpers import jit, slow_seat

E = 4  # Experts; 3 groups of 16 tokens.


@functools.cache
def _fast(capacity):
  return jit(functools.partial(seat, num_experts=E, capacity=capacity))


def _asked(k, seed=0, priority=False, padding=True):
  """Random distinct choices; an eighth of the tokens is padding."""
  rng = np.random.default_rng(seed)
  g, s = 3, 16
  # Expert 0 is liked most, so that places run out.
  liking = rng.gumbel(size=(g, s, E)) - np.arange(E) * 0.7
  expert = np.argsort(-liking, axis=-1)[..., :k].astype(np.int32)
  active = rng.random((g, s, k)) < 0.8
  active[..., 0] = True
  if padding:
    active &= (rng.random((g, s)) < 7 / 8)[..., None]
  weight = rng.random((g, s, k)).astype(np.float32)
  order = rng.integers(0, 5, (g, s, k)).astype(np.int32) if priority else None
  return Assignment(expert, weight, active, order)


def _places(seats, k):
  g, n = seats.place.shape
  return np.asarray(seats.place).reshape(g, n // k, k)


@pytest.mark.parametrize('priority', [False, True], ids=['arrival', 'priority'])
# With the last, a pair of numbers to sort is too large for one int32.
@pytest.mark.parametrize('capacity', [1, 4, 16, 1 << 28])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_equals_the_plain_loop(k, capacity, priority):
  for seed in range(5):
    asked = _asked(k, seed, priority)
    seats = _fast(capacity)(asked)
    place, load = slow_seat(
      asked.expert,
      asked.active,
      num_experts=E,
      capacity=capacity,
      priority=asked.priority,
    )
    np.testing.assert_array_equal(_places(seats, k), place)
    np.testing.assert_array_equal(seats.load, load)


@pytest.mark.parametrize('capacity', [1, 4, 16])
def test_what_every_seating_keeps(capacity):
  k = 3
  for seed in range(5):
    asked = _asked(k, seed, priority=seed % 2 == 1)
    seats = _fast(capacity)(asked)
    place = _places(seats, k)
    taken = place >= 0
    # Who asks for nothing, padding above all, sits nowhere.
    assert not (taken & ~asked.active).any()
    assert place.max() < capacity
    for g in range(3):
      pairs = [*zip(asked.expert[g][taken[g]], place[g][taken[g]], strict=True)]
      assert len(set(pairs)) == len(pairs)
      for e in range(E):
        here = taken[g] & (asked.expert[g] == e)
        assert here.sum() == seats.load[g, e] <= capacity
        # Places are filled from 0 without a hole, choice after choice.
        assert sorted(place[g][here]) == list(range(here.sum()))
        by_choice = [place[g, :, c][here[:, c]] for c in range(k)]
        kept = [p for p in by_choice if len(p)]
        for before, after in zip(kept, kept[1:], strict=False):
          assert before.max() < after.min()


def test_three_tokens_by_hand():
  # Two places each. Tokens 0 and 1 like expert 0, then 1; token 2 the reverse.
  expert = jnp.array([[[0, 1], [0, 1], [1, 0]]])
  weight = jnp.array([[[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]]])
  seats = seat(
    Assignment(expert, weight, jnp.full((1, 3, 2), True)),
    num_experts=2,
    capacity=2,
  )
  # Expert 0: tokens 0 and 1, full before anyone's second choice. Expert 1:
  # token 2 first although it comes last, then token 0; token 1 finds it full.
  np.testing.assert_array_equal(seats.place, [[0, 1, 1, -1, 0, -1]])
  np.testing.assert_array_equal(seats.load, [[2, 2]])
  # Nothing else is touched: routes are token-major and weights as they were.
  np.testing.assert_array_equal(seats.token, [[0, 0, 1, 1, 2, 2]])
  np.testing.assert_array_equal(seats.expert, [[0, 1, 0, 1, 1, 0]])
  np.testing.assert_array_equal(seats.weight, weight.reshape(1, 6))
  np.testing.assert_array_equal(seats.first, [[0, 0, 1]])


def test_priority_reorders_within_a_choice_only():
  # One place at expert 0, which all three want, token 1 as a second choice
  # and most urgently of all.
  expert = jnp.array([[[0, 1], [1, 0], [0, 1]]])
  priority = jnp.array([[[2, 0], [0, -9], [1, 0]]])
  active = jnp.array([[[True, False], [True, True], [True, False]]])
  seats = seat(
    Assignment(expert, jnp.ones((1, 3, 2)), active, priority),
    num_experts=2,
    capacity=1,
  )
  np.testing.assert_array_equal(seats.place, [[-1, -1, 0, -1, 0, -1]])


def test_groups_do_not_compete():
  # The same 16 tokens three times: each group seats them as if alone.
  one = _asked(2, seed=7)
  alone = jax.tree.map(lambda a: a[:1], one)
  thrice = jax.tree.map(lambda a: np.concatenate([a[:1]] * 3), one)
  a, b = _fast(4)(alone), _fast(4)(thrice)
  np.testing.assert_array_equal(b.place, np.repeat(a.place, 3, axis=0))


def test_padding_in_front_moves_nobody():
  # Four tokens behind two of padding sit as they do without it, whatever the
  # padding would have liked.
  asked = _asked(2, seed=3, padding=False)
  asked = jax.tree.map(lambda a: a[:, :4], asked)
  wide = jax.tree.map(
    lambda a: np.concatenate([a[:, :2], a], axis=1), asked
  ).replace(
    active=np.concatenate([np.zeros((3, 2, 2), bool), asked.active], axis=1)
  )
  a, b = _fast(1)(asked), _fast(1)(wide)
  np.testing.assert_array_equal(b.place[:, 4:], a.place)
  assert (b.place[:, :4] == -1).all()
  np.testing.assert_array_equal(a.load, b.load)
