"""What a train step costs on a mesh, by arithmetic: no compiler, no devices."""

import collections
import dataclasses
import functools
import math

import flax.linen as nn
import jax

from st_moe import counts, sharding
from st_moe.config import Config
from st_moe.model.transformer import Transformer
from st_moe.plan.hlo import Exchange, sent_per_byte
from st_moe.train import optimizer, step

_ITEM = {'bfloat16': 2, 'float32': 4}  # Bytes of an activation.


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one train step, for each device; bytes and FLOPs."""

  memory: dict[str, float]
  flops: dict[str, float]  # By part, 'recomputed' apart.
  exchanges: list[Exchange]


def estimate(config: Config, sizes: dict[str, int]) -> Estimate:
  """Arithmetic for `config` on a mesh of `sizes`, all of `sharding.AXES`.

  Weights and gradients travel in the dtype of activations, which must be
  settled: not 'auto'.

  Raises:
    ValueError: a dimension does not divide.
  """
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  step.check_sizes(config, mesh)
  state = _state(config.model, config.optimizer)
  weights = [
    _Weight.of(box, s.spec, mesh)
    for box, s in zip(
      jax.tree.leaves(state.params, is_leaf=_is_box),
      jax.tree.leaves(sharding.of_boxed(state.params, mesh)),
      strict=True,
    )
  ]
  return Estimate(
    memory=_memory(config, mesh, state),
    flops=_flops(config, mesh),
    exchanges=_exchanges(config, mesh, weights),
  )


@functools.lru_cache(maxsize=8)
def _state(model, optimizer_config):
  """A first state as boxed shapes."""
  module = Transformer(model)
  tx = optimizer.make(optimizer_config, step.parameter_axes(module))
  return jax.eval_shape(lambda: step.init_state(module, tx, jax.random.key(0)))


def _is_box(x) -> bool:
  return isinstance(x, nn.Partitioned)


@dataclasses.dataclass(frozen=True)
class _Weight:
  """One parameter on a mesh."""

  names: tuple[str, ...]
  elements: int  # On one device.
  gathered: tuple[str, ...]  # Mesh axes along which FSDP splits it.
  summed: tuple[str, ...]  # Those of the batch along which it is repeated.

  @classmethod
  def of(cls, box, spec, mesh) -> '_Weight':
    spec = [*spec, *[None] * (box.value.ndim - len(spec))]
    along = {
      name: (entry,) if isinstance(entry, str) else entry or ()
      for name, entry in zip(box.names, spec, strict=True)
    }
    used = [a for axes in along.values() for a in axes]
    parts = math.prod(mesh.shape[a] for a in used)
    big = lambda axes: tuple(a for a in axes if mesh.shape[a] > 1)
    return cls(
      box.names,
      math.prod(box.value.shape) // parts,
      big(along.get('embed', ())),
      big(a for a in sharding.AXES[:3] if a not in used),
    )


def _flops(config: Config, mesh) -> dict[str, float]:
  data = config.data
  share = data.batch_size / math.prod(mesh.shape.values())
  found = counts.train_flops(
    config.model, data.inputs_length, data.targets_length
  )
  return {part: flops * share for part, flops in found.items()}


def _bytes(tree, mesh) -> int:
  """Of boxed shapes, what one device holds."""
  shardings = sharding.of_boxed(tree, mesh)
  shapes = sharding.unbox(tree)
  return sum(
    math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize
    for a, s in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
    )
  )


def _memory(config: Config, mesh, state) -> dict[str, float]:
  return {
    'parameters': _bytes(state.params, mesh),
    'optimizer': _bytes(state.opt_state, mesh),
  }


def _exchanges(config: Config, mesh, weights) -> list[Exchange]:
  count, sent = collections.Counter(), collections.Counter()
  item = _ITEM[config.model.dtype]

  def add(kind, axes, given, times=1):
    n = math.prod(mesh.shape[a] for a in axes)
    if n > 1 and given:
      count[kind, axes] += times
      sent[kind, axes] += times * given * sent_per_byte(kind, n)

  for weight in weights:
    held = weight.elements * item
    whole = held * math.prod(mesh.shape[a] for a in weight.gathered)
    # There for the forward pass, and again for the backward one.
    add('all-gather', weight.gathered, held, 2 * config.microbatches)
    add('reduce-scatter', weight.gathered, whole, config.microbatches)
    add('all-reduce', weight.summed, held, config.microbatches)
  for stack, size, tokens in step.groups(config):
    places = _places(config, mesh, size, tokens)
    times = 4 * config.model.plan(stack).num_sparse * config.microbatches
    moved = places * config.model.embed_dim * item
    add('all-to-all', ('expert',), moved, times)
  found = [Exchange(*key, n, sent[key]) for key, n in count.items()]
  return sorted(found, key=lambda e: -e.sent)


def _places(config: Config, mesh, size: int, tokens: int) -> int:
  """Places in the buffers of all experts that one device fills."""
  groups = -(-tokens // size)
  groups = -(-groups // sharding.batch_shards(mesh))
  moe = config.model.moe
  return groups * moe.num_experts * moe.slots(size, deterministic=False)
