"""What a task is made of: where its files lie, what a wrong row is told."""

import json
import logging
import re

import pytest

from st_moe.data import task as task_lib
from st_moe.data.task import TextTask, class_number, label_text, short, take

LABELS = ('no', 'yes')


def ask(row, split):
  """One example for each of a row's questions."""
  for question in take(row, 'questions', list):
    yield {
      'inputs': f'toy {take(question, "text")}',
      'targets': label_text(question, split, LABELS),
      'idx': take(row, 'id/number', int),
    }


TASK = TextTask(
  ask,
  labels=LABELS,
  files={
    'train': ('toys/Toy/train.jsonl', 'toys/Toy/train.few.jsonl'),
    'validation': ('toys/Toy/val.jsonl',),
    'test': ('toys/Toy/test.jsonl',),
  },
)


def row(number, *questions):
  """`row(7, ('is it so', 'yes'))`: a row with one question."""
  asked = [{'text': text, 'label': label} for text, label in questions]
  return {'id': {'number': number}, 'questions': asked}


TWO = [row(0, ('a', 'yes'), ('b', 'no')), row(1, ('c', 0))]


def put(root, name, rows=TWO):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


# ---- Where a file lies ------------------------------------------------------


@pytest.fixture
def told(caplog):
  """The warnings so far."""
  caplog.set_level(logging.WARNING, 'st_moe')
  return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize('folder', ['toys/Toy', 'Toy'])
def test_a_file_of_ours_or_of_the_bare_archive(tmp_path, folder, told):
  path = put(tmp_path, f'{folder}/val.jsonl')
  assert TASK.file('validation', str(tmp_path)) == path
  assert told() == []


def test_the_variable_names_the_folder_where_nothing_else_does(
  tmp_path, monkeypatch
):
  path = put(tmp_path / 'a', 'toys/Toy/val.jsonl')
  other = put(tmp_path / 'b', 'toys/Toy/val.jsonl')
  monkeypatch.setenv('ST_MOE_DATA', str(tmp_path / 'a'))
  assert TASK.file('validation', '') == path
  assert TASK.file('validation', str(tmp_path / 'b')) == other
  assert len(TASK.load('validation')) == 3


def test_home_is_understood(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  path = put(tmp_path, 'data/toys/Toy/val.jsonl')
  assert TASK.file('validation', '~/data') == path


def test_what_stands_in_for_a_file_is_told_once(tmp_path, told):
  few = put(tmp_path, 'toys/Toy/train.few.jsonl')
  for _ in range(2):
    assert TASK.file('train', str(tmp_path)) == few
    assert len(TASK.load('train', str(tmp_path))) == 3
  assert told() == [
    f'{few} stands in for toys/Toy/train.jsonl, which is not there.'
  ]
  # The official file comes first, wherever it lies.
  whole = put(tmp_path, 'Toy/train.jsonl')
  assert TASK.file('train', str(tmp_path)) == whole
  assert len(told()) == 1


def test_a_folder_without_the_files_is_told_what_is_missing(tmp_path):
  with pytest.raises(ValueError) as error:
    TASK.file('train', str(tmp_path))
  assert str(error.value) == (
    f'{tmp_path} has none of toys/Toy/train.jsonl, toys/Toy/train.few.jsonl.'
  )
  # The file of another split is none of its own.
  put(tmp_path, 'toys/Toy/train.jsonl')
  with pytest.raises(ValueError, match='has none of toys/Toy/val.jsonl'):
    TASK.load('validation', str(tmp_path))


def test_no_folder_at_all_is_told_how_to_name_one(monkeypatch):
  for set_it in (
    lambda: monkeypatch.delenv('ST_MOE_DATA', raising=False),
    lambda: monkeypatch.setenv('ST_MOE_DATA', ''),
  ):
    set_it()
    with pytest.raises(ValueError) as error:
      TASK.load('train')
    for part in (
      'Where is toys/Toy/train.jsonl?',
      '--data_dir',
      'data.data_dir',
      'ST_MOE_DATA',
      'st-moe prepare superglue',
    ):
      assert part in str(error.value)


def test_splits_are_those_of_the_files():
  assert TASK.splits == ('train', 'validation', 'test')
  assert TextTask(ask, sizes={'train': 2}).splits == ('train',)


# ---- Examples ---------------------------------------------------------------


def test_load_makes_every_example_of_every_row(tmp_path):
  put(tmp_path, 'toys/Toy/val.jsonl')
  assert TASK.load('validation', str(tmp_path)) == [
    {'inputs': 'toy a', 'targets': 'yes', 'idx': 0},
    {'inputs': 'toy b', 'targets': 'no', 'idx': 0},
    {'inputs': 'toy c', 'targets': 'no', 'idx': 1},
  ]


def test_load_reads_a_file_as_the_task_says(tmp_path):
  read = lambda path: enumerate(json.loads(path.read_text()), 1)
  task = TextTask(ask, files={'train': ('toys/a.json',)}, read=read)
  path = tmp_path / 'toys' / 'a.json'
  path.parent.mkdir()
  path.write_text(json.dumps(TWO, indent=2))
  assert len(task.load('train', str(tmp_path))) == 3
  path.write_text(json.dumps([*TWO, {}]))
  with pytest.raises(ValueError, match=f"{path}, line 3: no field 'questions'"):
    task.load('train', str(tmp_path))


def test_generated_rows_need_no_file(monkeypatch):
  monkeypatch.delenv('ST_MOE_DATA', raising=False)
  task = TextTask(
    ask,
    generate=lambda split: [row(n, (split, 'no')) for n in range(2)],
    sizes={'train': 2, 'validation': 2},
  )
  assert task.load('validation') == [
    {'inputs': 'toy validation', 'targets': 'no', 'idx': n} for n in range(2)
  ]


GOOD = json.dumps(TWO[0]).encode()


@pytest.mark.parametrize(
  'line, expected',
  [
    (b'{"id": {"number": 1}}', ", line 3: no field 'questions' in {'id': "),
    (b'{"questions": 1}', ", line 3: 'questions' is 1; it must be a list."),
    (b'{"questions": [5]}', ", line 3: no field 'text' in 5."),
    (
      b'{"questions": [{"text": null}]}',
      ", line 3: 'text' is None; it must be text.",
    ),
    (
      b'{"questions": [{"text": "a"}]}',
      ", line 3: no field 'label' in {'text': 'a'}; only test files may lack",
    ),
    (
      b'{"questions": [{"text": "a", "label": "maybe"}]}',
      ", line 3: label 'maybe' is none of 'no', 'yes' (or their numbers, 0 to"
      ' 1).',
    ),
    (
      b'{"questions": [{"text": "a", "label": 1}], "id": {}}',
      ", line 3: no field 'id/number' in {",
    ),
    (
      b'{"questions": [{"text": "a", "label": 1}], "id": {"number": "x"}}',
      ", line 3: 'id/number' is 'x'; it must be a whole number.",
    ),
    (b'{"questions": [', ', line 3: broken JSON ('),
    (b'[1, 2]', ', line 3: a JSON list where an object is needed'),
    (b'{"questions": "\xff"}', ', line 3 is not UTF-8 ('),
  ],
)
def test_a_wrong_row_names_file_line_and_field(tmp_path, line, expected):
  path = put(tmp_path, 'toys/Toy/val.jsonl')
  path.write_bytes(GOOD + b'\n\n' + line)  # A blank line is a line.
  with pytest.raises(ValueError, match=re.escape(f'{path}{expected}')):
    TASK.load('validation', str(tmp_path))


@pytest.mark.parametrize('content', ['', '\n \n', '{"questions": []}'])
def test_a_file_without_rows_is_an_error(tmp_path, content):
  path = put(tmp_path, 'toys/Toy/val.jsonl')
  path.write_text(content)
  with pytest.raises(ValueError) as error:
    TASK.load('validation', str(tmp_path))
  assert str(error.value) == f'{path}: no rows; a task needs at least one.'


@pytest.mark.parametrize(
  'change, expected',
  [
    ({'inputs': 5}, "'inputs' is 5; it must be text."),
    ({'targets': None}, "'targets' is None; it must be text."),
    ({'inputs': '\ud83d'}, "'inputs' is not UTF-8 (surrogates not allowed)."),
    ({'note': ['\ud83d']}, "'note' is not UTF-8 (surrogates not allowed)."),
    ({'note': {1, 2}}, "'note' is {1, 2}, which JSON cannot hold."),
    ({'note': b'a'}, "'note' is b'a', which JSON cannot hold."),
  ],
)
def test_an_example_that_cannot_be_kept_names_its_line(
  tmp_path, change, expected
):
  good = {'inputs': 'a', 'targets': 'b'}
  make = lambda row, split: [good | change if row['bad'] else good]
  task = TextTask(make, files={'train': ('a.jsonl',)})
  path = put(tmp_path, 'a.jsonl', [{'bad': False}, {'bad': True}])
  with pytest.raises(ValueError) as error:
    task.load('train', str(tmp_path))
  assert str(error.value) == f'{path}, line 2: {expected}'


def test_half_a_surrogate_names_the_field_of_the_row(tmp_path):
  half = row(0, ('a', 'yes'), ('\ud83d', 'no'))
  put(tmp_path, 'toys/Toy/val.jsonl', [TWO[0], half])
  with pytest.raises(ValueError, match="val.jsonl, line 2: 'text' is not UTF"):
    TASK.load('validation', str(tmp_path))


def test_a_file_that_goes_away_is_named(tmp_path):
  with pytest.raises(ValueError, match='gone.jsonl: no such file'):
    list(TASK.read(tmp_path / 'gone.jsonl'))


# ---- Fields -----------------------------------------------------------------


def test_take_goes_down_a_path():
  nested = {'a': {'b': {'c': 'deep'}, 'n': 3, 'l': [1]}, 'b': 'shallow'}
  assert take(nested, 'b') == 'shallow'
  assert take(nested, 'a/b/c') == 'deep'
  assert take(nested, 'a/n', int) == 3
  assert take(nested, 'a/l', list) == [1]
  for field in ('c', 'a/c', 'a/b/d', 'b/c', 'a/l/0'):
    with pytest.raises(ValueError, match=f"no field '{field}' in "):
      take(nested, field)


@pytest.mark.parametrize(
  'value, kind, expected',
  [(0, int, 0), ('12', int, 12), ('', str, ''), ([], list, [])],
)
def test_take_gives_a_value_of_the_kind(value, kind, expected):
  assert take({'f': value}, 'f', kind) == expected


@pytest.mark.parametrize(
  'value, kind, what',
  [
    (3, str, 'text'),
    (None, str, 'text'),
    (True, str, 'text'),
    ('1.5', int, 'a whole number'),
    (1.0, int, 'a whole number'),
    (True, int, 'a whole number'),
    ('', int, 'a whole number'),
    ('abc', list, 'a list'),
    ({}, list, 'a list'),
  ],
)
def test_take_refuses_another_kind(value, kind, what):
  with pytest.raises(ValueError) as error:
    take({'f': value}, 'f', kind)
  assert str(error.value) == f"'f' is {value!r}; it must be {what}."


def test_a_message_does_not_bury_its_reader():
  passage = 'long ' * 1000
  for text in (
    short(passage),
    short({'passage': passage}),
    str(pytest.raises(ValueError, take, {'passage': passage}, 'x').value),
    str(pytest.raises(ValueError, take, {'f': [passage]}, 'f').value),
  ):
    assert 'long long' in text and len(text) < 260
  assert short('brief') == "'brief'"


# ---- Labels -----------------------------------------------------------------

BOOLEAN, COPA = ('False', 'True'), ('choice1', 'choice2')


@pytest.mark.parametrize(
  'labels, label, expected',
  [
    (LABELS, 'yes', 'yes'),
    (LABELS, 0, 'no'),
    (LABELS, 1, 'yes'),
    (BOOLEAN, True, 'True'),
    (BOOLEAN, False, 'False'),
    (BOOLEAN, 'True', 'True'),
    (BOOLEAN, 1, 'True'),
    (COPA, 1, 'choice2'),
  ],
)
def test_labels_are_texts_truth_values_or_numbers(labels, label, expected):
  for split in ('train', 'validation', 'test'):
    assert label_text({'label': label}, split, labels) == expected


@pytest.mark.parametrize(
  'labels, label',
  [(LABELS, label) for label in ('Yes', '', 2, -1, 1.0, None, ['yes'], {})]
  + [(LABELS, True), (COPA, False), (BOOLEAN, 'true')],
)
def test_an_unknown_label_is_an_error_in_every_split(labels, label):
  hides = label in ('', -1, None)  # In a test split; see below.
  for split in ('train', 'validation', *['test'] * (not hides)):
    with pytest.raises(ValueError) as error:
      label_text({'label': label}, split, labels)
    for part in (f'label {label!r} ', *map(repr, labels), '0 to 1'):
      assert part in str(error.value)


def test_only_a_test_row_may_lack_its_label():
  assert label_text({}, 'test', LABELS) == '<unk>' == task_lib.UNKNOWN
  for split in ('train', 'validation'):
    with pytest.raises(ValueError, match="no field 'label' in {'a': 1}; only"):
      label_text({'a': 1}, split, LABELS)


@pytest.mark.parametrize('label', [-1, None, '', -1.0])
def test_a_test_row_may_hide_its_label_as_others_do(label):
  """HuggingFace and TFDS say -1, official files null or nothing."""
  assert label_text({'label': label}, 'test', LABELS) == task_lib.UNKNOWN
  # Unless it is an answer.
  assert label_text({'label': ''}, 'test', ('', 'yes')) == ''


def test_a_label_may_have_another_name():
  assert label_text({'gold': 1, 'label': 0}, 'train', LABELS, 'gold') == 'yes'
  with pytest.raises(ValueError, match="no field 'gold' in"):
    label_text({'label': 1}, 'train', LABELS, 'gold')
  with pytest.raises(ValueError, match="gold 'x' is none of"):
    label_text({'gold': 'x'}, 'train', LABELS, 'gold')


# ---- What is compared -------------------------------------------------------


def test_labels_are_compared_by_number():
  value = TASK.comparable()
  known = {'example': {'targets': 'yes'}, 'is_target': True}
  assert [value(text, **known) for text in LABELS] == [0, 1]
  # No label at all is wrong, and never an error.
  assert [value(text) for text in ('Yes', 'yes ', '', 'oui')] == [-1] * 4
  assert class_number('anything') == -1


def test_texts_are_compared_as_they_are():
  assert TextTask(ask).comparable() is None


def test_a_task_may_say_what_is_compared():
  count = lambda text, example=None, is_target=False: len(text)
  for labels in ((), LABELS):
    task = TextTask(ask, labels=labels, postprocess=count)
    assert task.comparable() is count
