"""What the leaderboard of SuperGLUE gets, line by line, and would refuse."""

import json
import os
import pathlib
import random
import zipfile

import pytest

from st_moe.data import superglue
from st_moe.data.task import UNKNOWN
from st_moe.infer import submission
from st_moe.infer.submission import problems, write


def _row(idx, prediction, by='rank', target=UNKNOWN):
  return {
    'idx': idx,
    'by': by,
    'input': '...',
    'target': target,
    'prediction': prediction,
    'score': -1.0,
  }


def _multirc(paragraph, question, answer, prediction):
  idx = {'paragraph': paragraph, 'question': question, 'answer': answer}
  return _row(idx, prediction)


def _record(passage, query, prediction, target=UNKNOWN):
  return _row({'passage': passage, 'query': query}, prediction, target=target)


# Of each task the rows of an evaluation, and the lines of its file.
ROWS = {
  'boolq': [_row(0, 'True'), _row(1, 'False'), _row(2, 'True')],
  'cb': [_row(0, 'neutral'), _row(1, 'entailment'), _row(2, 'contradiction')],
  'copa': [_row(0, 'choice2'), _row(1, 'choice1')],
  # Numbers of questions go on from passage to passage, as in the test file.
  'multirc': [
    _multirc(0, 0, 0, 'True'),
    _multirc(0, 0, 1, 'False'),
    _multirc(0, 1, 2, 'True'),
    _multirc(5, 2, 3, 'False'),
  ],
  'record': [
    _record(0, 0, 'the Cat'),
    _record(0, 1, 'Émile "X"'),
    _record(2, 2, 'Dog'),
  ],
  'rte': [_row(0, 'not_entailment'), _row(1, 'entailment')],
  'wic': [_row(0, 'False'), _row(1, 'True')],
  'wsc': [
    _row(0, 'the cat', 'decoding', target='The fluffy cat'),
    _row(1, 'dog', 'decoding', target='The fluffy cat'),
    _row(2, '', 'decoding', target='The fluffy cat'),
  ],
  'axb': [_row(0, 'entailment'), _row(1, 'not_entailment')],
  'axg': [_row(0, 'not_entailment'), _row(1, 'not_entailment')],
}
LINES = {
  'BoolQ.jsonl': [
    '{"idx": 0, "label": "true"}',
    '{"idx": 1, "label": "false"}',
    '{"idx": 2, "label": "true"}',
  ],
  'CB.jsonl': [
    '{"idx": 0, "label": "neutral"}',
    '{"idx": 1, "label": "entailment"}',
    '{"idx": 2, "label": "contradiction"}',
  ],
  'COPA.jsonl': ['{"idx": 0, "label": 1}', '{"idx": 1, "label": 0}'],
  'MultiRC.jsonl': [
    '{"idx": 0, "passage": {"questions": ['
    '{"idx": 0, "answers":'
    ' [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]}, '
    '{"idx": 1, "answers": [{"idx": 2, "label": 1}]}]}}',
    '{"idx": 5, "passage": {"questions": ['
    '{"idx": 2, "answers": [{"idx": 3, "label": 0}]}]}}',
  ],
  'ReCoRD.jsonl': [
    '{"idx": 0, "label": "the Cat"}',
    r'{"idx": 1, "label": "\u00c9mile \"X\""}',
    '{"idx": 2, "label": "Dog"}',
  ],
  'RTE.jsonl': [
    '{"idx": 0, "label": "not_entailment"}',
    '{"idx": 1, "label": "entailment"}',
  ],
  'WiC.jsonl': ['{"idx": 0, "label": "false"}', '{"idx": 1, "label": "true"}'],
  'WSC.jsonl': [
    '{"idx": 0, "label": "True"}',
    '{"idx": 1, "label": "False"}',
    '{"idx": 2, "label": "False"}',
  ],
  'AX-b.jsonl': [
    '{"idx": 0, "label": "entailment"}',
    '{"idx": 1, "label": "not_entailment"}',
  ],
  'AX-g.jsonl': [
    '{"idx": 0, "label": "not_entailment"}',
    '{"idx": 1, "label": "not_entailment"}',
  ],
}


def _measured(rows=ROWS):
  """As `Evaluator.measure` has it."""
  return {f'super_glue_{k}': ({'examples': len(v)}, v) for k, v in rows.items()}


def _read(path):
  with zipfile.ZipFile(path) as archive:
    assert len(set(archive.namelist())) == len(archive.namelist())
    return {n: archive.read(n).decode() for n in archive.namelist()}


def _one(tmp_path, task, rows, name=''):
  """The lines of one task alone."""
  measured = {name or f'super_glue_{task}': ({}, rows)}
  (text,) = _read(write(tmp_path, measured)).values()
  return [json.loads(line) for line in text.splitlines()]


def test_each_task_line_by_line(tmp_path, capsys):
  path = write(tmp_path, _measured())
  assert path == tmp_path / 'superglue.zip'
  found = _read(path)
  assert found.keys() == LINES.keys()
  for name, lines in LINES.items():
    assert found[name] == ''.join(f'{line}\n' for line in lines), name
  assert capsys.readouterr().out == ''  # Nothing is missing.
  assert [p.name for p in tmp_path.iterdir()] == ['superglue.zip']


def test_missing_tasks_are_told(tmp_path, capsys):
  some = {k: v for k, v in ROWS.items() if k not in ('wsc', 'axb')}
  assert len(_read(write(tmp_path, _measured(some)))) == 8
  said = capsys.readouterr().out
  assert said == 'The leaderboard wants all ten; missing: axb, wsc.\n'
  # A second one takes the place of the first.
  assert len(_read(write(tmp_path, _measured()))) == 10


def test_other_tasks_are_left_out(tmp_path):
  others = {
    'tiny_boolq': ({}, ROWS['boolq']),
    'text': ({'loss': 1.0}, []),
    'super_glue_other': ({}, ROWS['boolq']),
  }
  assert len(_read(write(tmp_path, {**others, **_measured()}))) == 10
  with pytest.raises(
    ValueError,
    match=r"No submission of \['super_glue_other', 'text', 'tiny_boolq'\]: none"
    ' is a task of SuperGLUE; use --mixture=super_glue',
  ):
    write(tmp_path / 'none', others)
  assert not (tmp_path / 'none').exists()


def test_a_task_with_a_sentinel_is_the_task(tmp_path):
  name = 'super_glue_cb_1_sentinel'
  assert _one(tmp_path, 'cb', [_row(3, 'neutral')], name) == [
    {'idx': 3, 'label': 'neutral'}
  ]


def test_ranked_answers_go_before_decoded_ones(tmp_path):
  rows = [
    _row(0, 'garbage', 'decoding'),
    _row(1, 'neutral', 'decoding'),
    _row(0, 'contradiction'),
    _row(1, 'entailment'),
  ]
  labels = lambda rows: [x['label'] for x in _one(tmp_path, 'cb', rows)]
  assert labels(rows) == ['contradiction', 'entailment']
  # What is no label is the first one.
  assert labels(rows[:2]) == ['entailment', 'neutral']


@pytest.mark.parametrize(
  ('task', 'first'),
  [
    ('boolq', 'false'),
    ('cb', 'entailment'),
    ('copa', 0),
    ('rte', 'entailment'),
    ('wic', 'false'),
    ('axb', 'entailment'),
    ('axg', 'entailment'),
  ],
)
@pytest.mark.parametrize('said', ['', 'true', '<extra_id_0>', 'choice'])
def test_decoded_garbage_is_the_first_label(tmp_path, task, first, said):
  assert _one(tmp_path, task, [_row(7, said, 'decoding')]) == [
    {'idx': 7, 'label': first}
  ]


def test_garbage_about_an_answer_is_no(tmp_path):
  ((line),) = _one(tmp_path, 'multirc', [_multirc(1, 2, 3, 'yes')])
  assert line['passage']['questions'][0]['answers'] == [{'idx': 3, 'label': 0}]


def test_what_multirc_mixes_is_sorted_out(tmp_path):
  """Answers go to their questions, these to their passages."""
  rows = ROWS['multirc']
  mixed = [rows[0], rows[3], rows[2], rows[1]]
  assert _one(tmp_path, 'multirc', mixed) == [
    json.loads(line) for line in LINES['MultiRC.jsonl']
  ]


def test_a_referent_becomes_true_or_false(tmp_path):
  """T5's rule: more or fewer words of the noun, whatever its articles."""
  noun = "Bob's old hat"
  said = {
    "Bob's old hat": 'True',
    "the Bob's": 'True',
    'Bob': 'False',  # A person, not what is his.
    "Ann's old hat": 'False',
    'hat': 'False',  # Nor any hat.
    'garbage': 'False',
    '': 'False',
    'True': 'False',  # WSC is not asked for a label.
  }
  rows = [_row(i, text, 'decoding', noun) for i, text in enumerate(said)]
  found = _one(tmp_path, 'wsc', rows)
  assert [line['label'] for line in found] == list(said.values())


def test_the_first_answer_to_each_query(tmp_path):
  """Where answers are known, a query has a row for each right one."""
  rows = [
    _record(0, 4, 'Ann', target='Ann'),
    _record(0, 4, 'Bob', target='Anna'),
    _record(0, 5, 'Cy', target='Bob'),
    _record(1, 4, 'Dan', target='Ann'),  # Queries are numbered throughout.
  ]
  assert _one(tmp_path, 'record', rows) == [
    {'idx': 4, 'label': 'Ann'},
    {'idx': 5, 'label': 'Cy'},
  ]


# What would be refused.


@pytest.fixture
def data(tmp_path):
  """Test files of all ten tasks, with the examples of `ROWS`."""
  folder = tmp_path / 'data'
  spans = {
    **{'span1_text': 'Ann', 'span1_index': 0},
    **{'span2_text': 'she', 'span2_index': 2},
  }
  # Fields of any task; each reads its own.
  fields = {
    **{'passage': 'p', 'question': 'q', 'premise': 'a', 'hypothesis': 'b'},
    **{'choice1': 'a', 'choice2': 'b', 'word': 'w'},
    **{'sentence1': 'a', 'sentence2': 'b'},
    **{'text': 'Ann says she sings', 'target': spans},
  }
  rows = {
    task: [{**fields, 'idx': row['idx']} for row in found]
    for task, found in ROWS.items()
  }
  answer = lambda n: {'idx': n, 'text': 'a'}
  rows['multirc'] = [
    {'idx': paragraph, 'passage': {'text': 'p', 'questions': [
      {'idx': n, 'question': 'q', 'answers': [answer(a) for a in answers]}
      for n, answers in questions.items()
    ]}}
    for paragraph, questions in {0: {0: (0, 1), 1: (2,)}, 5: {2: (3,)}}.items()
  ]  # fmt: skip
  rows['record'] = [
    {
      'idx': passage,
      'passage': {'text': 'Ann', 'entities': [{'start': 0, 'end': 2}]},
      'qas': [{'idx': n, 'query': '@placeholder?'} for n in queries],
    }
    for passage, queries in {0: (0, 1), 2: (2,)}.items()
  ]
  for task, found in rows.items():
    label = {'label': 'entailment'} if task.startswith('ax') else {}
    path = folder / superglue.TASKS[task].files['test'][0]
    path.parent.mkdir(parents=True)
    lines = (json.dumps({**row, **label}) for row in found)
    path.write_text('\n'.join(lines))
  return folder


@pytest.fixture
def changed(tmp_path):
  """(name -> its text, or None) -> a zip that differs in these files."""

  def change(**files):
    texts = {name: '\n'.join(lines) for name, lines in LINES.items()}
    for name, text in files.items():
      texts[name.replace('_', '-') + '.jsonl'] = text
    path = tmp_path / 'changed.zip'
    with zipfile.ZipFile(path, 'w') as archive:
      for name, text in texts.items():
        if text is not None:
          archive.writestr(name, text)
    return path

  return change


def test_a_right_one_has_no_problems(tmp_path, data, changed):
  assert problems(write(tmp_path, _measured()), data) == []
  assert problems(changed(), data) == []


def test_without_test_files_labels_are_looked_at_all_the_same(
  tmp_path, changed, monkeypatch
):
  monkeypatch.delenv('ST_MOE_DATA', raising=False)
  assert problems(changed(), tmp_path) == problems(changed()) == []
  wrong = changed(CB='{"idx": 0, "label": "maybe"}')
  assert problems(wrong) == ["CB.jsonl: 'maybe' is no label"]


def test_files_that_are_too_few_or_too_many(changed, data):
  path = changed(WSC=None, AX_b=None, notes='hello')
  assert problems(path, data) == [
    'notes.jsonl is no file of the benchmark',
    'WSC.jsonl is there 0 times',
    'AX-b.jsonl is there 0 times',
  ]
  path = changed()
  with zipfile.ZipFile(path, 'a') as archive:
    with pytest.warns(UserWarning, match='Duplicate name'):
      archive.writestr('CB.jsonl', 'again')
  assert problems(path, data) == ['CB.jsonl is there 2 times']


def _with(name, n, label):
  """The lines of a file with another label in line `n`."""
  lines = [json.loads(line) for line in LINES[f'{name}.jsonl']]
  lines[n]['label'] = label
  return '\n'.join(map(json.dumps, lines))


@pytest.mark.parametrize(
  ('name', 'label'),
  [
    ('BoolQ', 'True'),
    ('BoolQ', True),
    ('BoolQ', 1),
    ('WiC', 'False'),
    ('WSC', 'true'),
    ('WSC', False),
    ('COPA', True),
    ('COPA', 'choice1'),
    ('COPA', '0'),
    ('COPA', 2),
    ('CB', 'Neutral'),
    ('CB', None),
    ('RTE', 'neutral'),
    ('AX-b', 0),
    ('AX-g', ''),
    ('ReCoRD', 7),
    ('ReCoRD', ['Ann']),
  ],
)
def test_a_label_that_is_none(changed, data, name, label):
  path = changed(**{name.replace('-', '_'): _with(name, 1, label)})
  assert problems(path, data) == [f'{name}.jsonl: {label!r} is no label']


@pytest.mark.parametrize('label', [True, 'True', 2])
def test_a_label_of_an_answer_that_is_none(changed, data, label):
  first, last = map(json.loads, LINES['MultiRC.jsonl'])
  first['passage']['questions'][1]['answers'][0]['label'] = label
  path = changed(MultiRC=f'{json.dumps(first)}\n{json.dumps(last)}')
  assert problems(path, data) == [f'MultiRC.jsonl: {label!r} is no label']


def test_three_wrong_labels_are_enough(changed, tmp_path):
  lines = [{'idx': n, 'label': f'wrong {n}'} for n in range(9)]
  path = changed(RTE='\n'.join(map(json.dumps, lines)))
  assert problems(path, tmp_path) == [
    f"RTE.jsonl: 'wrong {n}' is no label" for n in range(3)
  ]


@pytest.mark.parametrize('name', LINES)
def test_examples_that_are_not_those_of_the_test_file(changed, data, name):
  """One missing, one twice, two in another order, one of another number."""
  lines = LINES[name]
  number = json.loads(lines[-1])['idx']
  other = lines[-1].replace(f'"idx": {number}', '"idx": 99', 1)
  for wrong in (
    lines[:-1],
    [*lines, lines[0]],
    lines[::-1],
    [*lines[:-1], other],
    [],
  ):
    path = changed(
      **{name[: -len('.jsonl')].replace('-', '_'): '\n'.join(wrong)}
    )
    (found,) = problems(path, data)
    assert found.startswith(f'{name}: ')
    assert 'examples are not, in order, the ' in found


def test_answers_under_another_question(changed, data):
  first, last = map(json.loads, LINES['MultiRC.jsonl'])
  questions = first['passage']['questions']
  questions[1]['answers'].insert(0, questions[0]['answers'].pop())
  path = changed(MultiRC=f'{json.dumps(first)}\n{json.dumps(last)}')
  assert problems(path, data) == [
    'MultiRC.jsonl: 4 examples are not, in order, the 4 of the test file'
  ]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"idx": 0, "label": "true"', 'malformed: JSONDecodeError'),
    ('{"idx": 0, "label": "true"}\n\n', 'malformed: JSONDecodeError'),
    ('{"label": "true"}', "malformed: KeyError 'idx'"),
    ('{"idx": 0}', "malformed: KeyError 'label'"),
    ('[0, "true"]', 'malformed: TypeError'),
    ('"true"', 'malformed: TypeError'),
    (b'{"idx": "\xff"}', 'malformed: UnicodeDecodeError'),
  ],
)
def test_lines_that_cannot_be_read(changed, data, text, message):
  (found,) = problems(changed(BoolQ=text), data)
  assert found.startswith('BoolQ.jsonl is ') and message in found


# With the real test files.


def _real():
  root = pathlib.Path(os.environ.get('ST_MOE_DATA', 'nowhere'))
  return {
    task
    for task, spec in superglue.TASKS.items()
    if (root / spec.files['test'][0]).exists()
  }


@pytest.fixture(scope='module')
def drawn():
  """Rows of the real test files, with labels drawn at random."""
  found, rng = {}, random.Random(0)
  for task in sorted(_real()):
    spec, rows = superglue.TASKS[task], []
    for e in spec.load('test'):
      idx = {k[4:]: v for k, v in e.items() if k.startswith('idx/')}
      said = rng.choice(spec.labels or (e['targets'], 'garbage'))
      by = 'rank' if spec.labels else 'decoding'
      rows.append(_row(idx or e['idx'], said, by, e['targets']))
    found[task] = rows
  if not found:
    pytest.skip('ST_MOE_DATA has no test file of SuperGLUE')
  return found


def test_random_labels_of_the_real_examples(drawn, tmp_path):
  path = write(tmp_path, _measured(drawn))
  missing = [
    f'{submission.FILES[task]} is there 0 times'
    for task in superglue.TASKS
    if task not in drawn
  ]
  assert problems(path) == missing
  # Both or all labels are there: nothing was taken for garbage.
  for task, rows in drawn.items():
    text = _read(path)[submission.FILES[task]]
    if task != 'multirc':
      lines = [json.loads(line) for line in text.splitlines()]
      assert len(lines) == len(rows)
      kinds = 2 if task == 'wsc' else len(superglue.TASKS[task].labels)
      assert len({line['label'] for line in lines}) == kinds
    assert text.count('"label"') == len(rows)


# How many examples the leaderboard counts.
SIZES = {
  'boolq': 3_245,
  'cb': 250,
  'copa': 500,
  'multirc': 9_693,
  'record': 10_000,
  'rte': 3_000,
  'wic': 1_400,
  'wsc': 146,
  'axb': 1_104,
  'axg': 356,
}


def test_the_real_examples_are_all_there(drawn):
  assert {t: len(rows) for t, rows in drawn.items()} == {
    t: n for t, n in SIZES.items() if t in drawn
  }


def test_one_real_example_less(drawn, tmp_path):
  fewer = {task: rows[:-1] for task, rows in drawn.items()}
  found = problems(write(tmp_path, _measured(fewer)))
  told = [p.split(':')[0] for p in found if p.endswith('of the test file')]
  assert told == [submission.FILES[t] for t in superglue.TASKS if t in drawn]
