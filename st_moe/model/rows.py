"""Rows of tokens, gathered by number and added up again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from st_moe import sharding
from st_moe.routing.types import Seats


@dataclasses.dataclass(frozen=True)
class Room:
  """Where what travels to the experts finds its place."""

  capacity: int  # Places of an expert in each group.
  num_experts: int
  transport: str  # 'auto', 'gspmd', 'shard_map' or 'two_hop'.


def by_slot(seats: Seats, slot: jax.Array, num_slots: int):
  """Whose seat each slot is: token, weight and route, [g, num_slots] of each.

  Empty ones have weight 0, and a token and a route past the last: nobody hears
  them.
  """
  slot = jnp.where(seats.place < 0, num_slots, slot)
  nobody = jnp.iinfo(slot.dtype).max
  token = _put(seats.token, slot, nobody, num_slots)
  number = jnp.broadcast_to(jnp.arange(slot.shape[1]), slot.shape)
  route = _put(number, slot, nobody, num_slots)
  return token, _moved(seats.weight, slot, route), route


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


def take(x: jax.Array, token: jax.Array) -> jax.Array:
  """Tokens of x [g, s, d] by number [b, g, n], as [b, g, n, d].

  Of those past the last, whatever there is: nobody asks for it.
  """
  return _taken(x, token, x.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(x, token, s):
  return picked(tiled(x), token)


def tiled(x: jax.Array) -> jax.Array:
  """x [g, s, d] for `picked`, [g, s, tiles, lanes]; the latter as it is."""
  # In two dimensions a TPU would read 16 rows for the sake of one.
  if x.ndim == 4:
    return x
  *shape, d = x.shape
  return x.reshape(*shape, -1, 128 if d % 128 == 0 else d)


def picked(x: jax.Array, token: jax.Array) -> jax.Array:
  numbers = jax.lax.GatherDimensionNumbers(
    offset_dims=(3, 4),
    collapsed_slice_dims=(1,),
    start_index_map=(1,),
    operand_batching_dims=(0,),
    start_indices_batching_dims=(1,),
  )
  one = (1, 1, *x.shape[2:])
  xs = jax.lax.gather(x, token[..., None], numbers, one, mode='clip')
  return xs.reshape(*token.shape, -1)


def add(y: jax.Array, xs: jax.Array, token: jax.Array) -> jax.Array:
  """The transpose of `take`: rows [b, g, n, d] added to y [g, s, d].

  Or to one as `tiled` has it.
  """
  xs = xs.reshape(*token.shape, *y.shape[2:])
  return _scatter(jax.lax.scatter_add, y, xs, token)


def _scatter(scatter, y, xs, row) -> jax.Array:
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=tuple(range(3, xs.ndim)),
    inserted_window_dims=(1,),
    scatter_dims_to_operand_dims=(1,),
    operand_batching_dims=(0,),
    scatter_indices_batching_dims=(1,),
  )
  return scatter(y, row[..., None], xs, numbers, mode='drop')


def _added(xs: jax.Array, token: jax.Array, s: int) -> jax.Array:
  _, g, _, d = xs.shape
  return add(jnp.zeros((g, s, d), xs.dtype), xs, token)


_taken.defvjp(
  lambda x, token, s: (_taken(x, token, s), token),
  lambda s, token, dxs: (_added(dxs, token, s), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def combine(ys, token, weight, routes, s: int) -> jax.Array:
  """Answers to tokens [b, g, n], weighted and added up: [g, s, d].

  They are [..., d] and taken as they are: a TPU pays for every change of shape.

  Args:
    weight: of each answer, as `token`; the gradient is of this one.
    routes: (route, as `token`; weight [g, s * k] by route) where each token has
      k routes in turn, each with one answer at most; else None.
  """
  # Or XLA converts first and copies twice the bytes.
  ys = jax.lax.optimization_barrier(ys)
  args, added = (ys, token, weight, routes), functools.partial(_by_addition, s)
  if routes is None:
    return added(*args)
  by_choice = functools.partial(_by_choice, s)
  return jax.lax.platform_dependent(*args, cpu=added, default=by_choice)


def _by_addition(s, ys, token, weight, routes):
  """Answers as float32, weighted, and added to their tokens."""
  # Not gathered by route: at that a TPU takes more than twice as long.
  del routes
  heard = ys.astype(jnp.float32) * weight.reshape(*ys.shape[:-1], 1)
  heard = heard.reshape(*token.shape, -1)
  return _added(heard, token, s).astype(ys.dtype)


def _by_choice(s, ys, token, weight, routes):
  """Answers put where their routes are, as they are; then one sum over the k.

  No float32 but inside that sum, and no two answers meet in a scatter: a GPU
  gets the same bits every time.
  """
  route, weight = routes
  g, n = weight.shape
  k = n // s
  # A choice's answers in one piece, or a token's would lie across a tile.
  row = jnp.where(route < n, route % k * s + route // k, n)
  rows = jnp.zeros((g, n, ys.shape[-1]), ys.dtype)
  rows = _scatter(jax.lax.scatter, rows, ys.reshape(*token.shape, -1), row)
  rows, weight = rows.reshape(g, k, s, -1), weight.reshape(g, s, k, 1)
  heard = (rows[:, i].astype(jnp.float32) * weight[:, :, i] for i in range(k))
  return sum(heard).astype(ys.dtype)


def _combine_forward(ys, token, weight, routes, s):
  return combine(ys, token, weight, routes, s), (ys, token, weight)


def _combine_backward(s, kept, dy):
  # By hand, or rows would be gathered in float32, at twice the cost.
  ys, token, weight = kept
  ys = jax.lax.optimization_barrier(ys)
  heard = take(dy, token).reshape(ys.shape)
  heard = jax.lax.optimization_barrier(heard).astype(jnp.float32)
  dys = (heard * weight.reshape(*ys.shape[:-1], 1)).astype(ys.dtype)
  dweight = (heard * ys.astype(jnp.float32)).sum(-1)
  return dys, None, dweight.reshape(weight.shape), None


combine.defvjp(_combine_forward, _combine_backward)


def into_groups(a: jax.Array, group_size: int) -> jax.Array:
  """Cuts [batch, length, ...] into [g, s, ...], zeros filling the last group.

  Groups do not depend on the mesh: empty ones are added where the devices are
  more, and they ask for nothing.
  """
  if a.ndim < 2:  # A scalar of the context, as `step`.
    return a
  batch, length, *rest = a.shape
  tokens = batch * length
  size = min(group_size, tokens)
  g = sharding.whole_groups(tokens, size, sharding.shards('group'))
  a = a.reshape(tokens, *rest)
  a = jnp.pad(a, ((0, g * size - tokens), *((0, 0) for _ in rest)))
  return a.reshape(g, size, *rest)
