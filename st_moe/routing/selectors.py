"""Which experts each token meets.

`selector(scores, ctx, rng, capacity, *, ...) -> Seats`; its k, if it has one,
has no default, so that a config says it (`MoEConfig.k`).
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from st_moe import about as about_lib
from st_moe import schedules
from st_moe.about import about
from st_moe.config import Capacity, ModelConfig, MoEConfig, Part
from st_moe.fields import Above0, AtLeast0, Range, Size, SizeOr0
from st_moe.routing.choosing import asked_k, best_of, keeps_k, of_expert
from st_moe.routing.expert_choice import capped_choice, expert_choice
from st_moe.routing.sampling import mixed_sampling
from st_moe.routing.seating import seat
from st_moe.routing.types import Assignment, RouteContext, Scores, Seats

_POLICIES = ('all', 'none', 'threshold', 'random')
_PRIORITIES = ('position', 'score', 'random')


def _draws(*, k=2, train_policy='random', priority='position', **_) -> bool:
  return k > 1 and train_policy == 'random' or priority == 'random'


@about(
  row='S0-01',
  paper='arXiv:2202.08906',
  causal=lambda priority='position', **_: priority != 'score',
  noisy=_draws,
)
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
  priority: Literal[_PRIORITIES] = 'position',
  k_at: schedules.Scheduled | Annotated[float, Range(1)] | None = None,
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

  First choices are seated before second ones, and inside a choice by `priority`

    position   left to right
    score      by the largest probability of the token's choices, highest first:
               Batch Prioritised Routing (V-MoE, arXiv:2106.05974)
    random     by a draw in training: Random Token Selection (arXiv:2109.10465)

  `k_at` asks fewer of them for a while: the first round(k_at) at each step, at
  least one, and in evaluation its last; weights are of those alone
  (SMoE-dropout, arXiv:2303.01610). Places and time stay those of k, and an
  override's k goes before it.
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
  pairs, steered = k > 1, ctx.override is not None and ctx.override.k
  k, rank = asked_k(ctx, k)
  best, expert = best_of(select, rank + k)
  best, expert = best[..., rank:], expert[..., rank:]  # [g, s, k]
  there = best > -jnp.inf  # Which rules one out.
  if k_at is not None and not steered:
    now = jnp.round(schedules.value(k_at, ctx.step))
    there &= jnp.arange(k) < jnp.maximum(now, 1)
  weight = jnp.where(there, of_expert(scores.probs, expert), 0)
  order = _order(priority, weight, ctx, rng)
  active = ctx.valid[..., None] & there
  if pairs:
    share = weight / (weight.sum(-1, keepdims=True) + 1e-9)
    weight = share if normalize else weight
    policy = eval_policy if ctx.deterministic else train_policy
    active &= _stays(policy, share, threshold, rng).at[..., 0].set(True)
  asked = Assignment(expert, weight, active, order)
  return seat(asked, num_experts=num_experts, capacity=capacity)


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


# A share of the probability, or a schedule of it.
Mass = Annotated[float, Range(0, 1, above=True)] | schedules.Scheduled


def _fits_top_p(model, moe: MoEConfig, *, expected, most=0, **_):
  del model
  for name, value in (('expected', expected), ('most', most)):
    if value > moe.num_experts:
      raise ValueError(
        f'config.model.moe.selector.{name} = {value} experts per token; it must'
        f' be at most {moe.num_experts}.'
      )


@about(row='S2-23', paper='arXiv:2403.07652', fits=_fits_top_p)
def top_p(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  p: Mass,
  expected: Above0,
  most: SizeOr0 = 0,
) -> Seats:
  """The best experts up to the one with which their sum reaches `p`.

  So a token in doubt meets more of them (arXiv:2403.07652). Weights
  are probabilities as they are. An override's k is followed to the number.

  Args:
    expected: experts per token on the average, for capacity and costs.
    most: experts per token; 0: all. They are found one by one, so that a low
      number makes a small program.
  """
  del rng, expected
  num_experts = scores.select.shape[-1]
  k, rank = asked_k(ctx, most or num_experts)
  fixed = ctx.override is not None and ctx.override.k is not None
  p = 1.0 if fixed else schedules.value(p, ctx.step)
  best, expert = best_of(scores.select, min(rank + k, num_experts))
  best, expert = best[..., rank:], expert[..., rank:]
  there = best > -jnp.inf
  weight = jnp.where(there, of_expert(scores.probs, expert), 0)
  # Of those before, as they were added up; 1 may be reached by rounding.
  before = jnp.pad(weight.cumsum(-1)[..., :-1], [(0, 0)] * 2 + [(1, 0)])
  wanted = (jax.lax.stop_gradient(before) < p) | (jnp.asarray(p) >= 1)
  asked = Assignment(expert, weight, ctx.valid[..., None] & there & wanted)
  return seat(asked, num_experts=num_experts, capacity=capacity)


def _divides(name: str, parts: int, total: int, what: str) -> None:
  if total % parts:
    raise ValueError(
      f'{name}={parts} does not divide {what} {total}: set it to a number that'
      ' does.'
    )


def _fits_group_top_1(model, moe: MoEConfig, *, k, **_):
  del model
  _divides('k', k, moe.num_experts, 'num_experts =')


@about(row='S1-13', paper='arXiv:2203.14685', fits=_fits_group_top_1)
def group_top_1(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  k: Size,
) -> Seats:
  """The best expert of each of k prototypes: of neighbours, equally many.

  It weighs what it has of its prototype's probability (arXiv:2105.15082,
  and arXiv:2203.14685).
  """
  del rng
  keeps_k(ctx)
  _divides('k', k, scores.select.shape[-1], 'num_experts =')
  select, log = _split(scores, k)
  chosen = _marked(select, 1)
  return _among(chosen, _shares(log, chosen, 1), scores, ctx, capacity, k)


def _fits_two_level(model, moe: MoEConfig, *, k, groups, chosen=1, **_):
  del model
  _divided_twice(moe.num_experts, k, groups, chosen)


def _divided_twice(num_experts: int, k: int, groups: int, chosen: int) -> None:
  _divides('groups', groups, num_experts, 'num_experts =')
  _divides('chosen', chosen, k, 'k =')
  for name, value, most in (
    ('chosen', chosen, groups),
    ('k / chosen', k // chosen, num_experts // groups),
  ):
    if value > most:
      raise ValueError(
        f'{name} = {value} of {groups} groups with {num_experts // groups}'
        f' experts each; it must be at most {most}.'
      )


@about(row='S1-13', paper='arXiv:2203.14685', fits=_fits_two_level)
def two_level(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  k: Size,
  groups: Size,
  chosen: Size = 1,
) -> Seats:
  """The `chosen` best groups of neighbours, and k / chosen experts in each.

  A group is as good as the sum of its probabilities. The weight is the product
  of the shares at either level, renormalised over those taken there; of one
  alone it is the probability itself, or the router would have no gradient.
  With two of two it is the hierarchical gate of arXiv:1701.06538, App. B.
  """
  del rng
  keeps_k(ctx)
  _divided_twice(scores.select.shape[-1], k, groups, chosen)
  select, log = _split(scores, groups)
  of_group = jax.nn.logsumexp(log, axis=-1)  # [g, s, groups]
  there = (select > -jnp.inf).any(-1)
  best = _marked(jnp.where(there, of_group, -jnp.inf), chosen)
  inside = _marked(select, k // chosen)
  shares = _shares(of_group, best, chosen)[..., None] * _shares(
    log, inside, k // chosen
  )
  return _among(best[..., None] & inside, shares, scores, ctx, capacity, k)


def _split(scores: Scores, parts: int) -> tuple[jax.Array, jax.Array]:
  """select and log(probs), [g, s, parts, e / parts]."""
  split = lambda a: a.reshape(*a.shape[:-1], parts, -1)
  log = jnp.log(jnp.maximum(scores.probs, 1e-37))
  return split(scores.select), split(log)


def _marked(select: jax.Array, n: int) -> jax.Array:
  """Whether each is among the n best of the last axis, bool; as `select`."""
  _, best = best_of(select, n)
  return (best[..., None] == jnp.arange(select.shape[-1])).any(-2)


def _shares(log: jax.Array, chosen: jax.Array, n: int) -> jax.Array:
  """The softmax over the n `chosen`; of one alone, what it has among all."""
  return jax.nn.softmax(jnp.where(chosen, log, -jnp.inf) if n > 1 else log)


def _among(chosen, shares, scores: Scores, ctx, capacity: int, k: int) -> Seats:
  """The k `chosen` with their `shares`, both [g, s, parts, e / parts]."""
  flat = lambda a: a.reshape(scores.select.shape)
  best, expert = best_of(jnp.where(flat(chosen), scores.select, -jnp.inf), k)
  there = best > -jnp.inf
  weight = jnp.where(there, of_expert(flat(shares), expert), 0)
  asked = Assignment(expert, weight, ctx.valid[..., None] & there)
  num_experts = scores.select.shape[-1]
  return seat(asked, num_experts=num_experts, capacity=capacity)


def _order(priority, probs, ctx: RouteContext, rng) -> jax.Array | None:
  """As `Assignment.priority` has it, of probabilities [g, s, k] of choices."""
  if priority not in _PRIORITIES:
    raise ValueError(
      f'priority {priority!r} is none of {", ".join(_PRIORITIES)}.'
    )
  if priority == 'score':
    # Not of weights: renormalised, a token in doubt would pass for a sure one.
    best = jax.lax.stop_gradient(probs).max(-1, keepdims=True)
    return jnp.broadcast_to(-best, probs.shape)
  if priority == 'position' or ctx.deterministic:
    return None
  if rng is None:
    raise ValueError(
      "The priority 'random' draws numbers: pass rngs={'dropout': key}, or use"
      " 'position' or 'score'."
    )
  # A key of its own: who stays is drawn as without.
  return jax.random.uniform(jax.random.fold_in(rng, 1), probs.shape)


SELECTORS = {
  'capped_choice': capped_choice,
  'expert_choice': expert_choice,
  'group_top_1': group_top_1,
  'mixed_sampling': mixed_sampling,
  'top_k': top_k,
  'top_p': top_p,
  'two_level': two_level,
}


def dropless(model: ModelConfig) -> ModelConfig:
  """The same model, evaluated so that an answer depends on its row alone.

  Nobody is dropped; where experts choose, they choose within a row.
  """

  def alone(moe: MoEConfig) -> MoEConfig:
    selector = moe.selector.choose('selector', SELECTORS, ('force',))
    within = {} if about_lib.of(selector).causal else {'group_by': 'sequence'}
    return dataclasses.replace(
      moe,
      eval_capacity=Capacity(dropless=True),
      dispatcher=Part('auto'),
      **within,
    )

  return model.map_moe(alone)
