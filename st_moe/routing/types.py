"""The values routing is made of. One letter per axis, here and in `model/`:

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
  """What a gate or selector may look at besides the activations.

  Arrays are [batch, length] where the model makes them and [g, s] inside a
  sparse layer.
  """

  valid: jax.Array  # bool; False is padding, which asks for nothing.
  tokens: jax.Array | None = None  # int32 ids of the tokens routed.
  positions: jax.Array | None = None  # int32, from 0 in each packed example.
  segments: jax.Array | None = None  # int32, 0 is padding.
  step: jax.Array | None = None  # int32 [], traced: schedules never retrace.
  override: RouteOverride | None = None
  deterministic: bool = flax.struct.field(pytree_node=False, default=True)


@flax.struct.dataclass
class Scores:
  """What a gate thinks of every expert, in three roles. float32 [g, s, e].

  A plain gate has select = logits and probs = softmax(logits); noisy, biased
  or tempered ones differ, and then each reader needs the right one.
  """

  logits: jax.Array  # Clean, for the z-loss.
  select: jax.Array  # The order of choice.
  probs: jax.Array  # What weights and balance are made of.

  def biased(self, bias: jax.Array) -> 'Scores':
    """As if `bias` [e] had been added before the softmax."""
    # Where all that is left had underflowed, 0 would become NaN.
    probs = jax.nn.softmax(jnp.log(jnp.maximum(self.probs, 1e-37)) + bias)
    return Scores(self.logits, self.select + bias, probs)


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
  """Who sits where: a list of routes per group. Nothing has moved yet."""

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
