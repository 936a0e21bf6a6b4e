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

from st_moe import about as about_lib
from st_moe import paths, schedules
from st_moe.about import about
from st_moe.config import ModelConfig, OptimizerConfig
from st_moe.fields import Range, Share
from st_moe.routing.shaping import SHAPING
from st_moe.schedules import Positive, Scheduled


@about(
  row='S2-30', paper='arXiv:2408.15664', neutral={'rate': 0}, moves=('bias',)
)
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


@about(
  row='S1-02',
  paper='arXiv:2204.10598',
  neutral={'decay': 1.0},
  moves=('usage',),
)
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


@about(
  paper='https://kexue.fm/archives/11619',
  neutral={'rate': 0.0},
  moves=('threshold',),
)
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


def check(optimizer: OptimizerConfig, model: ModelConfig, init: str) -> None:
  """Raises for a rule that moves nothing, or state that no rule moves.

  The latter of a run that begins anew: its `init` may have moved it.
  """
  rules_after(optimizer)
  sparse = [s for s in model.stacks if model.plan(s).num_sparse]
  kept = {
    name: part.name
    for stack in sparse
    for part in model.moe_of(stack).shaping
    for name, _ in about_lib.of(SHAPING[part.name]).keeps
  }
  moved = {
    name: part.name
    for part in optimizer.after
    for name in about_lib.of(AFTER[part.name]).moves
  }
  for name in sparse and moved.keys() - kept.keys():
    raise ValueError(
      f'config.optimizer.after.{moved[name]} has nothing to move: no part of'
      f' config.model.moe.shaping keeps a {name}.'
    )
  for name in () if init else kept.keys() - moved.keys():
    rules = [n for n, f in AFTER.items() if name in about_lib.of(f).moves]
    raise ValueError(
      f'config.model.moe.shaping.{kept[name]} keeps a {name} that nothing'
      f' moves: add {" or ".join(rules)} to config.optimizer.after.'
    )


def rules_after(config: OptimizerConfig):
  """All rules of a config in turn: f(old, new, heard, step) -> new."""
  what = 'config.optimizer.after'
  rules = [part.choose(what, AFTER) for part in config.after]
  return lambda old, new, heard, step: functools.reduce(
    lambda params, rule: rule(old, params, heard, step), rules, new
  )
