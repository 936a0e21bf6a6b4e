"""Pairs of texts in files, trained on and scored without a line of code."""

import gzip
import json

import pytest

from st_moe import config_file
from st_moe.config import DataConfig
from st_moe.data import pipeline, vocabulary
from st_moe.data.eval_data import EvalData
from st_moe.data.mixture import Library

BYTES = vocabulary.load('bytes')
ROWS = [
  {'inputs': f'say {word}', 'targets': word}
  for word in ('one', 'two', 'three', 'four', 'five')
]


def put(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = '\n'.join(map(json.dumps, rows))
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text if path.suffix == '.jsonl' else json.dumps(rows))
  return str(path)


def config(tmp_path, pairs, mix=None, **changes):
  values = dict(inputs_length=16, targets_length=8, batch_size=5)
  return DataConfig(
    mixture=mix or {},
    pairs=pairs,
    cache_dir=str(tmp_path / 'cache'),
    **{**values, **changes},
  )


def texts(data):
  return [(e.inputs_text, e.targets_text) for e in data.examples]


@pytest.fixture
def say(tmp_path):
  """Five rows to learn from, in three kinds of files, and two to be asked."""
  put(tmp_path / 'say' / '0.jsonl', ROWS[:2])
  put(tmp_path / 'say' / '1.jsonl.gz', ROWS[2:3])
  put(tmp_path / 'say' / '2.json', ROWS[3:])
  valid = put(tmp_path / 'valid.jsonl', ROWS[:2])
  return {'train': f'{tmp_path}/say/*', 'validation': valid}


def test_pairs_alone_are_what_is_trained_on(tmp_path, say):
  ask = {'train': put(tmp_path / 'ask.jsonl', ROWS[:1])}
  c = config(tmp_path, {'say': say, 'ask': ask})
  Library(c).check()
  data = pipeline.TrainData(Library(c, BYTES))
  assert dict(zip(data.sources, data.rates, strict=True)) == {
    'say': 5 / 6,
    'ask': 1 / 6,
  }
  c = config(tmp_path, {'say': say})
  counts = pipeline.prepare(Library(c, BYTES))
  assert [counts['say'][s]['records'] for s in counts['say']] == [5, 2]
  batch = pipeline.TrainData(Library(c, BYTES)).batch(0)
  found = {
    (BYTES.decode(i), BYTES.decode(t))
    for i, t in zip(
      batch['encoder_input_tokens'], batch['decoder_target_tokens'], strict=True
    )
  }
  assert found == {(row['inputs'], row['targets']) for row in ROWS}


def test_pairs_are_a_member_of_a_mixture(tmp_path, say):
  (tmp_path / 'text.txt').write_text('some text to fill gaps of ' * 9)
  files = {'text': {'train': f'{tmp_path}/text.txt'}}
  c = config(tmp_path, {'say': say}, {'say': 3, 'text': 1}, files=files)
  data = pipeline.TrainData(Library(c, BYTES))
  assert dict(zip(data.sources, data.rates, strict=True)) == {
    'say': 0.75,
    'text': 0.25,
  }
  with pytest.raises(ValueError, match='data.pairs.text is the name of a text'):
    Library(config(tmp_path, {'text': say}, files=files)).check()


def test_pairs_are_scored_by_what_a_vocabulary_can_say(tmp_path, say):
  data = EvalData(Library(config(tmp_path, {'say': say}), BYTES), 'say')
  assert texts(data) == [('say one', 'one'), ('say two', 'two')]
  assert data.choices(data.examples[0]) == ()  # It is decoded.
  scores = lambda *said: data.scores(data.examples, said)
  assert (
    scores('one', 'two') == scores(' one', 'ｔｗｏ ') == {'accuracy': 100.0}
  )
  assert scores('one', 'twо') == {'accuracy': 50.0}  # Of another alphabet.
  asked = {**say, 'metrics': 'accuracy|rouge'}
  data = EvalData(Library(config(tmp_path, {'say': asked}), BYTES), 'say')
  assert data.scores(data.examples, ['one', 'one']) == dict.fromkeys(
    ('accuracy', 'rouge1', 'rougeLsum'), 50.0
  ) | {'rouge2': 0.0}


def test_fields_and_labels_have_names(tmp_path):
  rows = [
    {'q': 'it rains', 'mood': 'sad', 'idx': 7},
    {'q': 'sun', 'mood': 1, 'idx': 9},
  ]
  asked = {
    'train': put(tmp_path / 'a.jsonl', rows),
    'test': put(tmp_path / 'b.jsonl', [{'q': 'snow'}, *rows[:1]]),
    'inputs': 'q',
    'targets': 'mood',
    'labels': 'sad|happy',
  }
  c = config(tmp_path, {'mood': asked})
  data = EvalData(Library(c, BYTES), 'mood', 'train')
  assert [e.targets_text for e in data.examples] == ['sad', 'happy']
  assert [e.idx for e in data.examples] == [7, 9]
  assert data.choices(data.examples[0]) == ('sad', 'happy')  # It is ranked.
  # What the test split does not tell is not scored.
  data = EvalData(Library(c, BYTES), 'mood', 'test')
  assert [data.told(e) for e in data.examples] == [False, True]
  assert data.scores(data.examples, ['sad', 'sad']) == {'accuracy': 100.0}
  with pytest.raises(
    ValueError, match='a.jsonl, line 1: mood .sad. is none of'
  ):
    bad = {**asked, 'labels': 'bad|good'}
    Library(config(tmp_path, {'mood': bad})).check()


def test_a_vocabulary_learns_from_pairs(tmp_path):
  rows = [{'inputs': 'ğ ' * 50, 'targets': 'þ ' * 50}] * 40
  c = config(tmp_path, {'say': {'train': put(tmp_path / 'a.jsonl', rows)}})
  found = Library(c).train_vocabulary(str(tmp_path / 'v.model'), 200)
  assert found.unk not in found.encode('ğ þ')


def test_flags_are_enough(say):
  flags = {f'data.pairs.say.{key}': value for key, value in say.items()}
  flags |= {'data.pairs.say.labels': 'no|1', 'data.pairs.say.inputs': 'q'}
  found = config_file.load('configs/finetune.py:mixture=say', flags).data
  assert found.pairs == {'say': {**say, 'labels': 'no|1', 'inputs': 'q'}}
  assert dict(found.mixture) == {'say': 1.0}


def test_an_edited_file_is_read_anew(tmp_path, say):
  c = config(tmp_path, {'say': say})
  assert len(EvalData(Library(c, BYTES), 'say')) == 2
  put(tmp_path / 'valid.jsonl', ROWS)
  assert len(EvalData(Library(c, BYTES), 'say')) == 5


def test_a_name_lasts_as_long_as_its_config(tmp_path, say):
  first = Library(config(tmp_path, {'say': say}), BYTES)
  assert first.members('say') == {'say': 1.0}
  with pytest.raises(ValueError, match="Unknown data source 'say'"):
    Library(config(tmp_path, {}), BYTES).members('say')
  # The first one still knows what it is.
  assert first.splits('say') == ['train', 'validation']
  assert len(EvalData(first, 'say', 'validation')) == 2


@pytest.mark.parametrize(
  'change, message',
  [
    ({'pairs': {'a-b': {}}}, 'data.pairs.a-b: a name is made of letters, digi'),
    (
      {'pairs': {'say': {}}},
      'data.pairs.say has no files; add --config.data.p',
    ),
    (
      {'pairs': {'tiny_cb': {'train': 'a'}}},
      'pairs.tiny_cb: there is a task of',
    ),
    (
      {'pairs': {'python_reference': {}}},
      'is the name of a text; take another',
    ),
    (
      {'trian': 'a.jsonl'},
      "field of data.pairs.say 'trian'. Did you mean 'trai",
    ),
    (
      {'metrics': 'rogue'},
      "metric of data.pairs.say 'rogue'. Did you mean 'ro",
    ),
    ({'train': 'no.jsonl'}, 'no.jsonl: no such file'),
    ({'train': '{}/a.txt'}, 'a.txt: rows have fields: they come as .jsonl'),
    (
      {'inputs': 'question'},
      "0.jsonl, line 1: no field 'question' in {'inputs",
    ),
    ({'train': '{}/empty.jsonl'}, 'empty.jsonl: no rows'),
  ],
)
def test_what_is_wrong_is_told_before_work_begins(
  tmp_path, say, change, message
):
  for name in ('a.txt', 'empty.jsonl'):
    (tmp_path / name).write_text('')
  change = {
    k: v.format(tmp_path) if isinstance(v, str) else v
    for k, v in change.items()
  }
  pairs = change.pop('pairs', {'say': {**say, **change}})
  with pytest.raises(ValueError, match=message):
    Library(config(tmp_path, pairs)).check()


def test_a_split_that_is_not_there_is_told_how_to_name_it(tmp_path, say):
  c = config(tmp_path, {'say': {'train': say['train']}})
  with pytest.raises(
    ValueError, match='no split .validation.*--config.data.pairs.say.validation'
  ):
    Library(c).check(('train', 'validation'))


def test_pairs_that_nothing_asks_for_are_told(tmp_path, say, caplog):
  Library(config(tmp_path, {'say': say}, {'tiny_cb': 1})).check()
  assert 'data.pairs.say is not in data.mixture' in caplog.text
