"""Losses and gauges of routing: `f(of: Routed, *, ...) -> (sum, weight)`.

Sums and weights are added over microbatches and devices before they are
divided, so a loss is the same in value and gradient however a batch is cut into
whole groups, and padding and empty groups count nothing. What is no sum over
tokens is of each group, weighted by its valid tokens, or of the whole batch.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.routing.types import RouteContext, Routed

Scope = Literal['group', 'batch']


def scoped(sums: jax.Array, scope: Scope) -> jax.Array:
  """Sums of each group [g, ...], or of all groups on all devices [1, ...].

  A loss of such sums that is not linear in them is `whole_batch`: no
  microbatch knows those of the others.
  """
  return sums.sum(0, keepdims=True) if scope == 'batch' else sums


def whole_batch(scope: Scope = 'group', **rest) -> bool:
  """`About.whole` of a loss with the option `scope`."""
  del rest
  return scope == 'batch'


@about(row='S0-01', paper='arXiv:2202.08906')
def router_z(of: Routed):
  """Sum over valid tokens of logsumexp(logits)^2 (arXiv:2202.08906, Eq. 5)."""
  z = jax.nn.logsumexp(of.scores.logits, axis=-1) ** 2
  return _over(z, of.ctx.valid)


@about(row='S0-01', paper='arXiv:2202.08906', whole=whole_batch)
def load_balance(of: Routed, *, scope: Scope = 'group'):
  """e * sum_e f_e p_e per group: 1 when even, e when one expert takes all.

  f_e is the share of valid tokens whose first choice is e, counted before
  anyone is dropped; gradient flows through the mean probability p_e alone
  (arXiv:2202.08906, Eq. 7-9). Groups weigh as much as their valid tokens.
  With `scope` 'batch' f and p are those of the whole batch, so that a group may
  favour experts that another leaves alone (arXiv:2501.11873).
  """
  probs, seats = of.scores.probs, of.seats
  first = seats.first if seats.k else probs.argmax(-1)
  chosen = jax.nn.one_hot(first, probs.shape[-1])
  return _balance(chosen, probs, of.ctx, scope)


@about(row='S0-01', paper='arXiv:2202.08906', whole=whole_batch)
def load_balance_all(of: Routed, *, scope: Scope = 'group'):
  """`load_balance` with all that was asked in f_e: k when even (Flaxformer)."""
  probs = of.scores.probs
  return _balance(of.seats.chosen(probs.shape[1]), probs, of.ctx, scope)


def _balance(chosen, probs, ctx: RouteContext, scope: Scope):
  """e * sum_e f_e p_e, f_e the share of valid tokens with chosen [g, s, e]."""
  e = probs.shape[-1]
  valid = ctx.valid.astype(jnp.float32)
  count = scoped(valid.sum(-1), scope)  # [g], or [1] of the batch.
  f = scoped(jnp.einsum('gse,gs->ge', chosen, valid), scope)
  p = scoped(jnp.einsum('gse,gs->ge', probs, valid), scope)
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
