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
from st_moe.fields import Above0, AtLeast0, Count, Range, Size, SizeOr0
from st_moe.routing.seating import seat
from st_moe.routing.types import Assignment, RouteContext, Scores, Seats

_POLICIES = ('all', 'none', 'threshold', 'random')


@about(row='S0-01', paper='arXiv:2202.08906', noisy=True)
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


def _held_by_experts(k: float, num_experts: int, most: int | None = None):
  """Raises for a k that no group has room for."""
  if k > num_experts:
    raise ValueError(
      f'k={k} experts per token; it must be at most {num_experts}.'
    )
  if most is not None and most < k:
    raise ValueError(
      f'most={most} experts of a token leave places of k={k} empty: it must be'
      ' at least k.'
    )


def _fits_experts(model, moe: MoEConfig, *, k, most=None, **_):
  del model
  _held_by_experts(k, moe.num_experts, most)


@about(row='S0-14', paper='arXiv:2202.09368', causal=False, fits=_fits_experts)
def expert_choice(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  k: Above0,
) -> Seats:
  """Each expert takes its most probable tokens (arXiv:2202.09368, 3.2).

  Of n valid tokens in a group round(n * k / e), at most `capacity`, which has
  to allow it (`times_k`). k is the mean of experts per token, and a token may
  meet none of them or all. Weights are probabilities as they are; of equals the
  earlier token is taken. A group of very few tokens may get no place at all.
  """
  del rng
  probs, there, count, places = _by_expert(scores, ctx, capacity, k)
  token, taken = _best_tokens(probs, there, count[:, None], places)
  return _picked(probs, token, taken)


@about(row='S0-14', paper='arXiv:2202.09368', causal=False, fits=_fits_experts)
def capped_choice(
  scores: Scores,
  ctx: RouteContext,
  rng: jax.Array | None,
  capacity: int,
  *,
  k: Above0,
  most: Size,
  sweeps: Count = 100,
  temperature: Above0 = 1e-3,
) -> Seats:
  """`expert_choice` with at most `most` experts a token (section 3.3).

  Experts take their best tokens of the assignment that is best for all of them
  together, relaxed by an entropy of weight `temperature`. What `sweeps` leave
  undecided the experts decide in turn: a token with `most` of them is gone, and
  the last of them may find too few.
  """
  del rng
  _held_by_experts(k, scores.probs.shape[-1], most)
  probs, there, count, places = _by_expert(scores, ctx, capacity, k)
  order = _relaxed(probs / temperature, there, count, most, sweeps)

  def pick(left, expert):
    order, there = expert  # [g, s]
    token, taken = _best_tokens(order, there & (left > 0), count, places)
    less = lambda left, token, taken: left.at[token].add(-taken)
    return jax.vmap(less)(left, token, taken.astype(jnp.int32)), (token, taken)

  in_turn = lambda a: a.swapaxes(0, 1)
  left = jnp.full(ctx.valid.shape, most)
  turns = in_turn(order), in_turn(there)
  token, taken = map(in_turn, jax.lax.scan(pick, left, turns)[1])
  return _picked(probs, token, taken)


def _by_expert(scores: Scores, ctx: RouteContext, capacity: int, k: float):
  """What experts choose from, and how many.

  Returns:
    probs, there: [g, e, s]; whom an expert may take.
    count: [g], tokens that each takes.
    places: what `count` never exceeds.
  """
  g, s, e = scores.probs.shape
  _keeps_k(ctx)
  _held_by_experts(k, e)
  there = (scores.select > -jnp.inf) & ctx.valid[..., None]
  # Of valid tokens: a row must not hear of the padding behind it.
  count = jnp.minimum(jnp.round(ctx.valid.sum(-1) * k / e), capacity)
  places = max(1, min(capacity, round(s * k / e)))
  return scores.probs.swapaxes(1, 2), there.swapaxes(1, 2), count, places


def _best_tokens(order: jax.Array, there: jax.Array, count, places: int):
  """The `count` highest in `order` [..., s] that are there.

  Returns:
    token, taken: [..., places]; of equals the earlier.
  """
  order = jnp.where(there, -jax.lax.stop_gradient(order), jnp.inf)
  number = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
  order, token = jax.lax.sort((order, number), num_keys=2)
  order, token = order[..., :places], token[..., :places]
  return token, (order < jnp.inf) & (jnp.arange(places) < count[..., None])


def _picked(probs: jax.Array, token: jax.Array, taken: jax.Array) -> Seats:
  """Seats of tokens [g, e, c] that experts took, in the order of places."""
  g, e, c = token.shape
  flat = lambda a: jnp.broadcast_to(a, (g, e, c)).reshape(g, e * c)
  weight = jnp.take_along_axis(probs, token, axis=-1)
  return Seats(
    token=flat(token),
    expert=flat(jnp.arange(e)[:, None]),
    weight=flat(jnp.where(taken, weight, 0)),
    asked=flat(taken),
    place=flat(jnp.where(taken, jnp.arange(c), -1)),
    load=taken.sum(-1, dtype=jnp.int32),
  )


def _relaxed(score: jax.Array, there, count, most: int, sweeps: int):
  """The order in which experts prefer tokens, prices paid: [g, e, s].

  Maximises sum(a * score) + H(a) over 0 <= a <= 1 where rows of experts add up
  to `count` and columns of tokens to `most` at the most: Dykstra's projections
  in turn, as logs of the factors that each of the three has left.
  """
  score = jnp.where(there, jax.lax.stop_gradient(score), -jnp.inf)
  total = lambda log, axis: jax.nn.logsumexp(log, axis=axis, keepdims=True)
  count = jnp.log(count)[:, None, None]

  def sweep(_, factors):
    price, cap = factors
    taken = total(score + price + cap, -1)  # -inf: nobody is there.
    log = score + jnp.where(taken > -jnp.inf, count - taken, 0)
    price = jnp.minimum(0, jnp.log(most) - total(log + cap, 1))
    return price, jnp.minimum(0, -(log + price))

  start = jnp.zeros_like(score[:, :1]), jnp.zeros_like(score)
  # Not the cap: it only makes equals of what is taken for certain.
  price, _ = jax.lax.fori_loop(0, sweeps, sweep, start)
  return score + price


def _keeps_k(ctx: RouteContext) -> None:
  """Raises where a caller asks for another k, which has no meaning here."""
  override = ctx.override
  if override is not None and (override.k is not None or override.rank):
    raise ValueError(
      f'This selector takes no k={override.k} or rank={override.rank} of a'
      ' caller: only top_k and top_p do. It follows experts on and off.'
    )


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
  best, expert = _best(scores.select, min(rank + k, num_experts))
  best, expert = best[..., rank:], expert[..., rank:]
  there = best > -jnp.inf
  weight = jnp.where(there, _of(scores.probs, expert), 0)
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
  _keeps_k(ctx)
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
  _keeps_k(ctx)
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
  _, best = _best(select, n)
  return (best[..., None] == jnp.arange(select.shape[-1])).any(-2)


def _shares(log: jax.Array, chosen: jax.Array, n: int) -> jax.Array:
  """The softmax over the n `chosen`; of one alone, what it has among all."""
  return jax.nn.softmax(jnp.where(chosen, log, -jnp.inf) if n > 1 else log)


def _among(chosen, shares, scores: Scores, ctx, capacity: int, k: int) -> Seats:
  """The k `chosen` with their `shares`, both [g, s, parts, e / parts]."""
  flat = lambda a: a.reshape(scores.select.shape)
  best, expert = _best(jnp.where(flat(chosen), scores.select, -jnp.inf), k)
  there = best > -jnp.inf
  weight = jnp.where(there, _of(flat(shares), expert), 0)
  asked = Assignment(expert, weight, ctx.valid[..., None] & there)
  num_experts = scores.select.shape[-1]
  return seat(asked, num_experts=num_experts, capacity=capacity)


SELECTORS = {
  'top_k': top_k,
  'expert_choice': expert_choice,
  'capped_choice': capped_choice,
  'top_p': top_p,
  'group_top_1': group_top_1,
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
