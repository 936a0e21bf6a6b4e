"""Articles and summaries as T5 writes them."""

import json
import os
import pathlib

import pytest

from st_moe.data import summarization

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

ROWS = {
  'xsum': {'document': 'A cat.\nIt sat.', 'summary': 'Cat sat.', 'id': '1'},
  'cnn_dailymail': {'article': 'A cat.\nIt sat.', 'highlights': 'Cat sat.'},
}


@pytest.mark.parametrize('name', ROWS)
def test_a_row(name):
  task = summarization.TASKS[name]
  assert list(task.examples(ROWS[name], 'train')) == [
    {'inputs': 'summarize: A cat.\nIt sat.', 'targets': 'Cat sat.'}
  ]


@pytest.mark.parametrize(
  'name, field',
  [(name, field) for name, row in ROWS.items() for field in [*row][:2]],
)
def test_a_wrong_row_names_file_line_and_field(tmp_path, name, field):
  path = tmp_path / 'summarization' / name / 'dev.jsonl'
  path.parent.mkdir(parents=True)
  row = {k: v for k, v in ROWS[name].items() if k != field}
  path.write_text(json.dumps(ROWS[name]) + '\n' + json.dumps(row))
  with pytest.raises(ValueError, match=f"{path}, line 2: no field '{field}'"):
    summarization.TASKS[name].load('validation', str(tmp_path))


def test_scores():
  pytest.importorskip('rouge_score', reason='ROUGE is of that package')
  task = summarization.TASKS['xsum']
  assert task.comparable() is None
  # All 2 words said are of the 3 asked for: F1 4/5. So is 1 pair of 2: 2/3.
  assert task.metrics[0](['the cat sat'], ['the cat']) == {
    'rouge1': pytest.approx(80),
    'rouge2': pytest.approx(200 / 3),
    'rougeLsum': pytest.approx(80),
  }


@pytest.mark.parametrize(
  'name, split, count',
  [
    ('xsum', 'train', 1000),
    ('xsum', 'validation', 100),
    ('xsum', 'test', 1000),
    ('cnn_dailymail', 'train', 6),
  ],
)
def test_real_rows(name, split, count):
  task = summarization.TASKS[name]
  folder = DATA / 'summarization'
  if not folder.exists():
    pytest.skip(f'no {folder}; set ST_MOE_DATA to a folder that has it')
  examples = task.load(split, str(DATA))
  assert len(examples) == count
  # A summary is shorter than its article.
  assert sum(len(e['targets']) < len(e['inputs']) for e in examples) == count
