"""Files that are whole or absent, wherever they lie."""

import errno
import os

import pytest

from st_moe.data import files


def _tree(root):
  paths = sorted(p for p in root.rglob('*') if p.is_file())
  return {str(p.relative_to(root)): p.read_text() for p in paths}


@pytest.mark.parametrize('remote', [False, True])
def test_a_tree_moves_whole(tmp_path, bucket, remote):
  root = bucket if remote else tmp_path / 'disk'
  (root / 'old' / 'deep').mkdir(parents=True)
  (root / 'old' / 'a').write_text('1')
  (root / 'old' / 'deep' / 'b').write_text('2')
  before = 'gs://' if remote else f'{root}/'
  files.move_tree(f'{before}old', f'{before}new')
  assert _tree(root) == {'new/a': '1', 'new/deep/b': '2'}
  assert not (root / 'old').exists()


def test_what_there_is_to_know_of_a_file(tmp_path, bucket, monkeypatch):
  """On a disk and in a store; crc32 of '123456789' is a constant of its own."""
  monkeypatch.chdir(tmp_path)
  assert files.absolute('a/b') == tmp_path / 'a' / 'b'
  # `resolve` would make it a path below the working directory.
  assert f'{files.absolute("gs://a/b")}' == 'gs://a/b'
  for path in (tmp_path / 'a', 'gs://b/a'):
    files.write_whole(path, b'123456789')
    assert files.size(path) == 9 and files.checksum(path) == 'cbf43926'
    files.write_whole(path, b'')
    assert files.size(path) == 0 and files.checksum(path) == '00000000'


def test_nothing_appears_when_writing_fails(tmp_path):
  path = tmp_path / 'deep' / 'file'
  with pytest.raises(KeyError), files.appearing(path) as temp:
    temp.write_text('half')
    raise KeyError
  assert list(path.parent.iterdir()) == []
  files.write_whole(path, b'whole')
  assert [p.name for p in path.parent.iterdir()] == ['file']


def test_a_full_disk_is_said_plainly(tmp_path):
  message = 'No space left while writing .*file by way of .* make room or set'
  with (
    pytest.raises(ValueError, match=message),
    files.appearing(tmp_path / 'file'),
  ):
    raise OSError(errno.ENOSPC, 'No space left on device')
  assert list(tmp_path.iterdir()) == []


def test_json_knows_no_nan():
  nan, inf = float('nan'), float('inf')
  found = files.as_json({'a': [nan, (1.5, -inf)], 'b': {'c': inf, 'd': True}})
  assert found == '{"a": ["nan", [1.5, "-inf"]], "b": {"c": "inf", "d": true}}'


def test_no_file_takes_the_place_of_a_device(tmp_path):
  """As it would have of /dev/null, for somebody who may."""
  fifo = tmp_path / 'fifo'
  os.mkfifo(fifo)
  with pytest.raises(ValueError, match='fifo is no file, and none can take'):
    files.write_whole(fifo, b'x')
  assert fifo.is_fifo()


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'no JSON, or damaged'),
    (b'[]', 'it is a list, not an object'),
    (b'"\xff"', 'no JSON, or damaged'),
    (b'{"a": 1, "a": 2}', "it has 'a' twice"),
    (b'{"a": ' + b'[' * 100_000, 'no JSON, or damaged'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'no JSON, or damaged'),
  ],
)
def test_json_that_is_none(tmp_path, data, message):
  (tmp_path / 'a.json').write_bytes(data)
  with pytest.raises(ValueError, match='a.json is no JSON, or damaged') as e:
    files.read_json(tmp_path / 'a.json')
  assert message in str(e.value)
  (tmp_path / 'a.json').write_bytes(b'{"a": {"b": 1}}')
  assert files.read_json(tmp_path / 'a.json') == {'a': {'b': 1}}
