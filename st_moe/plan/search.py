"""Which mesh is fastest among those a step fits on: every one is tried."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from st_moe import sharding
from st_moe.config import Config, Part
from st_moe.plan import cost
from st_moe.plan.chips import Chip
from st_moe.train import sizes as sizes_lib

DISPATCHERS = ('index', 'mask')
MICROBATCHES = (1, 2, 4, 8, 16)
REMAT = ('none', 'dots', 'full')
SHARES = (1, 2, 4, 8)  # Of the groups of a config.
SMALLEST = 64  # Tokens in a share.
MESHES = 1000  # That are tried: a minute or two.


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A way to run a config on so many chips."""

  config: Config
  sizes: dict[str, int]
  work: cost.Work
  seconds: cost.Seconds


def candidates(
  config: Config,
  devices: int,
  chip: Chip,
  *,
  watch: Callable[[list], Iterable] = iter,
) -> list[Candidate]:
  """All ways there are, the fastest first; whether they fit is not asked.

  Args:
    watch: given all meshes, gives one after the other, to be tried next.

  Raises:
    ValueError: there are more meshes than `MESHES`, or none divides; what is
      said is of the first one.
  """
  tried = list(itertools.islice(meshes(config, devices), MESHES + 1))
  if len(tried) > MESHES:
    raise ValueError(
      f'{devices} devices make more than {MESHES:,} meshes, which is as many as'
      ' a search tries. Take a number of them with fewer divisors, or name one'
      ' mesh (--config.mesh.expert and so on) instead of --search.'
    )
  found, refused = [], None
  for sizes in watch(tried):
    for changed in variants(config, sizes):
      try:
        work = cost.work(changed, sizes)
      except ValueError as e:  # Something does not divide.
        refused = refused or e
        continue
      seconds = cost.seconds(work, chip, sizes)
      found.append(Candidate(changed, sizes, work, seconds))
  if not found:
    raise ValueError(
      f'None of the {len(tried)} meshes of {devices} devices can train this.'
      f' The first: {refused}'
    )
  return sorted(
    found, key=lambda c: (round(c.seconds.step, 2), c.seconds.worst)
  )


def meshes(config: Config, devices: int) -> Iterator[dict[str, int]]:
  """Sizes of all axes: every factorisation, experts never repeated in one."""
  experts, divisors = config.model.num_experts or 1, sharding.divisors
  for fsdp in divisors(devices):
    for expert in divisors(math.gcd(devices // fsdp, experts)):
      for model in divisors(devices // fsdp // expert):
        yield sharding.mesh_sizes(
          devices, experts, fsdp=fsdp, expert=expert, model=model
        )


def variants(config: Config, sizes: dict[str, int]) -> Iterator[Config]:
  """Dispatchers, group sizes, microbatches and what to compute again."""
  for dispatcher, parts, remat in itertools.product(
    DISPATCHERS, MICROBATCHES, REMAT
  ):
    model = config.model.with_moe(dispatcher=Part(dispatcher))
    model = dataclasses.replace(model, remat=remat)
    changed = dataclasses.replace(config, model=model, microbatches=parts)
    yield from _with_groups(changed, sizes)


def _with_groups(config: Config, sizes: dict[str, int]) -> Iterator[Config]:
  """Its own groups, or the largest that lie within a device; shares of them.

  Smaller ones drop more tokens, and only `mask` pays for large ones.
  """
  shards = math.prod(n for axis, n in sizes.items() if axis != 'model')
  shares = SHARES if config.model.moe.dispatcher.name == 'mask' else (1,)
  for share in shares:
    stacks = {}
    for stack, size, tokens in sizes_lib.groups(config):
      whole = sharding.divisors(max(tokens // shards, 1))
      size = max(1, max(n for n in whole if n <= size) // share)
      of_stack = dataclasses.replace(config.model.stack(stack), group_size=size)
      stacks[stack] = of_stack
    if share == 1 or all(s.group_size >= SMALLEST for s in stacks.values()):
      model = dataclasses.replace(config.model, **stacks)
      yield dataclasses.replace(config, model=model)


def fitting(
  given: Config, ranked: list[Candidate], chip: Chip, count: int
) -> Iterator[tuple[Candidate, cost.Cost]]:
  """The first `count` that fit the memory of `chip`, one for each mesh."""
  seen, too_large = set(), set()
  for candidate in ranked:
    mesh, config = tuple(candidate.sizes.values()), candidate.config
    way = mesh, config.microbatches, config.model.remat
    # `index` comes before what needs more.
    if mesh in seen or way in too_large:
      continue
    if config.model.moe.dispatcher.name != 'mask':
      # Only its memory depends on groups, and each group is to be traced.
      config = dataclasses.replace(config, model=_groups_of(given, config))
    if found := cost.fitting(config, candidate.sizes, chip, candidate.work):
      seen.add(mesh)
      yield candidate, found
      if len(seen) == count:
        return
    else:
      too_large.add(way)


def _groups_of(given: Config, config: Config):
  stacks = {name: given.model.stack(name) for name in given.model.stacks}
  return dataclasses.replace(config.model, **stacks)
