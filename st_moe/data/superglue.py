"""SuperGLUE as text in, text out: what T5 makes of it, byte for byte.

T5 writes the name of the task, then fields as `name: text`; the answer is the
name of the label (arXiv:1910.10683, appendix D; the tasks `super_glue_*_v102`
of its package). WSC asks for the noun that a marked pronoun stands for, ReCoRD
for the entity behind a placeholder. The two diagnostic sets are read as RTE.

A task is one line of `TASKS`.
"""

import re
from collections.abc import Iterator, Mapping

from st_moe.data import metrics
from st_moe.data.task import (
  UNKNOWN,
  Example,
  Row,
  TextTask,
  class_number,
  label_text,
  sentences,
  take,
  untold,
)

BOOLEAN = ('False', 'True')
ENTAILMENT = ('entailment', 'not_entailment')


def multirc(row: Row, split: str) -> Iterator[Example]:
  """One example for each answer to each question about a passage."""
  passage = take(row, 'passage/text')
  for question in take(row, 'passage/questions', list):
    for answer in take(question, 'answers', list):
      text = (
        f'multirc question: {take(question, "question")}'
        f' answer: {take(answer, "text")} paragraph: {passage}'
      )
      yield {
        'inputs': re.sub('</?b>', '', text.replace('<br>', ' ')),
        'targets': label_text(answer, split, BOOLEAN),
        'idx/paragraph': take(row, 'idx', int),
        'idx/question': take(question, 'idx', int),
        'idx/answer': take(answer, 'idx', int),
      }


def record(row: Row, split: str) -> Iterator[Example]:
  """One example for each right answer to each query about a passage."""
  text = take(row, 'passage/text')
  entities = sorted(
    {
      text[take(e, 'start', int) : take(e, 'end', int) + 1]
      for e in take(row, 'passage/entities', list)
    }
  )
  # Highlights become sentences of the passage.
  passage = re.sub(r'([.?!"\'])\n@highlight\n', r'\1 ', text)
  passage = passage.replace('\n@highlight\n', '. ')
  for query in take(row, 'qas', list):
    asked = take(query, 'query')
    told = not untold(query, 'answers', split)
    answers = take(query, 'answers', list) if told else ()
    answers = sorted({take(a, 'text') for a in answers})
    for answer in answers or [UNKNOWN]:
      yield {
        'inputs': f'record query: {asked}'
        f' entities: {", ".join(entities)} passage: {passage}',
        'targets': answer,
        'idx/passage': take(row, 'idx', int),
        'idx/query': take(query, 'idx', int),
        'answers': answers,
        'choices': entities,
      }


def wsc(row: Row, split: str) -> Iterator[Example]:
  """`wsc: Tom asked Ann if *she* ...`: whom does the pronoun mean?

  The target is the noun that the row names, right or wrong; for training only
  right ones are of use.
  """
  label = label_text(row, split, BOOLEAN)
  if split == 'train' and label != 'True':
    return
  text, spans = take(row, 'text'), {}
  for span in ('span1', 'span2'):
    words = take(row, f'target/{span}_text')
    spans[span] = _as_in_text(
      words, text, take(row, f'target/{span}_index', int)
    )
  noun, pronoun = spans['span1'], spans['span2']
  blank = _blanked(text, take(row, 'target/span2_index', int), pronoun)
  yield {
    'inputs': 'wsc: ' + blank.replace(' X ', f' *{pronoun}* '),
    'targets': noun,
    'label': class_number(label, BOOLEAN),
    'idx': take(row, 'idx', int),
  }


def _as_in_text(span: str, text: str, index: int) -> str:
  """A span as the text has it: official ones differ in case and full stops."""
  if span in text or span.startswith('Kamenev'):  # That one is not contiguous.
    return span
  words = text.split()
  if not 0 <= index < len(words):
    raise ValueError(f'{span!r} is not at word {index} of {text!r}.')
  first = span[0].lower() if words[index][0].islower() else span[0].upper()
  found = (first + span[1:]).rstrip('.').replace('\n', ' ')
  if found not in text:
    raise ValueError(f'{span!r} is not in {text!r}.')
  return found


# Two rows whose indices are wrong -> the word that the pronoun is, there.
_MISPLACED = {
  '"Good for him," he said.': ('him,"', 'X ,"'),
  'they might want to use it ,': ('it', 'X'),
}


def _blanked(text: str, index: int, pronoun: str) -> str:
  """`text` with an X for the pronoun, its word number `index`."""
  for part, (word, blank) in _MISPLACED.items():
    if part in text:
      return text.replace(part, part.replace(word, blank, 1)).rstrip()
  words = text.split(' ')
  if not 0 < index < len(words) or words[index] != pronoun:
    raise ValueError(f'span2 {pronoun!r} is not word {index} of {text!r}.')
  return ' '.join([*words[:index], 'X', *words[index + 1 :]])


# What metrics compare.


def multirc_value(text: str, example=None, is_target=False) -> dict:
  value = {'value': class_number(text, BOOLEAN)}
  if is_target:
    value['group'] = example['idx/question']
  return value


def record_value(text: str, example=None, is_target=False) -> dict:
  if not is_target:
    return {'value': text}
  group = example['idx/passage'], example['idx/query']
  return {'value': metrics.texts(example['answers']), 'group': group}


def axg_value(text: str, example=None, is_target=False) -> dict:
  """Rows come in pairs that differ in a gender."""
  value = {'value': class_number(text, ENTAILMENT)}
  return value | ({'group': example['idx'] // 2} if is_target else {})


_DETERMINERS = frozenset(
  'a an few her his each every many much my our some that the their these this'
  ' those which whose your'.split()
)


def wsc_value(text: str, example=None, is_target=False) -> int:
  """The label; of an answer, whether it names the noun of the row: T5's rule.

  More or fewer words of the noun will do ('fuzzy bunny' for 'bunny'), but not
  'Bob' for "Bob's hat". -1 is no answer.
  """
  if is_target:
    return example['label']
  said, noun = (
    [w for w in str(s).strip().lower().split(' ') if w not in _DETERMINERS]
    for s in (text, metrics.texts([example['targets_pretokenized']])[0])
  )
  if not ' '.join(said):
    return -1
  if ("'" in ' '.join(said)) != ("'" in ' '.join(noun)):
    return 0
  return int(set(said) <= set(noun) or set(noun) <= set(said))


# The tasks.


def _files(folder: str, **standins: str) -> dict[str, tuple[str, ...]]:
  """The official names, and what stands in for one that is not there."""
  names = {'train': 'train', 'validation': 'val', 'test': 'test'}
  return {
    split: tuple(
      f'superglue/{folder}/{n}.jsonl'
      for n in (name, *filter(None, [standins.get(split)]))
    )
    for split, name in names.items()
  }


def _diagnostic(folder: str) -> dict[str, tuple[str, ...]]:
  return dict.fromkeys(
    ('validation', 'test'), (f'superglue/{folder}/{folder}.jsonl',)
  )


def _sentences(
  name, fields, labels, files, metric_fns=(metrics.accuracy,), **more
):
  if not isinstance(fields, Mapping):
    fields = {field: field for field in fields}

  def make(row, split):  # Made here, so that an edit here makes shards stale.
    return sentences(row, split, name=name, fields=fields, labels=labels)

  return TextTask(make, metric_fns, labels, files=files, **more)


_CB = ('entailment', 'contradiction', 'neutral')
_PAIR = ('hypothesis', 'premise')

TASKS = {
  'boolq': _sentences(
    'boolq', ('passage', 'question'), BOOLEAN,
    _files('BoolQ', train='train.subset'),
  ),
  'cb': _sentences(
    'cb', _PAIR, _CB, _files('CB'),
    (metrics.mean_multiclass_f1(3), metrics.accuracy),
  ),
  'copa': _sentences(
    'copa', ('choice1', 'choice2', 'premise', 'question'),
    ('choice1', 'choice2'), _files('COPA'),
  ),
  'multirc': TextTask(
    multirc,
    (metrics.f1_over_all, metrics.mean_over_groups(metrics.all_match)),
    BOOLEAN, multirc_value, _files('MultiRC'),
  ),
  'record': TextTask(
    record, (metrics.first_of_each_group(metrics.squad),), (), record_value,
    _files('ReCoRD', train='train.32', validation='dev32'),
  ),
  'rte': _sentences('rte', _PAIR, ENTAILMENT, _files('RTE')),
  'wic': _sentences(
    'wic', ('sentence1', 'sentence2', 'word'), BOOLEAN, _files('WiC')
  ),
  'wsc': TextTask(
    wsc, (metrics.accuracy,), (), wsc_value, _files('WSC')
  ),
  'axb': _sentences(
    'rte', {'hypothesis': 'sentence2', 'premise': 'sentence1'}, ENTAILMENT,
    _diagnostic('AX-b'), (metrics.matthews, metrics.accuracy),
  ),
  'axg': _sentences(
    'rte', _PAIR, ENTAILMENT, _diagnostic('AX-g'),
    (metrics.on_values(metrics.accuracy), metrics.parity),
    postprocess=axg_value,
  ),
}  # fmt: skip

# T5's rates of its mixture: the sizes of the official training sets. (It adds
# 1,322 of Definite Pronoun Resolution, which is no part of SuperGLUE.)
RATES = {
  'boolq': 9_427,
  'cb': 250,
  'copa': 400,
  'multirc': 27_243,
  'record': 138_854,
  'rte': 2_490,
  'wic': 5_428,
  'wsc': 259,
  'axb': 0,
  'axg': 0,
}


# What the leaderboard averages: the metrics of a task first, then the tasks.
COUNTED = {
  'boolq': ('accuracy',),
  'cb': ('mean_3class_f1', 'accuracy'),
  'copa': ('accuracy',),
  'multirc': ('f1', 'exact_match'),
  'record': ('f1', 'em'),
  'rte': ('accuracy',),
  'wic': ('accuracy',),
  'wsc': ('accuracy',),
}


def average(scores: Mapping[str, float]) -> float | None:
  """The leaderboard's score of 'boolq/accuracy' and so on.

  None where one of the eight tasks is missing; others do not count.
  """
  names = [[f'{t}/{metric}' for metric in of] for t, of in COUNTED.items()]
  if not scores.keys() >= {name for of_task in names for name in of_task}:
    return None
  mean = lambda values: sum(values) / len(values)
  return mean([mean([scores[name] for name in of_task]) for of_task in names])
