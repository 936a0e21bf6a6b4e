"""SentencePiece's file format, as far as its models are read and written here.

A protocol buffer: a list of pieces (field 1), how it was trained (2), how text
is normalised (3). Fields from 200 on are free for others; ours say what stands
behind the pieces: how many sentinels, and which tokens were added after. A
serialised message grows by appending fields, hence no protobuf module is
needed; that of SentencePiece clashes with the copies of it in other packages.
"""

import functools
import struct
from collections.abc import Iterable, Iterator

SENTINELS = 100  # Behind the pieces, where the model says nothing else.

# Fields of a model.
_PIECE, _TRAINER, _NORMALIZER, _SENTINELS, _ADDED = 1, 2, 3, 200, 201
# Types of a piece; user-defined ones are never split.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_UNIGRAM = 1


def sentinel(k: int) -> str:
  """How texts name sentinel `k`."""
  return f'<extra_id_{k}>'


def _varint(n: int) -> bytes:
  out = b''
  while n > 127:
    out, n = out + bytes([n & 127 | 128]), n >> 7
  return out + bytes([n])


def _field(number: int, value: int | float | str | bytes) -> bytes:
  if isinstance(value, int):
    return _varint(number << 3) + _varint(value)
  if isinstance(value, float):
    return _varint(number << 3 | 5) + struct.pack('<f', value)
  value = value.encode() if isinstance(value, str) else value
  return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
  """(number, value) of every field of a message.

  Raises:
    ValueError: it is none, or a truncated one.
  """
  at = 0

  def varint():
    nonlocal at
    n = shift = 0
    while True:
      if at >= len(message) or shift > 63:
        raise ValueError('not a protocol buffer, or a truncated one')
      byte = message[at]
      at, n, shift = at + 1, n | (byte & 127) << shift, shift + 7
      if byte < 128:
        return n

  while at < len(message):
    key = varint()
    number, kind = key >> 3, key & 7
    if kind == 0:
      yield number, varint()
      continue
    size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else len(message))
    if at + size > len(message):
      raise ValueError('not a protocol buffer, or a truncated one')
    yield number, message[at : at + size]
    at += size


def _piece(name: str, score: float, kind: int) -> bytes:
  return _field(
    _PIECE, _field(1, name) + _field(2, float(score)) + _field(3, kind)
  )


def make(scored: Iterable[tuple[str, float]], charsmap: bytes) -> bytes:
  """A unigram model of (piece, score) pairs; <pad>, </s>, <unk> are first.

  Args:
    charsmap: how characters are normalised, compiled; b'': not at all.
  """
  kinds = {0: CONTROL, 1: CONTROL, 2: UNKNOWN}
  kind_of = lambda name: USER_DEFINED if '<extra_id_' in name else NORMAL
  model = b''.join(
    _piece(name, score, kinds.get(i, kind_of(name)))
    for i, (name, score) in enumerate(scored)
  )
  ids = {40: 2, 41: (1 << 64) - 1, 42: 1, 43: 0}  # unk, bos (none), eos, pad.
  trainer = _field(3, _UNIGRAM)
  trainer += b''.join(_field(n, i) for n, i in ids.items())
  # A space before the text, spaces folded and written as ▁.
  rules = _field(2, charsmap) + b''.join(_field(n, 1) for n in (3, 4, 5))
  return model + _field(_TRAINER, trainer) + _field(_NORMALIZER, rules)


@functools.lru_cache(maxsize=2)
def names(model: bytes) -> tuple[str, ...]:
  """Its pieces, by id."""
  found = (value for number, value in _fields(model) if number == _PIECE)
  return tuple(dict(_fields(piece)).get(1, b'').decode() for piece in found)


def with_tokens(model: bytes, sentinels: int | None, added: Iterable[str]):
  """The model, saying what stands behind its pieces.

  Args:
    sentinels: how many; None: those among its pieces, else 100.
    added: tokens behind these.
  """
  if sentinels not in (None, SENTINELS):
    model += _field(_SENTINELS, sentinels)
  return model + b''.join(_field(_ADDED, token) for token in added)


@functools.lru_cache(maxsize=8)
def behind(model: bytes) -> tuple[int | None, tuple[str, ...]]:
  """Sentinels behind its pieces (None: among them), and tokens added after.

  Raises:
    ValueError: it is no model, or a truncated one.
  """
  added, sentinels, parts = [], SENTINELS, set()
  if sentinel(0).encode() in model:  # As mT5's: its last 100 pieces.
    sentinels = None
  for number, value in _fields(model):
    parts.add(number)
    if number == _SENTINELS:
      sentinels = value
    elif number == _ADDED:
      added.append(value.decode())
  # What is appended to a truncated one would be taken for the rest of it.
  if not parts >= {_PIECE, _TRAINER, _NORMALIZER}:
    raise ValueError('some of its parts are missing')
  return sentinels, tuple(added)


def bare(model: bytes) -> bytes:
  """The model without what `with_tokens` said."""
  return model.removesuffix(with_tokens(b'', *behind(model)))


def extended(model: bytes) -> bytes:
  """The model with sentinels and added tokens as pieces of their own.

  <extra_id_99> ... <extra_id_0> are what SeqIO appends, with a space before
  each, so that a sentinel in a text is one id.
  """
  sentinels, added = behind(model)
  names = [f'▁{sentinel(k)}' for k in reversed(range(sentinels or 0))]
  return model + b''.join(
    _piece(name, 0.0, USER_DEFINED) for name in (*names, *added)
  )
