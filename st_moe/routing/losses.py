"""Losses and gauges of routing: `f(of: Routed, *, ...) -> (sum, weight)`.

Sums and weights are added over microbatches and devices before they are
divided, so a loss is the same in value and gradient however a batch is cut into
whole groups, and padding and empty groups count nothing.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.routing.types import RouteContext, Routed, Scores


@about(row='S0-01', paper='arXiv:2202.08906')
def router_z(of: Routed):
  """Sum over valid tokens of logsumexp(logits)^2 (arXiv:2202.08906, Eq. 5)."""
  z = jax.nn.logsumexp(of.scores.logits, axis=-1) ** 2
  return _over(z, of.ctx.valid)


@about(row='S0-01', paper='arXiv:2202.08906')
def load_balance(of: Routed):
  """e * sum_e f_e p_e per group: 1 when even, e when one expert takes all.

  f_e is the share of valid tokens whose first choice is e, counted before
  anyone is dropped; gradient flows through the mean probability p_e alone
  (arXiv:2202.08906, Eq. 7-9). Groups weigh as much as their valid tokens.
  """
  probs, seats = of.scores.probs, of.seats
  first = seats.first if seats.k else probs.argmax(-1)
  return _balance(jax.nn.one_hot(first, probs.shape[-1]), probs, of.ctx)


@about(row='S0-01', paper='arXiv:2202.08906')
def load_balance_all(of: Routed):
  """`load_balance` with all that was asked in f_e: k when even (Flaxformer)."""
  probs = of.scores.probs
  return _balance(of.seats.chosen(probs.shape[1]), probs, of.ctx)


def _balance(chosen, probs, ctx: RouteContext):
  """e * sum_e f_e p_e, f_e the share of valid tokens with chosen [g, s, e]."""
  e = probs.shape[-1]
  valid = ctx.valid.astype(jnp.float32)
  count = valid.sum(-1)  # [g]
  f = jnp.einsum('gse,gs->ge', chosen, valid)
  p = jnp.einsum('gse,gs->ge', probs, valid)
  safe = jnp.maximum(count, 1)[:, None]
  loss = e * (f / safe * (p / safe)).sum(-1)  # [g]
  return (loss * count).sum(), count.sum()


@about(row='S1-01', paper='arXiv:1701.06538')
def importance(
  of: Routed, *, by: Literal['weights', 'probs', 'logits'] = 'weights'
):
  """CV^2 over experts of what the tokens of a group give them: 0 when even.

  weights  those of routes, before anyone is dropped (arXiv:1701.06538, Eq. 7)
  probs    what the gate gives, to who is not asked as well
  logits   their softmax, without noise (V-MoE: arXiv:2106.05974, App. A)
  """
  scores, seats = of.scores, of.seats
  if by == 'weights':
    asked = jnp.where(seats.asked, seats.weight, 0)
    given = seats.scattered(asked, scores.probs.shape[1])
  else:
    given = scores.probs if by == 'probs' else jax.nn.softmax(scores.logits)
  return _uneven(given, of.ctx)


@about(row='S1-01', paper='arXiv:1701.06538')
def load(of: Routed, *, exclude: bool = True):
  """CV^2 over experts of how many tokens of a group should choose them.

  The sum of their `chances`, which have a gradient, as counts have none
  (arXiv:1701.06538, Eq. 10-11). Where nobody drew noise, as in evaluation,
  there is nothing to weigh.

  Raises:
    ValueError: there is noise, and no k.
  """
  if 'std' not in of.scores.aside:
    return jnp.zeros(()), jnp.zeros(())
  if not of.seats.k:
    raise ValueError(
      "The loss 'load' asks how likely a token chooses an expert, and here"
      ' experts choose tokens: take it out of config.model.moe.losses.'
    )
  return _uneven(chances(of.scores, of.seats.k, exclude), of.ctx)


def chances(scores: Scores, k: int, exclude: bool = True) -> jax.Array:
  """How likely tokens choose each expert, were its noise drawn anew: [g, s, e].

  Phi((logit - b) / std), where b is the k-th largest noisy score of the others
  (arXiv:1701.06538, Eq. 8-9), or of all (`exclude` False: as V-MoE does,
  arXiv:2106.05974). Who draws noise leaves its deviation, `aside['std']`.
  """
  select = scores.select
  # From the best down; behind the last there is room.
  ordered = -jnp.sort(-select, axis=-1)
  ordered = jnp.pad(ordered, [(0, 0)] * 2 + [(0, 1)], constant_values=-jnp.inf)
  bar, after = ordered[..., k - 1, None], ordered[..., k, None]
  if exclude:
    bar = jnp.where(select >= bar, after, bar)
  barred = bar > -jnp.inf
  std = jnp.maximum(scores.aside['std'], 1e-6)  # It may have underflowed.
  ahead = (scores.logits - jnp.where(barred, bar, 0)) / std
  chosen = jnp.where(barred, jax.scipy.stats.norm.cdf(ahead), 1)
  return jnp.where(select > -jnp.inf, chosen, 0)


def _uneven(given, ctx: RouteContext):
  """CV^2 over experts of the sums of given [g, s, e] over valid tokens."""
  valid = ctx.valid.astype(jnp.float32)
  sums, count = jnp.einsum('gse,gs->ge', given, valid), valid.sum(-1)
  loss = sums.var(-1) / (sums.mean(-1) ** 2 + 1e-10)  # [g]
  return (loss * count).sum(), count.sum()


LOSSES = {
  'load_balance': load_balance,
  'load_balance_all': load_balance_all,
  'router_z': router_z,
  'importance': importance,
  'load': load,
}


def _over(value: jax.Array, mask: jax.Array):
  """Sum of `value` where `mask`, and how many those are."""
  mask = mask.astype(jnp.float32)
  return (value * mask).sum(), mask.sum()


def gauges(of: Routed) -> dict:
  """Health of one sparse layer: (sum, weight) each."""
  probs, seats, valid = of.scores.probs, of.seats, of.ctx.valid
  entropy = -(probs * jnp.log(probs + 1e-9)).sum(-1)
  asked = seats.asked.astype(jnp.float32)
  found = {
    'router_entropy': _over(entropy, valid),
    'router_confidence': _over(probs.max(-1), valid),
    'active_experts': (asked.sum(), valid.astype(jnp.float32).sum()),
    # Of the routes asked for, those that found no seat.
    'dropped_routes': _over((seats.place < 0).astype(jnp.float32), seats.asked),
  }
  if seats.k:
    g, s = valid.shape
    alone = (seats.place.reshape(g, s, seats.k) < 0).all(-1)
    # Tokens that no expert answers.
    found['dropped_tokens'] = _over(alone.astype(jnp.float32), valid)
  return found
