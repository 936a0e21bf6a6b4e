"""Which parameters are trained: those of a role, or of a pattern of paths.

A tree is parted into one with what is trained and one with the rest; both have
None, which is no leaf, where the other has an array. So what is frozen has
neither a gradient nor a place in the optimizer's state.
"""

import re

import jax

# Role -> pattern of the paths; the sets of arXiv:2202.08906, section 4.2.
ROLES = {
  'all': '',
  'moe': '/moe/',  # Routers and experts.
  'non_moe': '^(?!.*/moe/)',
  'attention': 'attention/|relpos_bias/',  # Norms not included.
  'ffn': '/(extra_)?mlp/',  # Dense ones.
  'router': '/router/',
}


def part(tree, train: str, is_leaf=None):
  """(what is trained of `tree`, the rest).

  Args:
    train: a role, or a regular expression found in a path such as
      'encoder/layers/layer_0/mlp/wi_0/kernel'.

  Raises:
    ValueError: nothing is of this role, or the expression is none.
  """
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  mine = [trains(train, name(path)) for path, _ in flat]
  if not any(mine):
    raise ValueError(
      f'optimizer.train={train!r} trains nothing: it is none of'
      f' {", ".join(ROLES)}, and no parameter has it in its path, as'
      f' {name(flat[0][0])} has.'
    )
  pick = lambda want: structure.unflatten(
    [
      leaf if m == want else None
      for m, (_, leaf) in zip(mine, flat, strict=True)
    ]
  )
  return pick(True), pick(False)


def trains(train: str, path: str) -> bool:
  """Whether what `part` calls `train` has the parameter at `path`."""
  try:
    return bool(re.search(ROLES.get(train, train), path))
  except re.error as e:
    raise ValueError(
      f'optimizer.train={train!r} is none of {", ".join(ROLES)} and no regular'
      f' expression: {e}.'
    ) from None


def join(mine, rest):
  """The tree that was parted."""
  one = lambda a, b: b if a is None else a
  return jax.tree.map(one, mine, rest, is_leaf=lambda x: x is None)
