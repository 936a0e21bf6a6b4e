"""Scores by hand, and against the `t5` package."""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.data import metrics, superglue

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

CB = superglue.TASKS['cb'].labels
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


def test_f1_of_class_1():
  # Said 1 twice, once rightly, of the 3 that there are: precision 1/2, recall
  # 1/3, F1 2/5.
  targets = [1, 1, 1, 0, 0]
  assert metrics.f1(targets, [1, 0, 0, 1, 0]) == {'f1': pytest.approx(40.0)}
  assert metrics.f1(targets, targets) == {'f1': 100.0}
  # What is neither 0 nor 1 counts as the wrong one of them.
  assert metrics.f1(targets, [1, -1, 7, -1, 0]) == {'f1': pytest.approx(40.0)}
  # Nobody speaks of class 1.
  assert metrics.f1([0, 0], [0, 0]) == {'f1': 0.0}


def test_matthews_correlates_classes():
  matthews = lambda *pair: metrics.matthews(*pair)['matthews_corrcoef']
  # Of 1: 1 true, 0 false; of 0: 2 true, 1 false. (1 * 2 - 0 * 1) over the root
  # of (1 + 0) (1 + 1) (2 + 0) (2 + 1).
  found = matthews([1, 1, 0, 0], [1, 0, 0, 0])
  assert found == pytest.approx(100 * 2 / 12**0.5)
  assert matthews([1, 0, 1], [1, 0, 1]) == pytest.approx(100)
  assert matthews([1, 0, 1], [0, 1, 0]) == pytest.approx(-100)
  # Three classes, 2 1 1 times asked for and 2 2 0 times said; 3 of 4 right:
  # (3 * 4 - 6) over the root of (16 - 8) (16 - 6).
  found = matthews([0, 1, 2, 0], [0, 1, 1, 0])
  assert found == pytest.approx(100 * 6 / 80**0.5)
  # What is no label is a class of its own, and never right: 2 2 0 asked for, 2
  # 1 1 said; (3 * 4 - 6) over the root of (16 - 8) (16 - 6).
  found = matthews([0, 0, 1, 1], [0, 0, 1, -1])
  assert found == pytest.approx(100 * 6 / 80**0.5)


@pytest.mark.parametrize('name', ['matthews', 'pearson', 'spearman'])
@pytest.mark.parametrize('pair', [([1, 1], [0, 1]), ([0, 1], [1, 1])])
def test_what_never_varies_correlates_with_nothing(name, pair):
  (value,) = getattr(metrics, name)(*pair).values()
  assert value == 0.0  # And no warning.


def test_pearson_and_spearman():
  # Deviations -1 0 1 and -4/3 -1/3 5/3: 3 over the root of 2 * 42/9.
  targets, predictions = [1.0, 2.0, 3.0], [1.0, 2.0, 4.0]
  assert metrics.pearson(targets, predictions) == {
    'pearson_corrcoef': pytest.approx(100 * 3 / (28 / 3) ** 0.5)
  }
  # Ranks are the same.
  assert metrics.spearman(targets, predictions) == {
    'spearman_corrcoef': pytest.approx(100)
  }
  # Ranks 1 2 3 and 3 1.5 1.5: deviations -1 0 1 and 1 -.5 -.5.
  assert metrics.spearman(targets, [9.0, 2.0, 2.0]) == {
    'spearman_corrcoef': pytest.approx(-100 * 1.5 / 3**0.5)
  }
  assert metrics.pearson([1, 2], [5, 3]) == {
    'pearson_corrcoef': pytest.approx(-100)
  }


# ---- Values in groups -------------------------------------------------------


def values(*found):
  return [{'value': value} for value in found]


def grouped(*pairs):
  return [{'value': value, 'group': group} for value, group in pairs]


# Questions a and b, their answers told in turns, and c with one.
ASKED = grouped((1, 'a'), (1, 'b'), (0, 'a'), (0, 'b'), (1, 'c'))


def test_values_may_be_scored_whatever_their_groups():
  said = values(1, 0, 0, 0, -1)
  of_values = metrics.on_values(metrics.accuracy)
  assert of_values(ASKED, said) == {'accuracy': 60.0}
  # One of three is found: precision 1, recall 1/3.
  assert metrics.f1_over_all(ASKED, said) == {'f1': pytest.approx(50.0)}


def test_all_match():
  assert metrics.all_match([1, 0], [1, 0]) == {'exact_match': 100.0}
  assert metrics.all_match([1, 0], [1, -1]) == {'exact_match': 0.0}


def test_means_over_groups():
  said = values(1, 0, 0, 0, -1)
  # a: 2 of 2; b: 1 of 2; c: 0 of 1.
  whole = metrics.mean_over_groups(metrics.all_match)(ASKED, said)
  assert whole == {'exact_match': pytest.approx(100 / 3)}
  by_group = metrics.mean_over_groups(metrics.accuracy)(ASKED, said)
  assert by_group == {'accuracy': pytest.approx((100 + 50 + 0) / 3)}
  with pytest.raises(ValueError, match='zip'):
    metrics.mean_over_groups(metrics.accuracy)(ASKED, said[1:])


def test_the_first_of_each_group_counts():
  first = metrics.first_of_each_group(metrics.accuracy)
  # a 1, b 1, c 1; what is said later does not matter.
  assert first(ASKED, values(1, 0, 7, 7, 1)) == {
    'accuracy': pytest.approx(200 / 3)
  }
  assert first(ASKED, values(0, 0, 0, 0, 1)) == {
    'accuracy': pytest.approx(100 / 3)
  }
  with pytest.raises(ValueError, match='zip'):
    first(ASKED, values(1))


def test_parity_is_one_answer_in_a_group_right_or_wrong():
  # a: 1 and 0; b: 0 twice, one of them wrong; c stands alone.
  assert metrics.parity(ASKED, values(1, 0, 0, 0, 9)) == {
    'gender_parity': pytest.approx(200 / 3)
  }
  # To say nothing twice is one answer too.
  assert metrics.parity(ASKED, values(-1, 0, -1, 1, 1)) == {
    'gender_parity': pytest.approx(200 / 3)
  }


# ---- Answers in words -------------------------------------------------------


@pytest.mark.parametrize(
  'answers, said, em, f1',
  [
    (['Ann'], 'Ann', 1, 1),
    # Case, marks, articles and spaces do not matter.
    (['the U.S.'], ' us! ', 1, 1),
    (['an apple'], 'A  apple', 1, 1),
    (['theory'], 'ory', 0, 0),  # An article is a word.
    # The best of the answers counts, for each score by itself.
    (['cat', 'the red cat'], 'red cat', 1, 1),
    (['cat', 'red dog'], 'red cat', 0, 2 / 3),  # 1 of 1, 1 of 2.
    (['red cat sat'], 'red dog', 0, 2 / 5),  # 1 of 3, 1 of 2.
    # A word said twice counts as often as it is there.
    (['cat dog'], 'cat cat', 0, 1 / 2),
    (['cat cat dog'], 'cat cat', 0, 4 / 5),
    (['cat'], '', 0, 0),
    (['the'], '', 1, 0),  # T5 finds no word in common.
  ],
)
def test_squad(answers, said, em, f1):
  assert metrics.squad([answers], [said]) == {
    'em': 100.0 * em,
    'f1': pytest.approx(100 * f1),
  }


def test_squad_is_a_mean_over_questions():
  targets = [['Ann'], ['Ben', 'Cy'], ['Dan']]
  assert metrics.squad(targets, ['ann', 'cy ran', 'no']) == {
    'em': pytest.approx(100 / 3),
    'f1': pytest.approx(100 * (1 + 2 / 3) / 3),
  }


def test_trivia_qa_makes_spaces_of_marks():
  for answer, said, squad, trivia in (
    ('U.S.', 'us', 100, 0),
    ('U.S.', 'u s', 0, 100),
    ('well-known_cat', 'the well known cat', 0, 100),
    ('‘Ann’ ´s `x`', 'ann s x', 0, 100),
  ):
    assert metrics.squad([[answer]], [said])['em'] == squad, answer
    assert metrics.trivia_qa([[answer]], [said])['em'] == trivia, answer
  # The rest is SQuAD's: 1 of 2 words, 1 of 1.
  assert metrics.trivia_qa([['cat', 'dog']], ['red cat']) == {
    'em': 0.0,
    'f1': pytest.approx(200 / 3),
  }


def test_rouge():
  # 2 of 3 words, 1 of 2 pairs of them, 2 of 3 in order.
  assert metrics.rouge(['the cat sat'], ['the cat ran']) == {
    'rouge1': pytest.approx(200 / 3),
    'rouge2': pytest.approx(50.0),
    'rougeLsum': pytest.approx(200 / 3),
  }
  # Precision 1, recall 1/2; of the one pair that was said, recall 1/3.
  for pair in (
    ('the cat sat down', 'the cat'),
    ('the cat', 'the cat sat down'),
  ):
    assert metrics.rouge(pair[:1], pair[1:]) == {
      'rouge1': pytest.approx(200 / 3),
      'rouge2': pytest.approx(50.0),
      'rougeLsum': pytest.approx(200 / 3),
    }
  # All words; 2 of 3 pairs; and each sentence for itself.
  assert metrics.rouge(['red cat . big dog'], ['big dog . red cat']) == {
    'rouge1': pytest.approx(100.0),
    'rouge2': pytest.approx(200 / 3),
    'rougeLsum': pytest.approx(100.0),
  }
  # The mean over examples; nothing said is nothing in common.
  assert metrics.rouge(['cat', 'dog'], ['cat', '']) == dict.fromkeys(
    ('rouge1', 'rougeLsum'), 50.0
  ) | {'rouge2': 0.0}


# ---- The most frequent answer -----------------------------------------------


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


def test_majority_of_values_in_groups():
  # 1 three times of five: recall 1, precision 3/5. Of three questions c alone
  # has all answers right.
  fns = superglue.TASKS['multirc'].metrics
  assert metrics.majority_baseline(ASKED, fns) == {
    'f1': pytest.approx(75.0),
    'exact_match': pytest.approx(100 / 3),
  }
  fns = superglue.TASKS['axg'].metrics
  assert metrics.majority_baseline(ASKED, fns) == {
    'accuracy': 60.0,
    'gender_parity': 100.0,
  }


def test_majority_where_several_answers_are_right():
  # Ann is right twice, each other once.
  targets = [['Ann', 'Ben'], ['Cy', 'Ann'], ['Dan']]
  expected = {'em': pytest.approx(200 / 3), 'f1': pytest.approx(200 / 3)}
  assert metrics.majority_baseline(targets, [metrics.squad]) == expected
  # In groups too: that of Dan has two examples, which count once.
  targets = grouped(*zip([*targets, ['Dan']], (0, 1, 2, 2), strict=True))
  fns = superglue.TASKS['record'].metrics
  assert metrics.majority_baseline(targets, fns) == expected


# ---- Texts and errors -------------------------------------------------------


def test_texts_come_as_bytes():
  came = [b'caf\xc3\xa9', 'café', np.array([b'caf\xc3\xa9'])[0]]
  assert metrics.texts(came) == ['café'] * 3
  assert metrics.texts(np.array([b'a', b'b'], object)) == ['a', 'b']
  assert metrics.texts([]) == []


def test_errors_name_the_numbers():
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    metrics.accuracy(['a', 'b'], ['a'])
  with pytest.raises(ValueError, match='0 targets and 0 predictions'):
    cb_f1([], [])
  with pytest.raises(ValueError, match="Target 0 is no class of \\['entail"):
    cb_f1([0], [0])


@pytest.mark.parametrize(
  'name',
  ('f1', 'matthews', 'pearson', 'spearman', 'all_match', 'squad', 'trivia_qa')
  + ('rouge', 'f1_over_all'),
)
def test_every_metric_needs_a_prediction_for_each_target(name):
  metric = getattr(metrics, name)
  target = {'squad': ['a'], 'trivia_qa': ['a'], 'rouge': 'a'}.get(name, 1)
  make = values if name == 'f1_over_all' else lambda *found: list(found)
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    metric(make(target, target), make(1))
  with pytest.raises(ValueError, match='0 targets and 0 predictions'):
    metric([], [])


# ---- The `t5` package -------------------------------------------------------

GOLDEN = sorted((DATA / 'golden').glob('t5_metrics_*.json'))


@pytest.mark.parametrize(
  'golden', GOLDEN or [None], ids=lambda p: p.stem[11:] if p else 'none'
)
def test_equal_to_t5(golden):
  if golden is None:
    pytest.skip(f'no {DATA}/golden; set ST_MOE_DATA to a folder that has it')
  from st_moe.data import tasks

  name = golden.stem.removeprefix('t5_metrics_')
  if f'super_glue_{name}' in tasks.TASKS:
    name = f'super_glue_{name}'
  task, golden = tasks.TASKS[name], json.loads(golden.read_text())
  examples = [
    {**e, 'targets_pretokenized': e['targets']}
    for e in task.load('validation', str(DATA))
  ]
  said = golden['raw_predictions']
  assert len(said) == golden['n'] == len(examples)
  if task.labels:
    assert set(said) > set(task.labels)  # Invalid answers are part of it.

  value = task.comparable() or (lambda text, **_: text)
  targets = [value(e['targets'], example=e, is_target=True) for e in examples]
  predictions = [
    value(text, example=e, is_target=False)
    for text, e in zip(said, examples, strict=True)
  ]
  for ours, theirs in (
    (plain(targets), golden['postprocessed_targets']),
    (plain(predictions), golden['postprocessed_predictions']),
  ):
    if type(ours[0]) is type(theirs[0]):  # Else they say it in another way.
      assert ours == theirs
  found = {}
  for metric in task.metrics:
    found |= metric(targets, predictions)
  expected = golden['expected']
  found = {name: found[name] for name in expected}  # We may have more.
  assert found == pytest.approx(expected, abs=1e-6)


def test_what_is_a_number_is_a_float():
  seqio = pytest.importorskip('seqio')
  Scalar = seqio.metrics.Scalar
  half = (0.5, np.float32(0.5), np.array(0.5), jnp.asarray(0.5, jnp.bfloat16))
  for value in (*half, Scalar(0.5), Scalar(np.float32(0.5))):
    found = metrics.as_float(value)
    assert type(found) is float and found == 0.5
  assert metrics.as_float(True) == metrics.as_float(1) == 1.0
  others = (None, 'text', b'text', [0.5], np.ones(1), [[1], [1, 2]], {}, 1j)
  kinds = (seqio.metrics.Text('a'), seqio.metrics.Histogram(np.ones(3)))
  assert {metrics.as_float(value) for value in (*others, *kinds)} == {None}


def plain(found):
  """As JSON has it, which knows no tuples."""
  return json.loads(json.dumps(found))
