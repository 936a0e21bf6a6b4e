"""`st-moe evaluate`: the scores of checkpoints, and what they answered."""

import dataclasses
import functools
import json
import math

import numpy as np
from etils import epath

from st_moe import config_file, hosts, sharding
from st_moe.config import Config
from st_moe.data import files, pipeline
from st_moe.data import mixture as mixtures
from st_moe.infer import submission as submissions
from st_moe.infer.evaluator import Evaluator, flat
from st_moe.infer.load import load, no_vocabulary
from st_moe.interop import convert
from st_moe.train import checkpoint
from st_moe.train.report import best_steps


def evaluate(
  path,
  *,
  mixture=(),
  output: str = '',
  vocabulary: str = '',
  overrides: dict | None = None,
  every_step: bool = False,
  submission: bool = False,
) -> dict[str, float]:
  """Scores the checkpoint at `path`; writes metrics.json and predictions.

  Args:
    mixture: names of tasks, mixtures or text sources; none: what it was trained
      on.
    output: a directory; '': 'evaluation' in the workdir.
    vocabulary: a SentencePiece model or 'bytes'; '': the checkpoint's.
    overrides: fields of its config to set, as on a command line.
    every_step: score all checkpoints of a workdir; tells which is best at what.
    submission: of the test split, unless another is set; also writes the zip
      that the leaderboard of SuperGLUE takes.

  Returns:
    The metrics; of `every_step`, those of the newest.
  """
  steps = checkpoint.all_steps(path) if every_step else [path]
  opened = functools.partial(
    load, vocabulary=vocabulary, mesh=_mesh(steps[0], overrides or {})
  )
  loaded = opened(steps[0])
  if loaded.vocabulary is None:
    raise ValueError(no_vocabulary(loaded.path))
  # All examples, answered in both ways, unless somebody says otherwise.
  whole = {'evaluate.decode': 'true', 'evaluate.batches': '0'}
  if submission:
    whole['evaluate.split'] = 'test'
  config = _set(loaded.config, {**whole, **(overrides or {})})
  sources = hosts.in_turn(lambda: _sources(config, loaded.vocabulary, mixture))
  if submission:
    submissions.check([source.name for source in sources])
  model = loaded.model.clone(config=config.model)
  evaluator = Evaluator(model, config, loaded.vocabulary, loaded.mesh)
  to = epath.Path(output or _beside(loaded.path) / 'evaluation').expanduser()
  if hosts.first():
    _announce(config, sources)
  by_step = {}
  for each in steps:
    loaded = opened(each) if by_step else loaded
    measured = _measure(evaluator, loaded, sources)
    found = flat(measured)
    by_step[loaded.step] = found
    if not hosts.first():
      continue
    folder = to / f'{loaded.step}' if every_step else to
    _write(folder, loaded, found, measured)
    _show(loaded, found)
    if submission:
      print(f'wrote {submissions.write(folder, measured)}')
  if every_step and hosts.first():
    best = best_steps(by_step)
    files.write_whole(to / 'best.json', json.dumps(best, indent=2).encode())
    for name, (step, value) in best.items():
      print(f'{name}: best {value:.4g} at step {step}')
  hosts.tell(f'wrote {to}')
  return by_step[max(by_step)]


def _set(config: Config, fields: dict) -> Config:
  values = config_file.to_dict(config)
  for field, value in fields.items():
    values = config_file.set_field(values, field, value)
  return config_file.from_dict(values)


def _mesh(path, overrides: dict):
  """One device (None); of several processes all, as the config lays them."""
  if hosts.count() == 1:
    return None
  config = _set(convert.open_source(path).config, overrides)
  return sharding.make_mesh(
    **dataclasses.asdict(config.mesh), num_experts=config.model.num_experts
  )


def _sources(config: Config, vocab, names) -> list:
  """Evaluation data by name; of a mixture that of all its tasks."""
  library = mixtures.Library(config.data, vocab)
  names = names or library.sources()
  members = dict.fromkeys(m for name in names for m in library.members(name))
  split = config.evaluate.split
  return [pipeline.EvalData(library, name, split) for name in members]


def _beside(path: str) -> epath.Path:
  """The workdir of a checkpoint, or where it lies if it left that."""
  folder = epath.Path(path).parent
  return folder.parent if folder.name == 'checkpoints' else folder


def _announce(config: Config, sources) -> None:
  capacity = config.model.moe.eval_capacity
  limit = 'no limit' if capacity.dropless else f'capacity {capacity.factor}'
  answers = 'no limit' if config.evaluate.dropless else limit
  print(f'Losses of text with {limit}, answers with {answers}.')
  most = config.data.inputs_length
  for source in sources:
    if not source.is_text:
      cut = np.mean([len(e.inputs) >= most for e in source.examples])
      if cut:
        print(
          f'{source.name}: {cut:.1%} of inputs fill data.inputs_length={most};'
          ' what is longer was cut.'
        )


def _measure(evaluator: Evaluator, loaded, sources) -> dict:
  from rich import progress

  total = sum(len(s.examples) for s in sources if not s.is_text)
  columns = (
    progress.TextColumn(f'step {loaded.step}'),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(
    *columns, transient=True, disable=not hosts.first()
  ) as bar:
    task = bar.add_task('', total=total)
    advance = lambda done: bar.advance(task, done)
    return evaluator.measure(loaded.params, sources, progress=advance)


def _write(folder: epath.Path, loaded, found: dict, measured: dict) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name, (_, rows) in measured.items():
    if rows:
      lines = ''.join(f'{json.dumps(row)}\n' for row in rows)
      files.write_whole(folder / f'predictions-{name}.jsonl', lines.encode())
  # JSON knows no NaN.
  plain = {k: v if math.isfinite(v) else str(v) for k, v in found.items()}
  about = {'checkpoint': loaded.path, 'step': loaded.step, 'metrics': plain}
  text = json.dumps(about, indent=2)
  files.write_whole(folder / 'metrics.json', text.encode())


def _show(loaded, found: dict) -> None:
  """A line a metric: what it is, and what the most frequent answer gets."""
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  table = Table('source', 'metric', 'majority', 'ranked', 'decoded')
  table.title = escape(loaded.path)
  seen = set()
  for name in found:
    _, source, metric = name.split('/', 2)
    metric = metric.removeprefix('decoded_').removeprefix('majority_')
    if (source, metric) in seen:
      continue
    seen.add((source, metric))
    values = [
      found.get(f'eval/{source}/{prefix}{metric}')
      for prefix in ('majority_', '', 'decoded_')
    ]
    table.add_row(
      source, metric, *('' if v is None else f'{v:.4g}' for v in values)
    )
  Console().print(table)
