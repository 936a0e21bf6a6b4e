"""Text to token ids and back: a SentencePiece model, or plain bytes.

Both are used as T5 uses them: 0 pads, 1 ends, 2 is unknown, and the last 100
ids are the sentinels of span corruption, counted downwards. So a vocabulary is
100 ids larger than its SentencePiece model (T5: 32000 pieces, 32100 ids),
unless the model has sentinels of its own (mT5) or says how many there are.
"""

import atexit
import dataclasses
import functools
import hashlib
import io
import pathlib
import re
import shutil
import string
import tempfile
from collections.abc import Iterable
from typing import ClassVar

from etils import epath

from st_moe.data import files, pieces
from st_moe.data.pieces import extended as _extended

SENTINELS = pieces.SENTINELS
_BYTES = 3 + 256  # Ids before the sentinels where there are no pieces.
# Bytes as ByT5 was trained on them: its sentinels are the ids 258, 257, ... of
# bytes that are in no text.
BYT5 = b'byt5'
_NEVER = 11  # 0xff down to 0xf5.


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A tokenizer as a value: its model travels along when it is pickled."""

  path: str = dataclasses.field(compare=False)
  # SentencePiece's; b'' and BYT5: ids are bytes.
  model: bytes = dataclasses.field(repr=False)

  pad: ClassVar[int] = 0
  eos: ClassVar[int] = 1
  unk: ClassVar[int] = 2

  @property
  def is_bytes(self) -> bool:
    return self.model in (b'', BYT5)

  @property
  def size(self) -> int:
    """Number of ids, sentinels included."""
    if self.is_bytes:
      return _BYTES + (SENTINELS if not self.model else 0)
    return len(self._pieces)

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self.model or b'bytes').hexdigest()

  @property
  def _pieces(self):
    try:
      return _processor(self.model)
    except (RuntimeError, ValueError) as e:
      raise ValueError(
        f'The vocabulary {self.path} is not a SentencePiece model ({e}).'
      ) from None

  @property
  def sentinels(self) -> range:
    """Ids of <extra_id_0>, <extra_id_1>, ..., counted downwards."""
    if self.is_bytes:
      count = SENTINELS if not self.model else _NEVER
      return range(self.size - 1, self.size - 1 - count, -1)
    return _sentinels(self.model)

  def sentinel(self, k: int) -> int:
    """The id of <extra_id_k>.

    Raises:
      ValueError: there is none.
    """
    if not 0 <= k < len(self.sentinels):
      among = f'0 ... {len(self.sentinels) - 1}' if self.sentinels else 'any'
      raise ValueError(f'Sentinel {k} is not among {among}.')
    return self.sentinels[k]

  @property
  def tokens(self) -> dict[str, int]:
    """Ids of what is cut out of a text first: sentinels and added tokens."""
    found = {pieces.sentinel(k): i for k, i in enumerate(self.sentinels)}
    if not self.is_bytes:
      found |= {t: self._pieces.piece_to_id(t) for t in _added(self.model)}
    return found

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without an EOS; those of SeqIO."""
    if not self.is_bytes:
      return self._pieces.encode(text)
    return [byte + 3 for byte in text.encode()]

  def encode_marked(self, text: str) -> list[int]:
    """Ids of a text cut at its `tokens`; those of transformers.

    A sentinel needs no space before it, and bytes have them too.
    """
    cut, tokens = _cut(self)
    found = []
    for part in cut.split(text) if tokens else [text]:
      found += [tokens[part]] if part in tokens else self.encode(part)
    return found

  def decode(self, ids: Iterable[int]) -> str:
    """The text of all ids: goes past an EOS, leaves pad and EOS out.

    Ids past the end, which a model padded to a round size may emit, are unknown
    tokens.
    """
    ids = [int(i) for i in ids]
    if not self.is_bytes:
      return self._pieces.decode(
        [i if i < self.size else self.unk for i in ids]
      )
    text, names = b'', {i: name for name, i in self.tokens.items()}
    for i in ids:
      if i in names:
        text += names[i].encode()
      elif 3 <= i < _BYTES:
        text += bytes([i - 3])
    return text.decode(errors='ignore')

  def piece(self, id: int) -> str:
    """What stands for one id, a space as ▁; of bytes that are no ASCII <0xE4>.

    The text of several is not that of each: see `decode`.
    """
    special = {self.pad: '<pad>', self.eos: '</s>', self.unk: '<unk>'}
    names = special | {i: name for name, i in self.tokens.items()}
    if id in names or not 0 <= id < self.size:
      return names.get(id, '<unk>')
    if not self.is_bytes:
      return self._pieces.id_to_piece(id)
    byte = id - 3
    return (
      chr(byte).replace(' ', '▁') if 32 <= byte < 127 else f'<0x{byte:02X}>'
    )

  def check_fits(self, model_vocab_size: int) -> None:
    """Raises if a model has no logit for some of the ids."""
    if model_vocab_size < self.size:
      raise ValueError(
        f'model.vocab_size {model_vocab_size} is smaller than the vocabulary'
        f' {self.path!r}: {self.size} ids, of which {len(self.sentinels)} are'
        f' sentinels; set it to {self.size} or more.'
      )

  def to_seqio(self):
    """The same vocabulary as SeqIO (and so T5X) knows it."""
    import seqio

    if self.is_bytes:
      extra = SENTINELS if not self.model else 0
      return seqio.ByteVocabulary(extra_ids=extra)
    sentinels, added = pieces.behind(self.model)
    if sentinels is None or added:  # All of them are pieces.
      file = self._file(_extended(self.model))
      return seqio.SentencePieceVocabulary(file, extra_ids=0)
    file = self._file(self.model)
    return seqio.SentencePieceVocabulary(file, extra_ids=sentinels)

  def _file(self, model: bytes) -> str:
    """A file with the model, which may have come out of a checkpoint."""
    path = epath.Path(self.path)
    if path.suffix == '.model' and path.exists():
      if path.read_bytes() == model:
        return self.path
    return str(_copy(model))


@functools.lru_cache(maxsize=8)
def _copy(model: bytes) -> pathlib.Path:
  """A file with `model`, of this process alone.

  One that others could find, and write before us, might hold anything.
  """
  folder = tempfile.mkdtemp(prefix='st_moe-')  # Nobody else may enter it.
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  copy = pathlib.Path(folder, 'vocabulary.model')
  copy.write_bytes(model)
  return copy


def load(path: str) -> Vocabulary:
  """'bytes', 'byt5' (the same with its sentinels), or a SentencePiece file."""
  if path in _BYTE_NAMES:
    return Vocabulary(path, _BYTE_NAMES[path])
  if not path:
    raise ValueError(
      "data.vocabulary is not set; give a SentencePiece model, 'bytes', or"
      ' train one with `st-moe prepare`.'
    )
  file = epath.Path(path).expanduser()
  if not file.exists() or file.is_dir():
    raise ValueError(
      f"data.vocabulary {path}: no such file; a SentencePiece model or 'bytes'"
      ' is needed.'
    )
  model = files.read_bytes(file)
  if not model:
    raise ValueError(
      f'data.vocabulary {path} is an empty file; a SentencePiece model or'
      " 'bytes' is needed."
    )
  return checked(str(file), model)


_BYTE_NAMES = {'bytes': b'', 'byt5': BYT5}


def checked(path: str, model: bytes) -> Vocabulary:
  """The vocabulary of a model that lay at `path` or came with a checkpoint.

  Raises:
    ValueError: it is none, or its special ids are not T5's.
  """
  vocabulary = Vocabulary(path, model)
  if vocabulary.is_bytes:
    return vocabulary
  processor = vocabulary._pieces
  ids = processor.pad_id(), processor.eos_id(), processor.unk_id()
  if ids != (0, 1, 2):
    raise ValueError(
      f'The vocabulary {path} has pad, eos, unk = {ids}, but T5 models need'
      ' (0, 1, 2); train it with --pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1.'
    )
  return vocabulary


def train(
  texts: Iterable[str], path: str, *, size: int, seed: int = 0
) -> Vocabulary:
  """Trains a unigram SentencePiece model of `size` ids, sentinels included.

  Like T5's own: NMT-NFKC normalisation, spaces folded, the rarest 0.05 % of
  characters unknown (never ASCII). Equal texts, size and seed give an equal
  file.

  Raises:
    ValueError: too little text for `size`; another file at `path`.
  """
  import sentencepiece

  files.check_free(path, lambda _: _size_of(path) > 0)

  if size <= SENTINELS + 3:
    raise ValueError(
      f'A vocabulary of {size} has no room for {SENTINELS} sentinels, 3 special'
      ' ids and pieces.'
    )
  model = io.BytesIO()
  lines = _Lines(texts)
  sentencepiece.set_random_generator_seed(seed)
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=lines,
      model_writer=model,
      model_type='unigram',
      vocab_size=size - SENTINELS,
      pad_id=Vocabulary.pad,
      eos_id=Vocabulary.eos,
      unk_id=Vocabulary.unk,
      bos_id=-1,
      character_coverage=0.9995,
      required_chars=string.digits + string.ascii_letters + string.punctuation,
      input_sentence_size=2_000_000,
      shuffle_input_sentence=True,
      max_sentence_length=_LONGEST,
      num_threads=16,  # Part of the result: sums are added in this order.
      minloglevel=2,
    )
  except RuntimeError as e:
    raise lines.error or _too_small(size, lines.count, str(e)) from None
  file = epath.Path(path).expanduser()
  if file.exists() and file.read_bytes() not in (b'', model.getvalue()):
    raise ValueError(
      f'{path} holds another vocabulary, of {_size_of(path)} ids: use it by'
      f' --config.data.vocabulary={path}, or name another file by --vocabulary.'
    )
  files.write_whole(file, model.getvalue())
  return load(path)


def _size_of(path: epath.PathLike) -> int:
  """Ids of a vocabulary; 0 if it is none."""
  try:
    return load(path).size
  except ValueError:
    return 0


_LONGEST = 4096  # Bytes; SentencePiece skips longer lines without a word.


class _Lines:
  """Lines of texts, counted, cut where SentencePiece would skip them."""

  def __init__(self, texts: Iterable[str]):
    self.count, self.error = 0, None
    self._lines = (
      line[start : start + _LONGEST // 4]  # A character has 4 bytes at most.
      for text in texts
      for line in text.split('\n')
      for start in range(0, len(line), _LONGEST // 4)
      if line.strip()
    )

  def __iter__(self):
    return self

  def __next__(self) -> str:
    try:
      line = next(self._lines)
    except ValueError as e:
      self.error = e  # SentencePiece would bury it in an error of its own.
      raise
    self.count += 1
    return line


def _too_small(size: int, lines: int, message: str) -> ValueError:
  """What SentencePiece's refusal means in numbers of ours."""
  head = f'{lines} lines of text do not make a vocabulary of {size}'
  if not lines:
    return ValueError('No text to train a vocabulary on.')
  if match := re.search(r'value <= (\d+)', message):
    most = int(match[1]) + SENTINELS
    return ValueError(f'{head}; the largest that works is {most}.')
  if match := re.search(r'required_chars\D*\d+ vs (\d+)', message):
    least = int(match[1]) + SENTINELS
    return ValueError(
      f'{head}: its characters alone need more; the smallest is {least}.'
    )
  return ValueError(f'{head}: {message}')


@functools.lru_cache(maxsize=8)
def _processor(model: bytes):
  """SentencePiece with all that stands behind its pieces, loaded once."""
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_proto=_extended(model))


@functools.lru_cache(maxsize=8)
def _sentinels(model: bytes) -> range:
  found = _processor(model)
  for name in ('▁<extra_id_{}>', '<extra_id_{}>'):
    id_of = lambda k, name=name: found.piece_to_id(name.format(k))
    first, count = id_of(0), 0
    if first == found.unk_id():
      continue
    while id_of(count) == first - count != found.unk_id():
      count += 1
    return range(first, first - count, -1)
  return range(0)


@functools.lru_cache(maxsize=8)
def _cut(vocabulary: Vocabulary) -> tuple[re.Pattern, dict[str, int]]:
  """What finds the tokens of a vocabulary in a text, and their ids."""
  tokens = vocabulary.tokens
  longest = sorted(tokens, key=len, reverse=True)
  return re.compile(f'({"|".join(map(re.escape, longest))})'), tokens


def _added(model: bytes) -> tuple[str, ...]:
  return pieces.behind(model)[1]
