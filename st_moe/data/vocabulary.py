"""Text to token ids and back: a SentencePiece model, or plain bytes.

Both are used as T5 uses them: 0 pads, 1 ends, 2 is unknown, and the last 100
ids are the sentinels of span corruption, counted downwards. So a vocabulary is
100 ids larger than its SentencePiece model (T5: 32000 pieces, 32100 ids).
"""

import dataclasses
import functools
import hashlib
import io
import pathlib
import re
import string
import struct
import tempfile
from collections.abc import Iterable
from typing import ClassVar

from etils import epath

from st_moe.data import files

SENTINELS = 100
_BYTES = 3 + 256  # Ids before the sentinels where there are no pieces.
_USER_DEFINED = 4  # SentencePiece's type of pieces that are never split.


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A tokenizer as a value: its model travels along when it is pickled."""

  path: str = dataclasses.field(compare=False)
  model: bytes = dataclasses.field(repr=False)  # b'': ids are bytes.

  pad: ClassVar[int] = 0
  eos: ClassVar[int] = 1
  unk: ClassVar[int] = 2

  @property
  def size(self) -> int:
    """Number of ids, sentinels included."""
    return len(self._pieces) if self.model else _BYTES + SENTINELS

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self.model or b'bytes').hexdigest()

  @property
  def _pieces(self):
    return _processor(self.model)

  def sentinel(self, k: int) -> int:
    """The id of <extra_id_k>; <extra_id_0> is the last id of all."""
    if not 0 <= k < SENTINELS:
      raise ValueError(f'Sentinel {k} is not among 0 ... {SENTINELS - 1}.')
    return self.size - 1 - k

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without an EOS."""
    if self.model:
      return self._pieces.encode(text)
    return [byte + 3 for byte in text.encode()]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of all ids: goes past an EOS, leaves pad and EOS out.

    Ids past the end, which a model padded to a round size may emit, are unknown
    tokens.
    """
    ids = [int(i) for i in ids]
    if self.model:
      return self._pieces.decode(
        [i if i < self.size else self.unk for i in ids]
      )
    text = b''
    for i in ids:
      if 3 <= i < _BYTES:
        text += bytes([i - 3])
      elif _BYTES <= i < self.size:
        text += f'<extra_id_{self.size - 1 - i}>'.encode()
    return text.decode(errors='ignore')

  def check_fits(self, model_vocab_size: int) -> None:
    """Raises if a model has no logit for some of the ids."""
    if model_vocab_size < self.size:
      raise ValueError(
        f'model.vocab_size {model_vocab_size} is smaller than the vocabulary'
        f' {self.path!r}: {self.size} ids, of which {SENTINELS} are sentinels;'
        f' set it to {self.size} or more.'
      )

  def to_seqio(self):
    """The same vocabulary as SeqIO (and so T5X) knows it."""
    import seqio

    if not self.model:
      return seqio.ByteVocabulary(extra_ids=SENTINELS)
    return seqio.SentencePieceVocabulary(self._file(), extra_ids=SENTINELS)

  def _file(self) -> str:
    """A file with the model, which may have come out of a checkpoint."""
    path = epath.Path(self.path)
    if path.suffix == '.model' and path.exists():
      if path.read_bytes() == self.model:
        return self.path
    copy = pathlib.Path(tempfile.gettempdir(), f'{self.fingerprint}.model')
    if not copy.exists() or copy.read_bytes() != self.model:
      files.write_whole(copy, self.model)
    return str(copy)


def load(path: str) -> Vocabulary:
  """'bytes', or a SentencePiece model file."""
  if path == 'bytes':
    return Vocabulary(path, b'')
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
  vocabulary = Vocabulary(str(file), file.read_bytes())
  if not vocabulary.model:
    raise ValueError(
      f'data.vocabulary {path} is an empty file; a SentencePiece model or'
      " 'bytes' is needed."
    )
  try:
    pieces = vocabulary._pieces
  except RuntimeError as e:
    raise ValueError(
      f'data.vocabulary {path} is not a SentencePiece model ({e}).'
    ) from None
  ids = pieces.pad_id(), pieces.eos_id(), pieces.unk_id()
  if ids != (0, 1, 2):
    raise ValueError(
      f'data.vocabulary {path} has pad, eos, unk = {ids}, but T5 models need'
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
  """
  import sentencepiece

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
  files.write_whole(path, model.getvalue())
  return load(path)


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
  """SentencePiece with the sentinels appended, loaded once per process."""
  import sentencepiece

  return sentencepiece.SentencePieceProcessor(model_proto=_extended(model))


def _extended(model: bytes) -> bytes:
  """The model with <extra_id_99> ... <extra_id_0> as its last pieces.

  This is what SeqIO does, so that a sentinel in a text is one id. A serialised
  list grows by appending items, hence no protobuf module is needed; that of
  SentencePiece clashes with the copies of it in other packages.
  """
  for k in reversed(range(SENTINELS)):
    name = f'▁<extra_id_{k}>'.encode()
    piece = b'\x0a' + bytes([len(name)]) + name  # Field 1: string.
    piece += b'\x15' + struct.pack('<f', 0.0)  # Field 2: score.
    piece += b'\x18' + bytes([_USER_DEFINED])  # Field 3: type.
    model += b'\x0a' + bytes([len(piece)]) + piece
  return model
