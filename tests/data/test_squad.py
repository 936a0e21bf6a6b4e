"""SQuAD rows as T5 writes them, and what real systems score on them."""

import json
import os
import pathlib
import re

import pytest

from st_moe.data import metrics, squad

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

V1, V2 = squad.TASKS['squad_v1'], squad.TASKS['squad_v2']
QUESTION = {
  'id': '7',
  'question': "Who's\nthere?",
  'answers': [{'text': 'U.S.', 'answer_start': 0}, {'text': 'a cat'}],
}


def document(*questions, context='The cat  (a big one) sat.'):
  paragraph = {'context': context, 'qas': list(questions)}
  return {'data': [{'paragraphs': []}, {'paragraphs': [paragraph]}]}


def load(tmp_path, task, content, split='train'):
  path = tmp_path / task.files[split][0]
  path.parent.mkdir(exist_ok=True)
  if not isinstance(content, bytes):
    content = json.dumps(content).encode()
  path.write_bytes(content)
  return task.load(split, str(tmp_path))


# T5 keeps the space that a last mark leaves behind.
EXAMPLE = {
  'inputs': "question: Who ' s there ? context: The cat ( a big one ) sat . ",
  'targets': 'U . S . ',
  'id': '7',
  'context': 'The cat ( a big one ) sat . ',
  'question': "Who ' s there ? ",
  'answers': ['U . S . ', 'a cat'],
}


def test_an_official_file(tmp_path):
  assert load(tmp_path, V1, document(QUESTION)) == [EXAMPLE]


def test_a_flat_row():
  row = {
    'id': '7',
    'title': 'Cats',
    'context': 'The cat  (a big one) sat.',
    'question': "Who's\nthere?",
    'answers': {'text': ['U.S.', 'a cat'], 'answer_start': [0, 1]},
  }
  assert list(squad.squad_v1(row, 'train')) == [EXAMPLE]


def test_only_ascii_marks_and_spaces_are_padded():
  # As RE2 reads [[:punct:]] and \s.
  assert (
    squad.padded('“a”…\xa0b\u2003c _d\t\n e-') == '“a”…\xa0b\u2003c _ d e - '
  )


def test_version_2(tmp_path):
  impossible = QUESTION | {'id': '8', 'is_impossible': True, 'answers': []}
  possible = QUESTION | {'is_impossible': False}
  nothing = {'targets': 'unanswerable', 'answers': ['unanswerable']}
  assert load(tmp_path, V2, document(possible, impossible)) == [
    EXAMPLE,
    EXAMPLE | {'id': '8'} | nothing,
  ]


@pytest.mark.parametrize(
  'content, expected',
  [
    (b'{"data": [\n{,', ', line 2: broken JSON (Expecting property name'),
    (b'{"data":\n"\xff"}', ', line 2 is not UTF-8'),
    ([], ", at the top: no field 'data' in []"),
    ({'data': 3}, ", at the top: 'data' is 3; it must be a list"),
    ({'data': [{}]}, ", data[0]: no field 'paragraphs' in {}"),
    (
      {'data': [{'paragraphs': [{'qas': []}]}]},
      ", data[0].paragraphs[0]: no field 'context'",
    ),
    (
      document(QUESTION, {'id': '9', 'answers': []}),
      ", data[1].paragraphs[0].qas[1]: no field 'question' in {'id': '9'",
    ),
    (
      document(QUESTION | {'answers': [{}]}),
      ", data[1].paragraphs[0].qas[0]: no field 'text' in {}",
    ),
    (
      document(QUESTION | {'answers': []}),
      ", line 1: 'answers/text' is []; it must be a list of texts",
    ),
    (document(), ': no rows'),
  ],
)
def test_a_wrong_document_names_file_and_place(tmp_path, content, expected):
  path = tmp_path / 'squad' / 'train-v1.1.json'
  with pytest.raises(ValueError, match=re.escape(f'{path}{expected}')):
    load(tmp_path, V1, content)


def test_a_missing_document_is_named():
  with pytest.raises(ValueError, match='nowhere.json: no such file'):
    list(squad.read('nowhere.json'))


def test_version_2_says_what_version_1_lacks(tmp_path):
  with pytest.raises(ValueError, match="'is_impossible' is None; it must be"):
    load(tmp_path, V2, document(QUESTION))


# ---- Scores -----------------------------------------------------------------


def scores(task, examples, said):
  value, pairs = task.comparable(), list(zip(examples, said, strict=True))
  return task.metrics[0](
    [value(e['targets'], example=e, is_target=True) for e in examples],
    [value(s, example=e, is_target=False) for e, s in pairs],
  )


def test_one_of_several_answers_is_right():
  # 'the cat' is 'a cat' to SQuAD; 'cat food' shares one word of 1 + 2: F1 2/3.
  examples, said = [EXAMPLE] * 4, ['The cat!', 'U . S .', 'cat food', 'dog']
  assert scores(V1, examples, said) == {
    'em': 50.0,
    'f1': pytest.approx(100 * (1 + 1 + 2 / 3) / 4),
  }


def test_scores_of_version_2():
  known = EXAMPLE | {'targets': 'red fox', 'answers': ['red fox']}
  nothing = EXAMPLE | {
    'targets': 'unanswerable',
    'answers': ['unanswerable'],
  }
  pairs = [
    (nothing, 'unanswerable', 1, 1),
    (nothing, '', 1, 1),
    (nothing, 'the.', 1, 1),  # The official script sees no word in it either.
    (nothing, 'unanswerable question', 0, 0),
    (nothing, 'fox', 0, 0),
    (known, 'unanswerable', 0, 0),
    (known, '', 0, 0),
    (known, 'the red fox', 1, 1),
    (known, 'fox', 0, 2 / 3),
  ]
  for example, said, em, f1 in pairs:
    assert scores(V2, [example], [said]) == {
      'em': 100.0 * em,
      'f1': pytest.approx(100 * f1),
    }
  examples, said, ems, f1s = zip(*pairs, strict=True)
  assert scores(V2, examples, said) == {
    'em': pytest.approx(100 * sum(ems) / 9),
    'f1': pytest.approx(100 * sum(f1s) / 9),
  }


# ---- Real rows --------------------------------------------------------------


def on_disk(name):
  if not (DATA / 'squad').exists():
    pytest.skip(f'no {DATA}/squad; set ST_MOE_DATA to a folder that has it')
  return DATA / 'squad' / name


def test_real_rows():
  on_disk('')
  assert len(V1.load('train', str(DATA))) == 10
  examples = V1.load('validation', str(DATA))
  assert len({example['id'] for example in examples}) == len(examples) == 1190
  assert all(example['targets'] for example in examples)


def test_real_systems_score_what_the_official_script_says():
  path = on_disk('xquad.en.system_predictions.json')
  rows = [row for _, row in squad.read(on_disk('xquad.en.json'))]
  systems = json.loads(path.read_text())
  assert len(systems['predictions']) == 4
  for name, said in systems['predictions'].items():
    found = metrics.squad(
      [row['answers']['text'] for row in rows], [said[r['id']] for r in rows]
    )
    expected = systems['scores_on_subset'][name]
    assert found == pytest.approx(expected, abs=1e-6)
