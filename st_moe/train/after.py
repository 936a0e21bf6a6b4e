"""What happens to parameters after the optimizer's update.

`rule(old, new, heard, step, *, ...) -> new`, of whole trees of parameters;
`heard` is of the whole batch: how often each expert was asked for, float32
[..., e], by the path of its sparse module ('encoder/layers/layer_1/moe'), and
what state should be as (sum, weight), by its path ('.../moe/kept_threshold').
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from st_moe import paths, schedules
from st_moe.about import about
from st_moe.config import OptimizerConfig
from st_moe.fields import Range, Share
from st_moe.schedules import Positive, Scheduled


@about(row='S2-30', paper='arXiv:2408.15664', neutral={'rate': 0})
def rebalanced(old, new, heard, step, *, rate: Positive = 1e-3):
  """Moves the bias of each expert by `rate` towards an even load.

  bias += rate * sign(mean - wanted); of the shaping `balanced`. No loss is
  needed, and no gradient (arXiv:2408.15664, Algorithm 1). Even is the whole
  batch, over all groups, microbatches and devices, and no group by itself.
  """
  del old

  def moved(path: str, bias: jax.Array) -> jax.Array:
    module, _, name = path.rpartition('/')
    if name != 'kept_bias':
      return bias
    asked = heard[module]
    short = asked.mean(-1, keepdims=True) - asked
    return bias + schedules.value(rate, step) * jnp.sign(short)

  return paths.map_by_path(moved, new)


@about(row='S1-02', paper='arXiv:2204.10598', neutral={'decay': 1.0})
def used(old, new, heard, step, *, decay: Share = 0.9):
  """Keeps a running share of what each expert was asked; of `rested`.

  usage = decay * usage + (1 - decay) * wanted / sum(wanted).
  """
  del old, step

  def moved(path: str, usage: jax.Array) -> jax.Array:
    module, _, name = path.rpartition('/')
    if name != 'kept_usage':
      return usage
    asked = heard[module]
    share = asked / jnp.maximum(asked.sum(-1, keepdims=True), 1)
    return decay * usage + (1 - decay) * share

  return paths.map_by_path(moved, new)


@about(paper='https://kexue.fm/archives/11619', neutral={'rate': 0.0})
def averaged(
  old,
  new,
  heard,
  step,
  *,
  rate: Annotated[float, Range(0, 1)] | Scheduled = 0.5,
):
  """Moves state by a share of the way to what the batch says it should be.

  kept += rate * (sum / weight - kept), of all that shapings leave in
  `Scores.aside['kept']`; 1 forgets the batches before.
  """
  del old

  def moved(path: str, kept: jax.Array) -> jax.Array:
    if path not in heard:
      return kept
    summed, weight = heard[path]
    weight = jnp.expand_dims(weight, range(weight.ndim, kept.ndim))
    way = summed / jnp.maximum(weight, 1) - kept
    share = jnp.where(weight > 0, schedules.value(rate, step), 0)
    return kept + share * way

  return paths.map_by_path(moved, new)


AFTER = {
  'averaged': averaged,
  'rebalanced': rebalanced,
  'used': used,
}


def rules_after(config: OptimizerConfig):
  """All rules of a config in turn: f(old, new, heard, step) -> new."""
  what = 'config.optimizer.after'
  rules = [part.choose(what, AFTER) for part in config.after]
  return lambda old, new, heard, step: functools.reduce(
    lambda params, rule: rule(old, params, heard, step), rules, new
  )
