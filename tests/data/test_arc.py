"""ARC rows as text."""

import collections
import json
import os
import pathlib

import pytest

from st_moe.data import arc

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))


def a_row(labels='AB', key='B'):
  return {
    'id': 'x1',
    'question': {
      'stem': 'What is ice?',
      'choices': [
        {'text': text, 'label': label}
        for text, label in zip(['steam', 'water', 'air'], labels, strict=False)
      ],
    },
    'answerKey': key,
  }


def test_a_row():
  assert list(arc.arc(a_row(), 'train')) == [
    {
      'inputs': 'arc question: What is ice? choices: (A) steam (B) water',
      'targets': 'water',
      'choices': ['steam', 'water'],
    }
  ]


def test_numbers_of_choices_become_letters():
  example = next(arc.arc(a_row('123', '3'), 'train'))
  assert example['inputs'].endswith('choices: (A) steam (B) water (C) air')
  assert example['targets'] == 'air'


def test_answers_are_compared_as_texts():
  task = arc.TASKS['arc_easy']
  assert task.comparable() is None and task.labels == ()
  scores = task.metrics[0](['water', 'air', 'air'], ['water', 'B', 'steam'])
  assert scores == {'accuracy': pytest.approx(100 / 3)}


def test_only_a_test_row_may_lack_its_answer():
  row = a_row()
  del row['answerKey']
  assert next(arc.arc(row, 'test'))['targets'] == '<unk>'
  with pytest.raises(ValueError, match="no field 'answerKey'"):
    list(arc.arc(row, 'validation'))


@pytest.mark.parametrize(
  'row, expected',
  [
    (a_row(key='C'), "'answerKey' is 'C', none of A, B."),
    (a_row() | {'question': 'q'}, "no field 'question/choices' in"),
    (a_row() | {'question': {'choices': []}}, "no field 'question/stem' in"),
    (
      a_row() | {'question': {'stem': 's', 'choices': [{'text': 'x'}]}},
      "no field 'label' in",
    ),
    (
      a_row() | {'question': {'stem': 's', 'choices': [{'label': 'A'}]}},
      "no field 'text' in",
    ),
  ],
)
def test_a_wrong_row_names_file_line_and_field(tmp_path, row, expected):
  # Under the official name, which comes second.
  path = tmp_path / 'arc' / 'ARC-Easy' / 'ARC-Easy-Dev.jsonl'
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(a_row()) + '\n' + json.dumps(row))
  with pytest.raises(ValueError, match=f'{path}, line 2: {expected}'):
    arc.TASKS['arc_easy'].load('validation', str(tmp_path))


@pytest.mark.parametrize(
  'name, counts',
  [('arc_easy', (2251, 570, 2376)), ('arc_challenge', (1119, 299, 1172))],
)
def test_real_rows(name, counts):
  task = arc.TASKS[name]
  if not (DATA / 'arc').exists():
    pytest.skip(f'no {DATA}/arc; set ST_MOE_DATA to a folder that has it')
  found = [task.load(split, str(DATA)) for split in task.splits]
  assert tuple(map(len, found)) == counts
  for example in found[1]:
    assert collections.Counter(example['choices'])[example['targets']] == 1
    assert f'(A) {example["choices"][0]} (B) ' in example['inputs']
