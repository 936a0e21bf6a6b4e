"""What the devices of a mesh send each other in a train step, by arithmetic."""

import collections
import functools
import math

from st_moe import paths, sharding
from st_moe.config import Config, DataConfig
from st_moe.plan import memory
from st_moe.plan.hlo import Exchange, sent_per_byte
from st_moe.train import sizes as sizes_lib

_FLOAT32 = 4


def exchanges(config: Config, mesh) -> list[Exchange]:
  """Of one step of `config`, the most bytes first.

  Weights travel in the dtype of activations, which must be settled: not 'auto';
  their gradients in that of `model.gradient_sums`.
  """
  found = _Sum(mesh, memory.ITEM[config.model.dtype])
  same, data = memory.same_parameters(config), config.data
  sizes = data.batch_size, data.inputs_length, data.targets_length
  for e in _of_weights(
    same.model, same.optimizer, sizes, config.microbatches, mesh
  ):
    found.include(e)
  _to_experts(found, config)
  _partial_sums(found, config)
  return found.exchanges()


@functools.lru_cache(maxsize=4096)
def _of_weights(model, optimizer, sizes, microbatches, mesh) -> list[Exchange]:
  batch, inputs, targets = sizes
  data = DataConfig(
    batch_size=batch, inputs_length=inputs, targets_length=targets
  )
  config = Config(
    model=model, optimizer=optimizer, data=data, microbatches=microbatches
  )
  found = _Sum(mesh, memory.ITEM[config.model.dtype])
  for parameter in memory.parameters(config, mesh):
    _weight(found, config, parameter)
  return found.exchanges()


class _Sum:
  """Exchanges on one mesh, added up by kind and axes."""

  def __init__(self, mesh, item: int):
    self.mesh, self.item = mesh, item
    self._count, self._sent = collections.Counter(), collections.Counter()

  def add(self, kind: str, axes, given: float, times: float = 1) -> None:
    """`times` exchanges of `given` bytes on each device."""
    axes = tuple(a for a in axes if self.mesh.shape[a] > 1)
    if axes and given and times:
      n = math.prod(self.mesh.shape[a] for a in axes)
      sent = times * given * sent_per_byte(kind, n)
      self.include(Exchange(kind, axes, times, sent))

  def include(self, e: Exchange) -> None:
    self._count[e.kind, e.axes] += e.count
    self._sent[e.kind, e.axes] += e.sent

  def exchanges(self) -> list[Exchange]:
    found = [Exchange(*k, n, self._sent[k]) for k, n in self._count.items()]
    return sorted(found, key=lambda e: -e.sent)


def _rows(config: Config, mesh) -> int:
  """Sequences that a device sees in one step."""
  return config.data.batch_size // sharding.batch_shards(mesh)


def _weight(found: _Sum, config: Config, p: memory.Parameter) -> None:
  """Gathered where FSDP splits it, its gradient summed up."""
  mesh, model, times = found.mesh, config.model, config.microbatches
  used = {a for axes in p.axes.values() for a in axes}
  summed = [a for a in sharding.AXES if a != 'model' and a not in used]
  trained = paths.trains(config.optimizer.train, p.path)
  if 'relpos_buckets' in p.axes:
    # Each layer's gradient is summed as a bias, before it is a table again.
    stack = p.path.partition('/')[0]
    heads = p.size // model.relpos_buckets
    bias = heads * config.data.length(stack) ** 2 * _FLOAT32
    uses = 1 if model.relpos_per_layer else model.stack(stack).num_layers
    found.add('all-reduce', summed, bias, trained * uses * times)
  elif [*p.axes] == ['vocab', 'embed']:
    # Looked up in parts, for the tokens of all; the parts come together there.
    for stack in model.stacks:
      tokens = _rows(config, mesh) * config.data.length(stack)
      numbers = tokens * model.embed_dim
      looked_up = numbers * found.item
      found.add('all-to-all', p.gathered, looked_up)
      found.add('all-to-all', p.gathered, numbers * _FLOAT32, trained)
      found.add('all-reduce', p.axes['vocab'], looked_up)
      found.add('all-reduce', summed, p.size * _FLOAT32, trained * times)
  else:
    whole = p.size * math.prod(mesh.shape[a] for a in p.gathered)
    early = p.cast and model.gradient_sums == 'activations'
    item = found.item if early else _FLOAT32
    # There for the forward pass, and again for the backward one.
    found.add('all-gather', p.gathered, p.size * found.item, 2 * times)
    found.add('reduce-scatter', p.gathered, whole * item, trained * times)
    found.add('all-reduce', summed, p.size * item, trained * times)


def _to_experts(found: _Sum, config: Config) -> None:
  """Tokens to experts and back, in both passes."""
  for stack, moved in _places(found, config):
    sparse = config.model.plan(stack).num_sparse
    times = 4 * sparse * config.microbatches
    found.add('all-to-all', ('expert',), moved, times)


def _places(found: _Sum, config: Config):
  """(stack, bytes of all places that a device fills in one layer)."""
  for stack, size, tokens in sizes_lib.groups(config):
    moe = config.model.moe_of(stack)
    shards = sharding.batch_shards(found.mesh)
    groups = sharding.whole_groups(tokens, size, shards) // shards
    places = moe.num_experts * moe.slots(size, deterministic=False)
    yield stack, groups * places * config.model.embed_dim * found.item


def _partial_sums(found: _Sum, config: Config) -> None:
  """What `model` splits: outputs, and slopes of inputs, are added up."""
  model, data = config.model, config.data
  rows, places = _rows(config, found.mesh), dict(_places(found, config))
  add = lambda given, times: found.add('all-reduce', ('model',), given, times)
  for stack in model.stacks:
    stream = lambda s: rows * data.length(s) * model.embed_dim * found.item
    for layer in model.plan(stack).layers:
      for sublayer in layer:
        again = model.remat == 'full' and sublayer is not layer[-1]
        routed = sublayer.kind == 'moe'
        if routed:
          add(places[stack], 2 * config.microbatches)
        if not routed or model.beside_dim(sublayer.moe):
          add(stream(stack), 2 + again)
        if sublayer.kind == 'cross_attention':
          add(stream('encoder'), 2)  # Slopes of keys, and of values.
