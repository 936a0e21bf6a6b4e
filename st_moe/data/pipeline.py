"""Mixtures of text and tasks -> batches.

Training batch n is a function of (config, n): any batch can be had without
those before it, on any number of hosts, and a run that starts again reads what
it would have read. Text is corrupted as it is read, by (seed, position in the
stream of its source), so each epoch takes out other spans.

A batch has, for batch size B and lengths Li, Lt:

  encoder_input_tokens   int32 [B, Li]   0 pads
  decoder_input_tokens   int32 [B, Lt]   targets shifted right, a 0 in front
  decoder_target_tokens  int32 [B, Lt]
  decoder_loss_weights   float32 [B, Lt] 1 on targets, 0 on padding
  task                   int32 [B]       place of its source in `sources`
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from st_moe.config import DataConfig
from st_moe.data import (
  mixture,
  pairs,
  shards,
  sources,
  span_corruption,
  text_shards,
  tiny_world,
)
from st_moe.data import vocabulary as vocabulary_lib
from st_moe.data.metrics import as_float, majority_baseline
from st_moe.data.task import UNKNOWN, tell_once
from st_moe.data.vocabulary import Vocabulary

Batch = dict[str, np.ndarray]

# Raise it when batch n of a config becomes another: runs that go on are told.
BATCHES = 2

_EVAL_SEED = 1  # Of nobody's choice: validation losses of all runs compare.


class TrainData:
  """The training stream, in batches that can be asked for in any order.

  Of each global batch a host reads the `rows` of its own devices (None: all);
  what a row is does not depend on who reads it.
  """

  def __init__(
    self,
    config: DataConfig,
    vocabulary: Vocabulary,
    *,
    rows: Sequence[int] | None = None,
    progress: shards.Progress | None = None,
  ):
    import grain

    library = mixture.Library(config, vocabulary, progress)
    opened = {name: library.open(name, 'train') for name in library.sources()}
    self.info = {name: _summary(found) for name, found in opened.items()}
    # Of what is read, and not of where it lies.
    self.digests = {name: found.digest for name, found in opened.items()}
    # What a reader of its losses should know, a line each.
    self.notes = [line for x in opened.values() for line in _checked(x, config)]
    found = mixture.rates(
      config, {name: len(found) for name, found in opened.items()}, library
    )
    self.sources = tuple(opened)
    self.rates = tuple(found[n] / sum(found.values()) for n in self.sources)
    self._size, self._seed = config.batch_size, _seed(config.seed, 'rows')
    self._rows = range(self._size) if rows is None else rows

    streams = []
    for index, (name, records) in enumerate(opened.items()):
      convert = _Convert(config, vocabulary, library.is_text(name), index)
      streams.append(
        grain.MapDataset.source(records)
        # Both look at the position in the endless stream, not in the epoch.
        .shuffle(seed=_seed(config.seed, name, 'order'))
        .repeat()
        .random_map(convert, seed=_seed(config.seed, name, 'noise'))
      )
    self._examples = grain.MapDataset.mix(streams, self.rates)

  def batch(self, n: int) -> Batch:
    """This host's rows of global batch `n`."""
    # A mixture is an interleaving with a period: left as it is, a source would
    # have the same rows for ever, hence the same devices and turns at experts.
    order = np.random.default_rng([self._seed, n]).permutation(self._size)
    numbers = n * self._size + order
    return _stack([self._examples[numbers[row]] for row in self._rows])

  def iterate(self, start: int = 0, *, threads: int = 4) -> Iterator[Batch]:
    """batch(start), batch(start + 1), ... without end, made ahead of use."""
    import grain

    batches = grain.MapDataset.range(start, sys.maxsize).map(self.batch)
    options = grain.ReadOptions(threads, 2 * threads)
    # `yield from` closes it, threads and all, when the caller stops early.
    yield from iter(batches.to_iter_dataset(options))


class EvalData:
  """One split of one source, in a fixed order, each example once."""

  # Metrics (targets, scores) and (targets, predictions, aux_values), as SeqIO
  # tells them apart, and the names of those that only T5X can compute.
  score_fns = aux_fns = left_out = ()
  _cut = ()  # Lines.

  def __init__(self, library: mixture.Library, name: str, split: str):
    if list(library.members(name)) != [name]:
      raise ValueError(
        f'{name!r} is a mixture; evaluate its tasks one by one:'
        f' {sorted(library.members(name))}.'
      )
    self.name, self.split = name, split
    self.is_text = library.is_text(name)
    self._records = library.open(name, split)
    self.info = _summary(self._records)
    self._cut = list(_cut(self._records.info).values())
    if not self.is_text:
      registry = library.registry
      self.labels, self.begins = registry.labels(name), registry.begins(name)
      self.metric_fns = registry.metric_fns(name)
      self.score_fns, self.aux_fns = registry.other_metric_fns(name)
      self.left_out = registry.metric_objects(name)
      self.comparable = registry.comparable(name)
    self._library, config = library, library.config
    self._convert = _Convert(config, library.vocabulary, self.is_text, 0)

  def __len__(self) -> int:
    return len(self._records)

  @functools.cached_property
  def task(self) -> int:
    """Its number in the mixture; what is not in there is the next.

    Not in `batches`, which are for whoever knows none: SeqIO takes seconds.
    """
    names = self._library.sources()
    return [*names, self.name].index(self.name)

  def example(self, index: int) -> Batch:
    """One row of a batch."""
    rng = np.random.default_rng([_EVAL_SEED, index])
    return self._convert(self._records[index], rng)

  def batches(self, batch_size: int) -> Iterator[Batch]:
    """All examples; `valid` [B] is False on the rows that fill the last batch.

    Such rows are all 0, loss weights included.
    """
    empty = {k: np.zeros_like(v) for k, v in self.example(0).items()}
    for first in range(0, len(self), batch_size):
      wanted = range(first, first + batch_size)
      valid = np.array([i < len(self) for i in wanted])
      examples = [self.example(i) if i < len(self) else empty for i in wanted]
      yield {**_stack(examples), 'valid': valid}

  @functools.cached_property
  def examples(self) -> 'Sequence[Example]':
    """What decoding and metrics need of a task, in the order of the rows."""
    if self.is_text:
      raise ValueError(
        f'{self.name!r} is text: it has a loss, but nothing to answer.'
      )
    return [Example(**json.loads(record)) for record in self._records]

  def choices(self, example: 'Example') -> Sequence[str]:
    """The answers that rank classification chooses from; () if it does not."""
    return example.fields.get('choices', self.labels)

  def scores(
    self,
    examples: 'Sequence[Example]',
    said: Sequence[str],
    logprobs: Sequence[float] = (),
  ) -> dict[str, float]:
    """The metrics of what was said to those examples whose answer is told.

    `logprobs` are those of what was said, in nats; none are all 0.
    """
    targets = self._targets(examples)
    predictions = [
      self.comparable(text, example=e.features, is_target=False)
      for e, text in zip(examples, said, strict=True)
      if self.told(e)
    ]
    aux = {'scores': self._of_told(examples, logprobs or [0.0] * len(examples))}
    return self._numbers(
      targets,
      [
        *((fn, (predictions,)) for fn in self.metric_fns),
        *((fn, (predictions, aux)) for fn in self.aux_fns),
      ],
    )

  def target_scores(
    self, examples: 'Sequence[Example]', logprobs: Sequence[float]
  ) -> dict[str, float]:
    """The metrics of the log-probabilities of the targets, in nats."""
    scores = self._of_told(examples, logprobs)
    return self._numbers(
      self._targets(examples), [(fn, (scores,)) for fn in self.score_fns]
    )

  def _of_told(self, examples, values) -> list:
    pairs = zip(examples, values, strict=True)
    return [value for example, value in pairs if self.told(example)]

  def _numbers(self, targets, asked) -> dict[str, float]:
    """What functions make of targets and arguments, as far as it is numbers."""
    found = {}
    for fn, arguments in asked if targets else ():
      known = getattr(fn, '__name__', str(fn))
      try:
        values = fn(targets, *arguments)
      except KeyError as e:
        if fn not in self.aux_fns:
          raise
        tell_once(
          f'{self.name}: the metric {known!r} is left out, as it asks for aux'
          f" values {e}; here there are only 'scores'."
        )
        continue
      if not isinstance(values, Mapping):
        values = {known: values}
      for name, value in values.items():
        if (number := as_float(value)) is not None:
          found[name] = number
        else:
          tell_once(
            f'{self.name}: the metric {name!r} is left out, as it is no number:'
            f' {type(value).__name__}.'
          )
    return found

  def majority(self, examples: 'Sequence[Example]') -> dict[str, float]:
    """The metrics of the answer that is right most often; {} as above.

    Nor where targets are no answers, as postprocessors may have it.
    """
    targets = self._targets(examples)
    try:
      found = majority_baseline(targets, self.metric_fns) if targets else {}
    except Exception:  # Of somebody's own metric, on an answer of our making.
      return {}
    found = {name: as_float(value) for name, value in found.items()}
    return {name: v for name, v in found.items() if v is not None}

  def notes(self) -> list[str]:
    """What a reader of its scores should know, a line each."""
    if self.is_text:
      return []
    lines = list(self._cut)
    lines += [
      f'{self.name}: the metric {name} is left out: it asks for the outputs of'
      ' a model of T5X.'
      for name in self.left_out
    ]
    untold = sum(not self.told(e) for e in self.examples)
    if 0 < untold < len(self):
      lines.append(
        f'{self.name}: {untold} of {len(self)} rows have no answer; they are'
        ' not scored.'
      )
    return lines

  def told(self, example: 'Example') -> bool:
    """Whether the answer is known, which those of test files often are not.

    Its targets say so or, as in T5's WSC, a `label` of -1, where metrics look
    at the label and not at the targets.
    """
    if example.targets_text == UNKNOWN:
      return False
    if example.fields.get('label') != -1:
      return True
    try:
      return self._target(example) != self._target(example, UNKNOWN)
    except Exception:  # Whatever a postprocessor makes of no answer.
      return True

  def _target(self, example: 'Example', text: str | None = None):
    return self.comparable(
      example.targets_text if text is None else text,
      example=example.features,
      is_target=True,
    )

  def _targets(self, examples) -> list:
    return [self._target(e) for e in examples if self.told(e)]


@dataclasses.dataclass(frozen=True)
class Example:
  """One example of a task as it lies on disk, cut but not padded."""

  inputs: list[int]
  targets: list[int]
  inputs_text: str
  targets_text: str
  idx: Any
  fields: dict[str, Any]  # Whatever else the task has, for its metrics.

  @property
  def features(self) -> dict[str, Any]:
    """As a postprocessor of SeqIO sees it."""
    texts = {
      'inputs_pretokenized': self.inputs_text,
      'targets_pretokenized': self.targets_text,
    }
    return {**self.fields, **texts, 'idx': self.idx}


def source_names(config: DataConfig, vocabulary: Vocabulary) -> list[str]:
  """Every source of the mixture, once, in the order of the config."""
  return mixture.Library(config, vocabulary).sources()


def open_eval(
  config: DataConfig,
  vocabulary: Vocabulary,
  name: str,
  split: str = 'validation',
) -> EvalData:
  return EvalData(mixture.Library(config, vocabulary), name, split)


def check(config: DataConfig, splits: Sequence[str] = ('train',)) -> None:
  """Looks at every name and file of a mixture, before work starts.

  Raises:
    ValueError: an unknown name, a split that a source does not have, lengths
      that span corruption cannot fill, a missing, empty or broken file.
  """
  pairs.tasks(config)
  used = {n: config.files[n] for n in config.drawn if n in config.files}
  sources.check(used, config.text_field)
  library = mixture.Library(config, vocabulary_lib.load('bytes'))
  for name in config.pairs.keys() - config.drawn:
    tell_once(
      f'data.pairs.{name} is not in data.mixture: nothing is made of it.'
    )
  for name in library.sources():
    library.check_splits(name, splits)
    if library.is_text(name):
      mixture.raw_tokens(config)
    library.check_files(name, splits)


def prepare(
  config: DataConfig,
  vocabulary: Vocabulary,
  *,
  splits: Sequence[str] = ('train', 'validation'),
  progress: shards.Progress | None = None,
  note: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, dict[str, int]]]:
  """Writes every shard of a mixture; returns counts by source and split.

  Args:
    note: told what is cut, a line each.

  Raises:
    ValueError: as of `check`, or more targets are cut than `data.allow_cut`.
  """
  library = mixture.Library(config, vocabulary, progress)
  wanted = {
    name: [split for split in splits if split in library.splits(name)]
    for name in library.sources()
  }
  check(config)
  for name, there in wanted.items():
    library.check_files(name, there)
  counts = {name: {} for name in wanted}
  for name, there in wanted.items():
    for split in there:
      found = library.open(name, split)
      cut = _checked if split == 'train' else lambda x, _: _cut(x.info).values()
      for line in cut(found, config):
        note(line)
      counts[name][split] = _summary(found)
  return counts


def train_vocabulary(
  config: DataConfig,
  path: str,
  size: int,
) -> Vocabulary:
  """Trains a vocabulary on the training text of a mixture.

  Tasks have text only once there is a vocabulary to read them with: what they
  should add is `data.vocabulary_extra`.
  """

  def texts():
    own = pairs.tasks(config)
    for name in config.drawn:
      if name in own:
        for example in own[name].load('train'):
          yield f'{example["inputs"]} {example["targets"]}'
      elif name in config.files:
        yield from sources.documents(
          config.files[name]['train'], config.text_field
        )
      elif name == sources.EMBEDDED:
        yield from sources.embedded_corpus('train')
    if config.vocabulary_extra == 'tiny_world':
      yield from tiny_world.text()
    elif config.vocabulary_extra:
      yield from sources.documents(config.vocabulary_extra, config.text_field)

  return vocabulary_lib.train(texts(), path, size=size, seed=config.seed)


class _Convert:
  """A record and an rng -> one row of a batch."""

  def __init__(
    self, config: DataConfig, vocabulary: Vocabulary, is_text: bool, task: int
  ):
    self._lengths = config.inputs_length, config.targets_length
    self._corrupt = is_text and functools.partial(
      span_corruption.corrupt,
      density=config.noise_density,
      mean_span=config.mean_span,
      first_sentinel=vocabulary.sentinel(0),
      num_sentinels=len(vocabulary.sentinels),
      eos=vocabulary.eos,
    )
    self._eos, self._task = vocabulary.eos, task

  def __call__(self, record: bytes, rng: np.random.Generator) -> Batch:
    if self._corrupt:
      inputs, targets = self._corrupt(text_shards.tokens_of(record), rng)
    else:
      row = json.loads(record)
      inputs, targets = row['inputs'], row['targets']
    inputs = _fit(inputs, self._lengths[0], self._eos)
    used = min(len(targets), self._lengths[1])
    targets = _fit(targets, self._lengths[1], self._eos)
    shifted = np.zeros_like(targets)
    shifted[1:] = targets[:-1]
    return {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': shifted,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (np.arange(len(targets)) < used).astype('f4'),
      'task': np.int32(self._task),
    }


def _fit(ids: Sequence[int], length: int, eos: int) -> np.ndarray:
  """`ids` padded, or cut with the last place left to an EOS."""
  fitted = np.zeros(length, np.int32)
  fitted[: len(ids)] = ids[:length]
  if len(ids) > length and ids[-1] == eos:
    fitted[-1] = eos
  return fitted


def _stack(examples: Sequence[Batch]) -> Batch:
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def _summary(found: shards.Shards) -> dict[str, int]:
  info = found.info
  return {key: info[key] for key in ('documents', 'tokens', 'records')}


def _cut(info: Mapping) -> dict[str, str]:
  """A line for inputs and for targets, where some of them are cut."""
  recipe, lines = info['recipe'], {}
  for key, length in recipe.get('lengths', {}).items():
    if count := info[f'cut_{key}']:
      lines[key] = (
        f'{recipe["name"]} {recipe["split"]}: {count:,} of {info["records"]:,}'
        f' {key} ({count / info["records"]:.1%}) are longer than'
        f' data.{key}_length={length} and cut at their end; the longest has'
        f' {info[f"longest_{key}"]} tokens.'
      )
  return lines


def _checked(found: shards.Shards, config: DataConfig) -> list[str]:
  """The lines of `_cut`; raises if too many targets to learn from are cut."""
  lines = _cut(found.info)
  share = found.info.get('cut_targets', 0) / found.info['records']
  if share > config.allow_cut:
    allowed = math.ceil(share * 1000) / 1000
    raise ValueError(
      f'{lines["targets"]} A model would learn to stop there: set'
      f' data.targets_length={found.info["longest_targets"]}, or'
      f' data.allow_cut={allowed} to train on them as they are.'
    )
  return list(lines.values())


def _seed(seed: int, *names: str) -> int:
  """32 bits that no two streams share; Grain takes no more."""
  text = '/'.join([str(seed), *names])
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'little')
