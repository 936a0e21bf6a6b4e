"""Tokens to experts and back: `f(x, seats, experts, room, *, ...) -> y`.

One contract, equal results:

  x [g, s, d], seats    who sits where
  experts(xs, expert)   block b of xs [b, ..., d] through expert `expert[b]`
                        (None: expert b; e: no one's, never heard); in two steps
                        `experts.hidden(xs, expert)`, a tree of [b, ...], and
                        `experts.answers(hidden, expert)`; itself a tree of
                        arrays [e, ...] and of keys for dropout: `experts.Bank`
  y [g, s, d]           each token's answers, summed with their weights in
                        float32 and returned in the dtype of x

In a profile the ways there and back are `dispatch` and `combine`.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from st_moe.config import MoEConfig, Part
from st_moe.model.grouped import BLOCK, grouped
from st_moe.model.rows import Room, by_slot, combine, take
from st_moe.routing.types import Seats
from st_moe.sharding import move, shards

# Remat policies save these, so that no backward pass repeats the exchange.
SAVED_NAMES = ('expert_inputs', 'expert_outputs')


def mask(x, seats: Seats, experts, room: Room):
  """One-hot masks [g, s, e, c] and einsums: the plain reading of the papers.

  Costs 4 * s * e * c * d FLOPs per group beyond the experts.
  """
  g, s, _ = x.shape
  num_experts, capacity = room.num_experts, room.capacity
  place = jnp.where(seats.place < 0, capacity, seats.place)
  with jax.named_scope('dispatch'):
    taken = jnp.zeros((g, s, num_experts, capacity), x.dtype)
    taken = jax.vmap(lambda m, *route: m.at[route].set(1, mode='drop'))(
      taken, seats.token, seats.expert, place
    )
    xs = jnp.einsum('gsec,gsd->egcd', taken, x)
  ys = _exchange(xs, experts, room.transport).reshape(xs.shape)
  with jax.named_scope('combine'):
    weights = jnp.zeros(taken.shape)
    weights = jax.vmap(
      lambda m, *route: m.at[route[:3]].add(route[3], mode='drop')
    )(weights, seats.token, seats.expert, place, seats.weight)
    y = jnp.einsum('gsec,egcd->gsd', weights, ys.astype(jnp.float32))
    return y.astype(x.dtype)


def index(x, seats: Seats, experts, room: Room):
  """Tokens gathered by place, answers added up by token: what sits, no more."""
  num_experts, capacity = room.num_experts, room.capacity
  slot = seats.expert * capacity + seats.place
  with jax.named_scope('dispatch'):
    seated = by_slot(seats, slot, num_experts * capacity)
    # Born [e, g, c], as they travel.
    split = lambda a: a.reshape(len(x), num_experts, capacity).swapaxes(0, 1)
    token, weight, route = (split(a) for a in seated)
    xs = take(x, token)
  ys = _exchange(xs, experts, room.transport)
  routes = (route, seats.weight) if seats.k else None
  with jax.named_scope('combine'):
    return combine(ys, token, weight, routes, x.shape[1])


def per_token(x, seats: Seats, experts, room: Room):
  """Each route through a copy of its expert's weights: for very few of them."""
  del room
  g, n = seats.expert.shape
  d = x.shape[-1]
  token = seats.token[None]
  weight = jnp.where(seats.place < 0, 0, seats.weight)[None]
  with jax.named_scope('dispatch'):
    xs = take(x, token).reshape(g * n, 1, d)
  ys = experts(xs, seats.expert.reshape(-1)).reshape(1, g, n, d)
  with jax.named_scope('combine'):
    return combine(ys, token, weight, None, x.shape[1])


def fitting(moe: MoEConfig, seats: Seats, deterministic: bool) -> Part:
  """The dispatcher of a config; of 'auto' the one that suits what sits."""
  if moe.dispatcher.name != 'auto':
    return moe.dispatcher
  if not moe.capacity(deterministic).dropless:
    return Part('index')
  # Few routes, as in a step of decoding: what counts is to read few weights,
  # and to copy none where every expert is read anyway.
  routes = seats.expert.size
  if routes < moe.num_experts:
    return Part('per_token')
  return Part('index' if routes <= BLOCK else 'grouped')


DISPATCHERS = {
  'mask': mask,
  'index': index,
  'grouped': grouped,
  'per_token': per_token,
}


def _exchange(xs: jax.Array, experts, transport: str) -> jax.Array:
  """Experts on [e, g, c, d], moved between the layouts by two all-to-alls.

  Returns [e, devices, rows, d]: what a device sends lies along one axis, as
  CPUs like it, and the devices have their own. So a TPU multiplies rows in the
  order in which they arrive; one axis of both would be a copy. Where there is
  one device, answers come in the shape of `xs`.
  """
  here = (None, 'group', 'slot', 'activation_embed')
  there = ('expert', 'expert_replicas', 'slot', 'activation_embed')
  shape, devices = xs.shape, shards('group')
  with jax.named_scope('dispatch'):
    xs = xs.reshape(len(xs), devices, -1, xs.shape[-1])
    xs = move(xs, here, there, split=0, join=1, by=transport)
  ys = experts(checkpoint_name(xs, 'expert_inputs'), None)
  with jax.named_scope('combine'):
    ys = move(ys, there, here, split=1, join=0, by=transport)
    # A CPU weighs groups faster than an axis of one.
    ys = ys.reshape(shape) if devices == 1 else ys
  return checkpoint_name(ys, 'expert_outputs')
