"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

import jax.numpy as jnp

from st_moe.about import about
from st_moe.routing.types import RouteContext, Scores


@about(
  row='S2-30', paper='arXiv:2408.15664', keeps=(('bias', 'e'),), neutral={}
)
def balanced(scores: Scores, ctx: RouteContext, rng, kept) -> Scores:
  """A bias for each expert that counts in the choice and in no weight.

  The rule `rebalanced` of `optimizer.after` moves it (arXiv:2408.15664).
  """
  del ctx, rng
  there = scores.select > -jnp.inf  # Whom nobody has ruled out before.
  moved = scores.probs + kept['bias']
  return scores.replace(select=jnp.where(there, moved, -jnp.inf))


SHAPING = {'balanced': balanced}
