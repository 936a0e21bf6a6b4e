"""Questions without a passage: the answer has to be in the parameters.

Natural Questions, TriviaQA and WebQuestions as google-research's t5_cbqa has
them (arXiv:2002.08910). Only the first answer is learnt; any of them is right.
"""

import functools
from collections.abc import Iterator

from st_moe.data import metrics
from st_moe.data.squad import answer_value, texts_of
from st_moe.data.task import UNKNOWN, Example, Row, TextTask, take, untold


def question(
  row: Row, split: str, *, name: str, field: str
) -> Iterator[Example]:
  """`NAME question: ...`; `field` has the answers."""
  right = _right(row, field, split)
  yield {
    'inputs': f'{name} question: {take(row, "question")}',
    'targets': right[0],
    'answers': right,
  }


def trivia_qa(row: Row, split: str) -> Iterator[Example]:
  """`trivia_qa question: ...`; the answer to learn stands by itself.

  In a row with `golden_answers` it does not.
  """
  sample = 'golden_answers' in row
  right = _right(row, 'golden_answers' if sample else 'aliases', split)
  right = [answer.strip() for answer in right]
  alone = not sample and not untold(row, 'answer', split)
  yield {
    'inputs': f'trivia_qa question: {take(row, "question").strip()}',
    'targets': take(row, 'answer').strip() if alone else right[0],
    'answers': right,
  }


def _right(row: Row, field: str, split: str) -> list[str]:
  return [UNKNOWN] if untold(row, field, split) else texts_of(row, field)


def _task(make, metric, folder: str, **files: tuple[str, ...]) -> TextTask:
  return TextTask(
    make, (metric,), postprocess=answer_value,
    files={
      split: tuple(f'closed_book_qa/{folder}/{name}' for name in names)
      for split, names in files.items()
    },
  )  # fmt: skip


TASKS = {
  'natural_questions_open': _task(
    functools.partial(question, name='nq', field='answer'), metrics.squad,
    'nq_open', train=('NQ-open.train.jsonl',),
    validation=('NQ-open.dev.jsonl',),
  ),
  # Rows {question, answer, aliases}: the official document is another, and too
  # large to hold. Both stand-ins are of the official validation split.
  'trivia_qa_open': _task(
    trivia_qa, metrics.trivia_qa, 'trivia_qa',
    train=('train.jsonl',), validation=('dev.jsonl', 'subset.jsonl'),
    test=('test.jsonl', 'test.sample.jsonl'),
  ),
  # A split is one file: of the official 3,778 rows of training these are 2,834.
  'web_questions_open': _task(
    functools.partial(question, name='wq', field='answers'), metrics.squad,
    'web_questions', train=('trainmodel.jsonl',), validation=('val.jsonl',),
    test=('test.jsonl',),
  ),
}  # fmt: skip
