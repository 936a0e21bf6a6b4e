"""What a model is measured on: a split of a source, its answers and metrics."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from st_moe.data import rows
from st_moe.data.metrics import as_float, majority_baseline
from st_moe.data.mixture import Library
from st_moe.data.task import UNKNOWN, tell_once

_EVAL_SEED = 1  # Of nobody's choice: validation losses of all runs compare.


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


class EvalData:
  """One split of one source, in a fixed order, each example once."""

  # Metrics (targets, scores) and (targets, predictions, aux_values), as SeqIO
  # tells them apart, and the names of those that only T5X can compute.
  score_fns = aux_fns = left_out = ()
  _cut = ()  # Lines.

  def __init__(self, library: Library, name: str, split: str = 'validation'):
    if list(library.members(name)) != [name]:
      raise ValueError(
        f'{name!r} is a mixture; evaluate its tasks one by one:'
        f' {sorted(library.members(name))}.'
      )
    self.name, self.split = name, split
    self.is_text = library.is_text(name)
    self._records = library.open(name, split)
    self.info = self._records.summary
    self._cut = list(self._records.cut.values())
    if not self.is_text:
      registry = library.registry
      self.labels, self.begins = registry.labels(name), registry.begins(name)
      self.metric_fns = registry.metric_fns(name)
      self.score_fns, self.aux_fns = registry.other_metric_fns(name)
      self.left_out = registry.metric_objects(name)
      self.comparable = registry.comparable(name)
    self._library = library
    self._convert = rows.Convert(library, self.is_text, 0)

  def __len__(self) -> int:
    return len(self._records)

  @functools.cached_property
  def task(self) -> int:
    """Its number in the mixture; what is not in there is the next.

    Not in `batches`, which are for whoever knows none: SeqIO takes seconds.
    """
    names = self._library.sources()
    return [*names, self.name].index(self.name)

  def example(self, index: int) -> rows.Batch:
    """One row of a batch."""
    rng = np.random.default_rng([_EVAL_SEED, index])
    return self._convert(self._records[index], rng)

  def batches(self, batch_size: int) -> Iterator[rows.Batch]:
    """All examples; `valid` [B] is False on the rows that fill the last batch.

    Such rows are all 0, loss weights included.
    """
    empty = {k: np.zeros_like(v) for k, v in self.example(0).items()}
    for first in range(0, len(self), batch_size):
      wanted = range(first, first + batch_size)
      valid = np.array([i < len(self) for i in wanted])
      examples = [self.example(i) if i < len(self) else empty for i in wanted]
      yield {**rows.stack(examples), 'valid': valid}

  @functools.cached_property
  def examples(self) -> Sequence[Example]:
    """What decoding and metrics need of a task, in the order of the rows."""
    if self.is_text:
      raise ValueError(
        f'{self.name!r} is text: it has a loss, but nothing to answer.'
      )
    return [Example(**json.loads(record)) for record in self._records]

  def choices(self, example: Example) -> Sequence[str]:
    """The answers that rank classification chooses from; () if it does not."""
    return example.fields.get('choices', self.labels)

  def scores(
    self,
    examples: Sequence[Example],
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
    self, examples: Sequence[Example], logprobs: Sequence[float]
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

  def majority(self, examples: Sequence[Example]) -> dict[str, float]:
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

  def told(self, example: Example) -> bool:
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

  def _target(self, example: Example, text: str | None = None):
    return self.comparable(
      example.targets_text if text is None else text,
      example=example.features,
      is_target=True,
    )

  def _targets(self, examples) -> list:
    return [self._target(e) for e in examples if self.told(e)]
