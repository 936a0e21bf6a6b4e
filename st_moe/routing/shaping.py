"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.fields import AtLeast0, Rate
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


@about(row='S0-12', paper='arXiv:2310.00811')
def near_best(
  scores: Scores, ctx: RouteContext, rng, kept, *, jitter: Rate = 0.1
) -> Scores:
  """Rules out experts that no jitter of the scores would bring to the front.

  See `near`; probabilities are those of the rest (arXiv:2310.00811).
  """
  del ctx, rng, kept
  return _without(scores, ~near(scores.select, jitter))


def near(select: jax.Array, jitter: float) -> jax.Array:
  """Who may be the best of [..., e] once both are jittered, bool [..., e].

  (best - z) / max(|z|, best) <= 2 jitter. Whom -inf rules out is not.
  """
  there = select > -jnp.inf
  z = jnp.where(there, select, 0)  # Or -inf by itself would become NaN.
  best = jnp.where(there, select, -jnp.inf).max(-1, keepdims=True)
  return there & (best - z <= 2 * jitter * jnp.maximum(jnp.abs(z), best))


@about(row='S1-02', paper='arXiv:2204.10598', keeps=(('usage', 'e'),))
def rested(
  scores: Scores, ctx: RouteContext, rng, kept, *, threshold: AtLeast0 = 0.5
) -> Scores:
  """Rules out in training who was used too much: (usage - mean) / mean.

  Where that is above `threshold` an expert rests for the step, and
  probabilities are those of the rest. Of a token's experts one always works: if
  others have ruled out all that would, none rests. The rule `used` of
  `optimizer.after` writes the usage (hard constraint of arXiv:2204.10598).
  """
  del rng
  if ctx.deterministic:
    return scores
  usage = kept['usage']
  tired = usage > (1 + threshold) * usage.mean()
  there = scores.select > -jnp.inf
  works = (there & ~tired).any(-1, keepdims=True)
  return _without(scores, tired & works)


def _without(scores: Scores, out: jax.Array) -> Scores:
  """As if the logits of those `out` [..., e] had been -inf."""
  probs = jnp.where(out, 0, scores.probs)
  return scores.replace(
    select=jnp.where(out, -jnp.inf, scores.select),
    probs=probs / jnp.maximum(probs.sum(-1, keepdims=True), 1e-37),
  )


SHAPING = {'balanced': balanced, 'near_best': near_best, 'rested': rested}
