"""What is to conform: entries of tables and configs of methods, and no names.

A mechanism enters by its line in a table and by its config.
"""

import dataclasses
import functools
import inspect

from st_moe import about, config_file, schedules
from st_moe.config import Config, ModelConfig, MoEConfig, Part
from st_moe.config import options as options_of
from st_moe.model import parts
from st_moe.train.after import AFTER

TABLES = {**parts.TABLES, 'after': AFTER, 'schedule': schedules.SCHEDULES}
METHODS = {path.stem: path for path in config_file.methods()}
BASE = 'st_moe_tiny'

# Of every tiny model: 8 rows are 4 groups in each stack.
ROWS, LENGTHS = 8, (8, 6)
GROUPS = 2 * LENGTHS[0], 2 * LENGTHS[1]


@functools.cache
def config(name: str) -> Config:
  """The config `name` of a method, its `base`, or the base of all, tiny."""
  name, _, arg = name.partition(':')
  file = METHODS.get(name, f'configs/{name}.py')
  arg = ','.join(filter(None, [arg, 'runlocal']))
  return tiny(config_file.load(f'{file}:{arg}'))


def tiny(config: Config) -> Config:
  """Width 16, 64 words, two layers a stack, both of them sparse, in a scan."""
  model, data = config.model, config.data
  stack = lambda of, size: (
    of
    and dataclasses.replace(
      of, num_layers=2, sparse_every=1, sparse_offset=0, group_size=size
    )
  )
  model = dataclasses.replace(
    model,
    vocab_size=64,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    encoder=stack(model.encoder, GROUPS[0]),
    decoder=stack(model.decoder, GROUPS[1]),
    dtype='float32',
  )
  data = dataclasses.replace(
    data,
    batch_size=ROWS,
    inputs_length=LENGTHS[0],
    targets_length=LENGTHS[1],
  )
  rate = dataclasses.replace(
    config.optimizer, warmup_steps=0, min_dim_to_factor=8
  )
  return dataclasses.replace(config, model=model, data=data, optimizer=rate)


@dataclasses.dataclass(frozen=True)
class Case:
  """An entry of a table with options, in the place of a config that has it."""

  kind: str
  part: Part
  of: str  # That config.
  stack: str = 'encoder'

  def __str__(self) -> str:
    said = ','.join(f'{k}={_short(v)}' for k, v in self.part.options)
    return f'{self.kind} {self.part.name}' + (f'({said})' if said else '')

  @property
  def entry(self):
    return TABLES[self.kind][self.part.name]

  @property
  def made(self):
    """The entry, its options bound."""
    if self.kind in parts.TABLES:
      return parts.choose(self.kind, self.part)
    return self.part.choose(self.kind, TABLES[self.kind])

  @property
  def about(self) -> about.About:
    return about.of(self.made)

  @property
  def model(self) -> ModelConfig:
    return config(self.of).model

  @property
  def moe(self) -> MoEConfig:
    """Of the layer it stands in."""
    return self.model.moe_of(self.stack)

  def at(self, **options) -> 'Case':
    """The same with other options."""
    part = Part.of(self.part.name, **{**self.part.kwargs, **options})
    return dataclasses.replace(self, part=part)


def _short(value) -> str:
  return value.name if isinstance(value, Part) else f'{value}'


def uses(name: str) -> list[Case]:
  """Every part of a config, inner ones too, without what only it is told."""
  found, whole = [], config(name)
  for stack in whole.model.stacks:
    if whole.model.plan(stack).num_sparse:
      for kind, part in parts.of(whole.model.moe_of(stack)):
        found.append(Case(kind, part, name, stack))
  found += [Case('after', p, name) for p in whole.optimizer.after]
  cases = []
  for case in found:
    if case.part.name not in TABLES[case.kind]:
      continue  # `parts.check` says so, in a test of its own.
    known = options_of(case.entry)
    kept = {k: v for k, v in case.part.options if k in known}
    cases.append(
      dataclasses.replace(case, part=Part.of(case.part.name, **kept))
    )
    cases += [
      Case('schedule', v, name)
      for _, v in case.part.options
      if isinstance(v, Part) and v.name in schedules.SCHEDULES
    ]
  return [*dict.fromkeys(cases)]


def variants(name: str) -> list[str]:
  """A method's config, and the same with each of its own arguments switched."""
  arguments = config_file.arguments(METHODS[name])
  changes = {'False': [''], '0': ['=2']}
  found = [name]
  for argument, default in arguments.items():
    found += [f'{name}:{argument}{v}' for v in changes.get(default, [])]
  return found


@functools.cache
def every_config() -> tuple[str, ...]:
  return (BASE, *(each for name in METHODS for each in variants(name)))


@functools.cache
def cases() -> tuple[Case, ...]:
  """Every entry with its defaults, and as each config has it.

  What has no default is as the first config that has the entry says.
  """
  every = [case for name in every_config() for case in uses(name)]
  found = {}
  for kind, table in TABLES.items():
    for name, entry in table.items():
      mine = [c for c in every if (c.kind, c.part.name) == (kind, name)]
      first = mine[0] if mine else Case(kind, Part(name), BASE)
      for case in [bare(first, entry), *mine]:
        found.setdefault((kind, case.part), case)
  return tuple(found.values())


# Where no config says them.
_GUESSES = {'start': 2.0, 'end': 0.5, 'steps': 4}
_GUESSES |= {'values': (2.0, 1.0, 0.5), 'at': (2, 4)}


def bare(case: Case, entry) -> Case:
  """`case` with the options alone that have no default."""
  parameters = inspect.signature(entry).parameters
  given = {
    name: case.part.kwargs.get(name, _GUESSES.get(name, 2))
    for name in options_of(entry)
    if parameters[name].default is inspect.Parameter.empty
  }
  return dataclasses.replace(case, part=Part.of(case.part.name, **given))


def of(*kinds: str) -> list[Case]:
  return [case for case in cases() if case.kind in kinds]


def entries() -> list[Case]:
  """One of each entry that comes from the literature."""
  found = {}
  for case in cases():
    if about.of(case.entry).paper:
      found.setdefault((case.kind, case.part.name), case)
  return [*found.values()]


def is_used(case: Case) -> bool:
  """Whether a config has this entry: of a method, if asked so, or the base."""
  same = lambda c: (c.kind, c.part.name) == (case.kind, case.part.name)
  return any(same(c) for name in every_config() for c in uses(name))
