"""Scores to scores: `f(scores, ctx, rng, kept, *, ...) -> Scores`."""

import jax
import jax.numpy as jnp

from st_moe import schedules
from st_moe.about import about
from st_moe.fields import AtLeast0, Count, Share, Size
from st_moe.routing.types import RouteContext, Scores
from st_moe.schedules import Positive


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


@about(
  row='S0-12',
  paper='arXiv:2310.00811',
  neutral={'jitter': 1.0},
)
def near_best(
  scores: Scores, ctx: RouteContext, rng, kept, *, jitter: Share = 0.1
) -> Scores:
  """Rules out experts that no jitter of the scores would bring to the front.

  See `near`; probabilities are those of the rest (arXiv:2310.00811).
  """
  del ctx, rng, kept
  return _without(scores, ~near(scores.select, jitter))


def near(select: jax.Array, jitter: float) -> jax.Array:
  """Who may be the best of [..., e] once both are jittered, bool [..., e].

  `(best - z) / max(|z|, best) <= 2 jitter`. Whom -inf rules out is not.
  """
  there = select > -jnp.inf
  z = jnp.where(there, select, 0)  # Or -inf by itself would become NaN.
  best = jnp.where(there, select, -jnp.inf).max(-1, keepdims=True)
  return there & (best - z <= 2 * jitter * jnp.maximum(jnp.abs(z), best))


@about(
  row='S1-02',
  paper='arXiv:2204.10598',
  keeps=(('usage', 'e'),),
  neutral={'threshold': 1e9},
)
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
  share = probs / jnp.maximum(probs.sum(-1, keepdims=True), 1e-37)
  return scores.replace(
    select=jnp.where(out, -jnp.inf, scores.select),
    probs=jnp.where(out.any(-1, keepdims=True), share, scores.probs),
  )


@about(row='S1-03', paper='arXiv:2106.05974', noisy=True, neutral={'std': 0.0})
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


@about(
  row='S1-17',
  paper='arXiv:2207.04672',
  noisy=True,
  neutral={'scale': 0.0},
)
def gumbel_second(
  scores: Scores, ctx: RouteContext, rng, kept, *, scale: Positive = 1.0
) -> Scores:
  """The best expert stays on top; in training the others come by chance.

  The second is the best of logits + `scale` * Gumbel noise: at 1 drawn by the
  probabilities of those that are left, as further ones are. Weights are of the
  probabilities as they were (the code of arXiv:2207.04672).
  """
  del kept
  if ctx.deterministic:
    return scores
  select = scores.select
  drawn = jax.random.gumbel(_key(rng, 'gumbel_second'), select.shape)
  first = jax.nn.one_hot(select.argmax(-1), select.shape[-1], dtype=bool)
  noisy = select + schedules.value(scale, ctx.step) * drawn
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
  neutral={},
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


def _own_experts_fit(model, moe, *, tasks, **_):
  if tasks > moe.num_experts:
    raise ValueError(
      f'config.model.moe.shaping.own_experts.tasks = {tasks}: each needs an'
      f' expert of its own, and there are {moe.num_experts}.'
    )


@about(
  row='S1-12',
  paper='arXiv:2505.14336',
  needs=('task',),
  neutral={'tasks': 1},
  fits=_own_experts_fit,
)
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
    logits=only(scores.logits),
    select=only(scores.select),
    probs=jnp.where(own.all(-1, keepdims=True), scores.probs, probs),
  )


SHAPING = {
  'balanced': balanced,
  'gumbel_second': gumbel_second,
  'near_best': near_best,
  'noise': noise,
  'own_experts': own_experts,
  'quantile': quantile,
  'rested': rested,
}
