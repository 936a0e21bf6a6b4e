"""Scores of a model whose every probability can be read from a table."""

import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import sharding
from st_moe.config import Config, DataConfig, EvalConfig
from st_moe.data import pipeline, vocabulary
from st_moe.data.metrics import accuracy
from st_moe.infer import evaluate
from st_moe.infer.evaluate import Evaluator
from tests.helpers import tiny

VOCABULARY = vocabulary.load('bytes')
EOS = VOCABULARY.eos
LABELS = ('no', 'yes')
CONFIG = Config(
  model=tiny(vocab_size=VOCABULARY.size),
  data=DataConfig(batch_size=5, inputs_length=4, targets_length=6),
)


@dataclasses.dataclass
class Table:
  """P(next | question, token before) as a table: no attention, no experts."""

  config: object

  def clone(self, config):
    return Table(config)

  def apply(self, variables, *args, method='__call__', mutable=None, **kwargs):
    if method == 'encode':
      return self._encode(*args)
    if method == 'decode':
      encoded, _, inputs, _ = args
    else:
      encoded = self._encode(kwargs['encoder_input_tokens'])
      inputs = kwargs['decoder_input_tokens']
    logits = variables['params'][encoded[:, None], inputs]
    return (logits, {'cache': {}}) if mutable else logits

  def _encode(self, tokens):
    return tokens[:, 0]  # The question is its first token.


def _params():
  """Question 1 is answered 'yes' if one may say anything, 2 'no', 3 'nay'."""
  size = VOCABULARY.size
  table = np.random.default_rng(0).standard_normal((4, size, size))
  for question, text in ((1, 'yes'), (2, 'no'), (3, 'nay')):
    ids = [0, *VOCABULARY.encode(text), EOS]
    for before, after in zip(ids, ids[1:], strict=False):
      table[question, before, after] += 8
  return table.astype('f4')


class Source(pipeline.EvalData):
  """Twenty questions; batches are those of real data."""

  def __init__(self, rows, name='quiz', is_text=False, labels=LABELS):
    self.name, self.is_text, self._rows = name, is_text, rows
    self.labels, self.metric_fns = labels, () if is_text else (accuracy,)

  def __len__(self):
    return len(self._rows)

  def example(self, index):
    question, answer = self._rows[index]
    pad = lambda ids: np.pad(ids, (0, 6 - len(ids))).astype(np.int32)
    targets = pad([*VOCABULARY.encode(answer), EOS])
    return {
      'encoder_input_tokens': np.array([question, 9, 0, 0], np.int32),
      'decoder_input_tokens': np.roll(targets, 1) * (np.arange(6) > 0),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets > 0).astype('f4'),
      'source': np.int32(0),
    }

  @functools.cached_property
  def examples(self):
    return [
      pipeline.Example([], [], answer, f'q{i}', {}, None)
      for i, (_, answer) in enumerate(self._rows)
    ]


def _rows():
  rng = np.random.default_rng(1)
  return [(int(rng.integers(1, 4)), LABELS[rng.integers(2)]) for _ in range(20)]


ROWS = _rows()


def _evaluator(**asked):
  config = dataclasses.replace(CONFIG, evaluate=EvalConfig(**asked))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Evaluator(Table(config.model), config, VOCABULARY, mesh)


def _measure(source, **asked):
  return _evaluator(**asked).measure(jnp.asarray(_params()), source)


def _log_probability(question, answer):
  """Of an answer's bytes and its EOS, one after the other."""
  table, total, before = _params().astype(float), 0, 0
  for token in [*VOCABULARY.encode(answer), EOS]:
    row = table[question, before]
    total += row[token] - math.log(sum(math.exp(v) for v in row))
    before = token
  return total


def _ranked(question):
  """The label with the larger score; 'nay' is none, so it takes a real one."""
  return max(LABELS, key=lambda label: _log_probability(question, label))


def test_rank_classification_takes_the_label_with_the_larger_score():
  metrics, rows = _measure(Source(ROWS))
  assert [row['prediction'] for row in rows] == [_ranked(q) for q, _ in ROWS]
  assert [_ranked(q) for q in (1, 2)] == ['yes', 'no']
  hits = sum(_ranked(q) == answer for q, answer in ROWS)
  assert metrics['accuracy'] == 100 * hits / 20
  most = max(sum(answer == label for _, answer in ROWS) for label in LABELS)
  assert metrics['majority_accuracy'] == 100 * most / 20
  assert metrics['examples'] == 20
  assert rows[3] == {
    'idx': 'q3', 'by': 'rank', 'target': ROWS[3][1],
    'prediction': _ranked(ROWS[3][0]),
  }  # fmt: skip


def test_an_answer_counts_with_its_end():
  """Or 'ye' would beat every longer answer that begins with it."""
  _, rows = _measure(Source([(1, 'yes')] * 5, labels=('ye', 'yes')))
  assert [row['prediction'] for row in rows] == ['yes'] * 5


def test_loss_is_that_of_every_target_token_once():
  # 'no' has 3 tokens with its EOS and 'yes' 4: a mean of means would differ.
  tokens = sum(len(answer) + 1 for _, answer in ROWS)
  total = sum(_log_probability(q, answer) for q, answer in ROWS)
  metrics, _ = _measure(Source(ROWS))
  assert metrics['loss'] == pytest.approx(-total / tokens, rel=1e-6)


def test_a_ragged_end_counts_once():
  # 7 + 7 + 6 and one row of filling; 5 + 5 + 5 + 5 without any.
  seven, even = (
    _measure(Source(ROWS), batch_size=n, decode=True) for n in (7, 5)
  )
  assert len(seven[1]) == 40  # Ranked and decoded.
  assert seven[1] == even[1]
  assert seven[0].keys() == even[0].keys()
  for name, value in seven[0].items():
    assert value == pytest.approx(even[0][name], rel=1e-6), name


def test_a_limit_of_batches():
  metrics, rows = _measure(Source(ROWS), batch_size=4, batches=2)
  assert metrics['examples'] == len(rows) == 8
  hits = sum(_ranked(q) == answer for q, answer in ROWS[:8])
  assert metrics['accuracy'] == 100 * hits / 8


def test_decoding_beside_ranking():
  metrics, rows = _measure(Source(ROWS), decode=True)
  spoken = {1: 'yes', 2: 'no', 3: 'nay'}
  ranked, decoded = rows[:20], rows[20:]
  assert {row['by'] for row in ranked} == {'rank'}
  assert {row['by'] for row in decoded} == {'decoding'}
  assert [r['prediction'] for r in decoded] == [spoken[q] for q, _ in ROWS]
  # Whoever may say anything is wrong about question 3 every time.
  hits = sum(spoken[q] == answer for q, answer in ROWS)
  assert metrics['decoded_accuracy'] == 100 * hits / 20
  assert metrics['decoded_accuracy'] < metrics['accuracy']


def test_a_task_without_labels_is_decoded():
  metrics, rows = _measure(Source(ROWS, labels=()))
  assert 'accuracy' not in metrics and len(rows) == 20
  assert {row['by'] for row in rows} == {'decoding'}
  assert metrics['majority_accuracy'] >= 50


def test_text_has_a_loss_and_no_answers():
  metrics, rows = _measure(Source(ROWS, is_text=True, labels=()), decode=True)
  assert list(metrics) == ['loss'] and rows == []


@pytest.mark.parametrize('decode', [False, True])
@pytest.mark.parametrize(
  'kind', [{}, {'labels': ()}, {'labels': (), 'is_text': True}]
)
def test_names_are_known_before_anything_is_measured(kind, decode):
  source, evaluator = Source(ROWS, **kind), _evaluator(decode=decode)
  found = evaluator(jnp.asarray(_params()), [source])
  assert set(evaluator.names(source)) == set(found)


def test_five_labels_of_ten_bytes():
  """Answers are padded to a shape that tasks share; padding never wins."""
  labels = ('no', 'yes', 'a', 'b', 'tenletters')
  _, rows = _measure(Source(ROWS, labels=labels))
  best = lambda q: max(labels, key=lambda label: _log_probability(q, label))
  assert [row['prediction'] for row in rows] == [best(q) for q, _ in ROWS]


def test_names_of_several_sources():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  evaluator = Evaluator(Table(CONFIG.model), CONFIG, VOCABULARY, mesh)
  found = evaluator(
    jnp.asarray(_params()),
    [Source(ROWS[:5]), Source(ROWS[5:], name='text', is_text=True, labels=())],
  )
  assert set(found) == {
    'eval/quiz/loss',
    'eval/quiz/accuracy',
    'eval/quiz/majority_accuracy',
    'eval/quiz/examples',
    'eval/text/loss',
  }


def _evaluate(monkeypatch, path, config=CONFIG, **options):
  loaded = types.SimpleNamespace(
    model=Table(config.model),
    params=jnp.asarray(_params()),
    config=config,
    vocabulary=VOCABULARY,
    path=str(path),
    step=40,
  )
  opened = []

  def open_eval(data, vocab, name, split):
    opened.append((name, split))
    if name == 'text':
      return Source(ROWS, name=name, is_text=True, labels=())
    return Source(ROWS, name=name)

  monkeypatch.setattr(evaluate, 'load', lambda _, vocabulary: loaded)
  monkeypatch.setattr(pipeline, 'open_eval', open_eval)
  monkeypatch.setattr(pipeline, 'source_names', lambda *_: ['text', 'quiz'])
  return evaluate.evaluate('anywhere', **options), opened


def test_the_verb_writes_scores_and_predictions(tmp_path, monkeypatch, capsys):
  path = tmp_path / 'run' / 'checkpoints' / '40'
  found, opened = _evaluate(monkeypatch, path)
  assert opened == [('text', 'validation'), ('quiz', 'validation')]
  to = tmp_path / 'run' / 'evaluation'
  about = json.loads((to / 'metrics.json').read_text())
  assert about == {'checkpoint': str(path), 'step': 40, 'metrics': found}
  lines = (to / 'predictions-quiz.jsonl').read_text().splitlines()
  assert [json.loads(line)['idx'] for line in lines] == [
    f'q{i}' for i in range(20)
  ]
  assert not (to / 'predictions-text.jsonl').exists()
  said = capsys.readouterr().out
  # It says how many were seated: a capacity moves the loss.
  assert 'teacher-forced with capacity 2.0, answers with no limit' in said
  assert f'accuracy {found["eval/quiz/accuracy"]:.4g}' in said


def test_the_verb_takes_names_fields_and_a_place(tmp_path, monkeypatch, capsys):
  found, opened = _evaluate(
    monkeypatch,
    tmp_path / '40',
    mixture=['quiz'],
    output=str(tmp_path / 'here'),
    overrides={
      'evaluate.split': 'test',
      'evaluate.batches': '2',
      'model.moe.eval_capacity.dropless': 'true',
    },
  )
  assert opened == [('quiz', 'test')]
  assert found['eval/quiz/examples'] == 10
  assert (tmp_path / 'here' / 'metrics.json').exists()
  assert 'teacher-forced with no limit' in capsys.readouterr().out


def test_a_checkpoint_that_left_its_run_is_scored_beside_it(
  tmp_path, monkeypatch
):
  _evaluate(monkeypatch, tmp_path / 'shared' / '40', mixture=['quiz'])
  assert (tmp_path / 'shared' / 'evaluation' / 'metrics.json').exists()
