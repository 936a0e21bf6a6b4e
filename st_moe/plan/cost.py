"""What a train step costs on a mesh, by arithmetic: no compiler, no devices."""

import collections
import dataclasses
import math

from st_moe import counts, paths, sharding
from st_moe.config import Config
from st_moe.model.transformer import Transformer
from st_moe.plan import memory
from st_moe.plan.chips import Chip
from st_moe.plan.exchanges import exchanges
from st_moe.plan.hlo import Exchange
from st_moe.train import sizes as sizes_lib
from st_moe.train.state import abstract_params


def count_params(config: Config) -> dict[str, int]:
  """Parameters by role, of the model as it would be initialised."""
  return paths.count(abstract_params(Transformer(config.model)))


def active_params(config: Config) -> int:
  """Parameters that one token meets: all but the experts not chosen."""
  abstract = abstract_params(Transformer(config.model))
  found = 0
  for path, leaf in paths.by_path(abstract).items():
    share = 1
    if paths.role(path) == 'experts':
      moe = config.model.moe_of(path.partition('/')[0])
      share = moe.expected_k / moe.num_experts
    found += math.prod(leaf.shape) * share
  return round(found)


@dataclasses.dataclass(frozen=True)
class Work:
  """What a train step does on each device."""

  flops: dict[str, float]  # By part; 'recomputed' apart.
  traffic: float  # Bytes that products read and write.
  exchanges: list[Exchange]

  @property
  def ideal(self) -> float:
    """FLOPs that neither dispatcher, padding nor recomputation adds to."""
    spare = 'dispatch', 'recomputed', 'padded groups'
    return sum(n for part, n in self.flops.items() if part not in spare)


def work(config: Config, sizes: dict[str, int]) -> Work:
  """Arithmetic for `config` on a mesh of `sizes`, all of `sharding.AXES`.

  Raises:
    ValueError: a dimension does not divide.
  """
  mesh = sharding.abstract_mesh(sizes)
  sizes_lib.check(config, mesh)
  data, model = config.data, config.model
  share = data.batch_size / math.prod(sizes.values())
  lengths = data.inputs_length, data.targets_length
  item = memory.ITEM[model.dtype]
  passes = {'none': 3, 'dots': 3, 'full': 4}[model.remat]
  held = memory.state(config, mesh)
  weights = sum(
    p.size * math.prod(sizes[a] for a in p.gathered)
    for p in memory.parameters(config, mesh)
  )
  padding = tuple(sizes_lib.padding(config, mesh).items())
  flops = dict(counts.train_flops(model, *lengths))
  padded = counts.train_flops(model, *lengths, padding)
  flops['padded groups'] = sum(padded.values()) - sum(flops.values())
  if config.loss.positions:  # Logits are made again.
    flops['recomputed'] += flops['logits'] / 3
  return Work(
    flops={part: n * share for part, n in flops.items()},
    traffic=counts.train_moved(model, *lengths, padding) * share * item
    + weights * item * passes * config.microbatches
    # Read and written by the optimizer, gradients once more.
    + 2 * sum(held.values())
    + 2 * held['parameters'],
    exchanges=exchanges(config, mesh),
  )


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a train step does on each device, and what it holds: bytes."""

  work: Work
  state: dict[str, float]  # From step to step.
  step: dict[str, float]  # Beside it, at the worst moment of a step.

  @property
  def peak(self) -> float:
    return sum(self.state.values()) + sum(self.step.values())


def cost(config: Config, sizes: dict[str, int]) -> Cost:
  """As `work`, which takes milliseconds; with memory, which takes seconds."""
  found, mesh = work(config, sizes), sharding.abstract_mesh(sizes)
  return Cost(found, memory.state(config, mesh), memory.of_step(config, mesh))


def fitting(
  config: Config, sizes: dict[str, int], chip: Chip, work: Work
) -> Cost | None:
  """`work`, and what `config` holds; None where it does not fit on `chip`."""
  mesh = sharding.abstract_mesh(sizes)
  if memory.at_least(config, mesh) > chip.memory:
    return None
  found = Cost(work, memory.state(config, mesh), memory.of_step(config, mesh))
  return found if found.peak <= chip.memory else None


WAYS_OUT = (
  'Split it over more devices (mesh.fsdp, mesh.model), keep less'
  ' (model.remat=full), or take fewer examples at a time (microbatches,'
  ' data.batch_size).'
)


class DoesNotFit(ValueError):
  """There is no room for a step."""


def check_room(config: Config, devices: int, chip: Chip) -> None:
  """Raises DoesNotFit where no mesh of so many chips has room."""
  held = memory.split_evenly(config, devices)
  if sum(held.values()) > chip.memory:
    gib = lambda size: f'{size / 2**30:.1f}'
    parts = ', '.join(f'{name} {gib(size)}' for name, size in held.items())
    raise DoesNotFit(
      f'A step does not fit on {devices} devices of {gib(chip.memory)} GiB,'
      f' however it is split. Each would hold {gib(sum(held.values()))} GiB at'
      f' least: {parts} (parameters in float32). Take more devices, or keep'
      ' less: model.remat=full, microbatches, a smaller data.batch_size.'
    )


@dataclasses.dataclass(frozen=True)
class Seconds:
  """A step on a chip at its peak rates."""

  products: float
  memory: float
  weights: float  # Exchanged; beside products, if all goes well.
  tokens: float  # Exchanged, while all else waits.

  @property
  def step(self) -> float:
    return max(self.products, self.memory, self.weights) + self.tokens

  @property
  def worst(self) -> float:
    """Where nothing goes on beside anything else."""
    return self.products + self.memory + self.weights + self.tokens


def seconds(found: Work, chip: Chip, sizes: dict[str, int]) -> Seconds:
  """The roofline of `found` on a mesh of such chips."""
  sent = collections.Counter()
  for e in found.exchanges:
    tokens = e.kind == 'all-to-all' or e.axes == ('model',)
    sent[tokens] += e.sent / chip.rate(e.axes, sizes)
  return Seconds(
    products=sum(found.flops.values()) / chip.flops,
    memory=found.traffic / chip.bandwidth,
    weights=sent[False],
    tokens=sent[True],
  )
