"""HuggingFace datasets in place of files, by a stand-in for their library."""

import json
import sys
import types

import pytest

from st_moe.data import hub, metrics, sources
from st_moe.data.task import TextTask, take

ROWS = [{'text': 'one'}, {'text': 'two'}]


class Found(list):
  dataset_size, _fingerprint = 77, 'abc'


@pytest.fixture
def asked(monkeypatch):
  """What `load_dataset` was asked for; it knows two datasets."""
  calls = []

  def load_dataset(*names, split):
    calls.append((*names, split))
    if (*names, split) in {
      ('somebody/words', 'train'),
      ('glue', 'cola', 'train'),
      ('somebody/words', 'train[:10%]'),
      ('glue', 'cola', 'train[2:4]+validation[-10%:]'),
    }:
      return Found(ROWS)
    raise FileNotFoundError(f'{names[0]} is not there\nand more of the kind')

  library = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', library)
  hub._load.cache_clear()
  yield calls
  hub._load.cache_clear()


@pytest.mark.parametrize(
  ('uri', 'found'),
  [
    ('hf:somebody/words:train', ('somebody/words', 'train')),
    # Not a dataset of the user 'glue', so the configuration of one.
    ('hf:glue/cola:train', ('glue', 'cola', 'train')),
    # A slice has colons of its own.
    ('hf:somebody/words:train[:10%]', ('somebody/words', 'train[:10%]')),
    (
      'hf:glue/cola:train[2:4]+validation[-10%:]',
      ('glue', 'cola', 'train[2:4]+validation[-10%:]'),
    ),
  ],
)
def test_a_name_may_have_a_configuration(asked, uri, found):
  assert list(hub.rows(uri)) == [('row 1', ROWS[0]), ('row 2', ROWS[1])]
  assert asked[-1] == found


def test_text_reads_from_it(asked):
  uri = 'hf:somebody/words:train'
  assert list(sources.documents(uri)) == ['one', 'two']
  assert sources.stamp(uri) == [uri, 77, 'abc']
  with pytest.raises(ValueError, match="row 1 has no field 'body'"):
    list(sources.documents(uri, 'body'))


def test_tasks_read_from_it(asked):
  uri = 'hf:glue/cola:train'
  examples = lambda row, split: [{'inputs': take(row, 'text'), 'targets': ''}]
  task = TextTask(examples, (metrics.accuracy,), files={'train': (uri,)})
  assert task.file('train', '') == uri
  assert [e['inputs'] for e in task.load('train')] == ['one', 'two']
  bad = TextTask(lambda row, split: [take(row, 'body')], files=task.files)
  with pytest.raises(ValueError, match="glue/cola:train, row 1: no field 'bod"):
    bad.load('train')


@pytest.mark.parametrize(
  ('uri', 'message'),
  [
    ('hf:words', 'write hf:NAME:SPLIT'),
    ('hf::train', 'write hf:NAME:SPLIT'),
    ('hf:words[:2]', 'write hf:NAME:SPLIT'),
    ('hf:nobody/words:train', 'cannot be loaded: nobody is not there$'),
  ],
)
def test_what_cannot_be_loaded(asked, uri, message):
  with pytest.raises(ValueError, match=message):
    next(hub.rows(uri))


def test_a_local_directory_is_no_configuration(asked, tmp_path):
  with pytest.raises(ValueError, match='is not there'):
    next(hub.rows(f'hf:{tmp_path}:train'))
  assert len(asked) == 1


def test_without_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  hub._load.cache_clear()
  with pytest.raises(ValueError, match=r"pip install 'st_moe\[datasets\]'"):
    next(hub.rows('hf:somebody/words:train'))


def test_the_library_itself(tmp_path, monkeypatch):
  pytest.importorskip('datasets', reason='the extra `datasets` is not there')
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
  lines = ''.join(json.dumps(row) + '\n' for row in ROWS)
  (tmp_path / 'words').mkdir()
  (tmp_path / 'words' / 'train.jsonl').write_text(lines)
  hub._load.cache_clear()
  assert [row for _, row in hub.rows(f'hf:{tmp_path}/words:train')] == ROWS
  half = [row for _, row in hub.rows(f'hf:{tmp_path}/words:train[:50%]')]
  assert half == ROWS[:1]
