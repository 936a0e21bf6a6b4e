"""Losses and gauges of routing, each as (sum, weight).

Sums and weights are added over microbatches and devices before they are
divided, so a loss is the same in value and gradient however a batch is cut into
whole groups, and padding and empty groups count nothing.
"""

import jax
import jax.numpy as jnp

from st_moe.routing.types import RouteContext, Scores, Seats


def router_z(scores: Scores, seats: Seats, ctx: RouteContext):
  """Sum over valid tokens of logsumexp(logits)^2 (arXiv:2202.08906, Eq. 5)."""
  del seats
  z = jax.nn.logsumexp(scores.logits, axis=-1) ** 2
  return _over(z, ctx.valid)


def load_balance(scores: Scores, seats: Seats, ctx: RouteContext):
  """e * sum_e f_e p_e per group: 1 when even, e when one expert takes all.

  f_e is the share of valid tokens whose first choice is e, counted before
  anyone is dropped; gradient flows through the mean probability p_e alone
  (arXiv:2202.08906, Eq. 7-9). Groups weigh as much as their valid tokens.
  """
  e = scores.probs.shape[-1]
  first = seats.first if seats.k else scores.probs.argmax(-1)
  return _balance(jax.nn.one_hot(first, e), scores.probs, ctx)


def load_balance_all(scores: Scores, seats: Seats, ctx: RouteContext):
  """`load_balance` with all k choices in f_e: k when even (Flaxformer)."""
  mark = lambda token, expert, row: row.at[token, expert].set(1.0)
  empty = jnp.zeros_like(scores.probs)
  chosen = jax.vmap(mark)(seats.token, seats.expert, empty)
  return _balance(chosen, scores.probs, ctx)


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


LOSSES = {
  'load_balance': load_balance,
  'load_balance_all': load_balance_all,
  'router_z': router_z,
}


def _over(value: jax.Array, mask: jax.Array):
  """Sum of `value` where `mask`, and how many those are."""
  mask = mask.astype(jnp.float32)
  return (value * mask).sum(), mask.sum()


def gauges(scores: Scores, seats: Seats, ctx: RouteContext) -> dict:
  """Health of one sparse layer: (sum, weight) each."""
  entropy = -(scores.probs * jnp.log(scores.probs + 1e-9)).sum(-1)
  routes = lambda mask: _over((seats.place < 0).astype(jnp.float32), mask)
  found = {
    'router_entropy': _over(entropy, ctx.valid),
    'router_confidence': _over(scores.probs.max(-1), ctx.valid),
    # Of the routes asked for, those that found no seat.
    'dropped_routes': routes(seats.asked),
  }
  if seats.k:
    g, s = ctx.valid.shape
    alone = (seats.place.reshape(g, s, seats.k) < 0).all(-1)
    # Tokens that no expert answers.
    found['dropped_tokens'] = _over(alone.astype(jnp.float32), ctx.valid)
  return found
