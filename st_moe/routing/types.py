"""The values routing is made of.

One letter per axis, here and in `model/`:

  g group    s token in its group    e expert    c place in an expert's buffer
  k choice (0 = best)    n route (a token-expert pair)
  d width    f expert hidden
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class RouteOverride:
  """What a caller asks of the routers of one stack, whatever they say."""

  # Added to their logits: -inf rules an expert out, a large number forces it.
  # float32 [sparse layers, e]; [e] inside a layer.
  bias: jax.Array
  # Take `k` experts (None: as the config says) from the rank-th best on.
  k: int | None = flax.struct.field(pytree_node=False, default=None)
  rank: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class RouteContext:
  """What a part of the chain may look at besides the activations.

  Arrays are [batch, length] where the model makes them and [g, s] inside a
  sparse layer.
  """

  valid: jax.Array  # bool; False is padding, which asks for nothing.
  tokens: jax.Array | None = None  # int32 ids of the tokens routed.
  positions: jax.Array | None = None  # int32, from 0 in each packed example.
  segments: jax.Array | None = None  # int32, 0 is padding.
  # int32, one number for the tokens of an example and no others.
  example: jax.Array | None = None
  task: jax.Array | None = None  # int32, the source an example comes from.
  before: jax.Array | None = None  # int32, the token before; 0: none.
  step: jax.Array | None = None  # int32 [], traced: schedules never retrace.
  override: RouteOverride | None = None
  deterministic: bool = flax.struct.field(pytree_node=False, default=True)
  # Whether a token must hear nothing of later ones.
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def told_task(self, tasks: int) -> jax.Array:
    """`task` for what knows `tasks` and no more: any other is the last."""
    if self.task is None:
      raise ValueError(
        'This model routes by task and was not told which: pass task, the'
        ' number of the source of each row, int32 [batch].'
      )
    return jnp.minimum(self.task, tasks - 1)


@flax.struct.dataclass
class Scores:
  """What a gate thinks of every expert, in three roles. float32 [g, s, e].

  A plain gate has select = logits and probs = softmax(logits); noisy, biased
  or tempered ones differ, and then each reader needs the right one.
  """

  logits: jax.Array  # Clean, for the z-loss.
  select: jax.Array  # The order of choice; -inf rules an expert out.
  probs: jax.Array  # What weights and balance are made of.
  # What a gate leaves for losses of its own: noise, factors. And under 'kept'
  # (sum, weight) of what the rule `averaged` moves state of that name towards.
  aside: dict = flax.struct.field(default_factory=dict)

  @classmethod
  def of(cls, logits: jax.Array, **aside) -> 'Scores':
    """Those of a plain gate."""
    return cls(logits, logits, jax.nn.softmax(logits), aside)

  @classmethod
  def certain(cls, chosen: jax.Array) -> 'Scores':
    """Where there is no doubt: `chosen` bool [g, s, e] share all of it.

    For tables, tasks and fixed sets: no other expert is ever asked, and the
    z-loss is 0 where one is chosen.
    """
    share = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1)
    logits = jnp.where(chosen, jnp.log(jnp.maximum(share, 1e-37)), -jnp.inf)
    return cls(logits, logits, share)

  def steered(self, override: RouteOverride | None) -> 'Scores':
    """As if the override's bias [e] had been added before the softmax."""
    return self if override is None else self.plus(override.bias)

  def plus(self, more: jax.Array) -> 'Scores':
    """As if `more` [..., e] had been added before the softmax."""
    # Where all that is left had underflowed, 0 would become NaN.
    probs = jnp.log(jnp.maximum(self.probs, 1e-37)) + more
    return self.replace(select=self.select + more, probs=jax.nn.softmax(probs))


@flax.struct.dataclass
class Assignment:
  """What each token asks for, before anyone counts the places."""

  expert: jax.Array  # int32 [g, s, k], best choice first.
  weight: jax.Array  # float32 [g, s, k].
  active: jax.Array  # bool [g, s, k]; False asks for no place.
  priority: jax.Array | None = (
    None  # [g, s, k], low first; None: left to right.
  )


@flax.struct.dataclass
class Seats:
  """Who sits where: a list of routes per group. Nothing has moved yet.

  Of any selector: a place is below the capacity and taken once; no token meets
  an expert twice; who asked for nothing, or was ruled out, has place -1.
  """

  token: jax.Array  # int32 [g, n], which token of the group.
  expert: jax.Array  # int32 [g, n].
  weight: jax.Array  # float32 [g, n], of the expert's answer.
  asked: jax.Array  # bool [g, n]; False never asked for a place.
  place: jax.Array  # int32 [g, n], place in the expert's buffer; -1: no seat.
  load: jax.Array  # int32 [g, e], tokens seated.
  # Where routes are the k choices of each token in turn (n = s * k), that k;
  # 0 where an expert picked its tokens.
  k: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def first(self) -> jax.Array:
    """First choice of every token, int32 [g, s]; only where k is known."""
    return self.expert[:, :: self.k]

  def dense(self, tokens: int) -> jax.Array:
    """Weights of seated routes, float32 [g, tokens, e]."""
    return self.scattered(jnp.where(self.place < 0, 0, self.weight), tokens)

  def chosen(self, tokens: int) -> jax.Array:
    """1 where a token asked an expert, float32 [g, tokens, e]."""
    return self.scattered(self.asked.astype(jnp.float32), tokens)

  def scattered(self, values: jax.Array, tokens: int) -> jax.Array:
    """`values` [g, n] of the routes, by token and expert."""
    g, e = self.load.shape
    add = lambda to, token, expert, value: to.at[token, expert].add(value)
    return jax.vmap(add)(
      jnp.zeros((g, tokens, e)), self.token, self.expert, values
    )


@flax.struct.dataclass
class Routed:
  """All that is known of one sparse layer's decision: what losses look at."""

  x: jax.Array  # [g, s, d], what the experts get.
  scores: Scores
  seats: Seats  # Before weighings: what is masked moves no loss.
  ctx: RouteContext
  experts: object  # The bank.
  aside: dict  # What stood beside the experts left.
