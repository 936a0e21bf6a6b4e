"""Questions without passages as t5_cbqa writes them."""

import json
import os
import pathlib
import re

import pytest

from st_moe.data import closed_book

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

TASKS = closed_book.TASKS
NQ = {'question': 'who was it', 'answer': ['Bob', 'Rob']}
TRIVIA = {'question': 'Who? ', 'answer': ' Bob', 'aliases': ['Rob ', 'Bob']}
GOLDEN = {'question': 'Who?', 'golden_answers': ['Rob', 'Bob']}
WQ = {'id': 'w1', 'question': 'who?', 'answers': ['Rob']}


@pytest.mark.parametrize(
  'name, row, expected',
  [
    (
      'natural_questions_open',
      NQ,
      ('nq question: who was it', 'Bob', ['Bob', 'Rob']),
    ),
    (
      'trivia_qa_open',
      TRIVIA,
      ('trivia_qa question: Who?', 'Bob', ['Rob', 'Bob']),
    ),
    (
      'trivia_qa_open',
      GOLDEN,
      ('trivia_qa question: Who?', 'Rob', ['Rob', 'Bob']),
    ),
    ('web_questions_open', WQ, ('wq question: who?', 'Rob', ['Rob'])),
  ],
)
def test_a_row(name, row, expected):
  keys = 'inputs', 'targets', 'answers'
  assert list(TASKS[name].examples(row, 'train')) == [
    dict(zip(keys, expected, strict=True))
  ]


@pytest.mark.parametrize(
  'name, said, expected',
  [
    ('natural_questions_open', 'the-Bob', (0, 0)),
    ('trivia_qa_open', 'the-Bob', (100, 100)),  # A mark is a space to TriviaQA.
    ('web_questions_open', 'A Bob!', (100, 100)),
    ('web_questions_open', 'Bob or so', (0, 50)),  # 2 * 1 / (1 + 3).
  ],
)
def test_any_answer_is_right_by_the_rules_of_the_set(name, said, expected):
  value, example = TASKS[name].comparable(), {'answers': [b'Rob', b'Bob']}
  found = TASKS[name].metrics[0](
    [value('Rob', example=example, is_target=True)],
    [value(said, example=example, is_target=False)],
  )
  assert (found['em'], found['f1']) == expected


@pytest.mark.parametrize(
  'name, row, change, expected',
  [
    ('natural_questions_open', NQ, {'question': 1}, "'question' is 1; it must"),
    ('natural_questions_open', NQ, {'answer': 'x'}, "'answer' is 'x'; it must"),
    ('natural_questions_open', NQ, {'answer': []}, "'answer' is []; it must"),
    ('trivia_qa_open', TRIVIA, {'aliases': [1]}, "'aliases' is [1]; it must"),
    ('trivia_qa_open', TRIVIA, {'answer': None}, "'answer' is None; it must"),
    ('web_questions_open', WQ, {'answers': None}, "'answers' is None; it must"),
  ],
)
def test_a_wrong_row_names_file_line_and_field(
  tmp_path, name, row, change, expected
):
  path = tmp_path / TASKS[name].files['train'][0]
  path.parent.mkdir(parents=True)
  path.write_text(json.dumps(row) + '\n' + json.dumps(row | change))
  with pytest.raises(
    ValueError, match=re.escape(f'{path}, line 2: {expected}')
  ):
    TASKS[name].load('train', str(tmp_path))


@pytest.mark.parametrize(
  'name, split, count',
  [
    ('natural_questions_open', 'validation', 3610),
    ('trivia_qa_open', 'validation', 3000),
    ('trivia_qa_open', 'test', 1000),
    ('web_questions_open', 'train', 2834),
    ('web_questions_open', 'validation', 755),
    ('web_questions_open', 'test', 2032),
  ],
)
def test_real_rows(name, split, count):
  folder = DATA / 'closed_book_qa'
  if not folder.exists():
    pytest.skip(f'no {folder}; set ST_MOE_DATA to a folder that has it')
  examples = TASKS[name].load(split, str(DATA))
  assert len(examples) == count
  assert all(e['targets'] in e['answers'] for e in examples)
