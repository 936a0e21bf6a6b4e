"""Experts switched on and off from outside (S2-15 of the literature: fTRI)."""

from collections.abc import Iterable

import numpy as np

from st_moe.config import ModelConfig
from st_moe.routing.types import RouteOverride

# Larger than what routers say, and small enough for differences between two
# experts that are both forced to survive in float32.
_FORCE = 1e4


def overrides(
  config: ModelConfig,
  *,
  off: Iterable[str] = (),
  on: Iterable[str] = (),
  k: int | None = None,
) -> dict[str, RouteOverride]:
  """RouteOverride of 'encoder' and 'decoder'; those without one are absent.

  Args:
    off, on: experts as 'STACK.LAYER.EXPERT', where LAYER is the number in
      `layers_LAYER` and any part may be '*'. Those off get no token, those on
      get every token, and all the weight.
    k: experts per token, in place of the config's.

  Raises:
    ValueError: there is no such expert, or too few are left.
  """
  found = {}
  for stack in config.stacks:
    if n := config.plan(stack).num_sparse:
      experts = config.moe_of(stack).num_experts
      if k is not None and not 1 <= k <= experts:
        raise ValueError(f'{k} experts per token: there are {experts}.')
      found[stack] = np.zeros((n, experts), np.float32)
  off, on = list(off), list(on)
  if (off or on or k is not None) and not found:
    raise ValueError('This model is dense: there are no experts to steer.')
  touched = set(found) if k is not None else set()
  for names, bias in ((off, -np.inf), (on, _FORCE)):
    for name in names:
      for stack, row, expert in _named(name, config):
        if found[stack][row, expert] not in (0, bias):
          raise ValueError(f'{name} is asked to be both on and off.')
        found[stack][row, expert] = bias
        touched.add(stack)
  for stack in touched:
    experts, k_there = config.moe_of(stack).num_experts, config.moe_of(stack).k
    each = zip(config.plan(stack).sparse, found[stack], strict=True)
    for layer, bias in each:
      n, forced = np.isfinite(bias).sum(), (bias == _FORCE).sum()
      if forced > (k or k_there):
        raise ValueError(
          f'{stack} layer {layer} has {forced} experts on, for'
          f' {k or k_there} per token.'
        )
      if n < (k or 1):
        raise ValueError(
          f'{stack} layer {layer} has {n} of {experts} experts left, for'
          f' {k or k_there} per token.'
        )
  return {
    s: RouteOverride(bias, k) for s, bias in found.items() if s in touched
  }


def _named(name: str, config: ModelConfig):
  """(stack, row of its sparse layers, expert) of every expert a name means."""
  parts = name.split('.')
  if len(parts) != 3:
    raise ValueError(
      f'{name!r} names no expert; they are called STACK.LAYER.EXPERT, as'
      " 'decoder.3.17', and '*' is any."
    )
  stacks = {s: config.plan(s).sparse for s in config.stacks}
  stacks = {s: layers for s, layers in stacks.items() if layers}
  among = lambda part, known, what: (
    [_one(part, known, what, name)] if part != '*' else list(known)
  )
  for stack in among(parts[0], stacks, 'sparse stacks'):
    layers = {str(layer): row for row, layer in enumerate(stacks[stack])}
    for layer in among(parts[1], layers, f'sparse layers of the {stack}'):
      experts = {str(e): e for e in range(config.moe_of(stack).num_experts)}
      for expert in among(parts[2], experts, 'experts'):
        yield stack, layers[layer], experts[expert]


def _one(part: str, known, what: str, name: str) -> str:
  if part not in known:
    listed = ', '.join(known) if len(known) < 20 else f'0 to {len(known) - 1}'
    raise ValueError(f'{name}: the {what} are {listed}.')
  return part
