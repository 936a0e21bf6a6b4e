"""Text in: every kind of file, and every way in which one can be wrong."""

import gzip
import itertools
import json
import os
import sys

import pytest

from st_moe.data import files, sources

TWO = ['First line\nsecond line', 'Zweiter Text: é 漢']
TXT = '\n\n{}\n \n\n{}\n'.format(*TWO)
JSONL = ''.join(json.dumps({'text': text, 'id': 1}) + '\n' for text in TWO)
KINDS = {
  'a.txt': TXT,
  'a.jsonl': JSONL,
  'a.json': json.dumps([{'text': text} for text in TWO], indent=2),
  'lines.json': JSONL,
}


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('change', ['as is', 'bom', 'crlf'])
def test_every_kind_of_file_gives_the_same_documents(
  name, packed, change, tmp_path
):
  data = KINDS[name].encode()
  if change == 'bom':
    data = b'\xef\xbb\xbf' + data
  if change == 'crlf':
    data = data.replace(b'\n', b'\r\n')
  path = tmp_path / (name + '.gz' * packed)
  path.write_bytes(gzip.compress(data) if packed else data)
  assert list(sources.documents(str(path))) == TWO


def test_only_newlines_end_lines(tmp_path):
  text = 'a\x0bb\x0cc\x1cd\x85e\u2028f'
  (tmp_path / 'a.txt').write_text(text + '\n\nnext')
  (tmp_path / 'a.jsonl').write_text(
    json.dumps({'text': text}, ensure_ascii=False) + '\n{"text": "next"}'
  )
  for name in ('a.txt', 'a.jsonl'):
    assert list(sources.documents(str(tmp_path / name))) == [text, 'next']


def test_a_text_file_without_blank_lines_is_cut_at_line_ends(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, '_LONGEST_PARAGRAPHS', 5)
  (tmp_path / 'a.txt').write_text('abc\ndef\ng\n\nh')
  assert list(sources.documents(str(tmp_path / 'a.txt'))) == [
    'abc\ndef',
    'g',
    'h',
  ]


def test_globs_are_sorted_and_name_a_file_once(tmp_path):
  for name in ('b.txt', 'a.txt', 'c.txt', 'odd[1].txt'):
    (tmp_path / name).write_text(name)
  assert sources.expand([f'{tmp_path}/?.txt', f'{tmp_path}/a*']) == [
    f'{tmp_path}/{name}.txt' for name in 'abc'
  ]
  # A name that exists is a name, whatever a glob would make of it.
  assert sources.expand(f'{tmp_path}/odd[1].txt') == [f'{tmp_path}/odd[1].txt']


def test_relative_globs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'd').mkdir()
  (tmp_path / 'd' / 'a.txt').write_text('text')
  assert list(sources.documents('*/*.txt')) == ['text']


def test_object_store(bucket):
  (bucket / 'b').mkdir()
  for name, text in (('2.jsonl', '{"text": "two"}'), ('1.txt', 'one')):
    (bucket / 'b' / name).write_text(text)
  (bucket / 'b' / '3.txt.gz').write_bytes(gzip.compress(b'three'))
  assert sources.expand('gs://b/*.txt*') == ['gs://b/1.txt', 'gs://b/3.txt.gz']
  assert list(sources.documents('gs://b/*')) == ['one', 'two', 'three']
  with pytest.raises(ValueError, match='gs://b/9.txt: no such file'):
    sources.expand('gs://b/9.txt')
  sources.check({'x': {'train': 'gs://b/*'}})
  assert sources.stamp('gs://b/1.txt')[:2] == ['gs://b/1.txt', 3]


WRONG = [
  ('a.txt', b'', 'a.txt is empty'),
  ('a.txt', b'\n \n', 'a.txt is empty'),
  ('a.jsonl', b'{"text": ""}\n{"text": " "}', 'a.jsonl is empty'),
  ('a.json', b'[]', 'a.json is empty'),
  ('a.json', b'', 'a.json is empty'),
  ('a.txt', b'ok\n\nok\n\xff\n', 'a.txt, line 4 is not UTF-8'),
  ('a.jsonl', b'{"text": "ok"}\n\n{"text": ', 'a.jsonl, line 3: broken JSON'),
  ('a.json', b'[{"text": "ok"},\n{"tex', 'line 2: broken JSON.*or a list'),
  ('a.jsonl', b'{"text": "ok"}\n[1]', 'line 2: a JSON list where an object'),
  ('a.json', b'[{"text": "ok"}, 3]', 'item 2: a JSON int where an object'),
  (
    'a.jsonl',
    b'{"text": "ok"}\n{"body": "x", "id": 1}',
    r"line 2 has no field 'text' but \['body', 'id'\]; set data.text_field",
  ),
  ('a.json', b'[{"text": "ok"}, {"b": 1}]', "item 2 has no field 'text'"),
  ('a.jsonl', b'{"text": 7}', "line 1: field 'text' holds int, not text"),
  ('a.jsonl', b'{"text": "\\ud800"}', "field 'text' is not UTF-8"),
  ('a.csv', b'text', 'a.csv: .csv is none of .txt, .jsonl, .json'),
  ('README', b'text', 'README: no extension is none of'),
  ('a.txt.gz', b'text', 'a.txt.gz: damaged gzip'),
  (
    'a.txt.gz',
    gzip.compress(b'text\n' * 99, mtime=0)[:-12],
    r'a.txt.gz: damaged gzip after line \d+ \(Compressed file ended',
  ),
]


@pytest.mark.parametrize('name, data, message', WRONG)
def test_what_is_wrong_is_named_with_file_and_line(
  name, data, message, tmp_path
):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    list(sources.documents(str(tmp_path / name)))
  assert str(tmp_path) in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'pattern, message',
  [
    ('none.txt', 'none.txt: no such file'),
    ('none/*.txt', 'no file matches this pattern'),
    ('**/a.txt', "'\\*\\*' is not supported"),
    ('', r'is a directory; name its files: .*/\*\.jsonl'),
  ],
)
def test_what_is_not_there(pattern, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    sources.expand(f'{tmp_path}/{pattern}')


def test_read_jsonl_counts_blank_lines_but_skips_them(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"a": 1}\n\n{"a": 2}\n')
  assert list(sources.read_jsonl(path)) == [(1, {'a': 1}), (3, {'a': 2})]


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.json'])
def test_workers_share_a_file(name, tmp_path):
  texts = [f'document {i}' for i in range(7)]
  path = tmp_path / name
  rows = [json.dumps({'text': text}) for text in texts]
  path.write_text(
    {
      'a.txt': '\n\n'.join(texts),
      'a.jsonl': '\n'.join(rows),
      'a.json': f'[{",".join(rows)}]',
    }[name]
  )
  shares = [
    list(sources.documents_of(str(path), start=i, step=3)) for i in range(3)
  ]
  assert shares[1] == ['document 1', 'document 4']
  assert sorted(itertools.chain(*shares)) == texts


def test_embedded_corpus_is_split_once_and_for_all():
  train, validation = map(
    list, map(sources.embedded_corpus, ('train', 'validation'))
  )
  assert not set(train) & set(validation)
  share = sum(map(len, validation)) / sum(map(len, train + validation))
  assert 0.02 < share < 0.1
  assert len(train) > 50
  assert train == list(sources.documents_of(f'{sources.EMBEDDED}:train'))
  # Topics keep their side by name, whatever a later Python writes in them.
  from pydoc_data.topics import topics

  assert topics['while'] in validation and topics['debugger'] in validation
  assert topics['lambda'] in train and topics['with'] in train


def test_embedded_corpus_says_what_to_do_without_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
  with pytest.raises(ValueError, match='--config.data.files.NAME.train=GLOB'):
    list(sources.embedded_corpus('train'))


def test_embedded_corpus_knows_two_splits():
  with pytest.raises(ValueError, match="train and validation, not 'test'"):
    list(sources.embedded_corpus('test'))


def test_check_looks_at_every_file_but_not_far(tmp_path):
  good = '{"text": "ok"}\n' * 3
  (tmp_path / 'a.jsonl').write_text(good + 'broken, but far down')
  (tmp_path / 'b.jsonl').write_text(good)
  found = sources.check({'mine': {'train': f'{tmp_path}/*.jsonl'}})
  assert found == {
    'mine': {'train': [f'{tmp_path}/a.jsonl', f'{tmp_path}/b.jsonl']}
  }
  (tmp_path / 'b.jsonl').write_text('{"text": "ok"}\nbroken')
  with pytest.raises(ValueError, match='b.jsonl, line 2: broken JSON'):
    sources.check({'mine': {'train': f'{tmp_path}/*.jsonl'}})
  (tmp_path / 'b.jsonl').write_text('')
  with pytest.raises(ValueError, match='b.jsonl is empty'):
    sources.check({'mine': {'train': f'{tmp_path}/*.jsonl'}})


def test_check_wants_training_files():
  with pytest.raises(ValueError, match='add --config.data.files.mine.train='):
    sources.check({'mine': {'validation': 'a.txt'}})


def test_stamps_tell_changed_files(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one')
  first = sources.stamp(str(path))
  assert sources.stamp(str(path)) == first
  path.write_text('two')
  assert sources.stamp(str(path)) != first


def test_files_are_whole_or_absent(tmp_path):
  path = tmp_path / 'deep' / 'a.bin'
  files.write_whole(path, b'old')
  with pytest.raises(KeyError):
    with files.appearing(path) as temp:
      temp.write_bytes(b'half')
      raise KeyError
  assert path.read_bytes() == b'old'
  assert list(path.parent.iterdir()) == [path]
  files.write_whole(path, b'new')
  assert path.read_bytes() == b'new'


# What has no end, or asks for more than there is.


def _all(path):
  return list(sources.documents_of(str(path)))


def test_a_packed_line_without_end(tmp_path, monkeypatch):
  # 2 MB in 2 KB: as much as fits is read, and no more.
  monkeypatch.setattr(files, 'LONGEST_LINE', 1 << 20)
  monkeypatch.setattr(sources, '_LARGEST_PACKED', 4 << 20)
  text = b'{"text": "ok"}\n{"text": "' + b'a' * (2 << 20)
  for name in ('a.jsonl.gz', 'a.txt.gz'):
    (tmp_path / name).write_bytes(gzip.compress(text))
    with pytest.raises(ValueError, match=f'{name}, line 2 has more than 1 MiB'):
      _all(tmp_path / name)
  rows = b'{"text": "ok"},\n' * 300_000
  for data, message in {
    b'[\n' + rows: 'a.json.gz holds one list of more than 4 MiB',
    b'[' + rows.replace(b'\n', b''): 'a.json.gz, line 1 has more than 4 MiB',
    b'[%s"}]' % text[15:]: "item 1: field 'text' has more than 1 MiB",
  }.items():
    (tmp_path / 'a.json.gz').write_bytes(gzip.compress(data))
    with pytest.raises(ValueError, match=message):
      _all(tmp_path / 'a.json.gz')


@pytest.mark.parametrize('kind', ['a pipe', 'a device'])
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
  path = tmp_path / 'a.txt'
  if kind == 'a pipe':
    os.mkfifo(path)
  else:
    path.symlink_to('/dev/zero')
  check = lambda path: sources.check({'mine': {'train': str(path)}})
  for read in (_all, sources.read_text, check):
    with pytest.raises(ValueError, match=f'a.txt is {kind}; a file is needed'):
      read(path)


def test_a_file_that_is_read_whole_has_a_limit(tmp_path, monkeypatch):
  path = tmp_path / 'a.tsv'
  path.write_bytes(b'12345')
  assert files.read_bytes(path, 5) == b'12345'
  with pytest.raises(ValueError, match='a.tsv has more than 0 MiB; it is not'):
    files.read_bytes(path, 4)


@pytest.mark.parametrize('text', ['[' * 100_000, '{"text": %s}' % ('9' * 5000)])
def test_json_that_python_does_not_parse(text, tmp_path):
  for name in ('a.jsonl', 'a.json'):
    (tmp_path / name).write_text('{"text": "ok"}\n' + text)
    with pytest.raises(ValueError, match=f'{name}, line 2: broken JSON'):
      _all(tmp_path / name)
