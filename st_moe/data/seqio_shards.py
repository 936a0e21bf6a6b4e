"""SeqIO tasks as shards, with the records of `task_shards.py`.

The only door to SeqIO and TensorFlow. Both take seconds to import, so they wait
until somebody asks for a task that is none of ours.
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

from st_moe.data import fingerprint, shards, sources
from st_moe.data.task import SENTINEL, tell_once
from st_moe.data.task_shards import number_of
from st_moe.data.vocabulary import Vocabulary

_OURS = 'st_moe.data.tasks'
_MOST_PARTS = 64


def names() -> set[str]:
  """Every SeqIO task and mixture there is, ours included."""
  _ours()
  import seqio

  return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def _ours():
  with _without_banners():
    return importlib.import_module(_OURS)


class Tasks:
  """The registered tasks, as they read with a vocabulary of ours."""

  def __init__(self, vocabulary: Vocabulary):
    self._vocabulary, self._ours = vocabulary, _ours()

  def tasks(self, name: str) -> dict[str, float | None]:
    """Tasks behind a name, with their rates; as `Registry.tasks`."""
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

  def metric_fns(self, name: str) -> tuple:
    import seqio

    return tuple(seqio.TaskRegistry.get(name).predict_metric_fns)

  def other_metric_fns(self, name: str) -> tuple[tuple, tuple]:
    import seqio

    task = seqio.TaskRegistry.get(name)
    return tuple(task.score_metric_fns), tuple(task.predict_with_aux_metric_fns)

  def metric_objects(self, name: str) -> tuple[str, ...]:
    import seqio

    found = seqio.TaskRegistry.get(name)._metric_objs_constructor_args
    kinds = [m if inspect.isclass(m) else type(m) for m in found]
    return tuple(kind.__name__ for kind in kinds)

  def comparable(self, name: str) -> Callable:
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
    task = self._task(name)
    if split not in task.splits:
      raise ValueError(
        f'Task {name!r} has no split {split!r}, only {sorted(task.splits)}.'
      )
    lengths = {'inputs': inputs_length, 'targets': targets_length}
    source_files = task.source.list_shards(split)
    code, unknown = _code(task)
    recipe = {
      'name': name,
      'split': split,
      'files': _stamps(split, task.source),
      'code': code,
      'lengths': lengths,
      'vocabulary': self._vocabulary.fingerprint,
    }
    parts = min(len(source_files), _MOST_PARTS)
    jobs = [
      functools.partial(self._records, task, split, lengths, part, parts)
      for part in range(parts)
    ]
    if unknown:
      tell_once(
        f'{name}: whether {", ".join(unknown)} changed cannot be told, so its'
        ' examples are written anew each time.'
      )
    return shards.write(
      recipe,
      jobs,
      cache_dir=cache_dir,
      progress=progress,
      anew=bool(unknown),
    )

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
      for key, values in ids.items():
        length = self._uncut(task, key, values, texts[key], lengths[key])
        counts[f'cut_{key}'] += length > lengths[key]
        counts[f'longest_{key}'] = max(counts[f'longest_{key}'], length)
      if texts['targets'] is None:
        texts['targets'] = self._vocabulary.decode(ids['targets'])
      counts['documents'] += 1
      counts['tokens'] += sum(map(len, ids.values()))
      record = {
        **ids,
        # What nobody reads in training need not be parsed there.
        'inputs_text': '' if split == 'train' else texts['inputs'] or '',
        'targets_text': texts['targets'],
        'idx': number_of(row, part + i * parts),
        'fields': row,
      }
      yield json.dumps(record).encode()

  def _uncut(self, task, key: str, ids: list, text, length: int) -> int:
    """How long `ids` were before they were cut, as far as their text tells."""
    if len(ids) < length or not isinstance(text, str):
      return min(len(ids), length)
    marks = task.name.endswith(SENTINEL) + task.output_features[key].add_eos
    return len(self._vocabulary.encode(text)) + marks

  def _read(self, row: Mapping) -> dict:
    """What a task made of an example, as JSON can hold it."""
    row = {key: _plain(value) for key, value in row.items()}
    suffix = self._ours.AS_JSON
    told = {key: text for key, text in row.items() if key.endswith(suffix)}
    own = {k.removesuffix(suffix): json.loads(t) for k, t in told.items() if t}
    return {key: v for key, v in row.items() if key not in told} | own


def _stamps(split: str, source) -> list:
  """What changes when the data behind a task do."""
  paths = sorted(source.list_shards(split))
  is_function = hasattr(source, '_dataset_fn')  # Its 'shard' is the split.
  if is_function or not all(epath.Path(path).exists() for path in paths):
    return [_rows(source, split)]
  return [sources.stamp(path) for path in paths]


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


def _code(task) -> tuple[str, list[str]]:
  """A hash of the code that makes a task's examples, and what it leaves out."""
  import seqio

  walk = fingerprint.Walk()
  if made_by := getattr(task.source, '_dataset_fn', None):
    # What it makes is looked at as well (`_rows`): nothing escapes.
    apart = fingerprint.Walk()
    apart.take(made_by)
    walk.take(apart.digest)
  else:
    state = dict(vars(task.source))
    if '_tfds_dataset' in state:
      state['_tfds_dataset'] = repr(state['_tfds_dataset'])
    walk.take([type(task.source), state])
  features = task.output_features.items()
  walk.take([seqio.__version__, task.preprocessors])
  walk.take([(k, f.add_eos, f.dtype, f.rank) for k, f in features])
  return walk.digest, walk.unknown


def _rows(source, split: str) -> str:
  """A hash of what a source reads, from where nobody knows."""
  import seqio

  digest = hashlib.sha256()
  with seqio.utils.map_seed_manager(0):
    rows = source.get_dataset(split=split, shuffle=False)
  for row in rows.as_numpy_iterator():
    digest.update(json.dumps(_plain(row), sort_keys=True).encode())
  return digest.hexdigest()


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
  if not isinstance(value, bytes):
    return value
  # Of a field that is no text, an image say, nobody reads the bytes.
  return value.decode(errors='backslashreplace')
