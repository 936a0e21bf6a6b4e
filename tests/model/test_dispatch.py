"""Every dispatcher against one plain loop, in values and in gradients.

The experts here are relu(x A_e) B_e, small enough for their gradients to be
written down by hand: the oracle knows nothing of autodiff.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from st_moe.model import grouped as grouped_module
from st_moe.model.dispatch import DISPATCHERS, index, mask, per_token
from st_moe.model.experts import product
from st_moe.model.grouped import grouped
from st_moe.model.rows import Room
from st_moe.routing.seating import seat
from st_moe.routing.types import Assignment, Seats
from tests.helpers import jit

G, S, D, F, E = 3, 6, 5, 7, 4

KINDS = {
  'mask': mask,
  'index': index,
  'index, on a TPU': index,
  'grouped': grouped,
  'grouped, block 1': functools.partial(grouped, block=1),
  'grouped, block 4': functools.partial(grouped, block=4),
  'per_token': per_token,
  'grouped, block 4, on a TPU': functools.partial(grouped, block=4),
  'grouped, nothing kept': functools.partial(grouped, block=4),
  'grouped, nothing kept, on a TPU': functools.partial(grouped, block=4),
}
every_kind = pytest.mark.parametrize('kind', KINDS)


def room(capacity, num_experts=E):
  return Room(capacity, num_experts, 'auto')


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
  """A TPU is interpreted: memory that nobody wrote is NaN.

  Twelve rows a turn: most cases have more than one turn, all several experts.
  """
  case = getattr(request.node, 'callspec', None)
  kind = case.params.get('kind', '') if case else ''
  if 'grouped' in kind:
    kept = 0 if 'nothing kept' in kind else math.inf
    monkeypatch.setattr(grouped_module, '_KEPT', kept)
  if 'TPU' not in kind:
    return
  run = lambda *args, default, tpu=None, cpu=None: (tpu or default)(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', run)
  monkeypatch.setattr(grouped_module, '_AT_ONCE', 12)
  interpreted = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pl, 'pallas_call', interpreted)


class Bank(NamedTuple):
  wi: np.ndarray  # [e, d, f]
  wo: np.ndarray  # [e, f, d]

  def __call__(self, xs, expert):
    return self.answers(self.hidden(xs, expert), expert).reshape(xs.shape)

  def hidden(self, xs, expert):
    rows = xs.reshape(len(xs), -1, xs.shape[-1])
    return (product(rows, self.wi.astype(xs.dtype), expert),)

  def answers(self, hidden, expert):
    h = jax.nn.relu(*hidden)
    return product(h, self.wo.astype(h.dtype), expert)


@flax.struct.dataclass
class Experts:
  """A function of a number for each expert; its hidden units are the tokens."""

  numbers: jax.Array
  function: Callable = flax.struct.field(pytree_node=False)

  def __call__(self, xs, expert):
    return self.function(self.numbers, xs, expert)

  def hidden(self, xs, expert):
    return (xs,)

  def answers(self, hidden, expert):
    return self(*hidden, expert)


def _oracle(x, weight, bank, seats, dy):
  """y, and the gradients of sum(y * dy) by x, weight and bank, in float64."""
  y, dx = np.zeros(x.shape), np.zeros(x.shape)
  dweight = np.zeros(weight.shape)
  dwi, dwo = np.zeros(bank.wi.shape), np.zeros(bank.wo.shape)
  for g in range(len(x)):
    for n in range(weight.shape[1]):
      t, e = int(seats.token[g, n]), int(seats.expert[g, n])
      if seats.place[g, n] < 0:
        continue
      a = x[g, t].astype(float) @ bank.wi[e]
      h = np.maximum(a, 0)
      y[g, t] += weight[g, n] * (h @ bank.wo[e])
      dweight[g, n] = dy[g, t] @ (h @ bank.wo[e])
      dwo[e] += weight[g, n] * np.outer(h, dy[g, t])
      da = weight[g, n] * (bank.wo[e] @ dy[g, t]) * (a > 0)
      dwi[e] += np.outer(x[g, t], da)
      dx[g, t] += bank.wi[e] @ da
  return y, (dx, dweight, Bank(dwi, dwo))


@functools.cache
def _compiled(kind, capacity):
  def run(x, weight, bank, seats, dy):
    def forward(x, weight, bank):
      s = seats.replace(weight=weight)
      return KINDS[kind](x, s, bank, room(capacity))

    y, pull = jax.vjp(forward, x, weight, bank)
    return y, pull(dy)

  return jit(run)


def _case(seed, k, capacity, favourite=0.7):
  """Tokens, seats of k choices, a bank and a cotangent; some padding."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  liking = rng.gumbel(size=(G, S, E)) - favourite * np.arange(E)
  expert = np.argsort(-liking, axis=-1)[..., :k].astype(np.int32)
  active = rng.random((G, S, k)) < 0.9
  active &= (rng.random((G, S)) < 0.8)[..., None]
  asked = Assignment(expert, rng.random((G, S, k)).astype(np.float32), active)
  seats = jax.device_get(seat(asked, num_experts=E, capacity=capacity))
  bank = Bank(normal(E, D, F), normal(E, F, D))
  return normal(G, S, D), seats, bank, normal(G, S, D)


def _check(kind, capacity, x, seats, bank, dy):
  got = _compiled(kind, capacity)(x, seats.weight, bank, seats, dy)
  want = _oracle(x, seats.weight, bank, seats, dy)
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
  jax.tree.map(close, got, want)
  return got


@every_kind
@pytest.mark.parametrize(
  ('k', 'capacity'),
  [(1, 2), (2, 2), (3, 2), (2, S)],
  ids=['k=1 drops', 'k=2 drops', 'k=3 drops', 'k=2 drops nothing'],
)
def test_equals_the_plain_loop(kind, k, capacity):
  dropped = 0
  for seed in range(3):
    x, seats, bank, dy = _case(seed, k, capacity)
    dropped += ((seats.place < 0) & seats.asked).sum()
    _check(kind, capacity, x, seats, bank, dy)
  assert (dropped > 0) == (capacity == 2)


@every_kind
def test_a_token_without_a_seat_hears_exactly_nothing(kind):
  x, seats, bank, dy = _case(0, 2, 2, favourite=3.0)
  silent = (seats.place.reshape(G, S, 2) < 0).all(-1)
  assert silent.any() and not silent.all()
  y, (dx, _, _) = _check(kind, 2, x, seats, bank, dy)
  assert not np.asarray(y)[silent].any()
  assert not np.asarray(dx)[silent].any()
  assert np.asarray(y)[~silent].any(-1).all()


@every_kind
def test_an_expert_without_tokens_gets_exactly_no_gradient(kind):
  # Nobody likes expert 3, of which float32 noise must make nothing.
  x, seats, bank, dy = _case(0, 2, S, favourite=100.0)
  assert seats.load.sum(0).tolist()[2:] == [0, 0]
  _, (_, _, d) = _check(kind, S, x, seats, bank, dy)
  for kernel in d:
    assert not np.asarray(kernel[2:]).any()
    assert np.asarray(kernel[:2]).any(axis=(1, 2)).all()


def _expert_choice():
  """Two tokens for each expert, hand-made: k is 0, routes are expert-major.

  Token 0 sits everywhere, token 5 nowhere; one route found no seat.
  """
  token = np.tile([[0, 1, 0, 2, 3, 0, 0, 4]], (G, 1)).astype(np.int32)
  expert = np.tile(np.repeat(np.arange(E, dtype=np.int32), 2), (G, 1))
  place = np.tile([[0, 1]], (G, E)).astype(np.int32)
  place[1, 7] = -1
  rng = np.random.default_rng(0)
  return Seats(
    token=token,
    expert=expert,
    weight=rng.random(token.shape).astype(np.float32),
    asked=np.full(token.shape, True),
    place=place,
    load=np.array([[2, 2, 2, 2], [2, 2, 2, 1], [2, 2, 2, 2]], np.int32),
    k=0,
  )


@every_kind
def test_routes_in_any_order(kind):
  x, _, bank, dy = _case(0, 1, S)
  y, (dx, _, _) = _check(kind, 2, x, _expert_choice(), bank, dy)
  assert not np.asarray(y)[:, 5].any() and not np.asarray(dx)[:, 5].any()
  # Group 1 lost the last route, token 4 at expert 3: its only one.
  assert not np.asarray(y)[1, 4].any() and np.asarray(y)[0, 4].any()


def _three_answers(kind, dtype):
  """One token whose three experts answer 256, 1 and 1, each weighing 1."""
  seats = Seats(
    token=np.zeros((1, 3), np.int32),
    expert=np.arange(3, dtype=np.int32)[None],
    weight=np.ones((1, 3), np.float32),
    asked=np.full((1, 3), True),
    place=np.zeros((1, 3), np.int32),
    load=np.ones((1, 3), np.int32),
    k=3,
  )
  seen = []

  def answer(says, xs, expert):
    seen.append(xs.dtype)
    says = says if expert is None else says[expert]
    return xs * says.reshape(-1, *(1,) * (xs.ndim - 1))

  experts = Experts(jnp.array([256, 1, 1], dtype), answer)
  x = jnp.ones((1, 1, 2), dtype)
  run = functools.partial(KINDS[kind], experts=experts)
  y = jit(functools.partial(run, room=room(1, 3)))(x, seats)
  assert set(seen) == {jnp.dtype(dtype)}
  return y


@every_kind
def test_bfloat16_stays_bfloat16_but_is_summed_in_float32(kind):
  # In bfloat16 256 + 1 is 256: adding up there would forget both ones.
  assert jnp.bfloat16(256) + jnp.bfloat16(1) == 256
  y = _three_answers(kind, jnp.bfloat16)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.astype(jnp.float32), 258)
  assert _three_answers(kind, jnp.float32).dtype == jnp.float32


@every_kind
def test_weights_are_not_rounded_to_bfloat16(kind):
  # 1 - 2**-10 is 1 in bfloat16. With it and -1, 1024 tells the two apart.
  seats = Seats(
    token=np.zeros((1, 2), np.int32),
    expert=np.arange(2, dtype=np.int32)[None],
    weight=np.array([[1 - 2**-10, -1]], np.float32),
    asked=np.full((1, 2), True),
    place=np.zeros((1, 2), np.int32),
    load=np.ones((1, 2), np.int32),
    k=2,
  )
  x = jnp.full((1, 1, 1), 1024, jnp.bfloat16)
  same = Experts(jnp.zeros(2), lambda _, xs, expert: xs)
  run = functools.partial(KINDS[kind], experts=same, room=room(1, 2))
  y = jit(run)(x, seats)
  assert y.item() == 1023 - 1024


@every_kind
def test_nobody_hears_empty_places(kind):
  # Experts that answer with their bias, places left empty included: a token
  # hears it as often as it sits, and so does the bias in the way back.
  _, seats, _, _ = _case(0, 2, 3)
  says = lambda bias, xs, expert: jnp.full(xs.shape, bias[0])
  biased = lambda bias: Experts(jnp.full(E, bias), says)
  run = functools.partial(KINDS[kind], room=room(3))
  answer = lambda bias: run(jnp.ones((G, S, D)), seats, biased(bias))
  y = jit(answer)(7.0)
  heard = (seats.weight * (seats.place >= 0)).reshape(G, S, 2).sum(-1)
  np.testing.assert_allclose(y[..., 0], 7 * heard, rtol=1e-6)
  slope = jit(jax.grad(lambda bias: answer(bias).sum()))(7.0)
  np.testing.assert_allclose(slope, D * heard.sum(), rtol=1e-5)


def test_the_table():
  assert set(DISPATCHERS) == {'mask', 'index', 'grouped', 'per_token'}


# The loop of `grouped`.


def _one_expert(routes):
  """Of one group, whose every token sits at the only expert, weighing 1."""
  number = np.arange(routes, dtype=np.int32)[None]
  return Seats(
    token=number,
    expert=np.zeros_like(number),
    weight=np.ones(number.shape, np.float32),
    asked=np.full(number.shape, True),
    place=number,
    load=np.array([[routes]], np.int32),
    k=1,
  )


def test_gradients_of_weights_add_up_in_float32():
  # In bfloat16 256 + 1 is 256, and so would be the sum of 1024 ones.
  scaled = lambda w: Experts(w, lambda w, xs, expert: xs * w)
  run = functools.partial(grouped, room=room(1024, 1), block=1)
  x, w = jnp.ones((1, 1024, 1), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
  answers = lambda w: run(x, _one_expert(1024), scaled(w)).sum()
  assert jit(jax.grad(answers))(w).item() == 1024


@pytest.mark.parametrize('keeps', [True, False])
def test_nothing_is_made_for_every_block(keeps, monkeypatch):
  # 512 blocks: with a copy of the weights for each, 32 MiB.
  monkeypatch.setattr(grouped_module, '_KEPT', math.inf if keeps else 0)
  n, d, f = 512, 64, 128
  x, bank = (
    jnp.zeros((1, n, d)),
    Bank(jnp.zeros((1, d, f)), jnp.zeros((1, f, d))),
  )

  def temporaries(function):
    memory = jit(function).lower(x, bank).compile().memory_analysis()
    return memory.temp_size_in_bytes

  def answers(x, bank):
    return grouped(x, _one_expert(n), bank, room(n, 1), block=1)

  slope = jax.grad(lambda *of: (answers(*of) ** 2).sum(), argnums=(0, 1))
  weights = 2 * d * f * 4
  assert temporaries(answers) < 2 * x.nbytes + 2 * weights
  kept = keeps * n * (f + d) * 4  # Hidden units and answers, by row.
  assert temporaries(slope) < 4 * x.nbytes + 4 * weights + kept


def test_many_at_once():
  x, seats, bank, _ = _case(0, 2, 2)
  run = functools.partial(grouped, room=room(2), block=4)
  many = np.stack([x, 2 * x, -x])
  at_once = jit(jax.vmap(lambda x: run(x, seats, bank)))(many)
  one = jit(run)
  for x, y in zip(many, at_once, strict=True):
    np.testing.assert_allclose(y, one(x, seats, bank), rtol=1e-6, atol=1e-6)
