"""`st-moe prepare superglue`: what is fetched, and what is refused."""

import hashlib
import json
import os
import pathlib
import socket
import threading
import zipfile

import pytest

from st_moe.data import download, superglue

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

# All there is to fetch: 8 tasks in three splits, and two files of diagnostics.
TASKS = ('BoolQ', 'CB', 'COPA', 'MultiRC', 'RTE', 'ReCoRD', 'WSC', 'WiC')
NAMES = [
  *('AX-b/AX-b.jsonl', 'AX-g/AX-g.jsonl'),
  *(f'{t}/{split}.jsonl' for t in TASKS for split in ('train', 'val', 'test')),
]
# The only one whose sum is not known.
UNKNOWN = 'BoolQ/train.jsonl'


def content(name):
  return f'{{"file": "{name}"}}\n'.encode()


def sha256(data):
  return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def sums(monkeypatch):
  """The sums of our small files in place of the official ones."""
  small = {n: sha256(content(n))[:16] for n in download.SUMS}
  monkeypatch.setattr(download, 'SUMS', small)
  monkeypatch.delenv('ST_MOE_DATA', raising=False)
  return small


def pack(path, names=NAMES, changed=()):
  """An archive, and its URL."""
  with zipfile.ZipFile(path, 'w') as archive:
    for name in names:
      archive.writestr(name, b'other' if name in changed else content(name))
  return path.as_uri()


@pytest.fixture
def url(tmp_path):
  return pack(tmp_path / 'combined.zip')


def there(root):
  return sorted(
    str(path.relative_to(root)) for path in root.rglob('*') if path.is_file()
  )


EVERYTHING = sorted(f'superglue/{name}' for name in NAMES)


def test_everything_is_unpacked(tmp_path, url, capsys):
  download.superglue(str(tmp_path / 'data'), url)
  assert there(tmp_path / 'data') == EVERYTHING
  for name in NAMES:
    path = tmp_path / 'data' / 'superglue' / name
    assert path.read_bytes() == content(name)
  assert capsys.readouterr().out.splitlines() == [
    f'fetching {url}',
    f'{tmp_path}/data/superglue: all 26 files are there.',
  ]


def test_the_tasks_find_what_was_unpacked(tmp_path, url, capsys):
  download.superglue(str(tmp_path / 'data'), url)
  for task in superglue.TASKS.values():
    for split in task.splits:
      path = task.file(split, str(tmp_path / 'data'))
      name = str(path.relative_to(tmp_path / 'data' / 'superglue'))
      assert path.read_bytes() == content(name)


def test_the_variable_names_the_folder(tmp_path, url, capsys, monkeypatch):
  monkeypatch.setenv('ST_MOE_DATA', str(tmp_path / 'data'))
  download.superglue('', url)
  assert there(tmp_path / 'data') == EVERYTHING


def test_no_folder_at_all():
  with pytest.raises(ValueError) as error:
    download.superglue('', 'file:///nowhere')
  assert '--data_dir' in str(error.value) and 'ST_MOE_DATA' in str(error.value)


def test_a_second_run_fetches_nothing(tmp_path, url, capsys):
  download.superglue(str(tmp_path / 'data'), url)
  (tmp_path / 'combined.zip').unlink()
  capsys.readouterr()
  download.superglue(str(tmp_path / 'data'), url)
  assert capsys.readouterr().out == (
    f'{tmp_path}/data/superglue: all 26 files are there.\n'
  )


def test_only_what_is_missing_is_unpacked(tmp_path, capsys, sums):
  # Of BoolQ's training file nobody knows the sum, so that of the archive would
  # do as well; and a file that has its sum is not touched.
  url = pack(tmp_path / 'combined.zip', changed=[UNKNOWN, 'CB/val.jsonl'])
  mine = tmp_path / 'data' / 'superglue'
  for name in (UNKNOWN, 'CB/val.jsonl'):
    (mine / name).parent.mkdir(parents=True)
    (mine / name).write_bytes(content(name))
  download.superglue(str(tmp_path / 'data'), url)
  assert there(tmp_path / 'data') == EVERYTHING
  for name in NAMES:
    assert (mine / name).read_bytes() == content(name)


def test_a_file_that_is_not_the_official_one_is_refused(tmp_path, capsys, sums):
  url = pack(tmp_path / 'combined.zip', changed=['RTE/test.jsonl'])
  with pytest.raises(ValueError) as error:
    download.superglue(str(tmp_path / 'data'), url)
  path = tmp_path / 'data' / 'superglue' / 'RTE' / 'test.jsonl'
  assert str(error.value) == (
    f'{url} has another superglue/RTE/test.jsonl than the official one: its'
    f' sha256 begins with {sha256(b"other")[:16]}, not'
    f' {sums["RTE/test.jsonl"]}. Nothing is kept of it; what is right goes to'
    f' {path}.'
  )
  assert 'are there' not in capsys.readouterr().out
  assert 'superglue/RTE/test.jsonl' not in there(tmp_path / 'data')
  download.superglue(str(tmp_path / 'data'), pack(tmp_path / 'good.zip'))
  assert path.read_bytes() == content('RTE/test.jsonl')


def test_a_file_that_was_there_is_checked_too(tmp_path, url, capsys):
  path = tmp_path / 'data' / 'superglue' / 'WiC' / 'train.jsonl'
  path.parent.mkdir(parents=True)
  path.write_bytes(b'')
  with pytest.raises(ValueError, match=f'{path} is not the official file'):
    download.superglue(str(tmp_path / 'data'), url)
  assert path.read_bytes() == b''  # And not overwritten.


def test_without_a_network_it_says_what_to_put_where(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setenv('no_proxy', '*')
  here = tmp_path / 'data' / 'superglue'
  for name in NAMES[3:]:
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    (here / name).write_bytes(content(name))
  for url in (
    (tmp_path / 'none.zip').as_uri(),
    'http://127.0.0.1:9/combined.zip',  # Nobody listens.
  ):
    with pytest.raises(ValueError) as error:
      download.superglue(str(tmp_path / 'data'), url)
    said, _, missing = str(error.value).partition('Missing:')
    assert said.startswith(f'Cannot fetch {url}: ')
    assert f'unpack it into {here}, and run this again' in said
    assert missing.split() == sorted(str(here / name) for name in NAMES[:3])
  assert len(there(tmp_path / 'data')) == len(NAMES) - 3


@pytest.mark.parametrize('data', [b'', b'<html>404 Not Found</html>'])
def test_what_is_no_archive(tmp_path, capsys, data):
  path = tmp_path / 'combined.zip'
  path.write_bytes(data)
  with pytest.raises(ValueError, match='is not the archive of SuperGLUE: File'):
    download.superglue(str(tmp_path / 'data'), path.as_uri())
  assert there(tmp_path) == ['combined.zip']


def test_an_archive_that_lacks_a_file(tmp_path, capsys):
  names = [name for name in NAMES if name != 'WSC/val.jsonl']
  url = pack(tmp_path / 'combined.zip', names)
  with pytest.raises(ValueError, match='archive of SuperGLUE: .*WSC/val.jsonl'):
    download.superglue(str(tmp_path / 'data'), url)
  assert 'superglue/WSC/val.jsonl' not in there(tmp_path / 'data')


def test_an_archive_that_came_damaged(tmp_path, capsys):
  url = pack(tmp_path / 'combined.zip')
  path = tmp_path / 'combined.zip'
  damaged = path.read_bytes().replace(content('CB/val.jsonl'), b'!' * 25, 1)
  assert damaged != path.read_bytes()
  path.write_bytes(damaged)
  with pytest.raises(ValueError, match='archive of SuperGLUE: Bad CRC'):
    download.superglue(str(tmp_path / 'data'), url)


def test_an_archive_that_says_more_than_it_should(
  tmp_path, capsys, monkeypatch
):
  # 26 files of 10 KB, packed into a few hundred bytes each.
  path = tmp_path / 'combined.zip'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name in NAMES:
      archive.writestr(name, bytes(10_000))
  monkeypatch.setattr(download, '_LARGEST', 9_999)
  with pytest.raises(ValueError, match='no file of SuperGLUE'):
    download.superglue(str(tmp_path / 'data'), path.as_uri())
  assert there(tmp_path / 'data') == []


def test_a_server_that_says_nothing(tmp_path, capsys, monkeypatch):
  with socket.create_server(('127.0.0.1', 0)) as server:  # Never answers.
    port = server.getsockname()[1]
    monkeypatch.setattr(download, '_PATIENCE', 0.2)
    monkeypatch.setenv('no_proxy', '*')
    with pytest.raises(ValueError, match='Cannot fetch .*timed out'):
      download.superglue(str(tmp_path / 'data'), f'http://127.0.0.1:{port}/a')


def test_an_answer_that_is_cut_off(tmp_path, capsys, monkeypatch):
  def answer(server):
    connection, _ = server.accept()
    with connection:
      connection.recv(1 << 16)
      connection.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nPK')

  monkeypatch.setenv('no_proxy', '*')
  with socket.create_server(('127.0.0.1', 0)) as server:
    threading.Thread(target=answer, args=(server,)).start()
    url = f'http://127.0.0.1:{server.getsockname()[1]}/a'
    with pytest.raises(ValueError, match='Cannot fetch .*: 2 of 99 bytes came'):
      download.superglue(str(tmp_path / 'data'), url)


# ---- Real files -------------------------------------------------------------


def test_sums_are_those_of_all_files_but_one(sums):
  assert {*NAMES} - {UNKNOWN} == sums.keys()
  assert all(len(found) == 16 for found in sums.values())


REAL = dict(download.SUMS)


def test_sums_are_those_of_the_official_files():
  root = DATA / 'superglue'
  if not root.exists():
    pytest.skip(f'no {root}; set ST_MOE_DATA to a folder that has it')
  # Of files that are too large to lie there the sums alone are known.
  hashes = json.loads((root / 'official_hashes.json').read_text())
  known = {
    '/'.join(name.split('/')[-2:]): found['sha256']
    for name, found in hashes.items()
    if name.startswith('DavidHe137/mice')
  }
  for name, expected in REAL.items():
    path = root / name
    found = sha256(path.read_bytes()) if path.exists() else known[name]
    assert found.startswith(expected), name
