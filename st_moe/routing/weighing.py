"""Seats to seats with other weights: `f(seats, ctx, rng, *, ...) -> Seats`.

A masked answer is a weight of 0: neither dispatchers nor losses need to know.
"""

import jax.numpy as jnp

from st_moe.about import about
from st_moe.routing.types import RouteContext, Seats


@about(row='S1-17', paper='arXiv:2207.04672')
def renormalised(seats: Seats, ctx: RouteContext, rng) -> Seats:
  """The weights of a token's seated routes sum to 1, whoever was dropped.

  With `normalize` False of `top_k` this is NLLB's renormalisation after drops;
  of one route alone the weight is 1, and its router has no gradient.
  """
  del rng
  total = seats.dense(ctx.valid.shape[1]).sum(-1)  # [g, s]
  mine = jnp.take_along_axis(total, seats.token, axis=1)
  heard = (seats.place >= 0) & (mine > 0)
  weight = jnp.where(heard, seats.weight / jnp.where(heard, mine, 1), 0)
  return seats.replace(weight=weight)


WEIGHING = {'renormalised': renormalised}
