"""Scores by hand, and against the `t5` package."""

import json
import os
import pathlib

import numpy as np
import pytest

from st_moe.data import metrics, superglue

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

CB = superglue.FORMATS['cb'].labels
cb_f1 = metrics.mean_multiclass_f1(CB)


def test_accuracy_counts_right_answers():
  # Three of four; 'maybe' is no answer, so it is a wrong one.
  targets = ['True', 'False', 'True', 'True']
  predictions = ['True', 'False', 'maybe', 'True']
  assert metrics.accuracy(targets, predictions) == {'accuracy': 75.0}


def test_accuracy_compares_numbers_too_and_never_a_number_with_its_text():
  assert metrics.accuracy(np.array([1, 0]), [1, -1]) == {'accuracy': 50.0}
  assert metrics.accuracy([1, 0], ['1', 0]) == {'accuracy': 50.0}


def test_f1_is_the_mean_over_classes():
  targets = ['entailment', 'entailment', 'contradiction', 'neutral']
  predictions = ['entailment', 'contradiction', 'contradiction', '']
  # entailment: precision 1/1, recall 1/2; contradiction: 1/2, 1/1; both have
  # F1 2/3. neutral was never said: 0. Mean of (2/3, 2/3, 0) = 4/9.
  got = cb_f1(targets, predictions)
  assert got == {'mean_3class_f1': pytest.approx(400 / 9)}


def test_f1_of_a_class_that_nobody_speaks_of_is_zero():
  assert cb_f1(['neutral'], ['neutral']) == {
    'mean_3class_f1': pytest.approx(100 / 3)
  }


def test_f1_by_class_numbers_is_f1_by_texts():
  targets, predictions = [0, 0, 1, 2], [0, 1, 1, -1]
  assert metrics.mean_multiclass_f1(3)(targets, predictions) == cb_f1(
    [CB[t] for t in targets],
    ['garbage' if p < 0 else CB[p] for p in predictions],
  )


def test_majority_says_the_most_frequent_answer():
  # Of 5: entailment 3 times. Accuracy 3/5; F1 of entailment 2 * 3 / (3 + 5).
  targets = ['neutral', 'entailment', 'entailment', 'neutral', 'entailment']
  got = metrics.majority_baseline(targets, [cb_f1, metrics.accuracy])
  assert got == {
    'mean_3class_f1': pytest.approx(100 * (3 / 4) / 3),
    'accuracy': 60.0,
  }


def test_majority_does_not_depend_on_the_order_of_examples():
  # One each: the first by name, and it alone is right.
  for targets in (['a', 'b'], ['b', 'a']):
    says_a = lambda targets, predictions: {'a': predictions.count('a')}
    assert metrics.majority_baseline(targets, [says_a]) == {'a': 2}


def test_errors_name_the_numbers():
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    metrics.accuracy(['a', 'b'], ['a'])
  with pytest.raises(ValueError, match='0 targets and 0 predictions'):
    cb_f1([], [])
  with pytest.raises(ValueError, match="Target 0 is no class of \\['entail"):
    cb_f1([0], [0])


@pytest.mark.parametrize('name', ['boolq', 'cb', 'copa'])
def test_equal_to_t5(name):
  path = DATA / 'golden' / f't5_metrics_{name}.json'
  if not path.exists():
    pytest.skip(f'no {path}; set ST_MOE_DATA to a folder that has it')
  golden = json.loads(path.read_text())
  labels = superglue.FORMATS[name].labels
  numbers = golden['postprocessed_targets'], golden['postprocessed_predictions']
  texts = [labels[t] for t in numbers[0]], golden['raw_predictions']
  assert 'garbage' in texts[1]  # Invalid answers are part of the story.
  for (targets, predictions), classes in ((numbers, 3), (texts, CB)):
    got = metrics.accuracy(targets, predictions)
    if name == 'cb':
      got |= metrics.mean_multiclass_f1(classes)(targets, predictions)
    assert got == pytest.approx(golden['expected'], abs=1e-9)
