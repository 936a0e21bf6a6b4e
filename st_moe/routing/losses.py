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
from st_moe.fields import Share, Size
from st_moe.routing.types import RouteContext, Routed, Scores

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
def load_balance_all(
  of: Routed, *, normalized: bool = False, scope: Scope = 'group'
):
  """`load_balance` with all that was asked in f_e: k when even (Flaxformer).

  With `normalized` f_e is a share of what was asked, and not of tokens: 1 when
  even (expert-level balance of arXiv:2401.06066, Eq. 12-14).
  """
  probs = of.scores.probs
  chosen = of.seats.chosen(probs.shape[1])
  return _balance(chosen, probs, of.ctx, scope, normalized)


def _fits_groups(model, moe, *, groups: int):
  del model
  if moe.num_experts % groups:
    raise ValueError(
      f'config.model.moe.losses.load_balance_groups.groups = {groups} should'
      f' divide the {moe.num_experts} experts.'
    )


@about(row='S2-30', paper='arXiv:2401.06066', fits=_fits_groups)
def load_balance_groups(of: Routed, *, groups: Size):
  """Balance between `groups` of neighbouring experts: 1 when even.

  groups * sum_D f_D p_D per group of tokens, f_D the share of what was asked,
  p_D the mean probability, both summed over the experts of D: those of one
  device, say (device-level balance of arXiv:2401.06066, Eq. 15-17).
  """
  probs = of.scores.probs
  sums = lambda a: a.reshape(*a.shape[:2], groups, -1).sum(-1)
  chosen = of.seats.chosen(probs.shape[1])
  return _balance(sums(chosen), sums(probs), of.ctx, 'group', normalized=True)


@about(row='S1-02', paper='arXiv:2204.10598')
def kl_uniform(of: Routed):
  """KL of the mean gate to uniform, per group: 0 when even, ln e at collapse.

  sum_e p_e ln(e p_e), p_e the mean probability (arXiv:2204.10598).
  """
  probs, valid = of.scores.probs, of.ctx.valid.astype(jnp.float32)
  count = valid.sum(-1)  # [g]
  p = jnp.einsum('gse,gs->ge', probs, valid) / jnp.maximum(count, 1)[:, None]
  each = p * jnp.log(jnp.maximum(p, 1e-37) * probs.shape[-1])
  return (each.sum(-1) * count).sum(), count.sum()


def _fits_budget(model, moe, *, share: float):
  del model, share
  if moe.beside.name != 'conditional':
    raise ValueError(
      'config.model.moe.losses.budget is of what config.model.moe.beside ='
      f" 'conditional' uses, and that is {moe.beside.name!r}."
    )


@about(
  row='S1-14',
  paper='arXiv:2212.07571',
  joins=lambda sums, weights: jnp.abs(
    sums.sum() / jnp.maximum(weights.sum(), 1)
  ),
  fits=_fits_budget,
  moves=('shared',),
)
def budget(of: Routed, *, share: Share):
  """`|mean u - share|` over all layers together: 0 at the budget.

  u is how much of each token's answer the experts give beside a dense FFN
  (`conditional`). A layer's part, and its metric, is by how much it exceeds the
  share: some may, if others use less (CMR of arXiv:2212.07571).
  """
  used, there = of.aside['used'], of.aside['there']
  return used - share * there, there


def _balance(
  chosen, probs, ctx: RouteContext, scope: Scope, normalized: bool = False
):
  """e * sum_e f_e p_e, f_e the share of valid tokens with chosen [g, s, e].

  Args:
    normalized: f_e is the share of all that is chosen, and adds up to 1.
  """
  e = probs.shape[-1]
  valid = ctx.valid.astype(jnp.float32)
  count = scoped(valid.sum(-1), scope)  # [g], or [1] of the batch.
  f = scoped(jnp.einsum('gse,gs->ge', chosen, valid), scope)
  p = scoped(jnp.einsum('gse,gs->ge', probs, valid), scope)
  safe = jnp.maximum(count, 1)[:, None]
  of_what = jnp.maximum(f.sum(-1, keepdims=True), 1) if normalized else safe
  loss = e * (f / of_what * (p / safe)).sum(-1)  # [g]
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


@about(row='S1-01', paper='arXiv:1701.06538')
def importance(
  of: Routed, *, by: Literal['weights', 'probs', 'logits'] = 'weights'
):
  """CV^2 over experts of what the tokens of a group give them: 0 when even.

  What a token gives, `by`

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
  'budget': budget,
  'kl_uniform': kl_uniform,
  'load_balance': load_balance,
  'load_balance_all': load_balance_all,
  'load_balance_groups': load_balance_groups,
  'router_z': router_z,
  'entropy': entropy,
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
