"""ARC, questions of school science (arXiv:1803.05457), as text in, text out.

T5 has no ARC; the format is ours.
"""

import string
from collections.abc import Iterator

from st_moe.data import metrics
from st_moe.data.task import UNKNOWN, Example, Row, TextTask, take, untold


def arc(row: Row, split: str) -> Iterator[Example]:
  """`arc question: ... choices: (A) ... (B) ...`; the target is a choice."""
  choices = take(row, 'question/choices', list)
  texts = [take(choice, 'text') for choice in choices]
  # Some rows number their choices; to the model they are all letters.
  listed = zip(string.ascii_uppercase, texts, strict=False)
  yield {
    'inputs': f'arc question: {take(row, "question/stem")} choices: '
    + ' '.join(f'({letter}) {text}' for letter, text in listed),
    'targets': _answer(row, split, choices),
    'choices': texts,
  }


def _answer(row, split, choices) -> str:
  if untold(row, 'answerKey', split):
    return UNKNOWN
  key = take(row, 'answerKey')
  keys = [take(choice, 'label') for choice in choices]
  if key not in keys:
    raise ValueError(f"'answerKey' is {key!r}, none of {', '.join(keys)}.")
  return choices[keys.index(key)]['text']


def _files(folder: str) -> dict[str, tuple[str, ...]]:
  names = {'train': 'Train', 'validation': 'Dev', 'test': 'Test'}
  return {
    split: (f'arc/{folder}/{n}.jsonl', f'arc/{folder}/{folder}-{n}.jsonl')
    for split, n in names.items()
  }


TASKS = {
  'arc_easy': TextTask(arc, (metrics.accuracy,), files=_files('ARC-Easy')),
  'arc_challenge': TextTask(
    arc, (metrics.accuracy,), files=_files('ARC-Challenge')
  ),
}
