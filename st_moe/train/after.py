"""What happens to parameters after the optimizer's update.

`rule(old, new, wanted, step, *, ...) -> new`, of whole trees of parameters;
`wanted` is how often each expert was asked for, float32 [..., e], by the path
of its sparse module ('encoder/layers/layer_1/moe'), over the whole batch.
"""

import functools

import jax
import jax.numpy as jnp

from st_moe import paths, schedules
from st_moe.about import about
from st_moe.config import OptimizerConfig
from st_moe.schedules import Positive


@about(row='S2-30', paper='arXiv:2408.15664', neutral={'rate': 0})
def rebalanced(old, new, wanted, step, *, rate: Positive = 1e-3):
  """Moves the bias of each expert by `rate` towards an even load.

  bias += rate * sign(mean - wanted); of the shaping `balanced`. No loss is
  needed, and no gradient (arXiv:2408.15664, Algorithm 1).
  """
  del old

  def moved(path: str, bias: jax.Array) -> jax.Array:
    module, _, name = path.rpartition('/')
    if name != 'kept_bias':
      return bias
    asked = wanted[module]
    short = asked.mean(-1, keepdims=True) - asked
    return bias + schedules.value(rate, step) * jnp.sign(short)

  return paths.map_by_path(moved, new)


AFTER = {'rebalanced': rebalanced}


def rules_after(config: OptimizerConfig):
  """All rules of a config in turn: f(old, new, wanted, step) -> new."""
  what = 'config.optimizer.after'
  rules = [part.choose(what, AFTER) for part in config.after]
  return lambda old, new, wanted, step: functools.reduce(
    lambda params, rule: rule(old, params, wanted, step), rules, new
  )
