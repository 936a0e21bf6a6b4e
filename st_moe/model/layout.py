"""Parameters by role and path; scanned ones unrolled and back, without loss."""

import re

import jax
import jax.numpy as jnp

from st_moe.config import ModelConfig

# What a parameter is for, by its path; the first that fits.
ROLES = (
  ('router', r'/router/'),
  ('experts', r'/experts/'),
  ('norms', r'norm/scale$'),
  ('attention', r'attention/|relpos_bias/'),
  ('mlp', r'mlp/'),
  ('embedding', r'^token_embedder/|^logits_dense/'),
)


def role(path: str) -> str:
  """The role of the parameter at 'encoder/layers/...'."""
  return next(role for role, pattern in ROLES if re.search(pattern, path))


def by_path(params) -> dict:
  """'encoder/layers/...' -> leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  name = jax.tree_util.keystr
  return {name(p, simple=True, separator='/'): leaf for p, leaf in flat}


def map_by_path(make, params):
  """`params` with every leaf replaced by make('encoder/layers/...', leaf)."""
  name = jax.tree_util.keystr
  return jax.tree_util.tree_map_with_path(
    lambda p, leaf: make(name(p, simple=True, separator='/'), leaf), params
  )


def as_read(params, dtype):
  """`params` with those that layers read in `dtype` already so."""
  return map_by_path(
    lambda path, leaf: leaf.astype(dtype) if is_cast(path) else leaf, params
  )


def is_cast(path: str) -> bool:
  """Whether layers read it as they do activations.

  Those of routers, norms, embeddings and positions are read in float32.
  """
  read = ('/kernel', '/multiplicative_bias')
  return path.endswith(read) and role(path) in ('experts', 'attention', 'mlp')


def unrolled_paths(path: str, config: ModelConfig):
  """Paths in the unrolled model of what `path` holds, with their index in it.

  'encoder/layers/layer_1/mlp/wi/kernel' holds 'encoder/layers_1/mlp/wi/kernel'
  at 0, 'encoder/layers_3/...' at 1 and so on, where the period is 2; a path
  that is not scanned holds itself, at None.
  """
  match = re.match(r'(\w+)/layers/layer_(\d+)/(.*)', path)
  if not match:
    return [(path, None)]
  stack, j, rest = match[1], int(match[2]), match[3]
  plan = config.plan(stack)
  return [
    (f'{stack}/layers_{i * plan.period + j}/{rest}', i)
    for i in range(len(plan.layers) // plan.period)
  ]


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
