"""What a train step holds on each device of a mesh, by arithmetic."""

import collections
import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax

from st_moe import paths, sharding
from st_moe.config import Config, Part
from st_moe.model.transformer import Transformer
from st_moe.plan import activations
from st_moe.train import optimizer
from st_moe.train.state import init_state, parameter_axes

ITEM = {'bfloat16': 2, 'float32': 4}  # Bytes of an activation.
# As the TPU compiler leaves them, and its code: see EXPERIMENTS.md.
GAPS = 0.15


def state(config: Config, mesh) -> dict[str, int]:
  """Bytes that stay from step to step."""
  same = same_parameters(config)
  return dict(_held(same.model, same.optimizer, mesh))


@functools.lru_cache(maxsize=1024)
def _held(model, optimizer_config, mesh):
  boxed = _first_state(model, optimizer_config)
  return (
    ('parameters', _bytes(boxed.params, mesh)),
    ('optimizer', _bytes(boxed.opt_state, mesh)),
  )


def at_least(config: Config, mesh) -> int:
  """Bytes that need no tracing to tell: `state`, gradients and casts."""
  held = sum(state(config, mesh).values())
  return held + _gradients(config, mesh) + _cast(config, mesh)


def split_evenly(config: Config, devices: int) -> dict[str, float]:
  """Bytes on one of so many devices, at the least, whatever the mesh."""
  sizes = dict.fromkeys(sharding.AXES, 1)
  one = sharding.abstract_mesh(sizes)
  found = {
    **state(config, one),
    'weights as activations': _cast(config, one),
    'gradients': _gradients(config, one),
    'kept for the backward pass': activations.kept(config, sizes),
  }
  return {name: size / devices for name, size in found.items()}


def of_step(config: Config, mesh) -> dict[str, float]:
  """Bytes that come and go within a step, as many as are there at once.

  Of one microbatch, where its backward pass begins: all that was kept waits,
  and gradients have their places. With room to spare a compiler takes more: it
  computes several layers again at a time.
  """
  remat, sizes = config.model.remat != 'none', dict(mesh.shape)
  found = {
    'weights as activations': _cast(config, mesh),
    'weights of one layer, gathered': _gathered(config, mesh),
    'gradients': _gradients(config, mesh),
    'kept for the backward pass': activations.kept(config, sizes),
    'one layer, computed again': (
      activations.of_a_layer(config, sizes) if remat else 0
    ),
  }
  return found | {'gaps between them': GAPS * sum(found.values())}


def _cast(config: Config, mesh) -> int:
  item = ITEM[config.model.dtype]
  every = parameters(config, mesh)
  return item * sum(p.size for p in every if p.cast) if item < 4 else 0


def _gradients(config: Config, mesh) -> int:
  """As they arise; beside those of a microbatch, the sum so far in float32."""
  item, train = ITEM[config.model.dtype], config.optimizer.train
  mine = [p for p in parameters(config, mesh) if paths.trains(train, p.path)]
  arise = sum(p.size * (item if p.cast else 4) for p in mine)
  return arise + 4 * sum(p.size for p in mine) * (config.microbatches > 1)


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter on a mesh."""

  path: str
  shape: tuple[int, ...]
  axes: dict[str, tuple[str, ...]]  # Its own -> those of the mesh, in order.
  size: int  # Numbers on one device.

  @property
  def cast(self) -> bool:
    """Whether layers read it in the dtype of activations."""
    return paths.is_cast(self.path)

  @property
  def gathered(self) -> tuple[str, ...]:
    """The mesh axes of FSDP."""
    return self.axes.get('embed', ())


def parameters(config: Config, mesh) -> tuple[Parameter, ...]:
  same = same_parameters(config)
  return _parameters(same.model, same.optimizer, mesh)


@functools.lru_cache(maxsize=1024)
def _parameters(model, optimizer_config, mesh):
  boxed = _first_state(model, optimizer_config).params
  flat, _ = jax.tree.flatten_with_path(boxed, is_leaf=_is_box)
  shardings = jax.tree.leaves(sharding.of_boxed(boxed, mesh))
  found = []
  for (path, box), place in zip(flat, shardings, strict=True):
    spec = [*place.spec, *[None] * (len(box.names) - len(place.spec))]
    entries = ((e,) if isinstance(e, str) else e or () for e in spec)
    parameter = Parameter(
      jax.tree_util.keystr(path, simple=True, separator='/'),
      box.value.shape,
      dict(zip(box.names, entries, strict=True)),
      math.prod(place.shard_shape(box.value.shape)),
    )
    found.append(parameter)
  return tuple(found)


def _state(config: Config):
  """A first state, as boxed shapes."""
  same = same_parameters(config)
  return _first_state(same.model, same.optimizer)


def same_parameters(config: Config) -> Config:
  """`config` without what changes no parameter: to trace it takes seconds."""
  model = config.model.with_moe(dispatcher=Part('auto'), transport='auto')
  ungrouped = {
    name: dataclasses.replace(model.stack(name), group_size=1)
    for name in model.stacks
  }
  model = dataclasses.replace(model, remat='none', **ungrouped)
  return dataclasses.replace(config, model=model)


@functools.lru_cache(maxsize=8)
def _first_state(model, optimizer_config):
  module = Transformer(model)
  tx = optimizer.make(optimizer_config, parameter_axes(module))
  return sharding.shapes_of(lambda: init_state(module, tx, jax.random.key(0)))


def _is_box(x) -> bool:
  return isinstance(x, nn.Partitioned)


def _bytes(boxed, mesh) -> int:
  """What one device holds."""
  shardings = sharding.of_boxed(boxed, mesh)
  shapes = sharding.unbox(boxed)
  return sum(
    math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize
    for a, s in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
    )
  )


def _gathered(config: Config, mesh) -> int:
  """Of the largest layer that FSDP splits, with its gradients, still whole."""
  found = collections.Counter()
  for p in parameters(config, mesh):
    layer = re.match(r'\w+/layers(/layer)?_\d+/', p.path)
    parts = math.prod(mesh.shape[a] for a in p.gathered)
    if layer and parts > 1:
      repeated = p.shape[0] if 'layers' in p.axes else 1
      found[layer[0]] += p.size * parts // repeated
  return 2 * ITEM[config.model.dtype] * max(found.values(), default=0)
