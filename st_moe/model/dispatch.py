"""Tokens to experts and back: `dispatch(x, seats, experts, ...) -> y`.

One contract, equal results:

  x [g, s, d], seats    who sits where
  experts(xs, expert)   block b of xs [b, ..., d] through expert `expert[b]`
                        (None: expert b); a tree of arrays [e, ...] and of
                        keys for dropout: `experts.Bank`
  y [g, s, d]           each token's answers, summed with their weights in
                        float32 and returned in the dtype of x

In a profile the ways there and back are `dispatch` and `combine`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from st_moe.routing.types import Seats
from st_moe.sharding import AXES, move, on_shards, shards

# Remat policies save these, so that no backward pass repeats the exchange.
SAVED_NAMES = ('expert_inputs', 'expert_outputs')
BLOCK = 128  # Rows of one expert that `grouped` computes together.


def mask(x, seats: Seats, experts, *, capacity, num_experts, transport='auto'):
  """One-hot masks [g, s, e, c] and einsums: the plain reading of the papers.

  Costs 4 * s * e * c * d FLOPs per group beyond the experts.
  """
  g, s, _ = x.shape
  place = jnp.where(seats.place < 0, capacity, seats.place)
  with jax.named_scope('dispatch'):
    taken = jnp.zeros((g, s, num_experts, capacity), x.dtype)
    taken = jax.vmap(lambda m, *route: m.at[route].set(1, mode='drop'))(
      taken, seats.token, seats.expert, place
    )
    xs = jnp.einsum('gsec,gsd->egcd', taken, x)
  ys = _exchange(xs, experts, transport).reshape(xs.shape)
  with jax.named_scope('combine'):
    combine = jnp.zeros(taken.shape)
    combine = jax.vmap(
      lambda m, *route: m.at[route[:3]].add(route[3], mode='drop')
    )(combine, seats.token, seats.expert, place, seats.weight)
    y = jnp.einsum('gsec,egcd->gsd', combine, ys.astype(jnp.float32))
    return y.astype(x.dtype)


def index(x, seats: Seats, experts, *, capacity, num_experts, transport='auto'):
  """Tokens gathered by place, answers added up by token: what sits, no more."""
  slot = seats.expert * capacity + seats.place
  with jax.named_scope('dispatch'):
    by_slot = _by_slot(seats, slot, num_experts * capacity)
    # Born [e, g, c], as they travel.
    split = lambda a: a.reshape(len(x), num_experts, capacity).swapaxes(0, 1)
    token, weight = (split(a) for a in by_slot)
    xs = _take(x, token)
  ys = _exchange(xs, experts, transport)
  with jax.named_scope('combine'):
    return _combine(ys, token, weight, x.shape[1])


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
  """Rows sorted by expert, in blocks of one expert each, one after another.

  Costs the rows that sit, rounded up to whole blocks per expert, whatever the
  capacity: a loop of as many turns as there are blocks, which only its loads
  tell. Nothing is prepared for the worst of them but two tables of numbers, no
  weight is copied, and gradients add up in float32.
  """
  blocks = functools.partial(
    _in_blocks, capacity=capacity, num_experts=num_experts, block=block
  )
  if transport == 'gspmd' or shards('group') * shards('expert_mlp') == 1:
    return checkpoint_name(blocks(x, seats, experts), 'expert_outputs')

  def own(a):
    if _is_number(a):
      return jax.lax.pcast(a, ('data', 'fsdp'), to='varying')
    return jax.random.fold_in(a, jax.lax.axis_index(AXES))

  def local(x, seats, experts):
    # Tokens of all who share the experts meet on each of their devices.
    with jax.named_scope('dispatch'):
      x, seats = jax.lax.all_gather((x, seats), 'expert', tiled=True)
    x = checkpoint_name(x, 'expert_inputs')
    n = len(experts.wo)
    first = jax.lax.axis_index('expert') * n
    mine = (seats.expert >= first) & (seats.expert < first + n)
    seats = seats.replace(
      expert=jnp.where(mine, seats.expert - first, 0),
      place=jnp.where(mine, seats.place, -1),
      load=jax.lax.dynamic_slice_in_dim(seats.load, first, n, axis=1),
    )
    # Gradients differ where the arrays do not, and are summed there.
    x, seats = jax.lax.pcast((x, seats), 'model', to='varying')
    experts = jax.tree.map(own, experts)
    y = blocks(x, seats, experts).astype(jnp.float32)
    with jax.named_scope('combine'):
      y = jax.lax.psum_scatter(y, 'expert', tiled=True)
      return jax.lax.psum(y, 'model').astype(x.dtype)

  by_group = lambda a: ('group', *(None,) * (a.ndim - 1))
  axes = jax.tree.map(by_group, (x, seats))
  run = on_shards(local, (*axes, experts.axes()), by_group(x))
  return checkpoint_name(run(x, seats, experts), 'expert_outputs')


def _in_blocks(x, seats: Seats, experts, *, capacity, num_experts, block):
  g, s, d = x.shape
  (_, n), (_, here) = seats.expert.shape, seats.load.shape
  block = min(block, g * n)
  most = -(-g * n // block) + here
  # All groups share one sequence of rows: each expert's segment starts at a
  # whole block, and inside it the groups follow one another.
  per_expert = -(-seats.load.sum(0) // block)
  ends = per_expert.cumsum()  # [e], in blocks.
  before = seats.load.cumsum(0) - seats.load  # [g, e]
  starts = (ends - per_expert) * block + before
  row = jnp.take_along_axis(starts, seats.expert, 1) + seats.place
  expert = (ends <= jnp.arange(most)[:, None]).sum(-1)

  one = lambda a: a.reshape(1, -1)
  flat = seats.replace(
    token=one(seats.token + jnp.arange(g)[:, None] * s),
    place=one(seats.place),
    weight=one(seats.weight),
  )
  with jax.named_scope('dispatch'):
    by_slot = _by_slot(flat, one(row), most * block)
  token, weight = (a.reshape(most, 1, block) for a in by_slot)
  load = g * min(n / num_experts, capacity)  # Of an expert, were all alike.
  turns = round(here * max(1, load / block + 0.5))
  y = _answers(
    turns, x.reshape(1, g * s, d), experts, weight, token, expert, ends[-1]
  )
  return y.reshape(g, s, d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _answers(turns: int, x, experts, weight, token, expert, n) -> jax.Array:
  """Answers of blocks 0 to n, weighted and added up by token: [1, s, d].

  Args:
    turns: about how many blocks there are, for who reads the program.
    x: [1, s, d].
    weight, token: [blocks, 1, rows].
    expert: [blocks].
  """

  rows = _tiled(x)  # Once: it may be a copy.

  def turn(i, y):
    w, t, e = _at((weight, token, expert), i)
    with jax.named_scope('dispatch'):
      xs = _picked(rows, t)
    ys = _one(experts, e[0], i)(xs, None)
    with jax.named_scope('combine'):
      return _add(y, ys.astype(jnp.float32) * w[..., None], t)

  return _loop(turns, n, turn, jnp.zeros_like(x, jnp.float32)).astype(x.dtype)


def _answers_forward(turns, *args):
  return _answers(turns, *args), args


def _answers_backward(turns, kept, dy):
  """Another loop, which computes every block again."""
  x, experts, weight, token, expert, n = kept
  rows, slopes = _tiled(x), _tiled(dy)

  def turn(i, sums):
    w, t, e = _at((weight, token, expert), i)
    answer = lambda one, xs: one(xs, None)
    with jax.named_scope('dispatch'):
      xs = _picked(rows, t)
    ys, back = jax.vjp(answer, _one(experts, e[0], i), xs)
    with jax.named_scope('combine'):
      heard = _picked(slopes, t).astype(jnp.float32)
      dys = (heard * w[..., None]).astype(ys.dtype)
      dw = (heard * ys.astype(jnp.float32)).sum(-1)
    d, dxs = back(dys)

    def add(total, d, at):
      if d.dtype == jax.dtypes.float0:  # Of a key.
        return total
      new = _at(total, at) + d.astype(total.dtype)
      return jax.lax.dynamic_update_slice_in_dim(total, new, at, 0)

    dx, dexperts, dweight = sums
    with jax.named_scope('dispatch'):
      dx = _add(dx, dxs.astype(jnp.float32), t)
    return (
      dx,
      jax.tree.map(lambda total, d: add(total, d, e[0]), dexperts, d),
      add(dweight, dw, i),
    )

  primals = x, experts, weight
  zeros = lambda a: jnp.zeros_like(a, jnp.float32)
  sums = _loop(turns, n, turn, jax.tree.map(zeros, primals))
  like = lambda total, a: total.astype(a.dtype) if _is_number(a) else None
  return *jax.tree.map(like, sums, primals), None, None, None


_answers.defvjp(_answers_forward, _answers_backward)


def _loop(turns: int, n: jax.Array, turn, start):
  """`turn` n times; `plan.hlo` reads from the name how often to expect."""
  with jax.named_scope(f'about_{turns}_turns'):
    return jax.lax.fori_loop(0, n, turn, start)


def _at(arrays, i):
  return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), arrays)


def _one(experts, e, block):
  """The bank of expert `e` alone; its dropout is that of the block."""
  of = lambda a: _at(a, e) if _is_number(a) else jax.random.fold_in(a, block)
  return jax.tree.map(of, experts)


def _is_number(a: jax.Array) -> bool:
  """Or a key of dropout."""
  return jnp.issubdtype(a.dtype, jnp.floating)


def per_token(
  x, seats: Seats, experts, *, capacity, num_experts, transport='auto'
):
  """Each route through a copy of its expert's weights: for very few of them."""
  del capacity, num_experts, transport
  g, n = seats.expert.shape
  d = x.shape[-1]
  token = seats.token[None]
  weight = jnp.where(seats.place < 0, 0, seats.weight)[None]
  with jax.named_scope('dispatch'):
    xs = _take(x, token).reshape(g * n, 1, d)
  ys = experts(xs, seats.expert.reshape(-1)).reshape(1, g, n, d)
  with jax.named_scope('combine'):
    return _combine(ys, token, weight, x.shape[1])


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
  return _picked(_tiled(x), token)


def _tiled(x: jax.Array) -> jax.Array:
  """x [g, s, d] for `_picked`."""
  # In two dimensions a TPU would read 16 rows for the sake of one.
  *shape, d = x.shape
  return x.reshape(*shape, -1, 128 if d % 128 == 0 else d)


def _picked(x: jax.Array, token: jax.Array) -> jax.Array:
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


def _add(y: jax.Array, xs: jax.Array, token: jax.Array) -> jax.Array:
  """The transpose of `_take`: rows [b, g, n, d] added to y [g, s, d]."""
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(3,),
    inserted_window_dims=(1,),
    scatter_dims_to_operand_dims=(1,),
    operand_batching_dims=(0,),
    scatter_indices_batching_dims=(1,),
  )
  return jax.lax.scatter_add(y, token[..., None], xs, numbers, mode='drop')


def _added(xs: jax.Array, token: jax.Array, s: int) -> jax.Array:
  _, g, _, d = xs.shape
  return _add(jnp.zeros((g, s, d), xs.dtype), xs, token)


_taken.defvjp(
  lambda x, token, s: (_taken(x, token, s), token),
  lambda s, token, dxs: (_added(dxs, token, s), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(ys, token, weight, s: int) -> jax.Array:
  """Answers to tokens [b, g, n], weighted and added up: [g, s, d].

  They are [..., d] and taken as they are: a TPU pays for every change of shape.
  By slot rather than by route, of which there are more where places are few;
  and a TPU gathers rows at more than twice the cost of scattering them.
  """
  # Or XLA converts first and copies twice the bytes.
  ys = jax.lax.optimization_barrier(ys)
  heard = ys.astype(jnp.float32) * weight.reshape(*ys.shape[:-1], 1)
  heard = heard.reshape(*token.shape, -1)
  return _added(heard, token, s).astype(ys.dtype)


def _combine_forward(ys, token, weight, s):
  return _combine(ys, token, weight, s), (ys, token, weight)


def _combine_backward(s, kept, dy):
  # By hand, or rows would be gathered in float32, at twice the cost.
  ys, token, weight = kept
  ys = jax.lax.optimization_barrier(ys)
  heard = _take(dy, token).reshape(ys.shape)
  heard = jax.lax.optimization_barrier(heard).astype(jnp.float32)
  dys = (heard * weight.reshape(*ys.shape[:-1], 1)).astype(ys.dtype)
  dweight = (heard * ys.astype(jnp.float32)).sum(-1)
  return dys, None, dweight.reshape(weight.shape)


_combine.defvjp(_combine_forward, _combine_backward)
