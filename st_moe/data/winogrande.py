"""WinoGrande (arXiv:1907.10641): which of two nouns fits the blank?

T5 has no WinoGrande; the format is ours.
"""

from collections.abc import Iterator

from st_moe.data import metrics
from st_moe.data.task import (
  UNKNOWN,
  Example,
  Row,
  TextTask,
  short,
  take,
  untold,
)


def winogrande(row: Row, split: str) -> Iterator[Example]:
  """`winogrande sentence: ... option1: ... option2: ...`; one is the target."""
  options = [take(row, 'option1'), take(row, 'option2')]
  yield {
    'inputs': f'winogrande sentence: {take(row, "sentence")}'
    f' option1: {options[0]} option2: {options[1]}',
    'targets': _answer(row, split, options),
    'choices': options,
  }


def _answer(row, split, options) -> str:
  if untold(row, 'answer', split):
    return UNKNOWN
  answer = take(row, 'answer')
  if answer not in ('1', '2'):
    raise ValueError(
      f"'answer' is {short(answer)}; it must be '1' or '2', and only in test"
      ' files may it be empty.'
    )
  return options[int(answer) - 1]


TASKS = {
  'winogrande': TextTask(
    winogrande,
    (metrics.accuracy,),
    files={
      'train': (
        'winogrande/train_xl.jsonl',
        'winogrande/train_xl.subset.jsonl',
      ),
      'validation': ('winogrande/dev.jsonl',),
      'test': ('winogrande/test.jsonl',),
    },
  )
}
