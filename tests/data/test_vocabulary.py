"""Tokenizers: bytes, models trained here, and T5's own where it is at hand."""

import io
import json
import os
import pathlib
import pickle
import tempfile

import pytest
import sentencepiece

from st_moe.data import pieces, sources, vocabulary

TEXT = 'I like <extra_id_0> and <extra_id_99> sandwiches; naïve 漢字 cafés.'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'deep' / '500.model'
  texts = sources.embedded_corpus('train')
  return vocabulary.train(texts, str(path), size=500)


def test_bytes():
  v = vocabulary.load('bytes')
  assert v.encode('hé') == [107, 198, 172]
  assert v.size == 3 + 256 + 100
  assert (v.sentinel(0), v.sentinel(99)) == (358, 259)
  assert v.decode([107, 0, 358, 1, 198, 172, 349, 2, 400]) == (
    'h<extra_id_0>é<extra_id_9>'
  )


def test_a_trained_vocabulary(trained):
  assert trained.size == 500  # Sentinels included.
  assert (trained.sentinel(0), trained.sentinel(99)) == (499, 400)
  ids = trained.encode('The return value is a string.')
  assert max(ids) < 400 and trained.unk not in ids
  assert trained.decode(ids) == 'The return value is a string.'
  # Goes past an EOS; knows sentinels; a model of 512 logits may say 510.
  a, b = trained.encode('a'), trained.encode('b')
  assert trained.decode([*a, 1, 499, 0, *b, 510]).split() == (
    ['a', '<extra_id_0>', 'b', '⁇']
  )


def test_ascii_is_never_unknown(trained):
  for c in map(chr, range(33, 127)):
    assert trained.unk not in trained.encode(c), c


def test_training_again_gives_the_same_file(trained, tmp_path):
  path = tmp_path / 'again.model'
  again = vocabulary.train(
    sources.embedded_corpus('train'), str(path), size=500
  )
  assert again == trained and again.fingerprint == trained.fingerprint
  assert again.path != trained.path
  assert [p.name for p in tmp_path.iterdir()] == ['again.model']


def test_long_lines_are_not_lost(tmp_path):
  # SentencePiece skips lines of more than 4192 bytes.
  line = ' '.join(f'word{i}' for i in range(2000))
  v = vocabulary.train([line], str(tmp_path / 'a.model'), size=220)
  assert v.unk not in v.encode('word12')


def test_object_store(trained, bucket):
  (bucket / 'b').mkdir()
  (bucket / 'b' / 'v.model').write_bytes(trained.model)
  assert vocabulary.load('gs://b/v.model') == trained
  texts = sources.embedded_corpus('validation')
  remote = vocabulary.train(texts, 'gs://b/w.model', size=300)
  assert (bucket / 'b' / 'w.model').read_bytes() == remote.model


def test_another_vocabulary_is_not_written_over(tmp_path):
  path = tmp_path / 'v.model'
  train = lambda texts, size=200: vocabulary.train(texts, str(path), size=size)
  some = ['one text to learn from', 'and a second'] * 9
  first = train(some)
  assert train(some) == first  # The same command may be run again.
  for texts, size in ((['some other text of words'] * 9, 200), (some, 199)):
    with pytest.raises(ValueError, match='another vocabulary, of 200 ids'):
      train(texts, size)
  assert path.read_bytes() == first.model
  path.write_bytes(b'precious')
  with pytest.raises(ValueError, match='v.model exists and it was not written'):
    train(['one text'])
  assert path.read_bytes() == b'precious'


def test_a_vocabulary_is_a_value(trained):
  copy = pickle.loads(pickle.dumps(trained))
  assert copy == trained and hash(copy) == hash(trained)
  assert copy.encode(TEXT) == trained.encode(TEXT)
  assert copy != vocabulary.load('bytes')


def test_seqio_agrees(trained):
  for v in (vocabulary.load('bytes'), trained):
    seqio = v.to_seqio()
    assert v.encode(TEXT) == list(seqio.encode(TEXT))
    assert v.encode(TEXT) == seqio.encode_tf(TEXT).numpy().tolist()
    assert v.size == seqio.vocab_size
    assert (v.pad, v.eos, v.unk) == (seqio.pad_id, seqio.eos_id, seqio.unk_id)
    ids = v.encode('no sentinels')
    assert v.decode(ids) == seqio.decode(ids)
  ids = trained.encode(TEXT)
  assert trained.decode(ids) == seqio.decode(ids)
  assert trained.sentinel(0) in ids and trained.sentinel(99) in ids


def test_seqio_reads_a_model_out_of_a_checkpoint(trained, tmp_path):
  for path in ('no longer there.model', str(tmp_path)):
    loose = vocabulary.Vocabulary(path, trained.model)
    assert list(loose.to_seqio().encode(TEXT)) == trained.encode(TEXT)
  assert trained.to_seqio().sentencepiece_model_file == trained.path
  # A file that has changed since is not what was loaded.
  (tmp_path / 'v.model').write_text('another model')
  loose = vocabulary.Vocabulary(str(tmp_path / 'v.model'), trained.model)
  assert list(loose.to_seqio().encode(TEXT)) == trained.encode(TEXT)


def test_nobody_can_put_another_model_in_the_place_of_a_copy(
  trained, tmp_path, monkeypatch
):
  """A temporary folder is everybody's: what lies there is not believed."""
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  vocabulary._copy.cache_clear()
  planted = tmp_path / f'{trained.fingerprint}.model'
  planted.write_text('another model')
  found = vocabulary.Vocabulary('gone.model', trained.model).to_seqio()
  assert list(found.encode(TEXT)) == trained.encode(TEXT)
  (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
  assert folder.stat().st_mode & 0o077 == 0


def test_t5():
  data = pathlib.Path(os.environ.get('ST_MOE_DATA', '../shared/data'))
  folder = data / 'tokenizers' / 't5_cc_all.32000'
  if not folder.exists():
    pytest.skip(f'{folder} is not here; set ST_MOE_DATA')
  v = vocabulary.load(str(folder / 'spiece.model'))
  assert (v.size, v.sentinel(0)) == (32100, 32099)
  rows = (folder / 'golden_ids.jsonl').read_text().splitlines()
  assert len(rows) == 12
  for row in map(json.loads, rows):
    assert v.encode(row['text']) == row['ids']
    assert v.decode(row['ids']) == row['decoded']


def test_a_model_with_sentinels_of_its_own(trained, tmp_path):
  """As mT5's, whose last 100 pieces they are: nothing is appended."""
  own = pieces.extended(trained.model)
  (tmp_path / 'mt5.model').write_bytes(own)
  v = vocabulary.load(str(tmp_path / 'mt5.model'))
  assert (v.size, v.sentinel(0), v.sentinel(99)) == (500, 499, 400)
  assert v.encode(TEXT) == trained.encode(TEXT)
  seqio = v.to_seqio()
  assert list(seqio.encode(TEXT)) == v.encode(TEXT)
  assert seqio.vocab_size == 500


def test_as_many_sentinels_as_a_model_says(trained):
  for count in (0, 7, 300):
    v = vocabulary.checked('x', pieces.with_tokens(trained.model, count, ()))
    assert (v.size, len(v.sentinels)) == (400 + count, count)
    assert v.encode('The return value') == trained.encode('The return value')
    seqio = v.to_seqio()
    assert seqio.vocab_size == v.size
    text = 'a <extra_id_0> b <extra_id_6>'
    assert list(seqio.encode(text)) == v.encode(text)
    if count:
      assert v.sentinel(count - 1) == 400
    with pytest.raises(ValueError, match=f'Sentinel {count} is not among'):
      v.sentinel(count)


def test_sentinels_need_no_space_in_prompts(trained):
  one, two = trained.encode('('), trained.encode(')')
  ids = trained.encode_marked('(<extra_id_0><extra_id_99>)')
  assert ids == [*one, 499, 400, *two]
  assert trained.encode_marked(TEXT) == trained.encode(TEXT)
  assert vocabulary.load('bytes').encode_marked('a<extra_id_1>') == [100, 357]


def test_half_a_model_is_none(trained):
  for cut in (100, len(trained.model) - 1):
    with pytest.raises(ValueError, match='x is not a SentencePiece model'):
      vocabulary.checked('x', trained.model[:cut])


def test_check_fits(trained):
  trained.check_fits(500)
  with pytest.raises(ValueError, match='499 is smaller.*500 ids, of which 100'):
    trained.check_fits(499)


def test_sentinels_are_counted():
  for k in (-1, 100):
    with pytest.raises(ValueError, match=f'Sentinel {k} is not among 0 ... 99'):
      vocabulary.load('bytes').sentinel(k)


def test_what_cannot_be_loaded(tmp_path):
  with pytest.raises(ValueError, match='data.vocabulary is not set'):
    vocabulary.load('')
  with pytest.raises(ValueError, match='none.model: no such file'):
    vocabulary.load(str(tmp_path / 'none.model'))
  with pytest.raises(ValueError, match='no such file'):
    vocabulary.load(str(tmp_path))
  (tmp_path / 'empty.model').write_bytes(b'')  # Which is no word for bytes.
  with pytest.raises(ValueError, match='empty.model is an empty file'):
    vocabulary.load(str(tmp_path / 'empty.model'))
  (tmp_path / 'a.model').write_text('not a model')
  with pytest.raises(ValueError, match='a.model is not a SentencePiece model'):
    vocabulary.load(str(tmp_path / 'a.model'))
  model = io.BytesIO()  # SentencePiece's defaults: no pad, unk 0, eos 2.
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b c']), model_writer=model, vocab_size=7,
    minloglevel=2,
  )  # fmt: skip
  (tmp_path / 'b.model').write_bytes(model.getvalue())
  with pytest.raises(ValueError, match=r'= \(-1, 2, 0\), but .* \(0, 1, 2\)'):
    vocabulary.load(str(tmp_path / 'b.model'))


def test_too_little_text_names_the_size_that_works(tmp_path):
  path = str(tmp_path / 'a.model')
  texts = list(sources.embedded_corpus('validation'))
  with pytest.raises(ValueError, match=r'of 9000; the largest that works') as e:
    vocabulary.train(texts, path, size=9000)
  largest = int(str(e.value).rstrip('.').split()[-1])
  assert vocabulary.train(texts, path, size=largest).size == largest
  with pytest.raises(ValueError, match=f'works is {largest}'):
    vocabulary.train(texts, path, size=largest + 1)


def test_too_small_a_size_names_one_that_works(tmp_path):
  path = str(tmp_path / 'a.model')
  texts = list(sources.embedded_corpus('validation'))
  with pytest.raises(ValueError, match=r'characters alone need more') as e:
    vocabulary.train(texts, path, size=150)
  smallest = int(str(e.value).rstrip('.').split()[-1])
  assert vocabulary.train(texts, path, size=smallest).size == smallest
  with pytest.raises(ValueError, match='has no room for 100 sentinels'):
    vocabulary.train(texts, path, size=103)


def test_no_text(tmp_path):
  for texts in ([], ['', ' \n ']):
    with pytest.raises(ValueError, match='No text to train'):
      vocabulary.train(texts, str(tmp_path / 'a.model'), size=500)
  assert not list(tmp_path.iterdir())


def test_an_error_in_the_text_is_not_buried(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "some words"}\n{"text')
  texts = sources.documents(str(tmp_path / 'a.jsonl'))
  with pytest.raises(ValueError) as error:
    vocabulary.train(texts, str(tmp_path / 'a.model'), size=500)
  assert str(error.value).startswith(f'{tmp_path}/a.jsonl, line 2: broken JSON')


def test_a_model_that_is_cut_off(tmp_path):
  """The sentinels that are appended would be taken for the rest of it."""
  path = tmp_path / 'a.model'
  whole = vocabulary.train(['some text, more'] * 9, str(path), size=198).model
  ends = [end for end in range(1, len(whole), 997)]
  for end in [*ends, len(whole) - 1]:
    path.write_bytes(whole[:end])
    with pytest.raises(
      ValueError, match='a.model is not a SentencePiece model'
    ):
      vocabulary.load(str(path))
  path.write_bytes(b'')
  with pytest.raises(ValueError, match='a.model is an empty file'):
    vocabulary.load(str(path))
  path.unlink()
  path.symlink_to('/dev/zero')
  with pytest.raises(ValueError, match='a.model is a device; a file is needed'):
    vocabulary.load(str(path))


def test_what_stands_for_an_id():
  plain = vocabulary.load('bytes')
  ids = (0, 1, 2, *plain.encode('a é'), 358, 999)
  said = [plain.piece(i) for i in ids]
  assert said == [
    *('<pad>', '</s>', '<unk>', 'a', '▁', '<0xC3>', '<0xA9>'),
    *('<extra_id_0>', '<unk>'),
  ]
