"""SeqIO tasks as shards: JSON with the token ids of one example.

The only door to SeqIO and TensorFlow. Both take seconds to import, so they wait
until somebody asks for a task.

A record is {'inputs': ids, 'targets': ids, 'inputs_text': str, 'targets_text':
str, 'idx': any, 'fields': whatever else the task hands to its metrics}.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from st_moe.data import hub, shards, sources
from st_moe.data.task import SENTINEL, TextTask
from st_moe.data.vocabulary import Vocabulary

_OURS = 'st_moe.data.tasks'
_MOST_PARTS = 64


def registered() -> list[str]:
  """Every SeqIO task and mixture there is, ours included."""
  _ours()
  import seqio

  return sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


def _ours():
  with _without_banners():
    return importlib.import_module(_OURS)


class Registry:
  """The registered tasks, as they read with a vocabulary of ours."""

  def __init__(self, vocabulary: Vocabulary, data_dir: str = ''):
    ours = _ours()
    # From here on our tasks are registered with this vocabulary.
    ours.register(vocabulary.to_seqio(), data_dir)
    self._vocabulary, self._data_dir = vocabulary, data_dir
    self._ours = ours

  def names(self) -> list[str]:
    return registered()

  def tasks(self, name: str) -> dict[str, float | None]:
    """Tasks behind a name, with their rates if it is a mixture (else 1).

    None where the rate is made of a count that nobody knows yet; 0 where a task
    is only evaluated.
    """
    import seqio

    found = seqio.get_mixture_or_task(name)
    if isinstance(found, seqio.Task):
      return {name: 1.0}
    try:
      return {task.name: found.get_rate(task) for task in found.tasks}
    except TypeError:  # SeqIO computes with `num_input_examples` of None.
      return {task.name: None for task in found.tasks}

  def splits(self, name: str) -> list[str]:
    import seqio

    return list(seqio.TaskRegistry.get(name).splits)

  def check_files(self, name: str, split: str) -> None:
    """Raises where a file of ours is missing; others' tell when they read."""
    task = self._ours.text_task(name)
    if task and task.files:
      task.file(split, self._data_dir)

  def labels(self, name: str) -> tuple[str, ...]:
    """All answers that a task knows; () if they are not always the same."""
    task = self._ours.text_task(name)
    return task.labels if task else ()

  def begins(self, name: str) -> list[int]:
    """The ids that every answer begins with."""
    marked = name.endswith(SENTINEL)
    return [self._vocabulary.sentinel(0)] if marked else []

  def metric_fns(self, name: str) -> tuple:
    """Functions (targets, predictions) -> {metric: value}, both compared as
    `comparable` makes them."""
    import seqio

    return tuple(seqio.TaskRegistry.get(name).predict_metric_fns)

  def other_metric_fns(self, name: str) -> tuple[tuple, tuple]:
    """Functions (targets, scores), scores being log-probabilities of targets,
    and (targets, predictions, aux_values), with their own as 'scores'."""
    import seqio

    task = seqio.TaskRegistry.get(name)
    return tuple(task.score_metric_fns), tuple(task.predict_with_aux_metric_fns)

  def metric_objects(self, name: str) -> tuple[str, ...]:
    """Names of the metrics that are no functions."""
    import seqio

    found = seqio.TaskRegistry.get(name)._metric_objs_constructor_args
    return tuple(getattr(m, '__name__', type(m).__name__) for m in found)

  def comparable(self, name: str) -> Callable:
    """(text, example=, is_target=) -> what the metrics of the task compare."""
    import seqio

    return seqio.TaskRegistry.get(name).postprocess_fn

  def write(
    self,
    name: str,
    split: str,
    *,
    inputs_length: int,
    targets_length: int,
    cache_dir: str = '',
    progress: shards.Progress | None = None,
  ) -> shards.Shards:
    """Writes the examples of a task, unless that was done before.

    In this process: TensorFlow has threads of its own, and a worker would not
    know tasks that somebody registered by hand.
    """
    # Another registry may have registered them in its own way since.
    self._ours.register(self._vocabulary.to_seqio(), self._data_dir)
    task = self._task(name)
    if split not in task.splits:
      raise ValueError(
        f'Task {name!r} has no split {split!r}, only {sorted(task.splits)}.'
      )
    lengths = {'inputs': inputs_length, 'targets': targets_length}
    source_files = task.source.list_shards(split)
    recipe = {
      'name': name,
      'split': split,
      'files': self._stamps(name, split, source_files),
      'code': _code(task),
      'lengths': lengths,
      'vocabulary': self._vocabulary.fingerprint,
    }
    parts = min(len(source_files), _MOST_PARTS)
    jobs = [
      functools.partial(self._records, task, split, lengths, part, parts)
      for part in range(parts)
    ]
    return shards.write(recipe, jobs, cache_dir=cache_dir, progress=progress)

  def _task(self, name: str):
    """The task with our vocabulary in place of the one it came with."""
    import seqio

    task = seqio.TaskRegistry.get(name)
    features = task.output_features
    if not {'inputs', 'targets'} <= set(features):
      raise ValueError(
        f'Task {name!r} makes {sorted(features)}, but an encoder-decoder needs'
        " 'inputs' and 'targets'."
      )
    ours = self._vocabulary.to_seqio()
    return task.replace(
      output_features={
        key: dataclasses.replace(feature, vocabulary=ours)
        for key, feature in features.items()
        if key in ('inputs', 'targets')
      }
    )

  def _stamps(self, name: str, split: str, source_files) -> list:
    """What is known of the files behind a task."""
    paths = [path for path in source_files if '/' in path]
    task = self._ours.text_task(name)
    if task and task.files:
      paths.append(str(task.file(split, self._data_dir)))
    is_there = lambda path: hub.is_one(path) or epath.Path(path).exists()
    return [sources.stamp(path) for path in filter(is_there, sorted(paths))]

  def _records(
    self,
    task,
    split: str,
    lengths: Mapping[str, int],
    part: int,
    parts: int,
    counts: collections.Counter,
  ) -> Iterator[bytes]:
    import seqio

    shard = seqio.ShardInfo(part, parts) if parts > 1 else None
    with seqio.utils.map_seed_manager(0):  # Same examples on every run.
      dataset = task.get_dataset(
        lengths, split, shuffle=False, shard_info=shard
      )
    for i, row in enumerate(dataset.as_numpy_iterator()):
      row = self._read(row)
      ids = {key: row.pop(key) for key in ('inputs', 'targets')}
      for key, values in ids.items():
        feature = task.output_features[key]
        if feature.add_eos and values[-1:] != [self._vocabulary.eos]:
          values.append(self._vocabulary.eos)
      texts = {key: row.pop(f'{key}_pretokenized', None) for key in ids}
      if texts['targets'] is None:
        texts['targets'] = self._vocabulary.decode(ids['targets'])
      counts['documents'] += 1
      counts['tokens'] += sum(map(len, ids.values()))
      record = {
        **ids,
        # What nobody reads in training need not be parsed there.
        'inputs_text': '' if split == 'train' else texts['inputs'] or '',
        'targets_text': texts['targets'],
        'idx': _index(row, part + i * parts),
        'fields': row,
      }
      yield json.dumps(record).encode()

  def _read(self, row: Mapping) -> dict:
    """What a task made of an example, as JSON can hold it."""
    row = {key: _plain(value) for key, value in row.items()}
    suffix = self._ours.AS_JSON
    told = {key: text for key, text in row.items() if key.endswith(suffix)}
    own = {k.removesuffix(suffix): json.loads(t) for k, t in told.items() if t}
    return {key: v for key, v in row.items() if key not in told} | own


@contextlib.contextmanager
def _without_banners():
  """TensorFlow greets on the raw stderr, whatever its log level is."""
  sys.stderr.flush()
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def _code(task) -> str:
  """A hash of the modules that make a task's examples.

  Those of its functions, and what these import from their own package; an edit
  there makes examples that lie on disk stale.
  """
  made_by = getattr(task.source, '_dataset_fn', type(task.source))
  functions = [made_by]
  ours = getattr(made_by, 'keywords', {}).get('task')
  if isinstance(ours, TextTask):
    functions = [TextTask, ours.examples, ours.read, sources.read_jsonl]
    functions += filter(None, [ours.generate])
  modules = set()
  for function in [*functions, *task.preprocessors]:
    while isinstance(function, functools.partial):
      function = function.func
    module = inspect.getmodule(function)
    if module is None or module.__name__.startswith('seqio.'):
      continue
    package = module.__name__.split('.')[0]
    modules.add(module)
    modules.update(
      value
      for value in vars(module).values()
      if inspect.ismodule(value) and value.__name__.split('.')[0] == package
    )
  digest = hashlib.sha256()
  for module in sorted(modules, key=lambda m: m.__name__):
    try:
      digest.update(inspect.getsource(module).encode())
    except (OSError, TypeError):  # A notebook cell has no file.
      pass
  return digest.hexdigest()


def _index(row: dict, number: int):
  """Its number, or what T5 spreads over 'idx/passage' and so on, as a dict."""
  parts = {k.partition('/')[2]: v for k, v in row.items() if k[:4] == 'idx/'}
  return parts or row.pop('idx', row.get('id', number))


def _plain(value):
  """A feature as JSON can hold it."""
  if hasattr(value, 'to_list'):  # Ragged.
    value = value.to_list()
  elif hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [_plain(item) for item in value]
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  return value.decode() if isinstance(value, bytes) else value
