"""`st-moe grid`: one config under all combinations of some fields, one table.

Every cell is a run in a directory of its own, so a grid that was stopped goes
on where it was, and a field may be given more values later.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from st_moe import hosts, signals, stdio, terminal
from st_moe.config import Config, unknown
from st_moe.data import files
from st_moe.history import best_steps, read_rows
from st_moe.run import begin, loop, owner

Cell = dict[str, str]  # Field -> value, as on a command line.


def cells(vary: Sequence[str]) -> list[Cell]:
  """All combinations of 'FIELD=a,b' and 'FIELD+FIELD=a+x,b+y'.

  Fields joined by + change together; 'config' is the file. Commas and plusses
  within brackets part nothing.

  Raises:
    ValueError: no values, or not one for each field.
  """
  axes = []
  for text in vary:
    names, equals, values = text.partition('=')
    fields = names.split('+')
    axis = [_parted(value, '+') for value in _parted(values, ',')]
    if not equals or any(len(a) != len(fields) for a in axis):
      raise ValueError(
        f'--vary={text}: write FIELD=a,b, or FIELD+FIELD=a+x,b+y for fields'
        ' that change together.'
      )
    axes.append([dict(zip(fields, a, strict=True)) for a in axis])
  found = [
    {k: v for part in parts for k, v in part.items()}
    for parts in itertools.product(*axes)
  ]
  names = [directory(cell) for cell in found]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f'--vary makes two cells {name!r}.')
  return found


def _parted(text: str, sign: str) -> list[str]:
  """`text` at each `sign` outside of brackets."""
  parts, depth = [''], 0
  for letter in text:
    depth += (letter in '([{') - (letter in ')]}')
    if letter == sign and depth == 0:
      parts.append('')
    else:
      parts[-1] += letter
  return parts


def directory(cell: Cell) -> str:
  """'optimizer.train=moe,seed=1'; of a path its last part."""
  last = lambda field: '.'.join(field.split('.')[-2:])

  def base(value):
    if value.startswith(('{', '[', '(')):  # Several, which may hold paths.
      return value.replace('/', '_')
    return value.rstrip('/').rpartition('/')[2]

  return ','.join(f'{last(k)}={base(v)}' for k, v in cell.items())


def run(
  make: Callable[[Cell], Config],
  vary: Sequence[str],
  workdir,
  *,
  metrics: Sequence[str] = (),
  config_path: str = '',
  modules: Sequence[str] = (),
) -> None:
  """Trains every cell that is not finished; writes grid.json and grid.md.

  Args:
    make: the config of a cell.
    metrics: columns of the table; none: the average of SuperGLUE, or else all
      accuracies there are.
    modules: as of `loop.train`.

  Raises:
    ValueError: a cell has no valid config or measures no such metric (before
      anything is trained), or some could not be trained (after all others were;
      of several processes, at once).
  """
  if not os.fspath(workdir):
    raise ValueError('The workdir is empty: name a folder for the grid.')
  workdir = epath.Path(workdir).expanduser()
  wanted = cells(vary)
  configs = [make(cell) for cell in wanted]
  hosts.agreed(lambda: _check_free(workdir))
  with stdio.lasting(), signals.orderly(), owner.held(workdir):
    if metrics:
      _check_metrics(metrics, wanted, configs, workdir)
    about = {'modules': modules} if modules else {}
    _run(wanted, configs, workdir, metrics, config_path, about)


def _check_metrics(metrics, wanted, configs, workdir: epath.Path) -> None:
  known = {}  # By what they depend on; cells may have a lot in common.
  for cell, config in zip(wanted, configs, strict=True):
    key = repr((config.data, config.evaluate, config.init))
    if key not in known:
      known[key] = begin.metric_names(config, workdir / directory(cell))
    for metric in metrics if known[key] else ():
      if metric not in known[key]:
        raise unknown('metric', metric, known[key])


def _run(wanted, configs, workdir, metrics, config_path, about) -> None:
  failed = {}
  for number, (cell, config) in enumerate(zip(wanted, configs, strict=True)):
    name = directory(cell)
    hosts.tell(f'cell {number + 1} of {len(wanted)}: {name}')
    try:
      path = cell.get('config', config_path)
      loop.train(config, workdir / name, config_path=path, **about)
    except ValueError as e:
      if hosts.count() > 1:  # Did it fail on all of them?
        raise
      failed[name] = str(e)
      terminal.say(f'{name} failed: {e}')
    jax.clear_caches()  # Each cell compiles its own steps.
    if hosts.first():
      _tell(wanted[: number + 1], workdir, metrics, failed)
  if failed:
    raise ValueError(f'{len(failed)} cells failed: {", ".join(failed)}.')


def _check_free(workdir: epath.Path) -> None:
  """Raises where files that no grid wrote have names of ours."""
  every, table = {'cells', 'table', 'failed'}, workdir / 'grid.json'
  files.check_free(table, lambda p: every <= files.json_in(p).keys())
  files.check_free(workdir / 'grid.md', lambda _: table.exists())


def _tell(done: list[Cell], workdir: epath.Path, metrics, failed) -> None:
  measured = {
    directory(cell): _measured(workdir / directory(cell))
    for cell in done
    if directory(cell) not in failed
  }
  if not measured:
    return
  metrics = metrics or _columns(measured)
  rows = summary(done, measured, metrics)
  about = {'cells': measured, 'table': rows, 'failed': failed}
  write = lambda name, text: files.write_whole(workdir / name, text.encode())
  write('grid.json', files.as_json(about, indent=2))
  text = markdown(rows)
  write('grid.md', text)
  terminal.say(text)


def _measured(workdir: epath.Path) -> dict:
  """Of one run: its best and last scores, and the tokens dropped."""
  rows = read_rows(workdir)
  is_score = lambda key: key.startswith('eval/')
  by_step = {
    r['step']: {k: float(v) for k, v in r.items() if is_score(k)}
    for r in rows
    if any(map(is_score, r))
  }
  last = max(by_step, default=None)
  steps = [r for r in rows if 'loss' in r]
  dropped = [
    float(v)
    for r in steps
    for k, v in r.items()
    if k.endswith('/dropped_tokens')
  ]
  return {
    'best': best_steps(by_step),
    'last': by_step.get(last, {}),
    'dropped_tokens': float(np.mean(dropped)) if dropped else None,
    'train_loss': float(steps[-1]['loss']) if steps else None,
  }


def _columns(measured: Mapping[str, dict]) -> list[str]:
  names = {n for run in measured.values() for n in run['best']}
  averages = [n for n in names if n.endswith('/average')]
  found = averages or [n for n in names if n.endswith('accuracy')]
  return sorted(n for n in found if 'decoded_' not in n)


def summary(
  done: Sequence[Cell], measured: Mapping[str, dict], metrics: Sequence[str]
) -> list[dict[str, str]]:
  """A row for each combination, over all of its seeds: mean and spread.

  Scores are the best of a run, as the paper reports them (its peaks). What a
  seed changes in all rows alike is not in the differences from the first row,
  which are taken seed by seed.
  """
  seeded = lambda field: field.split('.')[-1] == 'seed'
  groups = {}
  for cell in done:
    key = tuple((f, v) for f, v in cell.items() if not seeded(f))
    seed = tuple(v for f, v in cell.items() if seeded(f))
    if directory(cell) in measured:
      groups.setdefault(key, {})[seed] = measured[directory(cell)]
  several = len(groups) > 1 and any(map(seeded, done[0]))
  rows, first = [], {}
  for key, by_seed in groups.items():
    runs = list(by_seed.values())
    row = dict(key) | {'runs': str(len(runs))}
    for metric in metrics:
      values = {
        seed: run['best'][metric][1]
        for seed, run in by_seed.items()
        if metric in run['best']
      }
      if not values:
        raise unknown('metric', metric, runs[0]['best'])
      digits = 3 if metric.endswith('/loss') else 2
      row[metric] = _spread(list(values.values()), digits)
      if several:
        base = first.setdefault(metric, values)
        same = [values[s] - base[s] for s in values if s in base]
        told = base is not values and same
        row[f'{metric}, less row 1'] = _spread(same, digits) if told else ''
    row['train loss'] = _spread([r['train_loss'] for r in runs], 3)
    dropped = [r['dropped_tokens'] for r in runs]
    row['dropped'] = '' if None in dropped else f'{np.mean(dropped):.1%}'
    rows.append(row)
  return rows


def _spread(values: Sequence[float], digits: int = 2) -> str:
  mean = f'{np.mean(values):.{digits}f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {np.std(values, ddof=1):.{digits}f}'


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
  """A table as Markdown has it."""
  line = lambda cells: f'| {" | ".join(cells)} |\n'
  head = list(rows[0])
  return (
    line(head)
    + line('---' for _ in head)
    + ''.join(line(row.values()) for row in rows)
  )
