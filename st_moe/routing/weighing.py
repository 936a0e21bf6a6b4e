"""Seats to seats with other weights: `f(seats, ctx, rng, *, ...) -> Seats`.

A masked answer is a weight of 0: neither dispatchers nor losses need to know.
"""

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.fields import Rate
from st_moe.routing.types import RouteContext, Seats


@about(row='S1-14', paper='arXiv:2212.07571', noisy=True, neutral={'rate': 0.0})
def expert_output(
  seats: Seats, ctx: RouteContext, rng: jax.Array | None, *, rate: Rate
) -> Seats:
  """Masks the answers of experts in training, each by itself, with `rate`.

  What stays is not scaled up; evaluation multiplies by 1 - `rate` (EOM of
  arXiv:2212.07571: whole rows of the experts' buffers are masked).
  """
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, seats.weight.shape)
  return _masked(seats, ctx, rng, rate, draw)


@about(row='S1-14', paper='arXiv:2212.07571', noisy=True, neutral={'rate': 0.0})
def final_output(
  seats: Seats, ctx: RouteContext, rng: jax.Array | None, *, rate: Rate
) -> Seats:
  """As `expert_output`, all answers of a token together (FOM)."""

  def draw(key):
    tokens = jax.random.bernoulli(key, 1 - rate, ctx.valid.shape)
    return jnp.take_along_axis(tokens, seats.token, axis=1)

  return _masked(seats, ctx, rng, rate, draw)


def _masked(seats: Seats, ctx: RouteContext, rng, rate: float, draw) -> Seats:
  if ctx.deterministic:
    return seats.replace(weight=seats.weight * (1 - rate))
  if rng is None:
    raise ValueError(
      "Masks of answers are drawn: pass rngs={'dropout': key}, or take"
      ' expert_output and final_output out of moe.weighing.'
    )
  return seats.replace(weight=jnp.where(draw(rng), seats.weight, 0))


@about(
  row='S1-17',
  paper='arXiv:2207.04672',
  neutral='what sums to 1 already stays, and nothing else',
)
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


WEIGHING = {
  'expert_output': expert_output,
  'final_output': final_output,
  'renormalised': renormalised,
}
