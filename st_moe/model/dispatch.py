"""Tokens to experts and back: `dispatch(x, seats, experts, ...) -> y`.

One contract, equal results:

  x [g, s, d], seats    who sits where
  experts(xs, expert)   block b of xs [b, ..., d] through expert `expert[b]`
                        (None: expert b)
  y [g, s, d]           each token's answers, summed with their weights in
                        float32 and returned in the dtype of x
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from st_moe.routing.types import Seats
from st_moe.sharding import constrain

# Remat policies save these, so that no backward pass repeats the exchange.
SAVED_NAMES = ('expert_inputs', 'expert_outputs')
BLOCK = 128  # Rows of one expert that `grouped` computes together.


def mask(x, seats: Seats, experts, *, capacity: int, num_experts: int):
  """One-hot masks [g, s, e, c] and einsums: the plain reading of the papers.

  Costs 4 * s * e * c * d FLOPs per group beyond the experts.
  """
  g, s, _ = x.shape
  combine = jnp.zeros((g, s, num_experts, capacity))
  place = jnp.where(seats.place < 0, capacity, seats.place)
  combine = jax.vmap(
    lambda m, *route: m.at[route[:3]].add(route[3], mode='drop')
  )(combine, seats.token, seats.expert, place, seats.weight)
  taken = jnp.zeros(combine.shape, x.dtype)
  taken = jax.vmap(lambda m, *route: m.at[route].set(1, mode='drop'))(
    taken, seats.token, seats.expert, place
  )
  xs = jnp.einsum('gsec,gsd->egcd', taken, x)
  ys = _exchange(xs, experts)
  return jnp.einsum('gsec,egcd->gsd', combine, ys.astype(jnp.float32)).astype(
    x.dtype
  )


def index(x, seats: Seats, experts, *, capacity: int, num_experts: int):
  """Gathers and scatters by place: moves what sits and nothing else."""
  slot = seats.expert * capacity + seats.place
  xs = _gather(x, seats, slot, num_experts * capacity)  # [g, e*c, d]
  xs = xs.reshape(-1, num_experts, capacity, x.shape[-1]).swapaxes(0, 1)
  ys = _exchange(xs, experts).swapaxes(0, 1)  # [g, e, c, d]
  return _combine(ys.reshape(len(x), -1, x.shape[-1]), seats, slot, x)


def grouped(
  x, seats: Seats, experts, *, capacity: int, num_experts: int, block=BLOCK
):
  """Rows sorted by expert, in blocks of one expert each: nothing need drop.

  Costs the rows that sit, rounded up to whole blocks per expert, whatever the
  capacity.
  """
  del capacity
  g, s, d = x.shape
  rows = seats.expert.shape[1] * g
  block = min(block, rows)
  num_blocks = -(-rows // block) + num_experts
  # All groups share one sequence of rows: each expert's segment starts at a
  # whole block, and inside it the groups follow one another.
  ends = (-(-seats.load.sum(0) // block)).cumsum()  # [e], in blocks.
  starts = (ends - (-(-seats.load.sum(0) // block))) * block
  before = seats.load.cumsum(0) - seats.load  # [g, e]
  row = jnp.take_along_axis(starts + before, seats.expert, 1) + seats.place
  expert = (ends <= jnp.arange(num_blocks)[:, None]).sum(-1)
  expert = jnp.minimum(expert, num_experts - 1)

  one = lambda a: a.reshape(1, -1)
  token = seats.token + jnp.arange(g)[:, None] * s
  flat = seats.replace(
    token=one(token), place=one(seats.place), weight=one(seats.weight)
  )
  x = x.reshape(1, g * s, d)
  xs = _gather(x, flat, one(row), num_blocks * block)
  xs = checkpoint_name(xs, 'expert_inputs')
  ys = experts(xs.reshape(num_blocks, block, d), expert)
  ys = checkpoint_name(ys, 'expert_outputs')
  y = _combine(ys.reshape(1, -1, d), flat, one(row), x)
  return y.reshape(g, s, d)


def per_token(x, seats: Seats, experts, *, capacity: int, num_experts: int):
  """Each route through a copy of its expert's weights: for very few of them."""
  del capacity, num_experts
  g, n = seats.expert.shape
  d = x.shape[-1]
  xs = jnp.take_along_axis(x, seats.token[..., None], axis=1)
  xs = jnp.where((seats.place < 0)[..., None], 0, xs)
  ys = experts(xs.reshape(g * n, 1, d), seats.expert.reshape(-1))
  route = jnp.broadcast_to(jnp.arange(n), (g, n))
  return _combine(ys.reshape(g, n, d), seats, route, x)


DISPATCHERS = {
  'mask': mask,
  'index': index,
  'grouped': grouped,
  'per_token': per_token,
}


def _exchange(xs: jax.Array, experts) -> jax.Array:
  """Experts on [e, g, c, d], moved between the layouts by two all-to-alls."""
  xs = constrain(xs, None, 'group', 'slot', 'activation_embed')
  xs = constrain(xs, 'expert', 'expert_replicas', 'slot', 'activation_embed')
  ys = experts(checkpoint_name(xs, 'expert_inputs'), None)
  ys = constrain(ys, 'expert', 'expert_replicas', 'slot', 'activation_embed')
  ys = constrain(ys, None, 'group', 'slot', 'activation_embed')
  return checkpoint_name(ys, 'expert_outputs')


def _gather(x, seats: Seats, slot: jax.Array, num_slots: int) -> jax.Array:
  """Slots filled with the tokens seated there, [g, num_slots, d]."""
  s = x.shape[1]
  slot = jnp.where(seats.place < 0, num_slots, slot)
  empty = jnp.full((x.shape[0], num_slots), s)  # An index past the tokens.
  token = jax.vmap(lambda t, i, v: t.at[i].set(v, mode='drop'))(
    empty, slot, seats.token
  )
  take = lambda x, t: jnp.take(x, t, axis=0, mode='fill', fill_value=0)
  return jax.vmap(take)(x, token)


def _combine(ys, seats: Seats, slot: jax.Array, x: jax.Array) -> jax.Array:
  """What each token of `x` hears back from `slot` of ys [g, slots, d]."""
  slot = jnp.where(seats.place < 0, ys.shape[1], slot)
  take = lambda y, i: jnp.take(y, i, axis=0, mode='fill', fill_value=0)
  heard = jax.vmap(take)(ys, slot).astype(jnp.float32)  # [g, n, d]
  heard *= seats.weight[..., None]
  if seats.k:
    g, s, d = x.shape
    y = heard.reshape(g, s, seats.k, d).sum(2)
  else:
    y = jnp.zeros(x.shape, jnp.float32)
    y = jax.vmap(lambda y, t, h: y.at[t].add(h))(y, seats.token, heard)
  return y.astype(x.dtype)
