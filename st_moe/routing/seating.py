"""Who gets a place: the only code that drops tokens."""

import jax
import jax.numpy as jnp

from st_moe.routing.types import Assignment, Seats


def seat(asked: Assignment, *, num_experts: int, capacity: int) -> Seats:
  """First come, first served: `capacity` places per expert and group.

  All first choices sit before any second choice; inside a choice the order is
  left to right, or ascending `priority`. A token without a seat gets no answer
  from that expert; weights are not renormalised for it (arXiv:2202.08906,
  App. G and Mesh-TensorFlow).
  """
  g, s, k = asked.expert.shape
  by_choice = lambda a: a.swapaxes(1, 2).reshape(g, k * s)
  back = lambda a: a.reshape(g, k, s).swapaxes(1, 2).reshape(g, s * k)

  # Choice-major order puts first choices in front; a stable sort by expert
  # then makes one queue per expert. Who asks for nothing queues nowhere. Sorts
  # throughout: to look up single numbers costs a TPU a tile of memory each.
  queue = by_choice(jnp.where(asked.active, asked.expert, num_experts))
  route = jnp.broadcast_to(jnp.arange(k * s), queue.shape)
  if asked.priority is None:
    lined_up, order = _by_key(queue, num_experts + 1, route, k * s)
  else:
    choice = jnp.broadcast_to(jnp.arange(k)[:, None], (k, s)).reshape(-1)
    keys = queue * k + choice, by_choice(asked.priority)
    lined_up, _, order = jax.lax.sort((*keys, route), num_keys=2)
    lined_up //= k
  begins = jnp.diff(lined_up, axis=-1, prepend=-1) != 0
  rank = route - jax.lax.cummax(jnp.where(begins, route, 0), axis=1)
  rank = jnp.minimum(rank, capacity)
  _, place = _by_key(order, k * s, rank, capacity + 1)
  seated = (place < capacity) & (queue < num_experts)
  wanted = jnp.zeros((g, num_experts + 1), jnp.int32)
  wanted = jax.vmap(lambda w, q: w.at[q].add(1))(wanted, queue)  # [g, e+1]
  return Seats(
    token=jnp.broadcast_to(jnp.arange(s * k) // k, (g, s * k)),
    expert=asked.expert.reshape(g, s * k),
    weight=asked.weight.reshape(g, s * k),
    asked=asked.active.reshape(g, s * k),
    place=back(jnp.where(seated, place, -1)),
    load=jnp.minimum(wanted[:, :-1], capacity),
    k=k,
  )


def _by_key(keys, num_keys: int, values, num_values: int):
  """Pairs of numbers from 0, sorted along the last axis.

  As one number each where an int32 has room for it: a CPU sorts those in a
  third of the time.
  """
  if num_keys * num_values > jnp.iinfo(jnp.int32).max:
    return jax.lax.sort((keys, values), num_keys=2)
  return jnp.divmod(jnp.sort(keys * num_values + values, axis=-1), num_values)
