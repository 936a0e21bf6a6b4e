"""Scores of a model whose every probability can be read from a table."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import sharding
from st_moe.config import Capacity, Config, DataConfig, EvalConfig, StackConfig
from st_moe.data import superglue, vocabulary
from st_moe.data.eval_data import EvalData, Example
from st_moe.data.metrics import accuracy
from st_moe.data.task import UNKNOWN, TextTask
from st_moe.infer.evaluator import Evaluator, flat
from st_moe.model.transformer import Transformer
from tests.helpers import random_params, tiny

VOCABULARY = vocabulary.load('bytes')
EOS, SENTINEL = VOCABULARY.eos, VOCABULARY.sentinel(0)
LABELS = ('no', 'yes')
CONFIG = Config(
  model=tiny(vocab_size=VOCABULARY.size),
  data=DataConfig(batch_size=5, inputs_length=4, targets_length=12),
)
# What the model says to each question; 'no' and 'yes' are the labels.
SPOKEN = {
  1: 'yes',
  2: 'no',
  3: 'nay',
  4: '<extra_id_0>yes',
  5: 'True',
  6: 'False',
  7: 'yes, but',
}


@dataclasses.dataclass
class Table:
  """P(next | question, token before) as a table: no attention, no experts."""

  config: object

  def clone(self, config):
    return Table(config)

  def apply(self, variables, *args, method='__call__', mutable=None, **kwargs):
    if method == 'encode':
      return self._encode(*args)
    if method == 'project':
      return args[0]  # They are logits already.
    if method == 'decode':
      encoded, _, inputs, _ = args
    else:
      encoded = self._encode(kwargs['encoder_input_tokens'])
      inputs = kwargs['decoder_input_tokens']
    # Several rows may share a question.
    encoded = encoded.repeat(len(inputs) // len(encoded))
    logits = variables['params'][encoded[:, None], inputs]
    return (logits, {'cache': {}}) if mutable else logits

  def _encode(self, tokens):
    return tokens[:, 0]  # The question is its first token.


@functools.cache
def table():
  size = VOCABULARY.size
  found = np.random.default_rng(0).standard_normal((8, size, size))
  for question, text in SPOKEN.items():
    ids = [0, *_ids(text), EOS]
    for before, after in zip(ids, ids[1:], strict=False):
      found[question, before, after] += 8
  return found.astype('f4')


def _ids(text):
  begins = [SENTINEL] * text.startswith('<extra_id_0>')
  return begins + VOCABULARY.encode(text.removeprefix('<extra_id_0>'))


class Source(EvalData):
  """Rows (question, answer) or (question, answer, fields), as a task or text.

  The metrics and choices are those of real data.
  """

  def __init__(self, rows, name='quiz', *, is_text=False, begins=(), **task):
    task = TextTask(None, **{'metrics': (accuracy,), 'labels': LABELS, **task})
    self.name, self.is_text, self._rows = name, is_text, rows
    self.labels, self.begins = task.labels, list(begins)
    self.metric_fns = task.metrics
    self.comparable = task.comparable() or (lambda text, **_: text)

  def __len__(self):
    return len(self._rows)

  def example(self, index):
    question, answer = self._rows[index]
    targets = [*_ids(answer), EOS]
    targets = np.pad(targets, (0, 12 - len(targets))).astype(np.int32)
    return {
      'encoder_input_tokens': np.array([question, 9, 0, 0], np.int32),
      'decoder_input_tokens': np.roll(targets, 1) * (np.arange(12) > 0),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets > 0).astype('f4'),
      'task': np.int32(0),
    }

  @functools.cached_property
  def examples(self):
    assert not self.is_text
    return [
      Example(
        [question, *VOCABULARY.encode('hi'), EOS],
        [*self.begins, *_ids(answer), EOS],
        f'question {question}',
        answer,
        f'q{i}',
        dict(*fields),
      )
      for i, (question, answer, *fields) in enumerate(self._rows)
    ]


def _rows():
  rng = np.random.default_rng(1)
  return [(int(rng.integers(1, 4)), LABELS[rng.integers(2)]) for _ in range(20)]


ROWS = _rows()


def _text(rows=ROWS):
  return Source(rows, 'text', is_text=True, labels=())


@functools.cache
def _evaluator(devices=1, **asked):
  config = dataclasses.replace(CONFIG, evaluate=EvalConfig(**asked))
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  return Evaluator(Table(config.model), config, VOCABULARY, mesh)


def _measure(source, **asked):
  (found,) = _measure_all([source], **asked).values()
  return found


def _measure_all(sources, **asked):
  return _evaluator(**asked).measure(jnp.asarray(table()), sources)


def log_probability(question, answer, begins=()):
  """Of an answer's bytes and its EOS, one after the other."""
  rows, total, before = table()[question].astype(float), 0, 0
  for token in [*begins, *_ids(answer), EOS]:
    row = rows[before]
    total += row[token] - math.log(np.exp(row).sum())
    before = token
  return total


def ranked(question, labels=LABELS):
  """The label with the largest score; 'nay' is none, so it takes a real one."""
  return max(labels, key=lambda label: log_probability(question, label))


def _predictions(rows, by='rank'):
  return [row['prediction'] for row in rows if row['by'] == by]


# Ranking and loss.


def test_rank_classification_takes_the_label_with_the_larger_score():
  metrics, rows = _measure(Source(ROWS))
  assert _predictions(rows) == [ranked(q) for q, _ in ROWS]
  assert [ranked(q) for q in (1, 2)] == ['yes', 'no']
  hits = sum(ranked(q) == answer for q, answer in ROWS)
  assert metrics['accuracy'] == 100 * hits / 20
  most = max(sum(answer == label for _, answer in ROWS) for label in LABELS)
  assert metrics['majority_accuracy'] == 100 * most / 20
  assert metrics['examples'] == 20
  question, answer = ROWS[3]
  assert rows[3] == {
    'idx': 'q3',
    'by': 'rank',
    'input': f'question {question}',
    'target': answer,
    'prediction': ranked(question),
    'score': pytest.approx(
      log_probability(question, ranked(question)), abs=1e-4
    ),
  }


def test_an_input_without_a_text_is_read_from_its_ids():
  source = Source([(1, 'yes')])
  (example,) = source.examples
  source.examples = [dataclasses.replace(example, inputs_text='')]
  _, rows = _measure(source)
  assert rows[0]['input'] == 'hi'


def test_an_answer_counts_with_its_end():
  """Or 'ye' would beat every longer answer that begins with it."""
  _, rows = _measure(Source([(1, 'yes')] * 5, labels=('ye', 'yes')))
  assert _predictions(rows) == ['yes'] * 5


def test_five_labels_of_ten_bytes():
  """Answers are padded to a shape that tasks share; padding never wins."""
  labels = ('no', 'yes', 'a', 'b', 'tenletters')
  _, rows = _measure(Source(ROWS, labels=labels))
  assert _predictions(rows) == [ranked(q, labels) for q, _ in ROWS]


def test_loss_is_that_of_every_target_token_once():
  # 'no' has 3 tokens with its EOS and 'yes' 4: a mean of means would differ.
  tokens = sum(len(answer) + 1 for _, answer in ROWS)
  total = sum(log_probability(q, answer) for q, answer in ROWS)
  for source in (Source(ROWS), _text()):
    metrics, _ = _measure(source)
    assert metrics['loss'] == pytest.approx(-total / tokens, rel=1e-6)


def test_a_target_that_is_no_label_is_scored_and_never_chosen():
  metrics, rows = _measure(Source([(3, 'nay'), (3, 'yes')]))
  assert log_probability(3, 'nay') > log_probability(3, ranked(3))
  assert _predictions(rows) == [ranked(3)] * 2
  total = log_probability(3, 'nay') + log_probability(3, 'yes')
  assert metrics['loss'] == pytest.approx(-total / 8, rel=1e-6)


def test_each_example_may_have_choices_of_its_own():
  """As ReCoRD's entities, beside the labels of all others."""
  own = ('a', 'tenletters', 'nay')
  source = Source([
    (3, 'nay', {'choices': own}),
    (3, 'no'),
    (1, 'nay', {'choices': own}),
    (2, 'no', {'choices': ('no',)}),
  ])  # fmt: skip
  _, rows = _measure(source)
  assert ranked(3, own) == 'nay' != ranked(3)
  assert _predictions(rows) == ['nay', ranked(3), ranked(1, own), 'no']
  for row, question in zip(rows, (3, 3, 1, 2), strict=True):
    assert row['score'] == pytest.approx(
      log_probability(question, row['prediction']), abs=1e-4
    )


def test_ranking_by_the_mean_of_tokens():
  """A long answer loses by its sum and may win by its mean."""
  labels = ('yes', 'tenletters')
  score = lambda q, label: log_probability(q, label)
  mean = lambda q, label: score(q, label) / (len(label) + 1)
  # Neither is what the model would say to question 2.
  assert score(2, 'yes') > score(2, 'tenletters')
  assert mean(2, 'yes') < mean(2, 'tenletters')
  source = Source([(2, 'yes'), (1, 'yes')], labels=labels)
  by_sum, by_mean = (
    _measure(source, decode=True, length_normalized=n) for n in (False, True)
  )
  assert _predictions(by_sum[1]) == ['yes', 'yes']
  assert _predictions(by_mean[1]) == ['tenletters', 'yes']
  assert by_mean[1][0]['score'] == pytest.approx(
    mean(2, 'tenletters'), abs=1e-5
  )
  # Of what is said as well: 'yes' and its end are four tokens.
  assert by_mean[1][3]['by'] == 'decoding'
  assert by_mean[1][3]['score'] == pytest.approx(by_sum[1][3]['score'] / 4)
  assert by_mean[0]['loss'] == by_sum[0]['loss']


# Decoding.


def test_decoding_beside_ranking():
  metrics, rows = _measure(Source(ROWS), decode=True)
  assert [row['by'] for row in rows] == ['rank'] * 20 + ['decoding'] * 20
  assert [row['idx'] for row in rows] == [f'q{i}' for i in range(20)] * 2
  assert _predictions(rows) == [ranked(q) for q, _ in ROWS]
  assert _predictions(rows, 'decoding') == [SPOKEN[q] for q, _ in ROWS]
  for row, (question, _) in zip(rows[20:], ROWS, strict=True):
    score = log_probability(question, SPOKEN[question])
    assert row['score'] == pytest.approx(score, abs=1e-4)
  # Whoever may say anything is wrong about question 3 every time.
  hits = sum(SPOKEN[q] == answer for q, answer in ROWS)
  assert metrics['decoded_accuracy'] == 100 * hits / 20
  assert metrics['decoded_accuracy'] < metrics['accuracy']


def test_a_task_without_labels_is_decoded():
  metrics, rows = _measure(Source(ROWS, labels=()))
  assert 'accuracy' not in metrics and len(rows) == 20
  assert _predictions(rows, 'decoding') == [SPOKEN[q] for q, _ in ROWS]
  assert metrics['majority_accuracy'] >= 50


def test_what_is_longer_than_every_label_errs():
  """It is cut where the longest label would have ended, not before."""
  source = Source([(7, 'yes'), (1, 'yes')])
  metrics, rows = _measure(source, decode=True)
  assert _predictions(rows, 'decoding') == ['yes,', 'yes']
  assert metrics['decoded_accuracy'] == 50
  # Without labels there is room for any target: 12 tokens.
  _, rows = _measure(Source([(7, 'yes')], labels=()))
  assert _predictions(rows, 'decoding') == ['yes, but']


def test_answers_that_begin_with_a_sentinel():
  """Scored with it, said with it, compared without it."""
  source = Source([(4, 'yes'), (1, 'yes'), (4, 'no')], begins=[SENTINEL])
  metrics, rows = _measure(source, decode=True)
  score = functools.partial(log_probability, begins=[SENTINEL])
  assert _predictions(rows)[0] == 'yes'
  assert rows[0]['score'] == pytest.approx(score(4, 'yes'), abs=1e-4)
  # Question 1 is answered without: the bytes count all the same.
  assert _predictions(rows, 'decoding') == ['yes', 'yes', 'yes']
  assert metrics['decoded_accuracy'] == pytest.approx(100 * 2 / 3)
  assert rows[3]['score'] == pytest.approx(score(4, 'yes'), abs=1e-4)
  total = score(4, 'yes') + score(1, 'yes') + score(4, 'no')
  assert metrics['loss'] == pytest.approx(-total / (5 + 5 + 4), rel=1e-6)
  # Elsewhere a sentinel is a part of what was said.
  _, rows = _measure(Source([(4, 'yes')], labels=()))
  assert _predictions(rows, 'decoding') == ['<extra_id_0>yes']


# What is compared.


def test_groups_of_answers():
  """MultiRC: T F | T F, of which the model gets T F | T T."""
  spec = superglue.TASKS['multirc']
  group = lambda n: {'idx/question': n}
  source = Source(
    [(5, 'True', group(0)), (6, 'False', group(0)),
     (5, 'True', group(1)), (5, 'False', group(1))],
    labels=spec.labels, metrics=spec.metrics, postprocess=spec.postprocess,
  )  # fmt: skip
  metrics, rows = _measure(source, decode=True)
  assert _predictions(rows) == ['True', 'False', 'True', 'True']
  # Two hits, one false alarm, no miss: 2 * 2 / (2 * 2 + 1).
  assert metrics['f1'] == metrics['decoded_f1'] == pytest.approx(80)
  assert metrics['exact_match'] == metrics['decoded_exact_match'] == 50
  # Of equally frequent answers 0 comes first: nothing is found.
  assert metrics['majority_f1'] == metrics['majority_exact_match'] == 0


def test_a_referent_is_a_label():
  """WSC: right is to name the noun where it is meant, another where not."""
  spec = superglue.TASKS['wsc']
  source = Source(
    [(1, 'yes', {'label': 1}), (1, 'the Yes', {'label': 1}),
     (2, 'dog', {'label': 1}), (2, 'dog', {'label': 0})],
    labels=spec.labels, metrics=spec.metrics, postprocess=spec.postprocess,
  )  # fmt: skip
  metrics, rows = _measure(source)
  assert _predictions(rows, 'decoding') == ['yes', 'yes', 'no', 'no']
  assert metrics['decoded_accuracy'] == 75
  assert metrics['majority_accuracy'] == 75


def test_a_test_split_has_predictions_and_no_scores():
  hidden = [(q, UNKNOWN) for q, _ in ROWS]
  metrics, rows = _measure(Source(hidden), decode=True)
  assert metrics == {'examples': 20}
  assert _predictions(rows) == [ranked(q) for q, _ in ROWS]
  assert _predictions(rows, 'decoding') == [SPOKEN[q] for q, _ in ROWS]
  assert {row['target'] for row in rows} == {UNKNOWN}
  # Nor where answers are decoded alone.
  metrics, rows = _measure(Source(hidden, labels=()))
  assert metrics == {'examples': 20}
  assert _predictions(rows, 'decoding') == [SPOKEN[q] for q, _ in ROWS]


def test_what_is_told_is_scored():
  """Rows without an answer are answered and count nowhere."""
  few = ROWS[:6]
  mixed = [few[0], (2, UNKNOWN), *few[1:], (1, UNKNOWN)]
  found, rows = _measure(Source(mixed), decode=True)
  wanted, _ = _measure(Source(few), decode=True)
  assert found.pop('examples') == 8 and wanted.pop('examples') == 6
  assert found == pytest.approx(wanted, rel=1e-5)
  assert len(_predictions(rows)) == 8


def test_the_test_split_of_wsc_names_a_noun_and_no_label():
  """Nobody knows whether the noun is meant; a submission needs it."""
  spec = superglue.TASKS['wsc']
  source = Source(
    [(1, 'yes', {'label': -1}), (2, 'dog', {'label': -1})],
    labels=spec.labels,
    metrics=spec.metrics,
    postprocess=spec.postprocess,
  )
  metrics, rows = _measure(source)
  assert metrics == {'examples': 2}
  assert [row['target'] for row in rows] == ['yes', 'dog']
  assert _predictions(rows, 'decoding') == ['yes', 'no']
  assert _evaluator().names([source]) == ['eval/quiz/examples']


def test_metrics_of_scores_get_those_of_the_targets():
  mean = lambda targets, scores: {'mean_score': sum(scores) / len(scores)}
  sure = lambda targets, predictions, aux: {'sure': sum(aux['scores'])}
  rows = [*ROWS[:4], (2, UNKNOWN)]
  source = Source(rows, labels=(), metrics=())
  source.score_fns = (mean,)
  found, said = _measure(source)
  wanted = sum(log_probability(*row) for row in ROWS[:4]) / 4
  assert found['mean_score'] == pytest.approx(wanted, rel=1e-5)
  # Nothing compares what it would have said, so it says nothing.
  assert said == [] and _evaluator().names([source]) == [
    f'eval/quiz/{name}' for name in found
  ]
  source.aux_fns = (sure,)
  found, said = _measure(source)
  assert _predictions(said, 'decoding') == [SPOKEN[q] for q, _ in rows]
  wanted = sum(log_probability(q, SPOKEN[q]) for q, _ in ROWS[:4])
  assert found['decoded_sure'] == pytest.approx(wanted, rel=1e-4)


# Batches, devices, several sources.


def test_a_ragged_end_counts_once():
  # 7 + 7 + 6 and one row of filling; 5 + 5 + 5 + 5 without any.
  for source in (Source(ROWS), _text()):
    seven, even = (_measure(source, batch_size=n, decode=True) for n in (7, 5))
    _equal(seven, even)


def _equal(found, wanted):
  close = functools.partial(pytest.approx, rel=1e-5)
  assert found[0] == close(wanted[0])
  assert len(found[1]) == len(wanted[1])
  for a, b in zip(found[1], wanted[1], strict=True):
    assert a.pop('score') == close(b.pop('score'))
    assert a == b


def test_a_limit_of_batches():
  metrics, rows = _measure(Source(ROWS), batch_size=4, batches=2)
  assert metrics['examples'] == len(rows) == 8
  hits = sum(ranked(q) == answer for q, answer in ROWS[:8])
  assert metrics['accuracy'] == 100 * hits / 8
  few, eight = (
    _measure(_text(rows), batch_size=4, batches=n)
    for rows, n in ((ROWS, 2), (ROWS[:8], 0))
  )
  assert few == eight
  # Batches of training, where no size is said: 5.
  assert _measure(Source(ROWS), batches=1)[0]['examples'] == 5


def test_text_has_a_loss_and_no_answers():
  metrics, rows = _measure(_text(), decode=True)
  assert list(metrics) == ['loss'] and rows == []


def _several():
  return [
    Source(ROWS[:7]),
    _text(),
    Source(ROWS[7:], 'free', labels=()),
    Source([(5, 'True'), (6, 'False')], 'bool', labels=('False', 'True')),
  ]


def test_sources_together_are_what_each_is_alone():
  """Their questions share batches."""
  told = []
  evaluator = _evaluator(decode=True)
  params = jnp.asarray(table())
  together = evaluator.measure(params, _several(), progress=told.append)
  assert list(together) == ['quiz', 'text', 'free', 'bool']
  assert sum(told) == 22 and len(told) < 10
  for source in _several():
    _equal(_measure(source, decode=True), together.pop(source.name))


def test_eight_devices_measure_as_one():
  eight, one = (
    _measure_all(_several(), batch_size=8, decode=True, devices=n)
    for n in (8, 1)
  )
  for name, found in eight.items():
    _equal(found, one[name])


# Names.

KINDS = {
  'labels': {},
  'free': {'labels': ()},
  'text': {'labels': (), 'is_text': True},
  'hidden': {'rows': [(1, UNKNOWN)] * 3},
  'half hidden': {'rows': [(1, UNKNOWN)] * 60 + [(1, 'yes')]},
  'choices': {'rows': [(1, 'yes', {'choices': ('no', 'yes')})], 'labels': ()},
  # More than are looked at.
  'sixty': {'rows': [(1, 'yes')] * 60},
  # Somebody's own metric.
  'slash': {'metrics': (accuracy, lambda t, p: {'f1/macro': 1.0})},
}


@pytest.mark.parametrize('decode', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_names_are_known_before_anything_is_measured(kind, decode):
  source = Source(**{'rows': ROWS, **KINDS[kind]})
  evaluator = _evaluator(decode=decode)
  found = evaluator(jnp.asarray(table()), [source])
  assert set(evaluator.names([source])) == set(found)


def test_names_of_several_sources():
  found = _evaluator()(jnp.asarray(table()), [Source(ROWS[:5]), _text()])
  assert set(found) == {
    'eval/quiz/loss',
    'eval/quiz/accuracy',
    'eval/quiz/majority_accuracy',
    'eval/quiz/examples',
    'eval/text/loss',
  }


# SuperGLUE's average.

# Of each task what ranking finds, a metric each; of WSC, decoding.
FOUND = {
  'boolq': {'accuracy': 80.0},
  'cb': {'mean_3class_f1': 60.0, 'accuracy': 90.0},
  'copa': {'accuracy': 70.0},
  'multirc': {'f1': 50.0, 'exact_match': 30.0},
  'record': {'f1': 20.0, 'em': 10.0},
  'rte': {'accuracy': 85.0},
  'wic': {'accuracy': 65.0},
  'wsc': {'decoded_accuracy': 55.0},
}


def _superglue(found, suffix=''):
  return {
    f'super_glue_{task}{suffix}': ({**metrics, 'examples': 9, 'loss': 1.0}, [])
    for task, metrics in found.items()
  }


def _averages(measured):
  prefix = 'eval/super_glue/'
  return {
    name.removeprefix(prefix): value
    for name, value in flat(measured).items()
    if name.startswith(prefix)
  }


def test_the_average_is_of_tasks_not_of_metrics():
  # CB counts as 75, MultiRC as 40, ReCoRD as 15.
  total = 80 + 75 + 70 + 40 + 15 + 85 + 65 + 55
  assert _averages(_superglue(FOUND)) == {'average': total / 8}
  found = flat(_superglue(FOUND))
  assert found['eval/super_glue_cb/accuracy'] == 90
  # Diagnostics and others do not count.
  assert _averages({
    **_superglue(FOUND),
    **_superglue({'axb': {'accuracy': 0.0}, 'axg': {'accuracy': 0.0}}),
    'tiny_boolq': ({'accuracy': 1.0}, []),
  }) == {'average': total / 8}  # fmt: skip


def test_tasks_with_sentinels_have_an_average_of_their_own():
  wrong = {task: dict.fromkeys(of, 0.0) for task, of in FOUND.items()}
  found = flat({**_superglue(FOUND), **_superglue(wrong, '_1_sentinel')})
  averages = {k: v for k, v in found.items() if k.endswith('/average')}
  assert averages == {
    'eval/super_glue/average': 485 / 8,
    'eval/super_glue_sentinel/average': 0.0,
  }


def test_each_way_has_its_average():
  every = {
    task: {
      name: value
      for metric, ranked in metrics.items()
      for plain in [metric.removeprefix('decoded_')]
      for name, value in {
        metric: ranked,
        f'decoded_{plain}': ranked if task == 'wsc' else ranked - 8,
        f'majority_{plain}': ranked - 4,
      }.items()
    }
    for task, metrics in FOUND.items()
  }
  assert _averages(_superglue(every)) == {
    'average': 485 / 8,
    'decoded_average': (485 - 7 * 8) / 8,  # All but WSC's are 8 lower.
    'majority_average': 485 / 8 - 4,
  }


@pytest.mark.parametrize('missing', ['boolq', 'wsc'])
def test_there_is_no_average_of_seven_tasks(missing):
  seven = {k: v for k, v in FOUND.items() if k != missing}
  assert _averages(_superglue(seven)) == {}
  half = {**FOUND, 'cb': {'accuracy': 90.0}}
  assert _averages(_superglue(half)) == {}


def test_the_eight_tasks_measured():
  """From questions to the average, which `names` knows of."""
  sources = []
  for task in superglue.COUNTED:
    spec = superglue.TASKS[task]
    answers = spec.labels[:2] or ('yes', 'no')
    rows = [
      (
        1 + n % 2,
        answer,
        {
          **{'idx/question': n, 'idx/passage': 0, 'idx/query': n},
          **{'answers': [answer], 'label': 1},
          **({'choices': ['yes', 'no', 'nay']} if task == 'record' else {}),
        },
      )
      for n, answer in enumerate(answers * 2)
    ]
    sources.append(
      Source(
        rows, f'super_glue_{task}', labels=spec.labels, metrics=spec.metrics,
        postprocess=spec.postprocess,
      )
    )  # fmt: skip
  evaluator = _evaluator()
  found = evaluator(jnp.asarray(table()), sources)
  score = lambda name: found[f'eval/super_glue_{name}']
  # To odd questions the model says 'yes', to even ones 'no'.
  assert score('record/em') == score('wsc/decoded_accuracy') == 100
  scores = [
    score('boolq/accuracy'),
    (score('cb/mean_3class_f1') + score('cb/accuracy')) / 2,
    score('copa/accuracy'),
    (score('multirc/f1') + score('multirc/exact_match')) / 2,
    100,
    score('rte/accuracy'),
    score('wic/accuracy'),
    100,
  ]
  assert found['eval/super_glue/average'] == pytest.approx(sum(scores) / 8)
  assert 'eval/super_glue/majority_average' in found
  assert 'eval/super_glue/decoded_average' not in found
  assert evaluator.names(sources) == list(found)


# Capacity.


@functools.cache
def _sparse(dropless):
  """An evaluator of a real model, one place for two tokens of four experts."""
  model = Transformer(
    tiny(
      vocab_size=VOCABULARY.size,
      encoder=StackConfig(1, 1, 0, group_size=16),
      decoder=StackConfig(1, 1, 0, group_size=8),
      moe={'eval_capacity': Capacity(0.5, minimum=1), 'extra_ffn': 'none'},
    )
  )
  config = dataclasses.replace(
    CONFIG, model=model.config, evaluate=EvalConfig(dropless=dropless)
  )
  one = np.ones((1, 1), np.int32)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = random_params(model, one, one, one)
  return Evaluator(model, config, VOCABULARY, mesh), params


def test_capacity_moves_answers_where_it_is_asked_for():
  rows = [(7, 'no'), (40, 'no'), (9, 'yes'), (30, 'yes')]

  def losses(dropless):
    """Of all rows, of the first alone, and of text."""
    evaluator, params = _sparse(dropless)
    measured = [
      evaluator.measure(params, [Source(some), _text(rows)])
      for some in (rows, rows[:1])
    ]
    scores = [found['quiz'][1][0]['score'] for found in measured]
    return *scores, measured[0]['text'][0]['loss']

  together, alone, text = losses(True)
  assert together == pytest.approx(alone, abs=1e-4)
  limited, lonely, limited_text = losses(False)
  # Where tokens compete for places, neighbours matter.
  assert abs(limited - lonely) > 0.01 and abs(limited - together) > 0.01
  # Text is measured with the capacity in any case.
  assert text == limited_text
