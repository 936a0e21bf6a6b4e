"""Tokens to experts and back: `dispatch(x, seats, experts, ...) -> y`.

One contract, equal results:

  x [g, s, d], seats    who sits where
  experts(xs, expert)   block b of xs [b, ..., d] through expert `expert[b]`
                        (None: expert b); see `experts.Bank`
  y [g, s, d]           each token's answers, summed with their weights in
                        float32 and returned in the dtype of x
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from st_moe.routing.types import Seats
from st_moe.sharding import move, on_shards, shards

# Remat policies save these, so that no backward pass repeats the exchange.
SAVED_NAMES = ('expert_inputs', 'expert_outputs')
BLOCK = 128  # Rows of one expert that `grouped` computes together.


def mask(x, seats: Seats, experts, *, capacity, num_experts, transport='auto'):
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
  ys = _exchange(xs, experts, transport)
  return jnp.einsum('gsec,egcd->gsd', combine, ys.astype(jnp.float32)).astype(
    x.dtype
  )


def index(x, seats: Seats, experts, *, capacity, num_experts, transport='auto'):
  """Tokens gathered by place, answers added up by token: what sits, no more."""
  slot = seats.expert * capacity + seats.place
  by_slot = _by_slot(seats, slot, num_experts * capacity)
  # Born [e, g, c], as they travel.
  split = lambda a: a.reshape(len(x), num_experts, capacity).swapaxes(0, 1)
  token, weight = (split(a) for a in by_slot)
  return _combine(
    _exchange(_take(x, token), experts, transport), token, weight, x.shape[1]
  )


def grouped(
  x,
  seats: Seats,
  experts,
  *,
  capacity,
  num_experts,
  transport='auto',
  block=BLOCK,
):
  """Rows sorted by expert, in blocks of one expert each: nothing need drop.

  Costs the rows that sit, rounded up to whole blocks per expert, whatever the
  capacity.
  """
  del capacity
  if transport == 'gspmd' or shards('group') == 1:
    return _in_blocks(x, seats, experts, num_experts, block)

  def local(x, seats, experts):
    # Tokens of all who share the experts meet on each of their devices.
    x, seats = jax.lax.all_gather((x, seats), 'expert', tiled=True)
    # Their gradients differ along `model`, and are summed there.
    x, seats = jax.lax.pcast((x, seats), 'model', to='varying')
    n = len(experts.wo)
    first = jax.lax.axis_index('expert') * n
    mine = (seats.expert >= first) & (seats.expert < first + n)
    seats = seats.replace(
      expert=jnp.where(mine, seats.expert - first, 0),
      place=jnp.where(mine, seats.place, -1),
      load=jax.lax.dynamic_slice_in_dim(seats.load, first, n, axis=1),
    )
    y = _in_blocks(x, seats, experts, n, block).astype(jnp.float32)
    y = jax.lax.psum_scatter(y, 'expert', tiled=True)
    return jax.lax.psum(y, 'model').astype(x.dtype)

  by_group = lambda a: ('group', *(None,) * (a.ndim - 1))
  axes = jax.tree.map(by_group, (x, seats))
  run = on_shards(local, (*axes, experts.axes()), by_group(x))
  return run(x, seats, experts)


def _in_blocks(x, seats: Seats, experts, num_experts: int, block: int):
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
  flat = seats.replace(
    token=one(seats.token + jnp.arange(g)[:, None] * s),
    place=one(seats.place),
    weight=one(seats.weight),
  )
  x = x.reshape(1, g * s, d)
  by_slot = _by_slot(flat, one(row), num_blocks * block)
  token, weight = (a.reshape(num_blocks, 1, block) for a in by_slot)
  xs = checkpoint_name(_take(x, token), 'expert_inputs')
  ys = checkpoint_name(experts(xs, expert), 'expert_outputs')
  return _combine(ys, token, weight, g * s).reshape(g, s, d)


def per_token(
  x, seats: Seats, experts, *, capacity, num_experts, transport='auto'
):
  """Each route through a copy of its expert's weights: for very few of them."""
  del capacity, num_experts, transport
  g, n = seats.expert.shape
  d = x.shape[-1]
  token = seats.token[None]
  weight = jnp.where(seats.place < 0, 0, seats.weight)[None]
  xs = _take(x, token).reshape(g * n, 1, d)
  ys = experts(xs, seats.expert.reshape(-1)).reshape(1, g, n, d)
  return _combine(ys, token, weight, x.shape[1])


DISPATCHERS = {
  'mask': mask,
  'index': index,
  'grouped': grouped,
  'per_token': per_token,
}


def _exchange(xs: jax.Array, experts, transport: str) -> jax.Array:
  """Experts on [e, g, c, d], moved between the layouts by two all-to-alls."""
  here = (None, 'group', 'slot', 'activation_embed')
  there = ('expert', 'expert_replicas', 'slot', 'activation_embed')
  xs = move(xs, here, there, split=0, join=1, by=transport)
  ys = experts(checkpoint_name(xs, 'expert_inputs'), None)
  ys = move(ys, there, here, split=1, join=0, by=transport)
  return checkpoint_name(ys, 'expert_outputs')


def _by_slot(seats: Seats, slot: jax.Array, num_slots: int):
  """Whose seat each slot is, and its weight: [g, num_slots] of both.

  Empty ones have weight 0 and a token past the last: nobody hears them.
  """
  slot = jnp.where(seats.place < 0, num_slots, slot)
  nobody = jnp.iinfo(slot.dtype).max
  token = _put(seats.token, slot, nobody, num_slots)
  number = jnp.broadcast_to(jnp.arange(slot.shape[1]), slot.shape)
  route = _put(number, slot, nobody, num_slots)
  return token, _moved(seats.weight, slot, route)


def _put(values: jax.Array, places: jax.Array, empty, n: int) -> jax.Array:
  """[g, n], with `values` at their places below n; elsewhere `empty`."""
  found = jnp.full((len(values), n), empty, values.dtype)
  put = lambda f, p, v: f.at[p].set(v, mode='drop')
  return jax.vmap(put)(found, places, values)


@jax.custom_vjp
def _moved(weight, slot, route):
  """Weights by route as weights by slot; both know the other's number.

  So the way back is a scatter too: to look up single numbers costs a TPU a
  tile of memory each.
  """
  return _put(weight, slot, 0, route.shape[1])


_moved.defvjp(
  lambda weight, slot, route: (_moved(weight, slot, route), (slot, route)),
  lambda kept, d: (_put(d, kept[1], 0, kept[0].shape[1]), None, None),
)


def _take(x: jax.Array, token: jax.Array) -> jax.Array:
  """Tokens of x [g, s, d] by number [b, g, n], as [b, g, n, d].

  Of those past the last, whatever there is: nobody asks for it.
  """
  return _taken(x, token, x.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(x, token, s):
  numbers = jax.lax.GatherDimensionNumbers(
    offset_dims=(3, 4),
    collapsed_slice_dims=(1,),
    start_index_map=(1,),
    operand_batching_dims=(0,),
    start_indices_batching_dims=(1,),
  )
  *_, d = x.shape
  # In two dimensions a TPU would read 16 rows for the sake of one.
  x = x.reshape(len(x), s, -1, 128 if d % 128 == 0 else d)
  one = (1, 1, *x.shape[2:])
  xs = jax.lax.gather(x, token[..., None], numbers, one, mode='clip')
  return xs.reshape(*token.shape, d)


def _add(xs: jax.Array, token: jax.Array, s: int) -> jax.Array:
  """The transpose of `_take`: rows [b, g, n, d] added up as [g, s, d]."""
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(3,),
    inserted_window_dims=(1,),
    scatter_dims_to_operand_dims=(1,),
    operand_batching_dims=(0,),
    scatter_indices_batching_dims=(1,),
  )
  _, g, _, d = xs.shape
  y = jnp.zeros((g, s, d), xs.dtype)
  return jax.lax.scatter_add(y, token[..., None], xs, numbers, mode='drop')


_taken.defvjp(
  lambda x, token, s: (_taken(x, token, s), token),
  lambda s, token, dxs: (_add(dxs, token, s), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(ys, token, weight, s: int) -> jax.Array:
  """Answers [b, g, n, d], weighted and added up by token: [g, s, d].

  By slot rather than by route, of which there are more where places are few;
  and a TPU gathers rows at more than twice the cost of scattering them.
  """
  # Or XLA converts first and copies twice the bytes.
  ys = jax.lax.optimization_barrier(ys)
  heard = ys.astype(jnp.float32) * weight[..., None]
  return _add(heard, token, s).astype(ys.dtype)


def _combine_forward(ys, token, weight, s):
  return _combine(ys, token, weight, s), (ys, token, weight)


def _combine_backward(s, kept, dy):
  # By hand, or rows would be gathered in float32, at twice the cost.
  ys, token, weight = kept
  ys = jax.lax.optimization_barrier(ys)
  heard = _take(dy, token).astype(jnp.float32)
  dys = (heard * weight[..., None]).astype(ys.dtype)
  return dys, None, (heard * ys.astype(jnp.float32)).sum(-1)


_combine.defvjp(_combine_forward, _combine_backward)
