"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

import jax
import jax.numpy as jnp

from st_moe import schedules
from st_moe.about import about
from st_moe.routing.types import RouteContext, Scores
from st_moe.schedules import Positive


@about(row='S2-30', paper='arXiv:2408.15664', keeps=(('bias', 'e'),))
def balanced(scores: Scores, ctx: RouteContext, rng, kept) -> Scores:
  """A bias for each expert that counts in the choice and in no weight.

  The rule `rebalanced` of `optimizer.after` moves it (arXiv:2408.15664).
  """
  del ctx, rng
  there = scores.select > -jnp.inf  # Whom nobody has ruled out before.
  moved = scores.probs + kept['bias']
  return scores.replace(select=jnp.where(there, moved, -jnp.inf))


@about(row='S1-03', paper='arXiv:2106.05974', noisy=True)
def noise(
  scores: Scores, ctx: RouteContext, rng, kept, *, std: Positive = 1.0
) -> Scores:
  """Normal noise of deviation `std` / experts on the logits, in training.

  Choice and weights hear of it, the z-loss does not. The deviation is left for
  the loss `load` (arXiv:2106.05974, section 2).
  """
  del kept
  if ctx.deterministic or std == 0:
    return scores
  shape = scores.select.shape
  deviation = schedules.value(std, ctx.step) / shape[-1]
  noisy = scores.plus(deviation * jax.random.normal(_key(rng, 'noise'), shape))
  # A gate may have drawn some before.
  both = jnp.hypot(scores.aside.get('std', 0.0), deviation)
  aside = {**scores.aside, 'std': jnp.broadcast_to(both, shape)}
  return noisy.replace(aside=aside)


@about(row='S1-17', paper='arXiv:2207.04672', noisy=True)
def gumbel_second(scores: Scores, ctx: RouteContext, rng, kept) -> Scores:
  """The best expert stays on top; in training the others come by chance.

  The second is the best of logits + Gumbel noise: drawn by the probabilities of
  those that are left, as further ones are. Weights are of the probabilities as
  they were (the code of arXiv:2207.04672).
  """
  del kept
  if ctx.deterministic:
    return scores
  select = scores.select
  drawn = jax.random.gumbel(_key(rng, 'gumbel_second'), select.shape)
  first = jax.nn.one_hot(select.argmax(-1), select.shape[-1], dtype=bool)
  noisy = select + drawn
  # Not inf: what an override adds later may be -inf.
  above = noisy.max(-1, keepdims=True) + 1
  return scores.replace(select=jnp.where(first, above, noisy))


def _key(rng: jax.Array | None, name: str) -> jax.Array:
  if rng is None:
    raise ValueError(
      f"The shaping {name!r} draws numbers: pass rngs={{'dropout': key}}, or"
      ' leave it out of config.model.moe.shaping.'
    )
  return rng


SHAPING = {
  'balanced': balanced,
  'noise': noise,
  'gumbel_second': gumbel_second,
}
