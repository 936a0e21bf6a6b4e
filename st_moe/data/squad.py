"""SQuAD as text in, text out: version 1.1 as T5 has it, byte for byte.

T5 has no task of version 2.0. Here it has the same text, and 'unanswerable' for
a target where the passage does not tell.
"""

import json
import os
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from st_moe.data import metrics
from st_moe.data.sources import read_jsonl, read_text
from st_moe.data.task import Example, Row, TextTask, short, take

UNANSWERABLE = 'unanswerable'
_PUNCTUATION = re.compile(f'([{re.escape(string.punctuation)}])')


def squad_v1(row: Row, split: str) -> Iterator[Example]:
  """`question: ... context: ...`; the target is the first answer."""
  del split
  yield _example(row, texts_of(row, 'answers/text'))


def squad_v2(row: Row, split: str) -> Iterator[Example]:
  del split
  impossible = row.get('is_impossible')
  if not isinstance(impossible, bool):
    raise ValueError(
      f"'is_impossible' is {short(impossible)}; it must be true or false, as in"
      ' files of version 2.0.'
    )
  answers = [UNANSWERABLE] if impossible else texts_of(row, 'answers/text')
  yield _example(row, answers)


def _example(row, answers) -> Example:
  answers = [padded(answer) for answer in answers]
  question, context = (padded(take(row, k)) for k in ('question', 'context'))
  return {
    'inputs': _one_space(f'question: {question} context: {context}'),
    'targets': answers[0],
    'id': take(row, 'id'),
    'context': context,
    'question': question,
    'answers': answers,
  }


def padded(text: str) -> str:
  """Punctuation becomes words of its own."""
  return _one_space(_PUNCTUATION.sub(r' \1 ', text))


def _one_space(text: str) -> str:
  return re.sub('[\t\n\f\r ]+', ' ', text)  # T5's \s knows ASCII alone.


def texts_of(row: Row, field: str) -> list[str]:
  """The list of texts, one at least, in a field of a row."""
  found = take(row, field, list)
  if not found or not all(isinstance(text, str) for text in found):
    raise ValueError(
      f'{field!r} is {short(found)}; it must be a list of texts, not empty.'
    )
  return found


# What metrics compare.


def answer_value(text: str, example=None, is_target=False) -> str | list[str]:
  """What was said; of a target, all answers that are right."""
  return metrics.texts(example['answers']) if is_target else text


def squad_v2_scores(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """As `metrics.squad`, by the rules of version 2.0.

  To say 'unanswerable' or nothing is right where there is no answer, and has
  nothing in common with any other.
  """
  none = '\0'  # A word that no answer has.
  is_none = lambda text: metrics.squad([['', UNANSWERABLE]], [text])['em'] > 0
  return metrics.squad(
    [[a for a in right if not is_none(a)] or [none] for right in targets],
    [none if is_none(said) else said for said in predictions],
  )


# Files.


def read(path: epath.PathLike) -> Iterator[tuple[int, Row]]:
  """(number from 1, row) of each question of an official .json or a .jsonl."""
  is_official = os.fspath(path).endswith('.json')
  return enumerate(_questions(path), 1) if is_official else read_jsonl(path)


def _questions(path) -> Iterator[Row]:
  document, place = _parsed(path), 'at the top'
  try:
    for n, article in enumerate(take(document, 'data', list)):
      place = f'data[{n}]'
      for p, paragraph in enumerate(take(article, 'paragraphs', list)):
        place = f'data[{n}].paragraphs[{p}]'
        context = take(paragraph, 'context')
        for q, row in enumerate(take(paragraph, 'qas', list)):
          place = f'data[{n}].paragraphs[{p}].qas[{q}]'
          found = [take(a, 'text') for a in take(row, 'answers', list)]
          yield {
            **row,
            'id': take(row, 'id'),
            'question': take(row, 'question'),
            'context': context,
            'answers': {'text': found},
          }
  except ValueError as error:
    raise ValueError(f'{path}, {place}: {error}') from None


def _parsed(path) -> Any:
  try:
    return json.loads(read_text(path))
  except json.JSONDecodeError as e:
    raise ValueError(
      f'{path}, line {e.lineno}: broken JSON ({e.msg} at column {e.colno}).'
    ) from None


def _files(version: str, **standins: str) -> dict[str, tuple[str, ...]]:
  names = {'train': 'train', 'validation': 'dev'}
  return {
    split: tuple(
      f'squad/{n}'
      for n in (f'{name}-v{version}.json', *filter(None, [standins.get(split)]))
    )
    for split, name in names.items()
  }


TASKS = {
  'squad_v1': TextTask(
    squad_v1, (metrics.squad,), (), answer_value,
    _files(
      '1.1', train='squad_v1.1.train.sample.jsonl', validation='xquad.en.json'
    ), read,
  ),
  'squad_v2': TextTask(
    squad_v2, (squad_v2_scores,), (), answer_value, _files('2.0'), read
  ),
}  # fmt: skip
