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
  # then makes one queue per expert. Who asks for nothing queues nowhere.
  queue = by_choice(jnp.where(asked.active, asked.expert, num_experts))
  if asked.priority is None:
    order = jnp.argsort(queue, stable=True)  # [g, k*s]
  else:
    choice = jnp.broadcast_to(jnp.arange(k)[:, None], (k, s)).reshape(-1)
    order = jnp.lexsort((by_choice(asked.priority), queue * k + choice))
  wanted = jnp.zeros((g, num_experts + 1), jnp.int32)
  wanted = jax.vmap(lambda w, q: w.at[q].add(1))(wanted, queue)  # [g, e+1]
  starts = wanted.cumsum(-1) - wanted
  rank = jax.vmap(lambda o: o.at[o].set(jnp.arange(k * s)))(order)
  place = rank - jnp.take_along_axis(starts, queue, axis=-1)
  seated = (place < capacity) & (queue < num_experts)
  return Seats(
    token=jnp.broadcast_to(jnp.arange(s * k) // k, (g, s * k)),
    expert=asked.expert.reshape(g, s * k),
    weight=asked.weight.reshape(g, s * k),
    asked=asked.active.reshape(g, s * k),
    place=back(jnp.where(seated, place, -1)),
    load=jnp.minimum(wanted[:, :-1], capacity),
    k=k,
  )
