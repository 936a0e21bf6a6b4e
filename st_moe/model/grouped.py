"""The dispatcher `grouped`: rows sorted by expert, as many as there are.

An expert's rows fill whole blocks. A loop takes as many turns as the blocks
need, which only the loads tell: a CPU has one block a turn and one expert for
it; a TPU many, of any experts, whose weights `grouped_tpu` finds by number.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from st_moe.fields import Count
from st_moe.model.rows import Room, add, by_slot, picked, tiled
from st_moe.routing.types import Seats
from st_moe.sharding import axes_of, on_shards, shards

BLOCK = 128  # Rows of one expert, at most.
# What a TPU takes in one turn: an even load and a quarter, below a bound of
# what its hidden units may fill.
_SLACK = 1.25
_AT_ONCE = 1 << 15  # Rows.
# Times the blocks of an even load, of which hidden units may be kept.
_KEPT = 1.5


def grouped(
  x,
  seats: Seats,
  experts,
  room: Room,
  *,
  block: Count = BLOCK,
):
  """Rows sorted by expert, in blocks of one expert each.

  Costs the rows that sit, rounded up to whole blocks per expert, whatever the
  capacity. No weight is copied, and gradients add up in float32. The backward
  pass finds hidden units and answers where a device could get few more rows
  than of even loads; elsewhere nothing is prepared for the worst but two tables
  of numbers, and every block is computed again.
  """
  blocks = functools.partial(_in_blocks, room=room, block=block)
  alone = shards('group') * shards('expert_mlp') == 1
  if room.transport == 'gspmd' or alone:
    # The compiler cannot split what a kernel does, nor what a loop keeps.
    y = blocks(x, seats, experts, local=alone).astype(x.dtype)
    return checkpoint_name(y, 'expert_outputs')

  def own(a):
    if _is_number(a):
      # The slopes of all who share it are summed on the way back.
      wide = a.astype(experts.sums)
      wide = jax.lax.pcast(wide, axes_of('expert_replicas'), to='varying')
      return wide.astype(a.dtype)
    every = jax.sharding.get_abstract_mesh().axis_names
    return jax.random.fold_in(a, jax.lax.axis_index(every))

  def local(x, seats, experts):
    # Tokens of all who share the experts meet on each of their devices.
    # In tiles there and back, or a TPU would lay out all of them anew.
    with jax.named_scope('dispatch'):
      own_x = tiled(x)
      all_x, seats = jax.lax.all_gather((own_x, seats), 'expert', tiled=True)
    all_x = checkpoint_name(all_x, 'expert_inputs')
    n = experts.count
    first = jax.lax.axis_index('expert') * n
    mine = (seats.expert >= first) & (seats.expert < first + n)
    seats = seats.replace(
      expert=jnp.where(mine, seats.expert - first, 0),
      place=jnp.where(mine, seats.place, -1),
      load=jax.lax.dynamic_slice_in_dim(seats.load, first, n, axis=1),
    )
    # Gradients differ where the arrays do not, and are summed there.
    all_x, seats = jax.lax.pcast((all_x, seats), 'model', to='varying')
    experts = jax.tree.map(own, experts)
    y = blocks(all_x, seats, experts, local=True)
    with jax.named_scope('combine'):
      y = jax.lax.psum_scatter(y, 'expert', tiled=True)
      return jax.lax.psum(y, 'model').astype(x.dtype).reshape(x.shape)

  by_group = lambda a: ('group', *(None,) * (a.ndim - 1))
  axes = jax.tree.map(by_group, (x, seats))
  run = on_shards(local, (*axes, experts.axes()), by_group(x))
  return checkpoint_name(run(x, seats, experts), 'expert_outputs')


def _in_blocks(x, seats: Seats, experts, *, room: Room, block, local):
  g, s, *d = x.shape
  (_, n), (_, here) = seats.expert.shape, seats.load.shape
  block = min(block, g * n)
  # Of an expert, were all alike.
  load = g * min(n / room.num_experts, room.capacity)
  turns = round(here * max(1, load / block + 0.5))
  most = -(-g * min(n, here * room.capacity) // block) + here
  at_once = min(most, round(_SLACK * turns), _AT_ONCE // block)
  at_once = max(1, at_once) if local else 1
  most = -(-most // at_once) * at_once
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
    seated = by_slot(flat, one(row), most * block)
  token, weight, _ = (a.reshape(most, 1, block) for a in seated)
  x = x.reshape(1, g * s, *d)
  pace, keeps = (turns, at_once), local and most <= _KEPT * turns
  y = _answers(pace, keeps, x, experts, weight, token, expert, ends[-1])
  return y.reshape(g, s, *d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _answers(pace, keeps, x, experts, weight, token, expert, n) -> jax.Array:
  """Answers of blocks 0 to n, weighted and added up: float32, as `x`.

  Args:
    pace: about how many blocks there are; how many a TPU takes at once.
    keeps: whether the backward pass finds hidden units and answers.
    x: [1, s, d], or as `tiled` has it.
    weight, token: [blocks, 1, rows].
    expert: [blocks].
  """
  args = x, experts, weight, token, expert, n
  return _paced(functools.partial(_forward, False), pace, *args)[0]


def _paced(way, pace, *args):
  turns, at_once = pace
  ways = dict(default=functools.partial(way, turns, 1))
  if at_once > 1:
    ways['tpu'] = functools.partial(way, -(-turns // at_once), at_once)
  return jax.lax.platform_dependent(*args, **ways)


def _forward(keeps, turns, at_once, x, experts, weight, token, expert, n):
  """The answers; if it `keeps` them, hidden units and answers by block."""
  rows = tiled(x)  # Once: it may be a copy.

  def block(i):
    w, t, e = _at((weight, token, expert), i, at_once)
    with jax.named_scope('dispatch'):
      xs = picked(rows, t)
    bank = _of_turn(experts, e, i)
    hidden = bank.hidden(xs, _numbers(e))
    return (hidden, bank.answers(hidden, _numbers(e))), w, t

  def turn(i, found):
    y, kept = found
    (hidden, ys), w, t = block(i)
    with jax.named_scope('combine'):
      heard = ys.astype(jnp.float32).reshape(*t.shape, -1) * w[..., None]
      y = add(y, heard, t)
    if keeps:
      put = lambda total, part: _put_at(total, part, i * at_once)
      kept = jax.tree.map(put, kept, (hidden, ys))
    return y, kept

  def of_all(a):
    # Like it, they vary along axes of the mesh.
    return jnp.broadcast_to(jnp.zeros_like(a)[:1], (len(expert), *a.shape[1:]))

  kept = jax.tree.map(of_all, jax.eval_shape(block, 0)[0]) if keeps else None
  start = jnp.zeros_like(x, jnp.float32), kept
  return _loop(turns, n, len(expert), at_once, turn, start)


def _answers_forward(pace, keeps, *args):
  y, kept = _paced(functools.partial(_forward, keeps), pace, *args)
  return y, (*args, kept)


def _backward(turns, at_once, x, experts, weight, token, expert, n, kept, dy):
  """Another loop; it computes every block again if nothing was kept."""
  rows, slopes = tiled(x), tiled(dy.astype(x.dtype))

  def turn(i, sums):
    w, t, e = _at((weight, token, expert), i, at_once)
    with jax.named_scope('dispatch'):
      xs = picked(rows, t)

    def answers(bank, xs):
      hidden = bank.hidden(xs, _numbers(e))
      if kept:
        hidden = jax.tree.map(_known, hidden, _at(kept[0], i, at_once))
      return bank.answers(hidden, _numbers(e))

    ys, back = jax.vjp(answers, _of_turn(experts, e, i), xs)
    if kept:
      ys = _at(kept[1], i, at_once)
    with jax.named_scope('combine'):
      heard = picked(slopes, t).astype(jnp.float32).reshape(ys.shape)
      w = w.reshape(ys.shape[:-1])
      dys = (heard * w[..., None]).astype(ys.dtype)
      dw = (heard * ys.astype(jnp.float32)).sum(-1)
    d, dxs = back(dys)

    def added(total, d):
      if d.dtype == jax.dtypes.float0:  # Of a key.
        return total
      d = d.astype(total.dtype)
      if len(d) == len(total):
        return total + d
      return _put_at(total, _at(total, e[0]) + d, e[0])

    dx, dexperts, dweight = sums
    with jax.named_scope('dispatch'):
      dx = add(dx, dxs.astype(jnp.float32), t)
    dexperts = jax.tree.map(added, dexperts, d)
    return dx, dexperts, _put_at(dweight, dw.reshape(t.shape), i * at_once)

  primals = x, experts, weight
  zeros = lambda a: jnp.zeros_like(a, jnp.float32)
  start = jax.tree.map(zeros, primals)
  sums = _loop(turns, n, len(expert), at_once, turn, start)
  like = lambda total, a: total.astype(a.dtype) if _is_number(a) else None
  return jax.tree.map(like, sums, primals)


def _answers_backward(pace, keeps, kept, dy):
  return *_paced(_backward, pace, *kept, dy), None, None, None


_answers.defvjp(_answers_forward, _answers_backward)


@jax.custom_vjp
def _known(a: jax.Array, value: jax.Array) -> jax.Array:
  """`a`, whose value is known: nobody need compute it for its slope."""
  return value


_known.defvjp(lambda a, value: (value, None), lambda _, d: (d, None))


def _loop(turns: int, n: jax.Array, most: int, at_once: int, turn, start):
  """Turns for n of the blocks; none is counted where there is but one.

  `plan.hlo` reads from the name how many to expect.
  """
  if most == at_once:
    return turn(0, start)
  with jax.named_scope(f'about_{turns}_turns'):
    return jax.lax.fori_loop(0, -(-n // at_once), turn, start)


def _at(arrays, i, n=1):
  """Parts `i` of n each."""
  cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * n, n)
  return jax.tree.map(cut, arrays)


def _put_at(total, part, at):
  return jax.lax.dynamic_update_slice_in_dim(total, part, at, 0)


def _numbers(expert):
  """Of the experts of a turn; None: it has one, by itself."""
  return expert if len(expert) > 1 else None


def _of_turn(experts, expert, turn):
  """For one block its expert alone; their dropout is that of the turn."""
  numbers = lambda a: a if len(expert) > 1 else _at(a, expert[0])
  of = lambda a: numbers(a) if _is_number(a) else jax.random.fold_in(a, turn)
  return jax.tree.map(of, experts)


def _is_number(a: jax.Array) -> bool:
  """Or a key of dropout."""
  return jnp.issubdtype(a.dtype, jnp.floating)
