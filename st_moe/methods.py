"""The mechanisms of the literature that are here: `st-moe methods`.

All of it is read from their tables, what they say of themselves, the configs
that have them and the experiments.
"""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
import textwrap
from collections.abc import Callable

from st_moe import about, config_file, fields
from st_moe.config import Config, Part
from st_moe.config import options as options_of
from st_moe.model import parts
from st_moe.shipped import folder
from st_moe.train.after import AFTER

# Field of a config -> the table it chooses from.
PLACES = {
  **{f'model.moe.{field}': table for field, table in parts.TABLES.items()},
  'optimizer.after': AFTER,
}
_EXPERIMENTS = folder('experiments')
_WIDTH, _WIDE = 80, 90  # Of a card, and of the table with papers.


@dataclasses.dataclass(frozen=True)
class Method:
  """A line of a table, and what a config makes of it."""

  place: str  # 'model.moe.selector'.
  name: str
  made: Callable
  row: str
  paper: str
  config: str = ''  # Of configs/methods, 'gshard'.
  part: Part | None = None  # As it is there.

  @property
  def source(self) -> str:
    """What it comes from: its row, or else its paper."""
    return self.row or self.paper

  @property
  def kind(self) -> str:
    return {'losses': 'loss'}.get(field := self.place.split('.')[-1], field)

  @property
  def about(self) -> about.About:
    """What it says of itself, with the options of its config."""
    given = self.part.kwargs if self.part else {}
    known = options_of(self.made)
    mine = {name: value for name, value in given.items() if name in known}
    return about.of(functools.partial(self.made, **mine))

  @property
  def summary(self) -> str:
    return (inspect.getdoc(self.made) or '').partition('\n')[0]


def entries() -> list[Method]:
  """All of all tables by row, and rows that are options of others' entries."""
  found = []
  for place, table in PLACES.items():
    for name, made in table.items():
      said = about.of(made)
      method = Method(place, name, made, said.row, said.paper)
      mine = [
        dataclasses.replace(method, config=config.name, part=part)
        for config in _configs().values()
        for where, part in config.parts
        if (where, part.name) == (place, name)
        if config.source == method.source
      ]
      mine += [  # Which has it where its argument says so.
        dataclasses.replace(method, config=config.name)
        for config in _configs().values()
        if config.source == method.source and name in config.words
      ]
      found.append(mine[0] if mine else method)
  sources = {method.source for method in found}
  for config in _configs().values():
    for place, part in config.parts if config.source not in sources else ():
      made, said = PLACES[place][part.name], (config.row, config.paper)
      found.append(Method(place, part.name, made, *said, config.name, part))
  order = lambda m: (not m.row, not m.paper, m.row, m.paper)
  return sorted(found, key=order)


@dataclasses.dataclass(frozen=True)
class _Config:
  """A config of a method, and what of the tables it has beside its base."""

  name: str
  row: str
  paper: str
  parts: tuple[tuple[str, Part], ...]
  words: frozenset[str]  # Of its file.

  @property
  def source(self) -> str:
    return self.row or self.paper


@functools.cache
def _configs() -> dict[str, _Config]:
  """By name; a docstring begins 'GShard (S1-18, arXiv:2006.16668): ...'."""
  found = {}
  for path in config_file.methods():
    said = re.search(r'\((?:(S\d-\d\d), )?([^);,]*)', config_file.summary(path))
    row, paper = said.groups('') if said else ('', '')
    whole, base = (
      _parts(config_file.load(f'{path}{arg}')) for arg in ('', ':base')
    )
    own = tuple(part for part in dict.fromkeys(whole) if part not in base)
    words = frozenset(re.findall(r'\w+', path.read_text()))
    found[path.stem] = _Config(path.stem, row, paper, own, words)
  return found


def _parts(config: Config) -> list[tuple[str, Part]]:
  """(place, part) of everything that a config has of the tables."""
  model = config.model
  sparse = [s for s in model.stacks if model.plan(s).num_sparse]
  of = (each for stack in sparse for each in parts.of(model.moe_of(stack)))
  found = [(f'model.moe.{field}', part) for field, part in of]
  return found + [('optimizer.after', part) for part in config.optimizer.after]


COLUMNS = 'row', 'name', 'paper', 'kind', 'causal', 'noisy', 'config', 'shown'


def table() -> list[tuple[str, ...]]:
  """A line of `COLUMNS` for each entry that comes from the literature."""
  say = lambda value: 'yes' if value else 'no'
  return [
    (
      m.row or '-',
      m.name,
      m.paper.removeprefix('arXiv:').removeprefix('https://').split('/')[0],
      m.kind,
      say(m.about.causal),
      say(m.about.noisy),
      m.config,
      experiments().get(m.config, {}).get('shown', ''),
    )
    for m in entries()
    if m.paper
  ]


@functools.cache
def experiments() -> dict[str, dict[str, str]]:
  """Config -> its row of experiments/methods.md, by the heads of columns.

  'shown' says whether a claim showed there: 'yes', 'no', 'in part', 'not yet'.
  """
  page = _EXPERIMENTS / 'methods.md'
  if not page.exists():  # Installed without it.
    return {}
  lines = page.read_text().splitlines()
  cells = [
    [cell.strip() for cell in line.strip('|').split(' | ')]
    for line in lines
    if line.startswith('| ') and not line.startswith('| ---')
  ]
  heads, *rows = cells
  found = [dict(zip(heads, row, strict=True)) for row in rows]
  return {row['config']: row for row in found}


def listed(width: int = 0) -> str:
  """`table` for a terminal; a row is named once.

  Args:
    width: of the terminal; where it is narrow, papers are left to the cards.
  """
  rows = [COLUMNS, *table()]
  if 0 < width < _WIDE:
    rows = [row[:2] + row[3:] for row in rows]
  sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines, last = [], ''
  for row in rows:
    words = ['' if row[0] == last else row[0], *row[1:]]
    padded = (w.ljust(size) for w, size in zip(words, sizes, strict=True))
    lines.append(' '.join(padded).rstrip())
    last = row[0]
  return '\n'.join(
    [
      *lines,
      '',
      'Kinds are fields of config.model.moe, `after` of config.optimizer; what',
      'was shown of a claim, and how, is in experiments/methods.md.',
      '`st-moe methods NAME` shows one: a row, a name or a config.',
    ]
  )


# One of them.


def cards(name: str) -> list[str]:
  """The cards of an entry, of a row ('S0-14') or of a config.

  Raises:
    ValueError: nothing is called so.
  """
  name = pathlib.PurePath(name).stem if name.endswith('.py') else name
  every = entries()
  found = [m for m in every if name in (m.name, m.row, m.config)]
  if not found and name in _configs():  # All it has is named by others.
    return [_claim(name)]
  if not found:
    known = {word for m in every for word in (m.name, m.row) if word}
    raise fields.unknown('method', name, known | {*_configs()})
  return [_card(method) for method in found]


def _card(method: Method) -> str:
  """All that is said of an entry, in paragraphs."""
  said = method.about
  facts = {
    ', '.join(filter(None, [method.row, method.paper])): method.paper,
    f'config.{method.place}': True,
    'a token hears of later ones': not said.causal,
    'draws numbers in training': said.noisy,
    f'keeps {_words(said.keeps)} from step to step': said.keeps,
    f'reads the {_words(said.needs)} of a token': said.needs,
    'takes a batch in one piece': said.whole or said.joins,
  }
  if isinstance(said.neutral, dict) and said.neutral:
    options = (f'{name}={value}' for name, value in said.neutral.items())
    facts[f'changes nothing at {", ".join(options)}'] = True
  told = '; '.join(text for text, holds in facts.items() if holds)
  options = [_fill(line) for line in _options(method.made)]
  return '\n\n'.join(
    [
      _fill(f'{method.name}: {told}.'),
      *filter(None, [inspect.getdoc(method.made)]),
      *(['\n'.join(['Options:', *options])] if options else []),
      *([_claim(method.config)] if method.config else []),
      *_verdicts(method),
    ]
  )


def _words(names) -> str:
  return ', '.join(n if isinstance(n, str) else n[0] for n in names)


def _fill(text: str) -> str:
  return textwrap.fill(text, _WIDTH, subsequent_indent='    ')


def _options(made: Callable) -> list[str]:
  """'  rate: a float, at least 0 and finite; 0.001'."""
  parameters, found = inspect.signature(made).parameters, []
  for name, hint in options_of(made).items():
    rule = ', or '.join(map(fields.described, fields.alternatives(hint)))
    default = parameters[name].default
    needed = default is inspect.Parameter.empty
    value = 'needed' if needed else default
    found.append(f'  {name}: {rule}; {value}')
  return found


def _claim(config: str) -> str:
  """What the docstring of a config of configs/methods says."""
  (path,) = (p for p in config_file.methods() if p.stem == config)
  text = ast.get_docstring(ast.parse(path.read_text())) or ''
  return f'configs/methods/{config}.py:\n\n{text}'


def _verdicts(method: Method) -> list[str]:
  """Of experiments whose heading has its row, or `name` or `config` so."""
  names = [method.row, f'`{method.name}`', f'`{method.config}`']
  found = []
  if row := experiments().get(method.config):
    told = '{compared}: {figures}. Claim: {claim}. Shown: {shown}.'
    found.append(_fill(f'Experiment. {told.format(**row)}'))
  for path in sorted(_EXPERIMENTS.glob('*.md')):
    for entry in re.split(r'^## ', path.read_text(), flags=re.MULTILINE)[1:]:
      heading, _, rest = entry.partition('\n')
      said = rest.partition('*Verdict.*')[2].partition('\n\n')[0]
      if said and any(name.strip('`') and name in heading for name in names):
        found.append(_fill(f'{heading}: {" ".join(said.split())}'))
  return found
