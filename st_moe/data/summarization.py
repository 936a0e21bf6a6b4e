"""Articles and their summaries, as T5 writes CNN/Daily Mail."""

import functools
from collections.abc import Iterator

from st_moe.data import metrics
from st_moe.data.task import Example, Row, TextTask, take


def summary(
  row: Row, split: str, *, source: str, target: str
) -> Iterator[Example]:
  """`summarize: ...`; `source` and `target` are the fields of a row."""
  del split
  yield {
    'inputs': f'summarize: {take(row, source)}',
    'targets': take(row, target),
  }


def _task(folder: str, source: str, target: str, **standins: str) -> TextTask:
  names = {'train': 'train', 'validation': 'dev', 'test': 'test'}
  return TextTask(
    functools.partial(summary, source=source, target=target),
    (metrics.rouge,),
    files={
      split: tuple(
        f'summarization/{folder}/{n}.jsonl'
        for n in (name, *filter(None, [standins.get(split)]))
      )
      for split, name in names.items()
    },
  )


TASKS = {
  'xsum': _task(
    'xsum',
    'document',
    'summary',
    train='train.sample',
    validation='dev.sample',
    test='test.sample',
  ),
  'cnn_dailymail': _task(
    'cnn_dailymail', 'article', 'highlights', train='tokenized.sample'
  ),
}
