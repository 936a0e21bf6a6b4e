"""Losses and gauges of routing: `f(of: Routed, *, ...) -> (sum, weight)`.

Sums and weights are added over microbatches and devices before they are
divided, so a loss is the same in value and gradient however a batch is cut into
whole groups, and padding and empty groups count nothing.
"""

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.routing.types import RouteContext, Routed


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


@about(row='S2-23', paper='arXiv:2403.07652')
def entropy(of: Routed):
  """Sum over valid tokens of -sum_e p ln p: 0 when sure, ln e when even.

  Keeps a router from spreading where more experts are asked for it (`top_p`;
  arXiv:2403.07652).
  """
  return _over(_entropy(of.scores.probs), of.ctx.valid)


def _entropy(probs: jax.Array) -> jax.Array:
  return -(probs * jnp.log(probs + 1e-9)).sum(-1)


LOSSES = {
  'load_balance': load_balance,
  'load_balance_all': load_balance_all,
  'router_z': router_z,
  'entropy': entropy,
}


def _over(value: jax.Array, mask: jax.Array):
  """Sum of `value` where `mask`, and how many those are."""
  mask = mask.astype(jnp.float32)
  return (value * mask).sum(), mask.sum()


def gauges(of: Routed) -> dict:
  """Health of one sparse layer: (sum, weight) each."""
  probs, seats, valid = of.scores.probs, of.seats, of.ctx.valid
  asked = seats.asked.astype(jnp.float32)
  found = {
    'router_entropy': _over(_entropy(probs), valid),
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
