"""Scores as T5 reports them: functions of targets and predictions, in percent.

The signature is the one that seqio asks of a task's `metric_fns`. Values are
compared as they come, label texts or class numbers; a prediction that is no
label at all ('', 'maybe', -1) is wrong, never an error.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MetricFn = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]


def accuracy(
  targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
  """Right answers in a hundred."""
  _check(targets, predictions)
  return {'accuracy': 100 * float(np.mean(_same(targets, predictions)))}


def mean_multiclass_f1(labels: int | Sequence[Any]) -> MetricFn:
  """F1 of each class against the others, averaged over classes (SuperGLUE CB).

  `labels` are all classes, or how many there are if they are numbers. A class
  that is neither asked for nor predicted has an F1 of 0, as in T5.
  """
  labels = range(labels) if isinstance(labels, int) else tuple(labels)

  def metric(
    targets: Sequence[Any], predictions: Sequence[Any]
  ) -> dict[str, float]:
    _check(targets, predictions)
    for target in targets:
      if target not in labels:
        raise ValueError(
          f'Target {target!r} is no class of {list(labels)}; give the metric '
          'all labels, as they are written in the targets.'
        )
    scores = []
    for label in labels:
      asked = np.array([target == label for target in targets])
      given = np.array([prediction == label for prediction in predictions])
      # 2pr / (p + r) for precision p and recall r, without their divisions.
      scores.append(
        2 * (asked & given).sum() / max(1, (asked + 0 + given).sum())
      )
    return {f'mean_{len(labels)}class_f1': 100 * float(np.mean(scores))}

  return metric


def majority_baseline(
  targets: Sequence[Any], metric_fns: Sequence[MetricFn]
) -> dict[str, float]:
  """The scores of answering every question with the most frequent target."""
  counts = collections.Counter(targets)
  # Of equally frequent ones the first by name, whatever the order of examples.
  most = min(counts, key=lambda label: (-counts[label], str(label)))
  scores = {}
  for metric_fn in metric_fns:
    scores.update(metric_fn(targets, [most] * len(targets)))
  return scores


def _same(targets: Sequence[Any], predictions: Sequence[Any]) -> list[bool]:
  # Pair by pair: numpy would turn a mix of texts and numbers into texts.
  return [bool(t == p) for t, p in zip(targets, predictions, strict=True)]


def _check(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(
      f'{len(targets)} targets and {len(predictions)} predictions: a metric '
      'needs one prediction for each target, and at least one.'
    )
