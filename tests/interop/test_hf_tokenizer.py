"""Tokenizers of HuggingFace, whatever files they come in.

The ids are those of transformers 5.24 (`AutoTokenizer.from_pretrained` of the
same files, EOS left out).
"""

import io
import json

import pytest
import sentencepiece

from st_moe.data import pieces, vocabulary
from st_moe.interop import hf_tokenizer

NAMES = (
  '<pad> </s> <unk> ▁ ▁the ▁class a b c < > ( ) _ e x t r i d 0 1 ▁a "'
).split()
SCORED = [(n, 0.0 if i < 3 else -0.25 * (i + 5)) for i, n in enumerate(NAMES)]
MODEL = pieces.make(SCORED, b'')  # 24 pieces.
A, B, OPEN, CLOSE, QUOTE, SPACE = 6, 7, 11, 12, 23, 3


def _folder(path, *, spiece=MODEL, **files):
  """A directory with files of a tokenizer: `added_tokens={...}`."""
  if spiece is not None:
    (path / 'spiece.model').write_bytes(spiece)
  for name, content in files.items():
    (path / f'{name}.json').write_text(json.dumps(content))
  return path


def _read(path, about=None):
  model = hf_tokenizer.read(path, about or {})
  return vocabulary.checked(str(path), model)


def _config(**fields):
  return {'tokenizer_class': 'T5Tokenizer', **fields}


def _whole(names=(), added=(), **fields):
  """A tokenizer.json as transformers writes it."""
  return {
    'version': '1.0',
    'added_tokens': [{'id': i, 'content': t} for t, i in added],
    'normalizer': None,
    'pre_tokenizer': {
      'type': 'Sequence',
      'pretokenizers': [
        {'type': 'WhitespaceSplit'},
        {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always'},
      ],
    },
    'model': {
      'type': 'Unigram',
      'unk_id': 2,
      'byte_fallback': False,
      'vocab': [*SCORED, *([name, 0.0] for name in names)],
    },
    **fields,
  }


@pytest.mark.parametrize('config', [None, {}, _config(extra_ids=100)])
def test_sentinels_wherever_they_stand(config, tmp_path):
  files = {} if config is None else {'tokenizer_config': config}
  v = _read(_folder(tmp_path, **files))
  assert (v.size, v.sentinel(0)) == (124, 123)
  for text, ids in {
    'a <extra_id_0> b': [SPACE, A, 123, SPACE, B],
    'a(<extra_id_0>)': [SPACE, A, OPEN, 123, SPACE, CLOSE],
    '"<extra_id_1>"': [SPACE, QUOTE, 122, SPACE, QUOTE],
    '<extra_id_0><extra_id_1>': [123, 122],
    '漢<extra_id_0>字': [SPACE, 2, 123, SPACE, 2],
    '  the   class ': [4, 5],
    # No sentinels: text like any other.
    '<extra_id_100>': [3, 9, 14, 15, 16, 17, 6, 13, 18, 19, 13, 21, 20, 20, 10],
    '<extra_id_07>a': [3, 9, 14, 15, 16, 17, 6, 13, 18, 19, 13, 20, 2, 10, 6],
  }.items():
    assert v.encode_marked(text) == ids, text


@pytest.mark.parametrize(('count', 'size'), [(0, 24), (3, 27), (300, 324)])
def test_as_many_sentinels_as_it_says(count, size, tmp_path):
  v = _read(_folder(tmp_path, tokenizer_config=_config(extra_ids=count)))
  assert (v.size, len(v.sentinels)) == (size, count)
  ids = v.encode_marked('a<extra_id_0>')
  assert (ids == [SPACE, A, size - 1]) == bool(count)
  assert max(ids) < size
  v.check_fits(size)
  with pytest.raises(ValueError, match=f'{size} ids, of which {count} are'):
    v.check_fits(size - 1)


@pytest.mark.parametrize(
  'files',
  [
    {'added_tokens': {'<spot>': 124, '<asoc>': 125}},
    {
      'tokenizer_config': _config(
        extra_ids=100,
        added_tokens_decoder={
          '0': {'content': '<pad>'},
          '125': {'content': '<asoc>'},
          '124': {'content': '<spot>'},
          '123': {'content': '<extra_id_0>'},
          **{str(123 - k): {'content': f'<extra_id_{k}>'} for k in range(100)},
        },
      )
    },
    {
      'tokenizer_json': None,
      'tokenizer': _whole(added=[('<spot>', 124), ('<asoc>', 125)]),
    },
    {
      'tokenizer_config': _config(
        additional_special_tokens=[
          *[f'<extra_id_{k}>' for k in range(100)], '<spot>',
          {'content': '<asoc>'},
        ]
      )
    },
  ],
)  # fmt: skip
def test_added_tokens_are_tokens(files, tmp_path):
  files.pop('tokenizer_json', None)
  v = _read(_folder(tmp_path, **files))
  assert v.size == 126
  assert v.encode_marked('the <spot> class') == [4, 124, 5]
  assert v.encode_marked('a<spot>b<asoc>') == [SPACE, A, 124, SPACE, B, 125]
  assert v.encode_marked('a <extra_id_0>') == [SPACE, A, 123]
  assert v.decode([124, 5]) == '<spot> class'
  # Tasks are encoded by SeqIO, which knows them too.
  assert 124 in v.encode('the <spot> class')
  assert v.encode('the <spot>') == list(v.to_seqio().encode('the <spot>'))


def test_added_tokens_that_cannot_be_are_named(tmp_path):
  told = {'<spot>': 124, '<far>': 200, '<within>': 6}
  with pytest.warns(UserWarning, match="pieces: .'<within>', '<far>'"):
    v = _read(_folder(tmp_path, added_tokens=told))
  assert v.size == 125 and v.encode_marked('<spot>') == [124]


def test_a_model_with_sentinels_of_its_own(tmp_path):
  """As mT5's: nothing is appended twice, whatever else is said."""
  own = pieces.extended(MODEL)
  for config in ({}, _config(extra_ids=0)):
    v = _read(_folder(tmp_path, spiece=own, tokenizer_config=config))
    assert (v.size, v.sentinel(0), v.sentinel(99)) == (124, 123, 24)
    assert v.encode_marked('a <extra_id_0> b') == [SPACE, A, 123, SPACE, B]
    assert v.encode_marked('(<extra_id_0>)')[-3:] == [123, SPACE, CLOSE]


@pytest.mark.parametrize('count', [3, 100])
def test_tokenizer_json_alone(count, tmp_path):
  names = [f'<extra_id_{k}>' for k in reversed(range(count))]
  added = [*zip(names, range(24, 124), strict=False), ('<spot>', 24 + count)]
  special = [('<pad>', 0), ('</s>', 1), ('<unk>', 2)]
  whole = _whole(names, [*special, *added])
  v = _read(_folder(tmp_path, spiece=None, tokenizer=whole))
  assert (v.size, v.sentinel(0)) == (25 + count, 23 + count)
  spot = 24 + count
  assert v.encode_marked('the <spot> class') == [4, spot, 5]
  assert v.encode_marked('"<extra_id_1>"') == [3, 23, 22 + count, 3, 23]
  assert v.encode_marked('漢<extra_id_0>字') == [3, 2, 23 + count, 3, 2]


def test_tokenizer_json_of_a_trained_model(tmp_path):
  """The same ids on text, its odd characters normalised alike."""
  from st_moe.data import sources

  texts = list(sources.embedded_corpus('validation'))
  trained = vocabulary.train(texts, str(tmp_path / 'a.model'), size=600)
  fields = dict(pieces._fields(trained.model))
  charsmap = dict(pieces._fields(fields[3]))[2]
  processor = trained._pieces
  vocab = [
    (processor.id_to_piece(i), processor.get_score(i)) for i in range(500)
  ]
  again = vocabulary.Vocabulary('', pieces.make(vocab, charsmap))
  odd = 'ﬁne Ⅷ ①\tｗｉｄｅ  spaces\u3000 naïve 漢字 cafe\u0301 '
  for text in (odd, *texts[:200]):
    assert again.encode(text) == trained.encode(text)
  assert again.decode(again.encode('a string')) == 'a string'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model': {'type': 'BPE'}}, 'is a BPE model'),
    ({'normalizer': {'type': 'Lowercase'}}, r"normalises text by .'Lowercase'"),
    ({'pre_tokenizer': {'type': 'ByteLevel'}}, r"cuts text by .'ByteLevel'"),
    (
      {'model': {'type': 'Unigram', 'unk_id': 0, 'vocab': [['<unk>', 0.0]]}},
      'begins with',
    ),
    ({'model': {'type': 'Unigram', 'vocab': 3}}, 'is damaged'),
  ],
)
def test_a_tokenizer_of_another_kind_is_left_behind(changes, message, tmp_path):
  """The parameters are of use without it; whoever needs it gives another."""
  _folder(tmp_path, spiece=None, tokenizer=_whole(**changes))
  with pytest.warns(UserWarning, match=f'{message}.*spiece.model'):
    assert hf_tokenizer.read(tmp_path, {}) is None


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({'tokenizer_config': [1]}, 'tokenizer_config.json is no JSON, or damaged'),
    ({'tokenizer_config': {'extra_ids': -1}}, 'extra_ids -1 is no number of'),
    ({'tokenizer_config': {'extra_ids': 1e9}}, 'extra_ids 1000000000.0 is no'),
    ({'added_tokens': {'<spot>': 'x'}}, "adds '<spot>' with the id 'x'"),
    ({'tokenizer': {'added_tokens': ['a']}}, 'is damaged'),
    ({'tokenizer': {'model': 'x'}, 'spiece': None}, 'is damaged'),
  ],
)
def test_damaged_files(files, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    hf_tokenizer.read(_folder(tmp_path, **files), {})


def test_special_ids_of_another_kind(tmp_path):
  """MADLAD's: unknown is 0, padding 1, the end 2."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b c']), model_writer=model, vocab_size=7,
    unk_id=0, pad_id=1, eos_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r'= \(1, 2, 0\), but .* \(0, 1, 2\)'):
    _read(_folder(tmp_path, spiece=model.getvalue()))


def test_byt5(tmp_path):
  """Its own sentinels are bytes that no text has, 0xff downwards."""
  for config, about in (
    ({'tokenizer_class': 'ByT5Tokenizer', 'extra_ids': 125}, {}),
    ({}, {'tokenizer_class': 'ByT5Tokenizer'}),
  ):
    folder = _folder(tmp_path, spiece=None, tokenizer_config=config)
    v = _read(folder, about)
    assert (v.size, v.sentinel(0), v.sentinel(1)) == (259, 258, 257)
    assert v.encode_marked('a<extra_id_0>b') == [100, 258, 101]
    assert v.decode([100, 258, 101]) == 'a<extra_id_0>b'
    with pytest.raises(ValueError, match='Sentinel 11 is not among 0 ... 10'):
      v.sentinel(11)
  assert v == vocabulary.load('byt5') != vocabulary.load('bytes')


@pytest.mark.parametrize(
  'model',
  [
    MODEL,
    pieces.extended(MODEL),
    pieces.with_tokens(MODEL, 0, ()),
    pieces.with_tokens(MODEL, 7, ('<spot>', '<asoc>')),
    b'',
    vocabulary.BYT5,
  ],
)
def test_there_and_back(model, tmp_path):
  hf_tokenizer.write(tmp_path, model)
  assert hf_tokenizer.read(tmp_path, {}) == model
  if (tmp_path / 'spiece.model').exists():
    kept = (tmp_path / 'spiece.model').read_bytes()
    assert kept in (MODEL, pieces.extended(MODEL))


@pytest.mark.parametrize(
  'added',
  [{}, {'extra_ids': 200}, {'extra_ids': 0}, {'added': ['<spot>', '<asoc>']}],
)
def test_as_transformers_says_today(added, tmp_path):
  reason = "transformers is not installed: pip install -e '.[hf]'"
  transformers = pytest.importorskip('transformers', reason=reason)
  added = dict(added)
  tokens = added.pop('added', [])
  about = {'model_type': 't5', 'vocab_size': 640}
  folder = _folder(tmp_path, tokenizer_config=_config(**added), config=about)
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  theirs.add_tokens(tokens)
  theirs.save_pretrained(folder)
  texts = ['a <extra_id_0>b', '(<extra_id_1>)', 'the<spot>a', ' <extra_id_150>']
  for _ in ('with spiece.model', 'with tokenizer.json alone'):
    ours = _read(folder)
    assert ours.size == len(theirs)
    for text in texts:
      assert ours.encode_marked(text) == theirs(text).input_ids[:-1]
    (folder / 'spiece.model').unlink(missing_ok=True)
