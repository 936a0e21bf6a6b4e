"""Parameters by their paths: what they are for, how read, trained, laid out."""

import collections
import math
import re

import jax
import jax.numpy as jnp

from st_moe.config import ModelConfig

# What a parameter is for, by its path; the first that fits.
ROLES = (
  ('kept', r'/kept_'),  # State that no optimizer moves.
  ('router', r'/router/'),
  ('experts', r'/experts/'),
  ('norms', r'(norm|moe/shared)/scale$'),  # Factors of each unit.
  ('attention', r'attention/|relpos_bias/'),
  ('mlp', r'mlp/'),
  ('embedding', r'^token_embedder/|^logits_dense/'),
)


# What `optimizer.train` may name, as patterns of paths; the sets of
# arXiv:2202.08906, section 4.2.
TRAINED = {
  'all': '',
  'moe': '/moe/',  # Routers and experts.
  'non_moe': '^(?!.*/moe/)',
  'attention': 'attention/|relpos_bias/',  # Norms not included.
  'ffn': '/(extra_)?mlp/',  # Dense ones.
  'router': '/router/',
}


def role(path: str) -> str:
  """The role of the parameter at 'encoder/layers/...'."""
  return next(role for role, pattern in ROLES if re.search(pattern, path))


def count(params) -> dict[str, int]:
  """How many parameters of each role there are, of arrays or their shapes."""
  found = collections.Counter()
  for path, leaf in by_path(params).items():
    found[role(path)] += math.prod(leaf.shape)
  return {role: found[role] for role, _ in ROLES if found[role]}


def by_path(params) -> dict:
  """'encoder/layers/...' -> leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  return {_name(path): leaf for path, leaf in flat}


def map_by_path(make, params):
  """`params` with every leaf replaced by make('encoder/layers/...', leaf)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: make(_name(path), leaf), params
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


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


def split(tree, train: str, is_leaf=None):
  """(what is trained of `tree`, the rest).

  Both have None, which is no leaf, where the other has an array. So what is
  frozen has neither a gradient nor a place in the optimizer's state.

  Args:
    train: a role, or a regular expression found in a path such as
      'encoder/layers/layer_0/mlp/wi_0/kernel'.

  Raises:
    ValueError: nothing is of this role, or the expression is none.
  """
  flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  mine = [trains(train, _name(path)) for path, _ in flat]
  if not any(mine):
    raise ValueError(
      f'optimizer.train={train!r} trains nothing: it is none of'
      f' {", ".join(TRAINED)}, and no parameter has it in its path, as'
      f' {_name(flat[0][0])} has.'
    )
  pick = lambda want: structure.unflatten(
    [
      leaf if m == want else None
      for m, (_, leaf) in zip(mine, flat, strict=True)
    ]
  )
  return pick(True), pick(False)


def trains(train: str, path: str) -> bool:
  """Whether what `split` calls `train` has the parameter at `path`.

  State that is kept from step to step is in no set, 'all' included.
  """
  try:
    found = re.search(TRAINED.get(train, train), path)
    return bool(found) and not re.search(dict(ROLES)['kept'], path)
  except re.error as e:
    raise ValueError(
      f'optimizer.train={train!r} is none of {", ".join(TRAINED)} and no'
      f' regular expression: {e}.'
    ) from None


def merge(mine, rest):
  """The tree that was split."""
  one = lambda a, b: b if a is None else a
  return jax.tree.map(one, mine, rest, is_leaf=lambda x: x is None)


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
