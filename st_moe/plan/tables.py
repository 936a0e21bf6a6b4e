"""A plan for people: tables of what it costs, and what of that decides."""

from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table

from st_moe import counts, terminal
from st_moe.config import Config
from st_moe.plan import cost, search
from st_moe.plan.chips import Chip
from st_moe.plan.topology import Compiled

_GIB, _G = 2**30, 1e9


def count(config: Config) -> dict:
  """Parameters by role, those a token meets, and forward FLOPs."""
  roles = cost.count_params(config)
  total = sum(roles.values())
  table = _table('parameters', 'count', 'share', title=config.name)
  for role, n in sorted(roles.items(), key=lambda item: -item[1]):
    table.add_row(role, f'{n:,}', f'{n / total:.1%}')
  table.add_section()
  table.add_row('all', f'{total:,}', f'{total / 1e9:,.3f}B')
  active = cost.active_params(config)
  table.add_row('met by a token', f'{active:,}', f'{active / total:.1%}')
  if config.paper_params:
    paper = config.paper_params
    table.add_row('its paper', f'{paper:,.0f}', f'{total / paper - 1:+.2%}')
  console = terminal.console()
  console.print(table)
  data = config.data
  flops = counts.forward_flops(
    config.model, data.inputs_length, data.targets_length
  )
  console.print(
    f'{flops:.4g} forward FLOPs for {data.inputs_length} input and'
    f' {data.targets_length} target tokens, {3 * flops:.4g} in training'
  )
  return {
    'parameters': roles,
    'all': total,
    'met_by_a_token': active,
    'forward_flops': flops,
  }


def estimated(
  found: cost.Cost,
  chip: Chip,
  sizes: Mapping[str, int],
  title: str,
  notes: Iterable[str] = (),
) -> None:
  """What arithmetic says of one mesh, for each device."""
  console = terminal.console()
  table = _table(
    'held by a device', 'GiB', f'of {_gib(chip.memory)}', title=title
  )
  for name, size in {**found.state, **found.step}.items():
    if size:
      table.add_row(name, _gib(size), f'{size / chip.memory:.0%}')
  table.add_section()
  table.add_row('at once', _gib(found.peak), f'{found.peak / chip.memory:.0%}')
  console.print(table)
  table = _table('done by a device in a step', 'amount', 'ms at best')
  seconds = cost.seconds(found.work, chip, sizes)
  for part, flops in found.work.flops.items():
    if flops:
      table.add_row(part, f'{flops / _G:,.1f} GFLOP', _ms(flops / chip.flops))
  table.add_section()
  flops = sum(found.work.flops.values())
  table.add_row(
    'all products', f'{flops / _G:,.1f} GFLOP', _ms(seconds.products)
  )
  traffic = f'{found.work.traffic / _G:,.1f} GB'
  table.add_row('memory read and written', traffic, _ms(seconds.memory))
  for e in found.work.exchanges:
    rate = chip.rate(e.axes, sizes)
    name = f'{e.kind} along {" x ".join(e.axes)}, {e.count:g} times'
    table.add_row(name, f'{e.sent / _G:,.2f} GB', _ms(e.sent / rate))
  console.print(table)
  console.print(said(found.work, chip, sizes))
  for note in notes:
    console.print(note)


def said(work: cost.Work, chip: Chip, sizes: Mapping[str, int]) -> str:
  """The roofline of a step in a sentence."""
  seconds = cost.seconds(work, chip, sizes)
  return (
    f'A step takes at best {_ms(seconds.step)} ms'
    f' ({work.ideal / chip.flops / seconds.step:.0%} of the peak FLOPs, not'
    ' counting what is computed again), and'
    f' {_ms(seconds.worst)} ms where nothing goes on beside anything else.'
  )


def ranked(
  found: Iterable[tuple[search.Candidate, cost.Cost]], chip: Chip
) -> None:
  """Meshes, the fastest first: how to run on each, and what decides."""
  ways = _table(
    *('', 'mesh', 'dispatcher', 'groups', 'micro-\nbatches', 'remat'),
    title='how to train, the fastest first',
  )
  ways.columns[1].justify = 'left'
  times = _table(
    *('', 'at best', 'products', 'memory', 'weights', 'tokens', 'alone'),
    *('MFU', f'GiB of {_gib(chip.memory)}'),
    title='ms a step',
  )
  for n, (candidate, held) in enumerate(found, 1):
    config, seconds = candidate.config, candidate.seconds
    model = config.model
    ways.add_row(
      str(n),
      mesh_name(candidate.sizes),
      model.moe.dispatcher.name,
      ' '.join(str(model.stack(s).group_size) for s in model.stacks),
      str(config.microbatches),
      model.remat,
    )
    parts = (seconds.step, seconds.products, seconds.memory)
    parts += seconds.weights, seconds.tokens, seconds.worst
    ideal = candidate.work.ideal / chip.flops
    times.add_row(
      str(n),
      *map(_ms, parts),
      f'{ideal / seconds.step:.0%}',
      _gib(held.peak),
    )
  console = terminal.console()
  console.print(ways, '', times, sep='\n')
  console.print(
    'ms at best: the longest of products, memory and exchanged weights, and'
    ' tokens on their way to experts and heads; alone: nothing beside anything.'
  )


def mesh_name(sizes: Mapping[str, int]) -> str:
  """'fsdp=2 expert=64'."""
  big = (f'{axis}={n}' for axis, n in sizes.items() if n > 1)
  return ' '.join(big) or 'one device'


def compiled(found: Compiled, chip: Chip, title: str) -> None:
  """What the compiler says beside what arithmetic does, for each device."""
  console, by = terminal.console(), found.expected
  table = _table(
    '', 'compiler', 'arithmetic', 'difference', 'ms at best', title=title
  )
  state, step = sum(by.state.values()), sum(by.step.values())
  memory = found.memory
  for name, size, expected in (
    ('arguments', memory['arguments'], state),
    ('beside them', memory['peak'] - memory['arguments'], step),
    ('peak memory', memory['peak'], by.peak),
  ):
    row = _beside(size, expected, _GIB)
    share = f'{size / chip.memory:.0%} of the chip'
    table.add_row(f'{name}, GiB', *row, share)
  table.add_section()
  sent = sum(e.sent for e in found.exchanges)
  sums = by.work
  for name, amount, expected, unit, rate in (
    ('products', found.flops, sum(sums.flops.values()), 'GFLOP', chip.flops),
    ('read and written', found.bytes, sums.traffic, 'GB', chip.bandwidth),
    ('sent', sent, sum(e.sent for e in sums.exchanges), 'GB', chip.link),
  ):
    row = _beside(amount, expected, _G)
    table.add_row(f'{name}, {unit}', *row, _ms(amount / rate))
  console.print(table)
  table = _table('exchange', 'along', 'times', 'GB sent', 'by arithmetic')
  table.columns[1].justify = 'left'
  known = {(e.kind, e.axes): e for e in sums.exchanges}
  for e in found.exchanges:
    expected = known.pop((e.kind, e.axes), None)
    row = f'{e.count}', f'{e.sent / _G:.3f}'
    expected = f'{expected.sent / _G:.3f}' if expected else ''
    table.add_row(e.kind, ' x '.join(e.axes), *row, expected)
  for e in known.values():
    row = e.kind, ' x '.join(e.axes), '', '', f'{e.sent / _G:.3f}'
    table.add_row(*row)
  console.print(table)
  for warning in found.warnings:
    console.print(warning)
  console.print(f'compiled in {found.seconds:.0f} s')


def _table(*heads: str, title: str | None = None) -> Table:
  # Without lines between columns there is room for all in 80 characters, and
  # what is longer goes on below.
  table = Table(
    title=title,
    title_justify='left',
    box=box.SIMPLE,
    padding=(0, 1, 0, 0),
    pad_edge=False,
    show_edge=False,
  )
  for i, head in enumerate(heads):
    justify = 'right' if i else 'left'
    table.add_column(head, justify=justify, overflow='fold')
  return table


def _gib(size: float) -> str:
  return f'{size / _GIB:,.2f}'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:,.{1 if seconds >= 1e-3 else 3}f}'


def _beside(measured: float, expected: float, unit: float):
  """('1.25', '1.20', '-4.0%')."""
  return (
    f'{measured / unit:,.2f}',
    f'{expected / unit:,.2f}',
    f'{expected / measured - 1:+.1%}' if measured else '',
  )
