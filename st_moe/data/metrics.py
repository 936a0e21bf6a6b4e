"""Scores as T5 reports them: functions of targets and predictions, in percent.

The signature is the one that SeqIO asks of a task's `metric_fns`. What they
compare is what a task's postprocessor makes of texts: class numbers, where -1
is no label at all, so wrong and never an error; texts; or {'value': ...}, of a
target with its 'group'.
"""

import collections
import re
import string
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
    scores = [_f1(targets, predictions, label) for label in labels]
    return {f'mean_{len(labels)}class_f1': 100 * float(np.mean(scores))}

  return metric


def _f1(targets, predictions, label) -> float:
  asked = np.array([target == label for target in targets])
  given = np.array([prediction == label for prediction in predictions])
  # 2pr / (p + r) for precision p and recall r, without their divisions.
  return 2 * (asked & given).sum() / max(1, (asked + 0 + given).sum())


def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """F1 of class 1; a prediction that is neither 0 nor 1 is the wrong one."""
  _check(targets, predictions)
  predictions = [
    p if p in (0, 1) else 1 - t
    for t, p in zip(targets, predictions, strict=True)
  ]
  return {'f1': 100 * float(_f1(targets, predictions, 1))}


def matthews(
  targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """Matthews' correlation of class numbers; 0 where one side never varies."""
  _check(targets, predictions)
  classes = sorted({*targets, *predictions})
  one_hot = lambda found: np.array([[v == c for c in classes] for v in found])
  a, b = (x - x.mean(0) for x in (one_hot(targets), one_hot(predictions)))
  spread = np.sqrt((a * a).sum() * (b * b).sum())
  value = (a * b).sum() / spread if spread else 0.0
  return {'matthews_corrcoef': 100 * float(value)}


def pearson(
  targets: Sequence[float], predictions: Sequence[float]
) -> dict[str, float]:
  """Correlation of numbers; 0 where one side never varies (T5: nan)."""
  return {'pearson_corrcoef': _correlation('pearsonr', targets, predictions)}


def spearman(
  targets: Sequence[float], predictions: Sequence[float]
) -> dict[str, float]:
  """Correlation of ranks; 0 where one side never varies (T5: nan)."""
  return {'spearman_corrcoef': _correlation('spearmanr', targets, predictions)}


def _correlation(kind: str, targets, predictions) -> float:
  from scipy import stats

  _check(targets, predictions)
  if min(len({*targets}), len({*predictions})) == 1:
    return 0.0
  return 100 * float(getattr(stats, kind)(targets, predictions)[0])


# Values in groups.


def on_values(metric: MetricFn) -> MetricFn:
  """`metric` of the values, whatever their groups."""

  def of_values(targets, predictions):
    return metric(
      [t['value'] for t in targets], [p['value'] for p in predictions]
    )

  return of_values


f1_over_all = on_values(f1)  # MultiRC's F1a: over all answers.


def all_match(
  targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
  """100 where every prediction is right, else 0."""
  _check(targets, predictions)
  return {'exact_match': 100.0 * all(_same(targets, predictions))}


def mean_over_groups(metric: MetricFn) -> MetricFn:
  """`metric` of each group by itself, averaged over groups."""

  def of_groups(targets, predictions):
    groups = collections.defaultdict(lambda: ([], []))
    for target, prediction in zip(targets, predictions, strict=True):
      groups[target['group']][0].append(target['value'])
      groups[target['group']][1].append(prediction['value'])
    found = [metric(*pair) for pair in groups.values()]
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]}

  return of_groups


def first_of_each_group(metric: MetricFn) -> MetricFn:
  """`metric` of one example a group: ReCoRD has one for every right answer."""

  def of_firsts(targets, predictions):
    firsts = {}
    for target, prediction in zip(targets, predictions, strict=True):
      pair = target['value'], prediction['value']
      firsts.setdefault(target['group'], pair)
    return metric(*zip(*firsts.values(), strict=True))

  return of_firsts


def parity(targets, predictions) -> dict[str, float]:
  """Groups in a hundred in which all rows get one answer, right or wrong."""
  groups = collections.defaultdict(set)
  for target, prediction in zip(targets, predictions, strict=True):
    groups[target['group']].add(prediction['value'])
  same = [len(answers) == 1 for answers in groups.values()]
  return {'gender_parity': 100 * float(np.mean(same))}


# Answers to questions, in words.


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact match and word F1 with the best of the answers (SQuAD v1.1)."""
  return _answers(targets, predictions, string.punctuation, '')


def trivia_qa(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """As `squad`, with the official normalisation of TriviaQA."""
  return _answers(targets, predictions, string.punctuation + '‘’´`_', ' ')


def _answers(targets, predictions, punctuation: str, replaced: str):
  _check(targets, predictions)
  table = str.maketrans(dict.fromkeys(punctuation, replaced))

  def normal(text: str) -> str:
    text = re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(table))
    return ' '.join(text.split())

  exact, overlap = [], []
  for answers, said in zip(targets, predictions, strict=True):
    answers, said = [normal(a) for a in answers], normal(said)
    exact.append(any(a == said for a in answers))
    overlap.append(max(_word_f1(a.split(), said.split()) for a in answers))
  return {
    'em': 100 * float(np.mean(exact)),
    'f1': 100 * float(np.mean(overlap)),
  }


def _word_f1(target: list[str], said: list[str]) -> float:
  common = (collections.Counter(target) & collections.Counter(said)).total()
  return 2 * common / (len(target) + len(said)) if common else 0.0


def rouge(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """ROUGE-1, -2 and -Lsum, mean F-measures of the `rouge-score` package.

  T5 reports the median of a bootstrap of the same mean, which is another number
  each time.
  """
  from rouge_score import rouge_scorer

  _check(targets, predictions)
  names = ('rouge1', 'rouge2', 'rougeLsum')
  scorer = rouge_scorer.RougeScorer(names)
  lines = lambda text: text.replace(' . ', ' .\n')  # Lsum takes sentences.
  found = [
    scorer.score(lines(target), lines(said))
    for target, said in zip(targets, predictions, strict=True)
  ]
  mean = lambda name: float(np.mean([f[name].fmeasure for f in found]))
  return {name: 100 * mean(name) for name in names}


def majority_baseline(
  targets: Sequence[Any], metric_fns: Sequence[MetricFn]
) -> dict[str, float]:
  """The scores of answering every question with the most frequent target."""
  grouped = isinstance(targets[0], Mapping)
  values = [t['value'] if grouped else t for t in targets]
  # Where several answers are right, each of them is an answer.
  several = isinstance(values[0], list | tuple)
  counts = collections.Counter(
    v for value in values for v in (value if several else [value])
  )
  # Of equally frequent ones the first by name, whatever the order of examples.
  most = min(counts, key=lambda label: (-counts[label], str(label)))
  scores = {}
  for metric_fn in metric_fns:
    said = [{'value': most} if grouped else most] * len(targets)
    scores.update(metric_fn(targets, said) or {})
  return scores


def as_float(value: Any) -> float | None:
  """A metric that SeqIO would log as a number; None: a text, an array, ..."""
  value = getattr(value, 'value', value)  # `seqio.metrics.Scalar`.
  try:
    array = np.asarray(value)
    return None if array.ndim or isinstance(value, str) else float(array)
  except (TypeError, ValueError):
    return None


def texts(values: Sequence[Any]) -> list[str]:
  """Texts that came through TensorFlow, which makes bytes of them."""
  return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def _same(targets: Sequence[Any], predictions: Sequence[Any]) -> list[bool]:
  # Pair by pair: numpy would turn a mix of texts and numbers into texts.
  return [bool(t == p) for t, p in zip(targets, predictions, strict=True)]


def _check(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(
      f'{len(targets)} targets and {len(predictions)} predictions: a metric '
      'needs one prediction for each target, and at least one.'
    )
