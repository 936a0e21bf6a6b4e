"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.fields import Size
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


def _asks_k(model, moe, *, k: int) -> None:
  del model
  if k != moe.k:
    raise ValueError(
      f'config.model.moe.shaping.quantile.k = {k} should be the k of the'
      f' selector {moe.selector.name!r}, {moe.k}.'
    )


@about(
  paper='https://kexue.fm/archives/11619',
  keeps=(('threshold', 'e'),),
  fits=_asks_k,
)
def quantile(
  scores: Scores, ctx: RouteContext, rng, kept, *, k: Size
) -> Scores:
  """A threshold for each expert, which k of e tokens pass; it is in no weight.

  Chosen are the k experts that are furthest above their thresholds. Training
  leaves where these should be for the rule `averaged`: with the cutoff of a
  token halfway between its last choice and the next best, where no more than
  k / e of the valid tokens have probs - cutoff above it. That is exact over all
  groups and devices, and a mean over microbatches. No loss is needed (quantile
  balancing: Su, 2026; Kimi K3, section 2.3.3).
  """
  del rng
  there = scores.select > -jnp.inf
  select = jnp.where(there, scores.probs - kept['threshold'], -jnp.inf)
  scores = scores.replace(select=select)
  if ctx.deterministic:
    return scores
  probs, select = jax.lax.stop_gradient((scores.probs, select))
  e = probs.shape[-1]
  cutoff = jnp.sort(select)[..., -k - 1 : e - k + 1].mean(-1)  # [g, s]
  # Of tokens to whom less than k + 1 are left there is nothing to learn.
  heard = ctx.valid & (cutoff > -jnp.inf)
  above = jnp.where(heard[..., None], probs - cutoff[..., None], -jnp.inf)
  found = _passed(above, heard, k)
  # All of them higher would choose the same.
  found, weight = found - found.mean(), heard.sum().astype(jnp.float32)
  kept = {**scores.aside.get('kept', {}), 'threshold': (found * weight, weight)}
  return scores.replace(aside={**scores.aside, 'kept': kept})


def _passed(values: jax.Array, mask: jax.Array, k: int) -> jax.Array:
  """What k of e of `values` [g, s, e] where `mask` [g, s] lie above: [e].

  By halving: devices tell one another counts, and no values.
  """
  e, count = values.shape[-1], mask.sum()
  there = jnp.where(mask[..., None], values, 0)

  def halved(_, ends):
    low, high = ends
    middle = (low + high) / 2
    many = e * (values > middle).sum((0, 1)) > k * count
    return jnp.where(many, middle, low), jnp.where(many, high, middle)

  ends = there.min((0, 1)), there.max((0, 1))
  return jax.lax.fori_loop(0, 30, halved, ends)[1]


SHAPING = {'balanced': balanced, 'quantile': quantile}
