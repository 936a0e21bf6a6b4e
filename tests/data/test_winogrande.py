"""WinoGrande rows as text."""

import json
import os
import pathlib

import pytest

from st_moe.data import winogrande

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

TASK = winogrande.TASKS['winogrande']
ROW = {
  'sentence': 'The box holds no cup as the _ is big.',
  'option1': 'box',
  'option2': 'cup',
  'answer': '2',
}


def test_a_row():
  assert list(winogrande.winogrande(ROW, 'train')) == [
    {
      'inputs': 'winogrande sentence: The box holds no cup as the _ is big.'
      ' option1: box option2: cup',
      'targets': 'cup',
      'choices': ['box', 'cup'],
    }
  ]


def test_the_answer_is_a_number_not_a_text():
  # Options may be equal, or the number of the other.
  row = ROW | {'option1': '2', 'option2': '1', 'answer': '1'}
  assert next(winogrande.winogrande(row, 'train'))['targets'] == '2'
  same = next(winogrande.winogrande(ROW | {'option1': 'cup'}, 'train'))
  assert (same['targets'], same['choices']) == ('cup', ['cup', 'cup'])


@pytest.mark.parametrize('unknown', [{'answer': ''}, {}])
def test_only_a_test_row_may_lack_its_answer(unknown):
  row = {k: v for k, v in ROW.items() if k != 'answer'} | unknown
  assert next(winogrande.winogrande(row, 'test'))['targets'] == '<unk>'
  assert next(winogrande.winogrande(ROW, 'test'))['targets'] == 'cup'
  with pytest.raises(ValueError, match="'answer'"):
    list(winogrande.winogrande(row, 'validation'))


@pytest.mark.parametrize(
  'change, expected',
  [
    ({'answer': '3'}, "'answer' is '3'; it must be '1' or '2'"),
    ({'answer': 'cup'}, "'answer' is 'cup'; it must be '1' or '2'"),
    ({'answer': 2}, "'answer' is 2; it must be text"),
    ({'option1': None}, "'option1' is None; it must be text"),
    ({'sentence': 0}, "'sentence' is 0; it must be text"),
  ],
)
def test_a_wrong_row_names_file_line_and_field(tmp_path, change, expected):
  path = tmp_path / 'winogrande' / 'dev.jsonl'
  path.parent.mkdir()
  path.write_text(json.dumps(ROW) + '\n' + json.dumps({**ROW, **change}))
  with pytest.raises(ValueError, match=f'{path}, line 2: {expected}'):
    TASK.load('validation', str(tmp_path))


@pytest.mark.parametrize(
  'split, first, second', [('train', 129, 121), ('validation', 628, 639)]
)
def test_real_rows(split, first, second):
  if not (DATA / 'winogrande').exists():
    pytest.skip(
      f'no {DATA}/winogrande; set ST_MOE_DATA to a folder that has it'
    )
  examples = TASK.load(split, str(DATA))
  assert len(examples) == first + second
  right = [e['choices'].index(e['targets']) for e in examples]
  assert right.count(0) == first
  # To say the first option always is right as often as it is the answer.
  said = [example['choices'][0] for example in examples]
  scores = TASK.metrics[0]([e['targets'] for e in examples], said)
  assert scores['accuracy'] == pytest.approx(100 * first / len(examples))
