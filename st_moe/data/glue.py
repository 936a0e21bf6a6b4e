"""GLUE as text in, text out: what T5 makes of it, byte for byte.

Read from the .tsv files of gluebenchmark.com. Columns are renamed as in
tensorflow_datasets, and those of text follow each other by name.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from st_moe.data import metrics
from st_moe.data.sources import read_text
from st_moe.data.task import (
  UNKNOWN,
  Example,
  Row,
  TextTask,
  sentences,
  short,
  take,
  untold,
)


def digits(row: Row, split: str, *, label: str, **kwargs) -> Iterator[Example]:
  """`sentences`; a label that is a digit is the number of a class."""
  value = row.get(label)
  if isinstance(value, str) and value.isdecimal():
    row = {**row, label: int(value)}
  yield from sentences(row, split, label=label, **kwargs)


def qqp(row: Row, split: str, **kwargs) -> Iterator[Example]:
  """`digits`, less the few official rows that line breaks tear apart."""
  if None not in row.values() and row.get(kwargs['label']) != '':
    yield from digits(row, split, **kwargs)


def stsb(row: Row, split: str) -> Iterator[Example]:
  """Scores from 0 to 5 become words: the nearest multiples of 0.2."""
  yield {
    'inputs': f'stsb sentence1: {take(row, "sentence1")}'
    f' sentence2: {take(row, "sentence2")}',
    'targets': _score_text(row, split),
    'idx': take(row, 'idx', int),
  }


def _score_text(row, split) -> str:
  if untold(row, 'score', split):
    return UNKNOWN  # T5 says -1.0, which metrics would take for a score.
  value = score(take(row, 'score'))
  if not 0 <= value <= 5:
    raise ValueError(
      f"'score' is {short(row['score'])}; it must be a number from 0 to 5."
    )
  return f'{round(value * 5) / 5:.1f}'


# What metrics compare.


def score(text: str, **_) -> float:
  """The number that a text is, -1 for any other."""
  try:
    return float(text)
  except ValueError:
    return -1.0


# Files.


def read_tsv(
  path: epath.PathLike, columns: Sequence[str] = ()
) -> Iterator[tuple[int, Row]]:
  """(line number, row) of each line that is not empty; quotes are just text.

  A row has its number from 0 as `idx`, and None for what its line lacks.
  `columns` are those of a file whose first line does not name them.
  """
  # The line ends of Python's text files, as which T5's examples were read.
  lines = enumerate(re.split('\r\n?|\n', read_text(path)), 1)
  lines = [(number, line) for number, line in lines if line]
  if lines and (not columns or columns[-1] in lines[0][1].split('\t')):
    columns = lines.pop(0)[1].split('\t')
  for idx, (number, line) in enumerate(lines):
    cells = itertools.chain(line.split('\t'), itertools.repeat(None))
    yield number, dict(zip(columns, cells, strict=False)) | {'idx': idx}


def _files(folder: str, validation='dev', test='test', train='train'):
  names = {'train': train, 'validation': validation, 'test': test}
  return {s: (f'glue/{folder}/{n}.tsv',) for s, n in names.items() if n}


def _task(
  name, fields, labels, files,
  label='label', metric_fns=(metrics.accuracy,), make=digits, **more,
):  # fmt: skip
  if not isinstance(fields, Mapping):
    fields = {field: field for field in fields}
  make = functools.partial(
    make, name=name, fields=fields, labels=labels, label=label
  )
  more = {'read': read_tsv, **more}
  return TextTask(make, metric_fns, labels, files=files, **more)


_NLI = ('entailment', 'neutral', 'contradiction')
_ENTAILMENT = ('entailment', 'not_entailment')
_PAIR = ('sentence1', 'sentence2')
_F1 = (metrics.f1, metrics.accuracy)

TASKS = {
  'glue_cola': _task(
    'cola', ('sentence',), ('unacceptable', 'acceptable'), _files('CoLA'),
    metric_fns=(metrics.matthews,), read=functools.partial(
      read_tsv, columns=('source', 'label', 'mark', 'sentence')
    ),
  ),
  'glue_sst2': _task(
    'sst2', ('sentence',), ('negative', 'positive'), _files('SST-2')
  ),
  'glue_mrpc': _task(
    'mrpc', {'sentence1': '#1 String', 'sentence2': '#2 String'},
    ('not_equivalent', 'equivalent'), _files('MRPC'), 'Quality', _F1,
  ),
  'glue_qqp': _task(
    'qqp', ('question1', 'question2'), ('not_duplicate', 'duplicate'),
    _files('QQP'), 'is_duplicate', _F1, qqp,
  ),
  'glue_stsb': TextTask(
    stsb, (metrics.pearson, metrics.spearman),
    postprocess=score, files=_files('STS-B'), read=read_tsv,
  ),
  'glue_mnli': _task(
    'mnli', {'hypothesis': 'sentence2', 'premise': 'sentence1'}, _NLI,
    _files('MNLI', 'dev_matched', 'test_matched'), 'gold_label',
  ),
  'glue_mnli_mismatched': _task(
    'mnli', {'hypothesis': 'sentence2', 'premise': 'sentence1'}, _NLI,
    _files('MNLI', 'dev_mismatched', 'test_mismatched', ''), 'gold_label',
  ),
  'glue_qnli': _task(
    'qnli', ('question', 'sentence'), _ENTAILMENT, _files('QNLI')
  ),
  'glue_rte': _task('rte', _PAIR, _ENTAILMENT, _files('RTE')),
  'glue_wnli': _task('wnli', _PAIR, _ENTAILMENT[::-1], _files('WNLI')),
}  # fmt: skip

# T5's rates of its mixture. WNLI has none: WSC is the better form of it.
RATES = {
  'cola': 8_551,
  'sst2': 67_349,
  'mrpc': 3_668,
  'qqp': 363_849,
  'stsb': 5_749,
  'mnli': 392_702,
  'qnli': 104_743,
  'rte': 2_490,
  'mnli_mismatched': 0,
}
