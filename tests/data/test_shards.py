"""Shards on disk: what is in them, and everything that may happen to them."""

import errno
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import time

import pytest

from st_moe.data import files, shards, text_shards, vocabulary

BYTES = vocabulary.load('bytes')


def write(cache, patterns, *, raw_tokens=40, **kwargs):
  return text_shards.write_text(
    'mine',
    'train',
    patterns,
    vocabulary=kwargs.pop('vocabulary', BYTES),
    raw_tokens=raw_tokens,
    cache_dir=str(cache),
    **kwargs,
  )


def chunks(found):
  return [text_shards.tokens_of(record).tolist() for record in found]


def parts(found, suffix='.array_record'):
  return sorted(pathlib.Path(found.directory).glob(f'part-*{suffix}'))


@pytest.fixture
def cache(tmp_path):
  return tmp_path / 'cache'


@pytest.fixture
def corpus(tmp_path, monkeypatch):
  """Nine documents in three files, which make four parts of 200 characters."""
  monkeypatch.setattr(text_shards, '_PART_BYTES', 200)
  folder = tmp_path / 'text'
  folder.mkdir()
  for name, lengths in (('a', [50]), ('b', [60, 70]), ('c', [90] * 6)):
    documents = [f'{name}{i} ' * (n // 3) for i, n in enumerate(lengths)]
    (folder / f'{name}.txt').write_text('\n\n'.join(documents))
  return f'{folder}/*.txt'


def test_documents_are_joined_and_cut(tmp_path, cache):
  (tmp_path / 'a.txt').write_text('abc\n\nde\n\nfghi')
  found = write(cache, str(tmp_path / 'a.txt'), raw_tokens=4)
  a = 100  # 'a' is byte 97, after 3 special ids.
  assert chunks(found) == [
    [a, a + 1, a + 2, a + 3],
    [a + 4, a + 5, a + 6, a + 7],
  ]


@pytest.mark.parametrize('length, sizes', [(71, [40]), (72, [40, 32])])
def test_a_last_chunk_is_kept_from_32_tokens_on(tmp_path, cache, length, sizes):
  (tmp_path / 'a.txt').write_text('x' * length)
  found = write(cache, str(tmp_path / 'a.txt'))
  assert [len(chunk) for chunk in chunks(found)] == sizes


def test_what_is_known_of_them(corpus, cache):
  found = write(cache, corpus)
  assert [path.name for path in parts(found)] == [
    f'part-{i:05d}-of-00004.array_record' for i in range(4)
  ]
  info = json.loads((pathlib.Path(found.directory) / 'info.json').read_text())
  assert info == found.info
  assert info['documents'] == 9
  # Characters; nothing stands between documents.
  assert info['tokens'] == 48 + 60 + 69 + 6 * 90
  assert (
    info['records']
    == len(found)
    == sum(part['records'] for part in info['parts'])
  )
  recipe = info['recipe']
  assert recipe['vocabulary'] == BYTES.fingerprint
  assert recipe['raw_tokens'] == 40
  assert recipe['format'] == shards.FORMAT_VERSION
  assert pathlib.Path(found.directory).name.startswith('mine-train-')


def test_a_digest_is_of_the_records(corpus, cache, tmp_path):
  """Wherever text and shards lie; one more document is another one."""
  known = write(cache, corpus).digest
  moved = shutil.copytree(tmp_path / 'text', tmp_path / 'moved')
  assert write(tmp_path / 'elsewhere', f'{moved}/*.txt').digest == known
  with (moved / 'c.txt').open('a') as f:
    f.write('\n\n' + 'one more ' * 10)
  assert write(cache, f'{moved}/*.txt').digest != known
  # Shards of older code have none.
  found = write(cache, corpus)
  info = pathlib.Path(found.directory) / 'info.json'
  info.write_text(re.sub(r'"digest": "[^"]*",', '', info.read_text()))
  assert write(cache, corpus).digest == ''


def test_plan_shares_out_bytes(monkeypatch):
  monkeypatch.setattr(text_shards, '_PART_BYTES', 100)
  assert text_shards.plan([('a', 40), ('b', 50), ('c', 20), ('d', 10)]) == [
    (('a', 'b'), 0, 1),
    (('c', 'd'), 0, 1),
  ]
  assert text_shards.plan([('a', 40), ('b', 201), ('c', 50)]) == [
    (('a',), 0, 1),
    (('b',), 0, 3),
    (('b',), 1, 3),
    (('b',), 2, 3),
    (('c',), 0, 1),
  ]
  # Gzip holds three times as much; a file is read 16 times at most, and there
  # are some 256 parts at most.
  assert len(text_shards.plan([('a.gz', 67)])) == 3
  assert len(text_shards.plan([('a', 10**9)])) == 16
  many = text_shards.plan([(f'{i:05d}', 90) for i in range(10_000)])
  assert 256 <= len(many) < 300
  assert [p for paths, _, _ in many for p in paths] == [
    f'{i:05d}' for i in range(10_000)
  ]


def test_workers_change_nothing(corpus, cache, tmp_path, monkeypatch):
  # What lies in the current folder is not run: it may have come with a model.
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'pickle.py').write_text('raise SystemExit("ran what lies here")')
  alone = write(cache, corpus)
  together = write(tmp_path / 'other', corpus, workers=2)
  assert alone.directory != together.directory
  assert chunks(alone) == chunks(together) and len(alone) > 9
  assert alone.info == together.info
  for a, b in zip(parts(alone), parts(together), strict=True):
    assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_an_error_in_a_worker_names_file_and_line(tmp_path, cache, monkeypatch):
  monkeypatch.setattr(text_shards, '_PART_BYTES', 50)
  for name in 'ab':
    (tmp_path / f'{name}.jsonl').write_text('{"text": "%s"}\n' % ('x' * 50))
  with (tmp_path / 'b.jsonl').open('a') as file:
    file.write('broken')
  with pytest.raises(ValueError, match='b.jsonl, line 2: broken JSON'):
    write(cache, f'{tmp_path}/*.jsonl', workers=2)


def test_done_is_done(corpus, cache):
  seen = []
  first = write(cache, corpus, progress=lambda *args: seen.append(args))
  assert seen == [('mine-train', done, 4) for done in range(5)]
  times = [path.stat().st_mtime_ns for path in parts(first)]
  seen.clear()
  again = write(cache, corpus, progress=lambda *args: seen.append(args))
  assert not seen and again.directory == first.directory
  assert times == [path.stat().st_mtime_ns for path in parts(again)]


def test_a_killed_run_goes_on_where_it_was(corpus, cache):
  whole = write(cache, corpus)
  directory = pathlib.Path(whole.directory)
  # As after a kill: the last part has no note, the one before is not there.
  (directory / 'info.json').unlink()
  parts(whole, '.json')[3].unlink()
  parts(whole)[2].unlink()
  young = directory / '.part-00003.abc.tmp'
  young.write_text('half')
  old = directory / '.part-00002.abc.tmp'
  old.write_text('half')
  os.utime(old, (0, 0))
  times = [path.stat().st_mtime_ns for path in parts(whole)[:2]]
  with pytest.raises(ValueError, match='no finished data'):
    shards.Shards(directory)

  seen = []
  again = write(cache, corpus, progress=lambda *args: seen.append(args[1]))
  assert seen == [2, 3, 4]
  assert times == [path.stat().st_mtime_ns for path in parts(again)[:2]]
  assert again.info == whole.info and chunks(again) == chunks(whole)
  # The younger one may be in use.
  assert young.exists() and not old.exists()


def test_a_failed_part_leaves_nothing_behind(cache):
  def job(counts):
    yield b'record'
    raise ValueError('line 7')

  recipe = {'name': 'mine', 'split': 'train'}
  with pytest.raises(ValueError, match='line 7'):
    shards.write(recipe, [job], cache_dir=str(cache))
  assert [path for path in cache.rglob('*') if path.is_file()] == []


def test_every_ingredient_has_its_own_directory(corpus, cache, tmp_path):
  first = write(cache, corpus)
  others = [
    write(cache, corpus, raw_tokens=41),
    write(cache, corpus, text_field='body'),
    write(cache, [corpus, corpus.replace('*', 'a')]),  # The same files.
  ]
  path = corpus.replace('*', 'a')
  pathlib.Path(path).write_text('changed text ' * 9)
  others.append(write(cache, corpus))
  same = [other.directory == first.directory for other in others]
  assert same == [False, False, True, False]


def test_stale_data_is_written_anew(corpus, cache, caplog):
  found = write(cache, corpus)
  path = pathlib.Path(found.directory) / 'info.json'
  path.write_text(json.dumps({**found.info, 'recipe': {'format': 0}}))
  again = write(cache, corpus)
  assert 'is stale and is written anew' in caplog.text
  assert again.info == found.info
  path.write_text('{"half')
  assert write(cache, corpus).info == found.info


def test_a_part_that_was_cut_off(corpus, cache):
  found = write(cache, corpus)
  part = parts(found)[1]
  whole = part.read_bytes()
  part.write_bytes(whole[:1000])
  with pytest.raises(ValueError, match=f'{part} .*1000 of {len(whole)} bytes'):
    shards.Shards(found.directory)
  # Asked for again, it is made again; so it is after it was deleted.
  assert chunks(write(cache, corpus)) == chunks(found)
  part.unlink()
  with pytest.raises(ValueError, match='0 of .* delete it and start again'):
    shards.Shards(found.directory)
  assert chunks(write(cache, corpus)) == chunks(found)
  assert part.read_bytes() == whole


def test_a_part_with_other_bytes(corpus, cache):
  found = write(cache, corpus)
  part = parts(found)[1]
  damaged = bytearray(part.read_bytes())
  damaged[100:140] = b'\xff' * 40
  part.write_bytes(damaged)
  first = found.info['parts'][0]['records']
  again = shards.Shards(found.directory)
  assert again[0] == found[0]
  with pytest.raises(ValueError, match=f'{part} is damaged.*delete it'):
    [again[first + i] for i in range(found.info['parts'][1]['records'])]


def test_a_part_that_is_cut_off_while_it_is_read(corpus, cache):
  found = write(cache, corpus)
  assert found[0]
  # An open reader answers with empty records here.
  os.truncate(parts(found)[0], 0)
  with pytest.raises(ValueError, match='part-00000.* is damaged'):
    list(found)


def test_a_full_disk(corpus, cache, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', full)
    with pytest.raises(
      ValueError, match=rf'No space left.*{cache}.*\(\d+ MiB free'
    ):
      write(cache, corpus)
  assert [path for path in cache.rglob('*') if path.is_file()] == []

  # ArrayRecord's own words.
  with pytest.raises(ValueError, match='set data.cache_dir to another disk'):
    with files.appearing(cache / 'a'):
      raise RuntimeError('write() failed: No space left on device')
  with pytest.raises(RuntimeError, match='something else'):
    with files.appearing(cache / 'a'):
      raise RuntimeError('something else')


def test_too_little_text(tmp_path, cache):
  (tmp_path / 'a.txt').write_text('abc')
  with pytest.raises(ValueError, match='no training .*1 documents with 3 tok'):
    write(cache, str(tmp_path / 'a.txt'))


def test_shards_can_be_sent_to_workers(corpus, cache):
  found = write(cache, corpus)
  expected = chunks(found)  # The readers are open now.
  assert chunks(pickle.loads(pickle.dumps(found))) == expected


def _write_at(moment, cache, corpus):
  text_shards._PART_BYTES = 200
  time.sleep(max(0, moment - time.time()))
  write(cache, corpus)


def test_two_processes_at_once(corpus, cache, tmp_path):
  context = multiprocessing.get_context('spawn')
  moment = time.time() + 1.5
  both = [
    context.Process(target=_write_at, args=(moment, cache, corpus))
    for _ in range(2)
  ]
  for process in both:
    process.start()
  for process in both:
    process.join()
  assert [process.exitcode for process in both] == [0, 0]
  found = write(cache, corpus, progress=lambda *_: pytest.fail('was done'))
  assert chunks(found) == chunks(write(tmp_path / 'alone', corpus))
  assert not list(pathlib.Path(found.directory).glob('.*'))


def test_object_store(corpus, bucket, tmp_path, cache, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (bucket / 'b').mkdir()
  found = write('gs://b/cache', corpus)
  expected = chunks(write(cache, corpus))
  assert chunks(found) == expected
  # Read from a copy under ~/.cache, made part by part.
  assert found.directory.startswith(str(tmp_path / 'home'))
  remote = next((bucket / 'b' / 'cache').iterdir())
  assert remote.name == pathlib.Path(found.directory).name
  assert not list(remote.glob('.*'))
  times = [path.stat().st_mtime_ns for path in parts(found)]
  parts(found)[0].write_bytes(b'cut')
  again = write('gs://b/cache', corpus, progress=lambda *_: pytest.fail('done'))
  assert chunks(again) == expected
  assert times[1:] == [path.stat().st_mtime_ns for path in parts(again)[1:]]


def test_the_default_place(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  assert str(shards.cache_root('')) == '/home/somebody/.cache/st_moe'
  assert str(shards.cache_root('~/x')) == '/home/somebody/x'
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  with pytest.raises(ValueError, match='~/x: nobody knows the home directory'):
    shards.cache_root('~/x')
  assert not str(shards.cache_root('')).startswith('~')


@pytest.mark.parametrize(
  'text', ['', '{', '[]', '{}', '{"parts": [{"file": "../x", "records": 1}]}']
)
def test_damaged_notes_are_told_by_name(corpus, cache, text):
  """Opening says what to delete; writing again just does its work anew."""
  found = write(cache, corpus)
  about = pathlib.Path(found.directory, 'info.json')
  about.write_text(text)
  with pytest.raises(ValueError, match='info.json is damaged.*delete it and'):
    shards.Shards(found.directory)
  parts(found)[0].with_suffix('.json').write_text(text)
  assert chunks(write(cache, corpus)) == chunks(found)
