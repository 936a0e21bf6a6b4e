"""ANLI, three rounds (arXiv:1910.14599), as T5 writes tasks of its kind.

T5 has no ANLI: this is what its preprocessor of GLUE makes of these fields.
"""

from collections.abc import Iterator

from st_moe.data import metrics
from st_moe.data.task import Example, Row, TextTask, label_text, take

LABELS = ('entailment', 'neutral', 'contradiction')
_OFFICIAL = {'e': 'entailment', 'n': 'neutral', 'c': 'contradiction'}


def anli(row: Row, split: str) -> Iterator[Example]:
  """`anli hypothesis: ... premise: ...`.

  Official rows say `context` for the premise, and e, n or c for the label.
  """
  label = _OFFICIAL.get(str(row.get('label')))
  premise = take(row, 'context' if 'context' in row else 'premise')
  yield {
    'inputs': f'anli hypothesis: {take(row, "hypothesis")} premise: {premise}',
    'targets': label or label_text(row, split, LABELS),
  }


def _round(number: int) -> TextTask:
  folder = f'anli/R{number}'
  files = {
    'train': (f'{folder}/train.jsonl', f'{folder}/train.subset.jsonl'),
    'validation': (f'{folder}/dev.jsonl',),
    'test': (f'{folder}/test.jsonl',),
  }
  return TextTask(anli, (metrics.accuracy,), LABELS, files=files)


TASKS = {f'anli_r{number}': _round(number) for number in (1, 2, 3)}
