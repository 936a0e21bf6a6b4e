"""SuperGLUE rows as T5 writes them, by hand and against the `t5` package."""

import gzip
import json
import os
import pathlib

import pytest

from st_moe.data import superglue

BOOLQ, CB, COPA = (superglue.FORMATS[name] for name in ('boolq', 'cb', 'copa'))

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))


def test_boolq():
  row = {
    'question': 'is the sea salty',
    'passage': 'Sea -- The sea is salty.',
    'idx': 7,
    'label': True,
  }
  assert superglue.to_text(BOOLQ, row) == {
    'inputs': (
      'boolq passage: Sea -- The sea is salty. question: is the sea salty'
    ),
    'targets': 'True',
    'idx': 7,
  }


def test_cb():
  row = {
    'premise': 'Do we assume it rains?',
    'hypothesis': 'it rains',
    'label': 'neutral',
    'idx': 1,
  }
  assert superglue.to_text(CB, row) == {
    'inputs': 'cb hypothesis: it rains premise: Do we assume it rains?',
    'targets': 'neutral',
    'idx': 1,
  }


def test_copa():
  row = {
    'premise': 'The woman retired.',
    'choice1': 'She received her pension.',
    'choice2': 'She paid off her mortgage.',
    'question': 'effect',
    'label': 0,
    'idx': 2,
  }
  assert superglue.to_text(COPA, row) == {
    'inputs': (
      'copa choice1: She received her pension. choice2: She paid off her '
      'mortgage. premise: The woman retired. question: effect'
    ),
    'targets': 'choice1',
    'idx': 2,
  }


@pytest.mark.parametrize(
  'format, label, expected',
  [
    (BOOLQ, False, 'False'),
    (BOOLQ, 'True', 'True'),
    (BOOLQ, 1, 'True'),
    (CB, 'contradiction', 'contradiction'),
    (CB, 2, 'neutral'),
    (COPA, 1, 'choice2'),
  ],
)
def test_labels_are_texts_truth_values_or_class_numbers(
  format, label, expected
):
  row = {**dict.fromkeys(format.fields, ''), 'label': label, 'idx': 0}
  assert superglue.to_text(format, row)['targets'] == expected


@pytest.mark.parametrize(
  'format, label',
  [(BOOLQ, 'yes'), (CB, 'entails'), (CB, True), (CB, 3), (CB, -1)]
  + [(COPA, True), (COPA, 1.0), (COPA, None)],
)
def test_an_unknown_label_is_an_error(format, label):
  row = {**dict.fromkeys(format.fields, ''), 'label': label, 'idx': 5}
  with pytest.raises(ValueError) as error:
    superglue.to_text(format, row)
  for part in (format.name, 'row 5', repr(label), *format.labels):
    assert part in str(error.value)


@pytest.mark.parametrize('field', ['premise', 'hypothesis', 'label', 'idx'])
def test_a_missing_field_is_an_error(field):
  row = {'premise': 'a', 'hypothesis': 'b', 'label': 'neutral', 'idx': 0}
  del row[field]
  with pytest.raises(ValueError, match=f"A cb row has no '{field}'"):
    superglue.to_text(CB, row)


def test_a_field_that_is_no_text_is_an_error():
  row = {'premise': 3, 'hypothesis': 'b', 'label': 'neutral', 'idx': 0}
  with pytest.raises(ValueError, match="'premise' is 3; it must be text"):
    superglue.to_text(CB, row)


# ---- Files ------------------------------------------------------------------

ROWS = [{'premise': 'é', 'hypothesis': 'b', 'label': 'neutral', 'idx': 0}] * 2


def test_read_rows_plain_and_gz(tmp_path):
  lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in ROWS)
  (tmp_path / 'a.jsonl').write_text(lines, encoding='utf-8')
  (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  assert list(superglue.read_rows(tmp_path / 'a.jsonl')) == ROWS
  assert list(superglue.read_rows(str(tmp_path / 'a.jsonl.gz'))) == ROWS


@pytest.mark.parametrize(
  'content, expected',
  [
    (b'{"idx": 0}\n{"idx": \n', ', line 2: broken JSON'),
    (b'{"idx": 0}\n[1, 2]\n', ', line 2: a JSON list'),
    (b'{"idx": 0}\n{"idx": "\xff"}\n', ', line 2 is not UTF-8'),
    (b'', ': no rows'),
    (None, ': no such file'),
  ],
  ids=['broken', 'a list', 'not utf-8', 'empty', 'missing'],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, content, expected):
  path = tmp_path / 'bad.jsonl'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError) as error:
    list(superglue.read_rows(path))
  assert f'{path}{expected}' in str(error.value)


def test_a_bad_row_is_an_error_that_names_file_and_line(tmp_path):
  path = tmp_path / 'val.jsonl'
  rows = [ROWS[0], {**ROWS[1], 'label': 'maybe'}]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(ValueError) as error:
    list(superglue.read_examples(CB, path))
  assert f"{path}, line 2: cb row 0: label 'maybe'" in str(error.value)


# ---- The `t5` package -------------------------------------------------------


@pytest.mark.parametrize(
  'format',
  [
    BOOLQ,
    CB,
    # No tasks of ours yet: what one line makes of them.
    superglue.Format(
      'rte', ('hypothesis', 'premise'), ('entailment', 'not_entailment'), 'RTE'
    ),
    superglue.Format(
      'wic', ('sentence1', 'sentence2', 'word'), ('False', 'True'), 'WiC'
    ),
  ],
  ids=lambda format: format.name,
)
def test_equal_to_t5_byte_for_byte(format):
  golden = DATA / 'golden' / f't5_text_{format.name}.jsonl'
  official = superglue.file_of(format, 'validation', DATA / 'superglue')
  for path in (golden, official):
    if not path.exists():
      pytest.skip(f'no {path}; set ST_MOE_DATA to a folder that has it')
  rows = list(superglue.read_rows(official))
  expected = list(superglue.read_rows(golden))
  assert len(expected) > 20
  for made_by_t5 in expected:
    ours = superglue.to_text(format, rows[made_by_t5['row']])
    assert ours == {key: made_by_t5[key] for key in ours}
