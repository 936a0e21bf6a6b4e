"""ANLI rows as text, and what real systems score on them."""

import json
import os
import pathlib

import pytest

from st_moe.data import anli, sources

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

ROW = {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 'neutral'}


def test_a_row():
  assert list(anli.anli(ROW, 'train')) == [
    {
      'inputs': 'anli hypothesis: It is wet. premise: It rains.',
      'targets': 'neutral',
    }
  ]


def test_every_round_has_three_labels():
  assert list(anli.TASKS) == ['anli_r1', 'anli_r2', 'anli_r3']
  for task in anli.TASKS.values():
    assert task.labels == ('entailment', 'neutral', 'contradiction')


@pytest.mark.parametrize('label', anli.LABELS)
def test_an_official_row_is_the_same_row(label):
  row = {**ROW, 'label': label}
  official = {
    'uid': 'u1',
    'context': ROW['premise'],
    'hypothesis': ROW['hypothesis'],
    'label': label[0],
  }
  assert list(anli.anli(official, 'train')) == list(anli.anli(row, 'train'))


def test_only_a_test_row_may_lack_its_label():
  row = {k: v for k, v in ROW.items() if k != 'label'}
  assert next(anli.anli(row, 'test'))['targets'] == '<unk>'
  with pytest.raises(ValueError, match="no field 'label'"):
    list(anli.anli(row, 'validation'))


@pytest.mark.parametrize(
  'change, expected',
  [
    ({'label': 'x'}, "label 'x' is none of 'entailment', 'neutral', "),
    ({'label': 3}, 'label 3 is none of'),
    ({'label': ['e']}, r"label \['e'\] is none of"),
    ({'premise': 1}, "'premise' is 1; it must be text"),
    ({'hypothesis': None}, "'hypothesis' is None; it must be text"),
  ],
)
def test_a_wrong_row_names_file_line_and_field(tmp_path, change, expected):
  path = tmp_path / 'anli' / 'R2' / 'train.jsonl'
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(ROW) + '\n' + json.dumps({**ROW, **change}))
  with pytest.raises(ValueError, match=f'{path}, line 2: {expected}'):
    anli.TASKS['anli_r2'].load('train', str(tmp_path))


# ---- Real rows --------------------------------------------------------------


def load(name, split):
  if not (DATA / 'anli').exists():
    pytest.skip(f'no {DATA}/anli; set ST_MOE_DATA to a folder that has it')
  return anli.TASKS[name].load(split, str(DATA))


@pytest.mark.parametrize(
  'name, split, counts',
  [
    ('anli_r1', 'test', (334, 333, 333)),
    ('anli_r2', 'test', (334, 333, 333)),
    ('anli_r3', 'test', (402, 402, 396)),
    ('anli_r3', 'validation', (402, 400, 396)),
    ('anli_r3', 'train', (74, 99, 77)),
  ],
)
def test_counts(name, split, counts):
  found = [example['targets'] for example in load(name, split)]
  assert tuple(found.count(label) for label in anli.LABELS) == counts
  assert len(found) == sum(counts)


@pytest.mark.parametrize(
  'system, accuracy',
  [
    ('roberta-from-r2', 22.04),
    ('roberta-from-r3', 20.28),
    ('bert-r1', 31.89),
    ('anli-roberta-large', 46.08),
    ('anli-bart-large', 50.33),
    ('anli-xlnet-large', 50.67),
    ('anli-electra-large', 55.01),
    ('anli-albert-xxlarge', 56.76),
  ],
)
def test_real_systems_score_what_the_authors_report(system, accuracy):
  task, examples = anli.TASKS['anli_r3'], load('anli_r3', 'validation')
  rows = sources.read_jsonl(DATA / 'anli/R3/dev.model_predictions.jsonl')
  letters = {label[0]: label for label in anli.LABELS}
  said = [letters[row[system]] for _, row in rows]
  value = task.comparable()
  scores = task.metrics[0](
    [value(example['targets']) for example in examples],
    [value(text) for text in said],
  )
  assert scores['accuracy'] == pytest.approx(accuracy, abs=0.005)
