"""What selectors share: the best of some scores, what a caller overrides."""

import jax
import jax.numpy as jnp

from st_moe.routing.types import RouteContext


def asked_k(ctx: RouteContext, k: int) -> tuple[int, int]:
  """(experts per token, from which rank on): the config's, or an override's."""
  if ctx.override is None:
    return k, 0
  return ctx.override.k or k, ctx.override.rank


def best_of(select: jax.Array, k: int):
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


def of_expert(probs: jax.Array, expert: jax.Array) -> jax.Array:
  """probs [g, s, e] of expert [g, s, k]: [g, s, k].

  Not `take_along_axis`: a TPU reads a tile of memory for each number. And
  choice by choice, or it would copy `probs` into another layout.
  """
  each = jnp.arange(probs.shape[-1])
  of = lambda i: jnp.where(expert[..., i, None] == each, probs, 0).sum(-1)
  return jnp.stack([of(i) for i in range(expert.shape[-1])], axis=-1)


def keeps_k(ctx: RouteContext) -> None:
  """Raises where a caller asks for another k, which has no meaning here."""
  override = ctx.override
  if override is not None and (override.k is not None or override.rank):
    raise ValueError(
      f'This selector takes no k={override.k} or rank={override.rank} of a'
      ' caller: only top_k and top_p do. It follows experts on and off.'
    )
