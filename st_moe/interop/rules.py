"""Parameters of any model out of any checkpoint, by rules on paths.

A rule is a pattern that must fit a whole path of the new model, unrolled
('encoder/layers_3/moe/router/kernel'), and the path there that it is made of,
with \\1 for its groups; '' is: new. The first that fits wins, and what none
fits is what has the same path there.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np

from st_moe import paths
from st_moe.config import ModelConfig, unknown

# What `config.init_take` may say besides 'architecture'.
RULES = {
  # The same model.
  'params': {},
  # Dense into sparse (arXiv:2212.05055): every expert a copy of the FFN that
  # was there, routers and extra FFNs new.
  'upcycle': {
    r'(.*)/moe/experts/(.*)': r'\1/mlp/\2',
    r'.*/moe/router/.*': '',
    r'.*/kept_.*': '',
    r'.*/(pre_)?extra_mlp(_layer_norm)?/.*': '',
  },
}


def named(take: str, own: Mapping[str, str]) -> dict[str, str]:
  """The rules of a config: its own before those of its `init_take`."""
  if take not in RULES:
    raise unknown('init_take', take, (*RULES, 'architecture'))
  rest = {rule: made for rule, made in RULES[take].items() if rule not in own}
  return {**own, **rest}


def initialize(
  params, model: ModelConfig, there: Mapping, rules: Mapping[str, str]
):
  """`params` of `model` with what the rules take of a checkpoint.

  Args:
    params: random ones, scanned or not; what stays new stays as it is.
    there: array of every path of the checkpoint, unrolled.

  Returns:
    The parameters, and what was done, in lines.

  Raises:
    ValueError: a rule that fits nothing, a path that is not there, a shape
      that does not fit.
  """
  done = {'loaded': [], 'copied to every expert': [], 'new': []}
  fitted, used = set(), set()

  def fill(path, leaf):
    found, out = [], None
    for piece, i in paths.unrolled_paths(path, model):
      rule, source = _match(piece, rules)
      fitted.add(rule)
      if not source:
        done['new'].append(piece)
        continue
      if source not in there:
        raise ValueError(
          f'{piece} is to be made of {source}, which the checkpoint does not'
          f" have; a rule {{{piece!r}: ''}} in init_rules leaves it new."
        )
      used.add(source)
      found.append((piece, i, np.asarray(there[source])))
    if not found:
      return leaf
    out = np.array(leaf)
    for piece, i, array in found:
      target = out if i is None else out[i]
      if array.shape == target.shape:
        done['loaded'].append(piece)
      elif '/experts/' in piece and array.shape == target.shape[1:]:
        done['copied to every expert'].append(piece)
      else:
        raise ValueError(
          f'{piece} is {list(target.shape)}, and what it is to be made of is'
          f' {list(array.shape)} in the checkpoint.'
        )
      target[...] = array
    sharding = getattr(leaf, 'sharding', None)
    return jax.device_put(out, sharding) if sharding else out

  params = paths.map_by_path(fill, params)
  idle = [rule for rule in rules if rule not in fitted]
  own = [rule for rule in idle if not any(rule in r for r in RULES.values())]
  if own:
    raise ValueError(f'No parameter fits the rule {own[0]!r} of init_rules.')
  done['left behind'] = sorted(set(there) - used)
  return params, [
    f'{what}: {len(pieces)} arrays, as {pieces[0]}'
    for what, pieces in done.items()
    if pieces
  ]


def _match(path: str, rules: Mapping[str, str]) -> tuple[str | None, str]:
  for rule, source in rules.items():
    if match := re.fullmatch(rule, path):
      return rule, match.expand(source)
  return None, path
