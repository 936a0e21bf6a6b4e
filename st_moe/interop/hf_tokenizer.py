"""The files of a HuggingFace tokenizer, as a SentencePiece model and back.

`spiece.model` has the pieces; where transformers saved `tokenizer.json` alone,
they are made of it. Around them, tokenizer_config.json, added_tokens.json and
tokenizer.json say how many sentinels there are and what was added.
"""

import base64
import pathlib
import re
import warnings

from st_moe.data import files, pieces, vocabulary

FILES = (
  'spiece.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'added_tokens.json',
)
_SENTINEL = re.compile(r'▁?<extra_id_(\d+)>')
_OWN = ('<pad>', '</s>', '<unk>')  # Of every T5, as SentencePiece has them.
_BYT5 = 'ByT5Tokenizer'


def read(directory: pathlib.Path, about: dict) -> bytes | None:
  """The vocabulary of a directory, as `Vocabulary.model`; None: it has none.

  Args:
    about: config.json, of which older ones name the tokenizer.

  Raises:
    ValueError: one of the files is damaged.
  """
  try:
    return _read(directory, about)
  except (AttributeError, KeyError, TypeError) as e:
    raise ValueError(
      f'The tokenizer of {directory} is damaged: its JSON files hold other'
      f' things than transformers puts there ({e!r}).'
    ) from None


def _read(directory: pathlib.Path, about: dict) -> bytes | None:
  said = _json(directory / 'tokenizer_config.json')
  whole = _json(directory / 'tokenizer.json')
  told = _told(directory, said, whole)
  if _BYT5 in (said.get('tokenizer_class'), about.get('tokenizer_class')):
    # Where <extra_id_0> stands is of its tokenizer, not of its training,
    # unless it is one of ours.
    ours = vocabulary.Vocabulary('bytes', b'')
    own = told.get(pieces.sentinel(0)) == ours.sentinel(0)
    return ours.model if own else vocabulary.BYT5
  file = directory / 'spiece.model'
  try:
    if file.exists():
      return _with_tokens(files.read_bytes(file), told, said, directory)
    if whole:
      return _with_tokens(_rebuilt(whole), told, said, directory)
  except _Lost as e:
    warnings.warn(
      f'The vocabulary of {directory} is left behind: {e}. Give the'
      ' SentencePiece model it was made of (spiece.model) where it is needed.',
      stacklevel=2,
    )
  return None


class _Lost(Exception):
  """Why a tokenizer cannot be a SentencePiece model."""


def _json(path: pathlib.Path) -> dict:
  return files.read_json(path) if path.exists() else {}


def _told(directory, said: dict, whole: dict) -> dict[str, int]:
  """Ids of added tokens, wherever they are told."""
  found = {}
  decoder = said.get('added_tokens_decoder') or {}
  listed = [
    *_json(directory / 'added_tokens.json').items(),
    *((_content(token), i) for i, token in decoder.items()),
    *((_content(t), t.get('id')) for t in whole.get('added_tokens') or ()),
  ]
  for token, i in listed:
    if not isinstance(token, str) or not str(i).isdecimal():
      raise ValueError(
        f'{directory}: the tokenizer adds {token!r} with the id {i!r}.'
      )
    found[token] = int(i)
  return {t: i for t, i in found.items() if t not in _OWN}


def _content(token):
  return token.get('content') if isinstance(token, dict) else token


def _with_tokens(model: bytes, told, said: dict, directory) -> bytes:
  """The model, saying which sentinels and added tokens stand behind it."""
  try:
    names = pieces.names(model)
  except ValueError:
    return model  # Whoever needs it will be told that it is none.
  if pieces.bare(model) != model:
    return model  # One of ours, which says so itself.
  own = pieces.behind(model)[0] is None
  behind = {i: token for token, i in told.items() if i >= len(names)}
  lost = [
    token
    for token, i in told.items()
    if i < len(names) and names[i].lstrip('▁') != token.lstrip('▁')
  ]
  listed = [
    _content(token)
    for key in ('additional_special_tokens', 'extra_special_tokens')
    for token in said.get(key) or ()
  ]
  named = [t for t in listed if _SENTINEL.fullmatch(str(t))]
  count = 0 if own else len(named) or _extra_ids(said, directory)
  if not any(_SENTINEL.fullmatch(token) for token in told):
    end = len(names) + count
    behind |= {end - 1 - k: pieces.sentinel(k) for k in range(count)}
  free = max([len(names) - 1, *behind]) + 1
  known = {*behind.values(), *names, *lost, *_OWN}
  more = [t for t in dict.fromkeys(listed) if t not in known]
  behind |= dict(enumerate(more, free))
  order = [behind[i] for i in sorted(behind)]
  first = [i for n, i in enumerate(sorted(behind)) if i != len(names) + n]
  if first:  # Ids must be those they were trained with.
    lost += [t for i, t in behind.items() if i >= first[0]]
    order = [t for t in order if t not in lost]
  if lost:
    warnings.warn(
      f'{directory}: the tokenizer has added tokens where none can be here;'
      f' a text with one is cut into pieces: {lost[:5]}'
      f'{" ..." if len(lost) > 5 else ""}.',
      stacklevel=3,
    )
  count = sum(1 for t in order if _SENTINEL.fullmatch(t))
  while count and order[:count] != [
    pieces.sentinel(k) for k in reversed(range(count))
  ]:
    count -= 1
  return pieces.with_tokens(model, None if own else count, order[count:])


def _extra_ids(said: dict, directory) -> int:
  count = said.get('extra_ids', pieces.SENTINELS)
  if type(count) is not int or not 0 <= count <= 10_000:
    raise ValueError(
      f'{directory}/tokenizer_config.json: extra_ids {count!r} is no number of'
      ' sentinels.'
    )
  return count


def _rebuilt(whole: dict) -> bytes:
  """The SentencePiece model that a tokenizer.json was made of.

  Raises:
    _Lost: it was made of none, or of one of another kind.
  """
  model, rules = whole.get('model') or {}, whole.get('normalizer')
  if model.get('type') != 'Unigram' or model.get('byte_fallback'):
    raise _Lost(
      f'its tokenizer.json is a {model.get("type")} model, no plain Unigram'
    )
  # Besides the table of characters, spaces are folded, as SentencePiece does.
  steps = [s for s in _steps(rules, 'normalizers') if not _folds_spaces(s)]
  kinds = [step.get('type') for step in steps]
  if kinds not in ([], ['Precompiled']):
    raise _Lost(f'its tokenizer.json normalises text by {kinds}')
  cuts = _steps(whole.get('pre_tokenizer'), 'pretokenizers')
  cuts = [step.get('type') for step in cuts]
  if set(cuts) - {'WhitespaceSplit', 'Metaspace'} or 'Metaspace' not in cuts:
    raise _Lost(f'its tokenizer.json cuts text by {cuts}')
  try:
    scored = [(str(name), float(score)) for name, score in model['vocab']]
    charsmap = steps[0]['precompiled_charsmap'] if steps else ''
    charsmap = base64.b64decode(charsmap or '', validate=True)
  except (KeyError, TypeError, ValueError) as e:
    raise _Lost(f'its tokenizer.json is damaged ({e!r})') from None
  if [name for name, _ in scored[:3]] != [*_OWN] or model.get('unk_id') != 2:
    raise _Lost(
      f'its tokenizer.json begins with {[name for name, _ in scored[:3]]}, but'
      f' T5 models need {[*_OWN]}'
    )
  # transformers lists sentinels and added tokens among the pieces.
  added = {_content(token) for token in whole.get('added_tokens') or ()}
  while scored[3:] and scored[-1][0] in added and scored[-1][0][0] != '▁':
    scored.pop()
  return pieces.make(scored, charsmap)


def _steps(rule: dict | None, key: str) -> list[dict]:
  """A rule of tokenizer.json, or those it is a sequence of."""
  if not rule:
    return []
  if rule.get('type') != 'Sequence':
    return [rule]
  return rule[key]


def _folds_spaces(step: dict) -> bool:
  if step.get('type') == 'Replace':
    return step.get('pattern') == {'Regex': ' {2,}'}
  return step.get('type') == 'Strip'


def write(directory: pathlib.Path, model: bytes) -> None:
  """Files of which transformers makes the same tokenizer, and `read` too."""
  vocab = vocabulary.Vocabulary('', model)
  if vocab.is_bytes:
    about = {'tokenizer_class': _BYT5}
    if not model:
      about['extra_ids'] = 0
      about['added_tokens_decoder'] = {
        str(i): {'content': t, 'special': True} for t, i in vocab.tokens.items()
      }
  else:
    sentinels, added = pieces.behind(model)
    about = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': sentinels or 0}
    if added:
      about['added_tokens_decoder'] = {
        str(vocab.tokens[t]): {'content': t} for t in added
      }
    (directory / 'spiece.model').write_bytes(pieces.bare(model))
  text = files.as_json(about, indent=2, sort_keys=True)
  (directory / 'tokenizer_config.json').write_text(f'{text}\n')
