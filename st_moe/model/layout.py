"""Scanned and unrolled parameters, into each other without loss."""

import jax
import jax.numpy as jnp

from st_moe.config import ModelConfig


def unroll(params: dict, config: ModelConfig) -> dict:
  """Parameters of `scan_layers=True` as those of `scan_layers=False`.

  `layers/layer_j` with a leading axis of periods becomes `layers_i`, one tree
  a layer.
  """
  params = dict(params)
  for stack in config.stacks:
    tree = dict(params[stack])
    period = config.plan(stack).period
    for name, stacked in tree.pop('layers').items():
      j = int(name.removeprefix('layer_'))
      periods = len(jax.tree.leaves(stacked)[0])
      for i in range(periods):
        tree[f'layers_{i * period + j}'] = jax.tree.map(
          lambda a, i=i: a[i], stacked
        )
    params[stack] = tree
  return params


def roll(params: dict, config: ModelConfig) -> dict:
  """The inverse of `unroll`."""
  params = dict(params)
  for stack in config.stacks:
    tree = dict(params[stack])
    plan = config.plan(stack)
    whole = len(plan.layers) // plan.period * plan.period
    layers = {}
    for j in range(plan.period):
      each = [tree.pop(f'layers_{i}') for i in range(j, whole, plan.period)]
      layers[f'layer_{j}'] = jax.tree.map(lambda *a: jnp.stack(a), *each)
    params[stack] = {**tree, 'layers': layers}
  return params
