"""`st-moe evaluate`: the scores of checkpoints, and what they answered."""

import contextlib
import dataclasses
import datetime
import functools
import math
import re
import sys
import time

from etils import epath

from st_moe import checkpoint, config_file, hosts, sharding, terminal
from st_moe.config import Config, ModelConfig
from st_moe.data import files, trust
from st_moe.data.eval_data import EvalData
from st_moe.data.mixture import Library
from st_moe.history import best_steps
from st_moe.infer import results
from st_moe.infer import submission as submissions
from st_moe.infer.evaluator import Evaluator, flat
from st_moe.infer.load import check_answers, load, no_vocabulary
from st_moe.interop import convert
from st_moe.model import parts

# What may be asked of a model that is trained: what to measure and how, and
# what leaves its function as it is but for who gets a place, and the dtype.
_SETTABLE = (
  *('evaluate', 'data', 'mesh', 'loss.positions'),
  *('model.dtype', 'model.moe.eval_capacity', 'model.moe.selector'),
  *('model.moe.dispatcher', 'model.moe.transport', 'model.moe.padding'),
  *('model.moe.group_by', 'model.encoder.group_size'),
  *('model.decoder.group_size',),
)
# Of these, what moves no score, or is written down by itself.
_FREE = (
  *('evaluate.', 'mesh.', 'loss.', 'data.mixture'),
  *('data.cache_dir', 'data.workers'),
)


def evaluate(
  path,
  *,
  mixture=(),
  output: str = '',
  vocabulary: str = '',
  overrides: dict | None = None,
  trust_config: bool = False,
  every_step: bool = False,
  submission: bool = False,
) -> dict[str, float]:
  """Scores the checkpoint at `path`; writes metrics.json and predictions.

  They join those of other tasks there; what another checkpoint scored there, or
  this one under other settings, is set aside.

  Args:
    mixture: names of tasks, mixtures or text sources; none: what it was trained
      on.
    output: a directory; '': 'evaluation' in the workdir, or in a checkpoint
      that is of none.
    vocabulary: a SentencePiece model or 'bytes'; '': the checkpoint's.
    overrides: fields of its config to set, as on a command line.
    trust_config: read the files that its config names, whoever trained it.
    every_step: score all checkpoints of a workdir; tells which is best at what.
    submission: of the test split, unless another is set; also writes the zip
      that the leaderboard of SuperGLUE takes.

  Returns:
    The metrics; of `every_step`, those of the newest.

  Raises:
    ValueError: before anything is measured, what cannot be.
  """
  _check_fields(overrides or {})
  if not output:
    _check_place(path)
  steps = checkpoint.all_steps(path) if every_step else [path]
  opened = functools.partial(
    load, vocabulary=vocabulary, mesh=_mesh(steps[0], overrides or {})
  )
  loaded = opened(steps[0])
  check_answers(loaded.path, loaded.config.model)
  if loaded.vocabulary is None:
    raise ValueError(no_vocabulary(loaded.path))
  # All examples, answered in both ways, unless somebody says otherwise.
  whole = {'evaluate.decode': 'true', 'evaluate.batches': '0'}
  if submission:
    whole['evaluate.split'] = 'test'
  overrides = {**whole, **(overrides or {})}
  config, trusted = loaded.config, True
  if not _is_own(loaded):
    trusted = trust_config
    config = _without_places(config, trusted)
  config = _set(config, overrides)
  _check_files(loaded.path, config, mixture, overrides, trusted)
  with _modules_told(getattr(loaded, 'modules', ())):
    sources = hosts.in_turn(
      lambda: _sources(config, loaded.vocabulary, mixture)
    )
  if submission:
    submissions.check([source.name for source in sources])
  model = loaded.model.clone(config=config.model)
  evaluator = Evaluator(model, config, loaded.vocabulary, loaded.mesh)
  to = epath.Path(output or _beside(path, loaded.path)).expanduser()
  inside = [epath.Path(each).name for each in steps] if every_step else []
  tasks = [source.name for source in sources if not source.is_text]
  hosts.agreed(
    lambda: [results.check(to / name, tasks) for name in ('', *inside)]
  )
  if hosts.first():
    _announce(config, sources)
  by_step, known, moved = {}, {}, False
  for each in steps:
    loaded = opened(each) if by_step else loaded
    measured = _measure(evaluator, loaded, sources)
    found = flat(measured)
    by_step[loaded.step] = found
    if not hosts.first():
      continue
    folder = to / f'{loaded.step}' if every_step else to
    about = _about(loaded, config)
    known[loaded.step], others = results.write(folder, about, found, measured)
    moved |= others
    _show(loaded, found)
    _warn(loaded, measured)
    if submission:
      terminal.say(f'wrote {submissions.write(folder, measured)}')
  if every_step and hosts.first():
    best = best_steps(known)
    results.write_best(to, best, moved)
    for name, (step, value) in best.items():
      terminal.say(f'{name}: best {value:.4g} at step {step}')
  hosts.tell(f'wrote {to}')
  return by_step[max(by_step)]


def settable(field: str) -> bool:
  """Whether an evaluation may have its own `field` of a config."""
  # A stack may have its own.
  whole = re.sub(r'^model\.(encoder|decoder)\.moe\.', 'model.moe.', field)
  return any(f'{whole}.'.startswith(f'{known}.') for known in _SETTABLE)


def _check_fields(overrides: dict) -> None:
  """Raises where a field would make it another model, or do nothing."""
  plain = config_file.to_dict(Config())
  for field, value in overrides.items():
    config_file.set_field(plain, field, value)  # Is there such a field?
    if field.startswith('data.vocabulary'):
      raise ValueError(
        f"{field} is of training; a vocabulary in place of the checkpoint's is"
        ' --vocabulary=FILE.'
      )
    if not settable(field):
      raise ValueError(
        f'{field} cannot be set for an evaluation: a checkpoint is what it was'
        f' trained to be. What can be set is {", ".join(_SETTABLE)}.'
      )


def _check_place(path) -> None:
  """Raises where a checkpoint of the hub has no place to write beside."""
  name, where = convert.split(path)
  if name == 'hf' and where and not epath.Path(where).expanduser().exists():
    raise ValueError(
      f'{path} is no directory here: say with --output=DIR where its'
      ' evaluation goes.'
    )


def _set(config: Config, fields: dict) -> Config:
  values = config_file.to_dict(config)
  for field, value in fields.items():
    values = config_file.set_field(values, field, value)
  config = config_file.from_dict(values)
  parts.check(config.model)
  return config


def _is_own(loaded) -> bool:
  """Whether this user trained it, or it names no place of a machine."""
  data = loaded.config.data
  if not trust.names_places(data):
    return True
  # All processes read it; to ask process 0 alone, they would wait for ever.
  signed = checkpoint.read_run(loaded.path).get('signature', '')
  return hosts.agreed(lambda: trust.is_own(data, signed))


def _without_places(config: Config, trusted: bool) -> Config:
  """`config` without what strangers may not say of this machine.

  Shards are written where this user has them; where the files of tasks lie is
  for the user to say.
  """
  data = dataclasses.replace(config.data, cache_dir='', workers=1)
  if not trusted:
    data = dataclasses.replace(data, data_dir='')
  return dataclasses.replace(config, data=data)


def _check_files(path: str, config: Config, names, given, trusted: bool):
  """Tells what will be read.

  Raises:
    ValueError: a file that a stranger's checkpoint alone names.
  """
  split = config.evaluate.split
  kinds = {'files': config.data.files, 'pairs': config.data.pairs}
  named = {
    f'data.{kind}.{name}.{split}': (name, globs[name][split])
    for name in names or config.data.drawn
    for kind, globs in kinds.items()
    if split in globs.get(name, ())
  }
  for field, (name, glob) in named.items():
    if not (trusted or any(f'{field}.'.startswith(f'{g}.') for g in given)):
      raise ValueError(
        f'{path} was not trained by you here, and says that {name} is in'
        f' {glob}. Say so yourself (--config.{field}={glob}), or let it be read'
        ' with all else that it names (--trust_config).'
      )
    hosts.tell(f'{name}: {glob}')


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
  library = Library(config.data, vocab)
  names = names or library.sources()
  members = dict.fromkeys(m for name in names for m in library.members(name))
  split = config.evaluate.split
  return [EvalData(library, name, split) for name in members]


@contextlib.contextmanager
def _modules_told(modules):
  """Adds to an error which modules had a task when a run was trained.

  They are not imported: a checkpoint of a stranger may name anything.
  """
  try:
    yield
  except ValueError as e:
    flags = [f'--module_import={m}' for m in modules if m not in sys.modules]
    if not flags or not str(e).startswith('Unknown data source'):
      raise
    what = str(e).partition('.')[0]
    raise ValueError(
      f'{what}. When this run was trained, it was registered by a module: add'
      f' {" ".join(flags)}, if you trust its code.'
    ) from None


def _beside(uri, path: str) -> epath.Path:
  """Where the results of the checkpoint `path` go, that of `uri`.

  What stands alone keeps them itself, or two in one folder would share them.
  """
  place = epath.Path(path).expanduser()
  alone = convert.split(uri)[0] != 'st_moe' or not place.name.isdigit()
  if not alone or (place.exists() and not place.is_dir()):
    place = place.parent
  if not alone and place.name == 'checkpoints':
    place = place.parent
  return place / 'evaluation'


def _about(loaded, config: Config) -> dict:
  """What scores depend on: equal where these are equal."""
  lines = config_file.diff(
    config_file.to_dict(loaded.config), config_file.to_dict(config)
  )
  asked = dataclasses.asdict(config.evaluate)
  del asked['every']
  place = epath.Path(loaded.path)
  # A run that was started anew has other checkpoints of the same names.
  inside = place.iterdir() if place.is_dir() else ()
  changed = [files.stamp(p)[2] for p in inside if not p.is_dir()]
  return {
    'checkpoint': loaded.path,
    'step': loaded.step,
    'written': max(changed, default=0),
    'settings': {
      'vocabulary': loaded.vocabulary.fingerprint,
      'evaluate': asked,
      'config': [line for line in lines if not line.startswith(_FREE)],
    },
  }


def _announce(config: Config, sources) -> None:
  limit = _limit(config.model)
  answers = 'no limit' if config.evaluate.dropless else limit
  print(f'Losses of text with {limit}, answers with {answers}.')
  for source in sources:
    for line in source.notes():
      terminal.say(line)


def _limit(model: ModelConfig) -> str:
  """How many tokens an expert takes: of each stack, where they differ."""
  limits = {}
  for stack in model.stacks:
    places = model.moe_of(stack).eval_capacity
    told = f'{places.count} places' if places.count else ''
    told = told or f'capacity {places.factor}'
    limits[stack] = 'no limit' if places.dropless else told
  if len({*limits.values()}) == 1:
    return limits.popitem()[1]
  return ' and '.join(f'{limit} ({stack})' for stack, limit in limits.items())


def _measure(evaluator: Evaluator, loaded, sources) -> dict:
  total = sum(map(evaluator.size, sources))
  shows = _bar if sys.stdout.isatty() else _lines
  with shows(f'step {loaded.step}', total) as advance:
    return evaluator.measure(
      loaded.params, sources, progress=advance, read=advance
    )


@contextlib.contextmanager
def _bar(name: str, total: int):
  from rich import progress

  columns = (
    progress.TextColumn(name),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeRemainingColumn(),
  )
  with progress.Progress(
    *columns, transient=True, disable=not hosts.first()
  ) as bar:
    task = bar.add_task('', total=total)
    yield lambda done: bar.advance(task, done)


_PATIENCE = 30.0  # Seconds without a word, where there is no terminal.


@contextlib.contextmanager
def _lines(name: str, total: int):
  start = told = time.monotonic()
  so_far = 0

  def advance(done: int):
    nonlocal told, so_far
    so_far, now = so_far + done, time.monotonic()
    if now - told >= _PATIENCE and so_far < total:
      told = now
      left = (now - start) / so_far * (total - so_far)
      left = datetime.timedelta(seconds=round(left))
      hosts.tell(f'{name}: {so_far:,} of {total:,} examples, {left} left')

  yield advance


def _warn(loaded, measured: dict) -> None:
  """Says so where a model knows nothing: one answer of NaNs is the first."""
  broken = [
    name
    for name, (metrics, rows) in measured.items()
    if not all(map(math.isfinite, (r['score'] for r in rows)))
    or not math.isfinite(metrics.get('loss', 0))
  ]
  if broken:
    terminal.say(
      f'{", ".join(broken)}: the logits of {loaded.path} are no numbers (NaN or'
      ' infinite), and these scores mean nothing. Look for such weights in it.'
    )


def _show(loaded, found: dict) -> None:
  """A line a metric: what it is, and what the most frequent answer gets."""
  from rich.table import Table

  table = Table('source', 'metric', 'majority', 'ranked', 'decoded')
  table.title = loaded.path
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
  terminal.console().print(table)
