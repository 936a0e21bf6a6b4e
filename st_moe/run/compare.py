"""`st-moe report`: finished runs side by side, from the files they wrote."""

import fnmatch
import os
import typing

import numpy as np
from etils import epath

from st_moe import terminal
from st_moe.config import unknown
from st_moe.data import files
from st_moe.history import best_steps, read_rows

if typing.TYPE_CHECKING:
  from st_moe.analysis.figures import Picture

_MARK = 'st-moe report'  # In pictures that may be drawn anew.


def compare(workdirs: list[str], *, baseline: str = '') -> None:
  """Prints what each stage did and how its tasks were answered.

  Args:
    workdirs: of runs, in order.
    baseline: of a run fine-tuned alike from random parameters.
  """
  console = terminal.console()
  paths = [*workdirs, *filter(None, [baseline])]
  runs = [_Run(*each) for each in zip(paths, _names(paths), strict=True)]
  stages = _table('Stages', ['run'], _STAGE)
  for run in runs:
    stages.add_row(*run.stage())
  console.print(stages)

  losses = _table(
    'Losses (validation)', ['run', 'source'], ['first', 'last', 'best at step']
  )
  for run in runs:
    for name in run.scores:
      if name.endswith('/loss'):
        losses.add_row(run.name, name.split('/')[1], *run.losses(name))
  if losses.row_count:
    console.print(losses)

  scratch = runs[-1].scores if baseline else {}
  untrained = ['untrained'] * bool(baseline)
  several = ['run'] * (len(workdirs) > 1)
  columns = 'examples', 'majority', *untrained, 'ours', 'best at step'
  tasks = _table('Tasks (validation)', [*several, 'task', 'metric'], columns)
  for run in runs[: len(workdirs)]:
    for name, value in run.scores.items():
      task, metric = name.split('/')[1:]
      majority = f'eval/{task}/majority_{metric.removeprefix("decoded_")}'
      if metric == 'loss' or majority not in run.scores:
        continue
      score = lambda found, key: f'{found[key]:.1f}' if key in found else ''
      tasks.add_row(
        *([run.name] if several else []),
        task,
        metric,
        score(run.scores, f'eval/{task}/examples').removesuffix('.0'),
        score(run.scores, majority),
        *([score(scratch, name)] if baseline else []),
        f'{value:.1f}',
        run.best(name),
      )
  if tasks.row_count:
    console.print(tasks)
  console.print('Files:')
  for run in runs:
    console.print(f'  {run.workdir}: {run.files()}')


_STAGE = (
  *('steps', 'tokens/s', 'loss first', 'loss last'),
  *('load of even', 'dropped'),  # From the emptiest expert to the fullest.
)


def _table(title: str, names, numbers):
  """A table that cuts nothing: where it is too wide, names go on below."""
  from rich import box
  from rich.table import Table

  table = Table(title=title, box=box.SIMPLE, padding=0)
  for column in names:
    table.add_column(column, overflow='fold')
  for column in numbers:
    table.add_column(column, no_wrap=True)
  return table


def _names(workdirs: list[str]) -> list[str]:
  """As much of the end of each path as tells it from the others."""
  parts = [os.fspath(epath.Path(w).resolve()).split('/') for w in workdirs]

  def name(own):
    others = [p for p in parts if p != own]
    for start in reversed(range(len(own))):
      end = own[start:]
      if all(p[-len(end) :] != end for p in others):
        break
    return '/'.join(end)

  return [name(own) for own in parts]


def draw_curves(workdirs: list[str], path: str) -> None:
  """Draws validation loss over steps, a panel per source, a line per run.

  Args:
    path: where to; its ending says how: .png, .svg, .pdf.

  Raises:
    ValueError: an unknown ending, or a file there that we did not draw.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  endings = FigureCanvasAgg(Figure()).get_supported_filetypes()
  ending = path.rpartition('.')[2]
  if ending not in endings:
    raise unknown('kind of picture', ending, endings)
  files.check_free(path, lambda p: _MARK.encode() in p.read_bytes())
  figure = curves(workdirs)
  signed = {'png': 'Software', 'svg': 'Creator', 'pdf': 'Creator'}
  signature = {signed[ending]: _MARK} if ending in signed else None
  with files.appearing(path) as temp:
    figure.savefig(temp, format=ending, dpi=100, metadata=signature)
  terminal.say(f'wrote {path}')


def curves(
  workdirs: list[str],
  metrics: str = 'eval/*/loss',
  label: str = 'validation loss, nats per target token',
) -> 'Picture':
  """Metrics over steps as a picture: a panel for each, a line for each run.

  Args:
    metrics: a pattern of their names in metrics.jsonl.
    label: of the axis of numbers.

  Raises:
    ValueError: no run has such a metric.
  """
  from st_moe.analysis.figures import Picture, colour

  runs = [_Run(*each) for each in zip(workdirs, _names(workdirs), strict=True)]
  every = [row for run in runs for row in run.rows]
  known = {k for row in every for k, v in row.items() if not np.ndim(v)}
  names = sorted(fnmatch.filter(known, metrics))
  if not names:
    raise unknown('metric', metrics, sorted(known))
  columns = min(len(names), 4)
  rows = -(-len(names) // columns)
  figure = Picture(3 * columns + 1, max(2.4 * rows, 2.8))
  panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
  for panel, name in zip(panels, names, strict=False):
    for n, run in enumerate(runs):
      points = [(r['step'], float(r[name])) for r in run.rows if name in r]
      if points:
        one = {'marker': '.'} if len(points) < 20 else {}
        of_run = dict(label=run.name, color=colour(n), **one)
        panel.plot(*zip(*points, strict=True), **of_run)
    parts = name.split('/')
    panel.set_title(parts[1] if parts[0] == 'eval' else name, fontsize='medium')
    panel.grid(alpha=0.3)
  for panel in figure.axes[len(names) :]:
    panel.remove()
  figure.supxlabel('step', fontsize='medium')
  figure.supylabel(label, fontsize='medium')
  lines = {
    line.get_label(): line for panel in figure.axes for line in panel.lines
  }
  figure.legend(lines.values(), lines.keys(), loc='outside right')
  return figure


class _Run:
  """What the files of a workdir say."""

  def __init__(self, workdir: str, name: str):
    self.workdir, self.name = epath.Path(workdir).expanduser(), name
    if not (self.workdir / 'config.json').exists():
      raise ValueError(f'{workdir} is no workdir of `st-moe train`.')
    self.rows = rows = read_rows(self.workdir)
    self.steps = [r for r in rows if 'loss' in r]
    self.measured = [r for r in rows if any(k.startswith('eval/') for k in r)]
    if not self.steps or not self.measured:
      raise ValueError(f'{workdir} has measured nothing yet.')
    last = self.measured[-1]
    self.scores = {k: v for k, v in last.items() if k.startswith('eval/')}
    self._best = best_steps(
      {
        r['step']: {k: float(r[k]) for k in r.keys() & self.scores}
        for r in self.measured
      }
    )

  def best(self, name: str, *, digits: int = 1) -> str:
    """The peak of a metric and its step, in brackets if that was not kept."""
    if name not in self._best:  # It was never finite.
      return ''
    step, value = self._best[name]
    there = (self.workdir / 'checkpoints' / f'{step}').exists()
    return f'{value:.{digits}f} {step if there else f"({step})"}'

  def losses(self, name: str) -> list[str]:
    """The first and the last of a loss, which are text if not finite; best."""
    found = [float(r[name]) for r in self.measured if name in r]
    return [f'{found[0]:.3f}', f'{found[-1]:.3f}', self.best(name, digits=3)]

  def stage(self) -> list[str]:
    first, last = self.steps[0], self.steps[-1]
    # The first row holds the compilation.
    rates = [r['tokens_per_second'] for r in self.steps[1:]] or [0]
    load = [np.ravel(v) for k, v in last.items() if k.endswith('/load')]
    even = [rows / max(rows.mean(), 1) for rows in load]
    dropped = [v for k, v in last.items() if k.endswith('/dropped_tokens')]
    return [
      self.name,
      f'{last["step"]}',
      f'{np.median(rates):,.0f}',
      f'{float(first["loss"]):.3f}',  # What is not finite was written as text.
      f'{float(last["loss"]):.3f}',
      f'{min(map(np.min, even)):.2f}..{max(map(np.max, even)):.2f}'
      if even
      else 'dense',
      f'{100 * np.mean(dropped):.1f} %' if dropped else '',
    ]

  def files(self) -> str:
    there = [p.name for p in self.workdir.iterdir()]
    return ', '.join(sorted(n for n in there if not n.startswith('.')))
