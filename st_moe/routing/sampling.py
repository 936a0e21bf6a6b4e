"""Selectors that draw experts, with the gradient of the draw."""

import functools

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.fields import Rate, Size
from st_moe.routing.choosing import asked_k, of_expert
from st_moe.routing.seating import seat
from st_moe.routing.shaping import near
from st_moe.routing.types import Assignment, RouteContext, Scores, Seats


@about(row='S0-12', paper='arXiv:2310.00811', noisy=True)
def mixed_sampling(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  k: Size,
  jitter: Rate | None = None,
) -> Seats:
  """k experts drawn by their probabilities, with the gradient of the draw.

  A choice is drawn from p, the probabilities of who is left, and its weight is
  p_i. Of all but the likeliest it is less by chance: slopes of the loss at two
  points stand for what the experts not drawn would have said. With one choice
  (second order, SparseMixer, arXiv:2310.00811) it is p_i / 2 with probability
  1/2, and its slope 2; with more (third order, GRIN, arXiv:2409.12136) p_i / 3
  with probability 3/4, and its slope 1. Evaluation takes the best, with p_i.

  Args:
    jitter: each choice is among those `near` the best that is left, as
      `near_best` has it for the first; None: among all that are left.
  """
  second = k == 1
  part, chance, slope = (1 / 2, 1 / 2, 2.0) if second else (1 / 3, 3 / 4, 1.0)
  k, rank = asked_k(ctx, k)
  select, num_experts = scores.select, scores.select.shape[-1]
  if not ctx.deterministic and rng is None:
    raise ValueError(
      "mixed_sampling draws experts: pass rngs={'dropout': key}, or use"
      " moe.selector = 'top_k'."
    )
  found = []
  for i in range(rank + k):
    there = select > -jnp.inf if jitter is None else near(select, jitter)
    p = jnp.where(there, scores.probs, 0)
    p /= jnp.maximum(p.sum(-1, keepdims=True), 1e-37)
    if ctx.deterministic:
      expert = jnp.where(there, select, -jnp.inf).argmax(-1)
    else:
      draw, mix = jax.random.split(jax.random.fold_in(rng, i))
      log = jnp.where(there, jnp.log(jnp.maximum(p, 1e-37)), -jnp.inf)
      expert = jax.random.categorical(draw, log)
    weight = of_expert(p, expert[..., None])[..., 0]
    if not ctx.deterministic:
      small = jax.random.bernoulli(mix, chance, expert.shape)
      small &= expert != p.argmax(-1)
      weight = mixed(weight, jnp.where(small, part, 1.0), slope)
    found.append((expert, weight, there.any(-1)))
    taken = expert[..., None] == jnp.arange(num_experts)
    select = jnp.where(taken, -jnp.inf, select)
  expert, weight, there = (
    jnp.stack(x, axis=-1) for x in zip(*found[rank:], strict=True)
  )
  asked = Assignment(expert, weight, ctx.valid[..., None] & there)
  return seat(asked, num_experts=num_experts, capacity=capacity)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mixed(p: jax.Array, part: jax.Array, slope: float) -> jax.Array:
  """p * part, of which the slope in `p` is `slope`, whatever the part."""
  del slope
  return p * part


mixed.defvjp(
  lambda p, part, slope: (p * part, None),
  lambda slope, kept, dy: (slope * dy, jnp.zeros_like(dy)),
)
