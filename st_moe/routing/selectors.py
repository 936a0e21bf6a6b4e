"""Which experts each token meets.

`selector(scores, ctx, rng, capacity, *, ...) -> Seats`; its k, if it has one,
has no default, so that a config says it (`MoEConfig.k`).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.config import Capacity, ModelConfig, Part
from st_moe.fields import AtLeast0, Size
from st_moe.routing.seating import seat
from st_moe.routing.types import Assignment, RouteContext, Scores, Seats

_POLICIES = ('all', 'none', 'threshold', 'random')


def _draws(*, k=2, train_policy='random', **_) -> bool:
  return k > 1 and train_policy == 'random'


@about(row='S0-01', paper='arXiv:2202.08906', noisy=_draws)
def top_k(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  k: Size,
  train_policy: Literal[_POLICIES] = 'random',
  eval_policy: Literal[_POLICIES] = 'all',
  threshold: AtLeast0 = 0.2,
  normalize: bool = True,
) -> Seats:
  """The k best experts of each token.

  k = 1 is the Switch rule (arXiv:2101.03961): the weight is the probability
  itself, or the router would have no gradient. k >= 2 is the ST-MoE rule
  (arXiv:2202.08906, App. G): weights are renormalised over the k choices before
  anyone is dropped and never after (`normalize` False: not even before, as
  Flaxformer), and a choice past the first stays by policy

    all        always
    none       never
    threshold  if its weight exceeds `threshold`
    random     with probability min(1, weight / `threshold`)
  """
  select, num_experts = scores.select, scores.select.shape[-1]
  if not 1 <= k <= num_experts:
    raise ValueError(f'k={k} experts per token; it must be 1 to {num_experts}.')
  for policy in (train_policy, eval_policy):  # Both, or a typo waits for eval.
    if policy not in _POLICIES:
      raise ValueError(
        f'Policy {policy!r} for choices past the first is none of'
        f' {", ".join(_POLICIES)}.'
      )
  pairs = k > 1
  k, rank = asked_k(ctx, k)
  best, expert = _best(select, rank + k)
  best, expert = best[..., rank:], expert[..., rank:]  # [g, s, k]
  there = best > -jnp.inf  # Which rules one out.
  weight = jnp.where(there, _of(scores.probs, expert), 0)
  active = ctx.valid[..., None] & there
  if pairs:
    share = weight / (weight.sum(-1, keepdims=True) + 1e-9)
    weight = share if normalize else weight
    policy = eval_policy if ctx.deterministic else train_policy
    active &= _stays(policy, share, threshold, rng).at[..., 0].set(True)
  asked = Assignment(expert, weight, active)
  return seat(asked, num_experts=num_experts, capacity=capacity)


def asked_k(ctx: RouteContext, k: int) -> tuple[int, int]:
  """(experts per token, from which rank on): the config's, or an override's."""
  if ctx.override is None:
    return k, 0
  return ctx.override.k or k, ctx.override.rank


def _best(select: jax.Array, k: int):
  """The k best scores and whose they are, both [g, s, k]; of equals the first.

  Not `jax.lax.top_k`: on CPUs and GPUs it gathers the scores of all devices.
  """
  found = []
  for _ in range(k):
    expert = select.argmax(-1)
    found.append((select.max(-1), expert))
    taken = expert[..., None] == jnp.arange(select.shape[-1])
    select = jnp.where(taken, -jnp.inf, select)
  best, expert = (jnp.stack(x, axis=-1) for x in zip(*found, strict=True))
  return best, expert


def _of(probs: jax.Array, expert: jax.Array) -> jax.Array:
  """probs [g, s, e] of expert [g, s, k]: [g, s, k].

  Not `take_along_axis`: a TPU reads a tile of memory for each number. And
  choice by choice, or it would copy `probs` into another layout.
  """
  each = jnp.arange(probs.shape[-1])
  of = lambda i: jnp.where(expert[..., i, None] == each, probs, 0).sum(-1)
  return jnp.stack([of(i) for i in range(expert.shape[-1])], axis=-1)


def _stays(policy, share, threshold, rng) -> jax.Array:
  if policy == 'all':
    return jnp.full(share.shape, True)
  if policy == 'none':
    return jnp.full(share.shape, False)
  if policy == 'threshold':
    return share > threshold
  if rng is None:
    raise ValueError(
      "The policy 'random' draws numbers: pass rngs={'dropout': key}, or use"
      " 'all', 'none' or 'threshold'."
    )
  return jax.random.uniform(rng, share.shape) * threshold < share


SELECTORS = {'top_k': top_k}


def dropless(model: ModelConfig) -> ModelConfig:
  """The same model, evaluated so that an answer depends on its row alone.

  Nobody is dropped; where experts choose, they choose within a row.
  """
  return model.with_moe(
    eval_capacity=Capacity(dropless=True), dispatcher=Part('auto')
  )
