"""Batches, groups and devices: what divides, what is wasted, what fits."""

import math
import os
from collections.abc import Iterator

import jax

from st_moe import sharding
from st_moe.config import Config, ModelConfig
from st_moe.train.state import Start


def check(config: Config, mesh) -> None:
  """Refuses a batch that does not divide, with the sizes that would.

  Raises:
    ValueError: batch against devices or microbatches, or a microbatch that is
      no whole number of groups.
  """
  batch, parts = config.data.batch_size, config.microbatches
  shards = sharding.batch_shards(mesh)
  measured = config.evaluate.batch_size
  if measured % shards:
    raise ValueError(
      f'evaluate.batch_size={measured} does not divide among {shards} devices;'
      f' the nearest that do are {_nearest(measured, shards)}.'
    )
  if batch % (parts * shards):
    raise ValueError(
      f'data.batch_size={batch} does not divide into {parts} microbatches on'
      f' {shards} devices; the nearest that do are'
      f' {_nearest(batch, parts * shards)}.'
    )
  for stack, size, tokens in groups(config) if parts > 1 else ():
    if tokens % size:
      raise ValueError(
        f'A microbatch of {batch // parts} x {tokens * parts // batch} tokens'
        f' is no whole number of {stack} groups of {size}; the nearest group'
        f' sizes that divide are {sharding.divisors_near(tokens, size)}'
        f' (model.{stack}.group_size).'
      )


def check_padding(config: Config, mesh) -> list[str]:
  """Refuses groups far larger than what a device has, with sizes that fit.

  Returns:
    What to tell where groups straddle devices: what that costs.

  Raises:
    ValueError: more than `config.max_padding` places for each that is needed.
  """
  shards, found = sharding.batch_shards(mesh), list(groups(config))
  factors = _padding(found, config.model, shards)
  wide = [g for g in found if factors[g[0]] > config.max_padding > 0]
  if wide:
    each = lambda text: ' and '.join(
      text.format(
        stack=stack, size=size, share=tokens // shards, factor=factors[stack]
      )
      for stack, size, tokens in wide
    )
    raise ValueError(
      f'A device computes whole groups. Of {shards} devices each has'
      f' {each("{share} {stack} tokens for groups of {size}")}, so that sparse'
      f' layers would compute {each("{factor:.1f}")} times the places. Set'
      f' {each("model.{stack}.group_size={share}")}, or, to have it so,'
      f' max_padding={math.ceil(max(factors.values()))}.'
    )
  return [
    f'{stack} groups of {size} tokens straddle devices of {tokens // shards}'
    f' tokens each, which pass them on in every sparse layer'
    f'{_more(factors[stack])}; with'
    f' model.{stack}.group_size={tokens // shards}, or a divisor of it, they'
    ' would not.'
    for stack, size, tokens in found
    if shards > 1 and tokens // shards % size
  ]


def padding(config: Config, mesh) -> dict[str, float]:
  """Places computed for each that tokens need, by sparse stack; 1: none more.

  A device computes whole groups, so that groups do not depend on the mesh: with
  a tenth of the tokens of one, ten times the places.
  """
  shards = sharding.batch_shards(mesh)
  return _padding(groups(config), config.model, shards)


def _padding(found, model: ModelConfig, shards: int) -> dict[str, float]:
  return {
    stack: sharding.whole_groups(tokens, size, shards) * size / tokens
    if model.moe_of(stack).computes_places
    else 1.0
    for stack, size, tokens in found
  }


def _more(factor: float) -> str:
  return f' and compute {factor:.2f} times the places' if factor > 1 else ''


def groups(config: Config) -> Iterator[tuple[str, int, int]]:
  """(sparse stack, tokens of a group, tokens of a microbatch)."""
  for stack in config.model.stacks:
    if config.model.plan(stack).num_sparse:
      length = config.data.length(stack)
      whole = config.data.batch_size * length
      size = min(config.model.stack(stack).group_size, whole)
      if config.model.moe_of(stack).group_by == 'sequence':
        size = length
      yield stack, size, whole // config.microbatches


def _nearest(n: int, factor: int) -> str:
  low = n // factor * factor
  return f'{low} and {low + factor}' if low else f'{factor}'


def check_room(start: Start, config: Config, mesh) -> None:
  """Refuses what no device here can hold, before it is made.

  Else the system would end the process, without a word. What a step takes
  beside its logits is not counted: what is refused here is hopeless.

  Raises:
    ValueError: with what it takes and what there is.
  """
  leaves = jax.tree.leaves(sharding.placed(start.shapes, start.shardings))
  state = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in leaves
  )
  params = jax.tree.leaves(start.shapes.params)
  count = sum(math.prod(leaf.shape) for leaf in params)
  data, length = config.data, config.data.length(config.model.stacks[-1])
  rows = data.batch_size // config.microbatches
  numbers = rows * min(config.loss.positions or length, length)
  logits = 4 * numbers * config.model.vocab_size // mesh.size
  room = _memory(mesh.local_devices[0])
  if state + logits > room:
    gib = lambda size: f'{size / 2**30:,.1f} GiB'
    raise ValueError(
      f'A device here has {gib(room)}. {count:,} parameters and the optimizer'
      f' take {gib(state)} of each, the logits of {rows:,} rows {gib(logits)}.'
      ' Make the model smaller (config.model.embed_dim, mlp_dim,'
      ' moe.num_experts, encoder.num_layers) or split it over more devices'
      ' (config.mesh.fsdp, expert, model); take fewer rows at a time'
      ' (config.data.batch_size, microbatches) or logits (loss.positions).'
    )


def _memory(device) -> int:
  """Bytes of a device; those of CPUs share the memory of the machine."""
  stats = device.memory_stats() or {}
  whole = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return stats.get('bytes_limit', whole // jax.local_device_count())
