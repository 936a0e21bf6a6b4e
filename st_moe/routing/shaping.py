"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.fields import Count
from st_moe.routing.types import RouteContext, Scores


@about(row='S2-30', paper='arXiv:2408.15664', keeps=(('bias', 'e'),))
def balanced(scores: Scores, ctx: RouteContext, rng, kept) -> Scores:
  """A bias for each expert that counts in the choice and in no weight.

  The rule `rebalanced` of `optimizer.after` moves it (arXiv:2408.15664).
  """
  del ctx, rng
  there = scores.select > -jnp.inf  # Whom nobody has ruled out before.
  moved = scores.probs + kept['bias']
  return scores.replace(select=jnp.where(there, moved, -jnp.inf))


def _own_experts_fit(model, moe, *, tasks, **_):
  if tasks > moe.num_experts:
    raise ValueError(
      f'config.model.moe.shaping.own_experts.tasks = {tasks}: each needs an'
      f' expert of its own, and there are {moe.num_experts}.'
    )


@about(row='S1-12', needs=('task',), fits=_own_experts_fit)
def own_experts(
  scores: Scores, ctx: RouteContext, rng, kept, *, tasks: Count
) -> Scores:
  """Rules out the experts of other tasks: each has a window of its own.

  Expert i is of task floor(i * `tasks` / experts); tasks past the last share
  its window. For the z-loss too, others are not there.
  """
  del rng, kept
  experts = scores.select.shape[-1]
  owner = jnp.arange(experts) * tasks // experts
  own = ctx.told_task(tasks)[..., None] == owner
  only = lambda logits: jnp.where(own, logits, -jnp.inf)
  # Where all its own had underflowed, 0 would become NaN.
  probs = jax.nn.softmax(only(jnp.log(jnp.maximum(scores.probs, 1e-37))))
  return scores.replace(
    logits=only(scores.logits), select=only(scores.select), probs=probs
  )


SHAPING = {'balanced': balanced, 'own_experts': own_experts}
