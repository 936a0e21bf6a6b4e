"""SuperGLUE rows as T5 writes them, by hand and against the `t5` package."""

import json
import os
import pathlib
import re

import pytest

from st_moe.data import sources, superglue
from st_moe.data import task as task_lib

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))

EIGHT = ('boolq', 'cb', 'copa', 'multirc', 'record', 'rte', 'wic', 'wsc')


def read(name, row, split='validation'):
  return list(superglue.TASKS[name].examples(row, split))


def without(row, *fields):
  return {key: value for key, value in row.items() if key not in fields}


# ---- Tasks of one answer a row ----------------------------------------------

ROWS = {
  'boolq': {
    'question': 'is the sea salty',
    'passage': 'Sea -- The sea is salty.',
    'label': True,
    'idx': 7,
  },
  'cb': {
    'premise': 'Do we assume it rains?',
    'hypothesis': 'it rains',
    'label': 'neutral',
    'idx': 7,
  },
  'copa': {
    'premise': 'The woman retired.',
    'choice1': 'She received her pension.',
    'choice2': 'She paid off her mortgage.',
    'question': 'effect',
    'label': 0,
    'idx': 7,
  },
  'rte': {
    'premise': 'Dana has died.',
    'hypothesis': 'Dana had an accident.',
    'label': 'not_entailment',
    'idx': 7,
  },
  'wic': {
    'word': 'class',
    'sentence1': 'An emerging class.',
    'sentence2': 'That showed class.',
    'start1': 12,
    'end1': 17,
    'start2': 12,
    'end2': 17,
    'label': False,
    'idx': 7,
  },
  # Of the two diagnostic sets: read as RTE, the first of the sentences as the
  # premise. That of AX-b writes its numbers as text.
  'axb': {
    'sentence1': 'The cat sat on the mat.',
    'sentence2': 'The cat did not sit on the mat.',
    'logic': 'Negation',
    'label': 'not_entailment',
    'idx': '7',
  },
  'axg': {
    'premise': 'The taxpayer met her accountant.',
    'hypothesis': 'The taxpayer met somebody.',
    'pair_id': 551646,
    'label': 'entailment',
    'idx': 7,
  },
}


@pytest.mark.parametrize(
  'name, inputs, targets',
  [
    (
      'boolq',
      'boolq passage: Sea -- The sea is salty. question: is the sea salty',
      'True',
    ),
    (
      'cb',
      'cb hypothesis: it rains premise: Do we assume it rains?',
      'neutral',
    ),
    (
      'copa',
      'copa choice1: She received her pension. choice2: She paid off her '
      'mortgage. premise: The woman retired. question: effect',
      'choice1',
    ),
    (
      'rte',
      'rte hypothesis: Dana had an accident. premise: Dana has died.',
      'not_entailment',
    ),
    (
      'wic',
      'wic sentence1: An emerging class. sentence2: That showed class. word: '
      'class',
      'False',
    ),
    (
      'axb',
      'rte hypothesis: The cat did not sit on the mat. premise: The cat sat on '
      'the mat.',
      'not_entailment',
    ),
    (
      'axg',
      'rte hypothesis: The taxpayer met somebody. premise: The taxpayer met her'
      ' accountant.',
      'entailment',
    ),
  ],
)
def test_a_row(name, inputs, targets):
  expected = {'inputs': inputs, 'targets': targets, 'idx': 7}
  for split in ('train', 'validation', 'test'):
    assert read(name, ROWS[name], split) == [expected]
  assert targets in superglue.TASKS[name].labels
  unlabeled = without(ROWS[name], 'label')
  assert read(name, unlabeled, 'test') == [expected | {'targets': '<unk>'}]
  with pytest.raises(ValueError, match="no field 'label'"):
    read(name, unlabeled)


@pytest.mark.parametrize(
  'name, labels',
  [
    ('boolq', ('False', 'True')),
    ('cb', ('entailment', 'contradiction', 'neutral')),
    ('copa', ('choice1', 'choice2')),
    ('multirc', ('False', 'True')),
    ('record', ()),
    ('rte', ('entailment', 'not_entailment')),
    ('wic', ('False', 'True')),
    ('wsc', ()),
    ('axb', ('entailment', 'not_entailment')),
    ('axg', ('entailment', 'not_entailment')),
  ],
)
def test_labels_in_the_order_of_their_numbers(name, labels):
  # As TFDS numbers them: what a file or a checkpoint's predictions may hold.
  assert superglue.TASKS[name].labels == labels
  if name in ROWS:
    targets = lambda label: read(name, ROWS[name] | {'label': label})
    numbered = [targets(n)[0]['targets'] for n in range(len(labels))]
    assert tuple(numbered) == labels


@pytest.mark.parametrize(
  'name, fields',
  [
    ('boolq', ('passage', 'question')),
    ('cb', ('premise', 'hypothesis')),
    ('copa', ('premise', 'choice1', 'choice2', 'question')),
    ('rte', ('premise', 'hypothesis')),
    ('wic', ('sentence1', 'sentence2', 'word')),
    ('axb', ('sentence1', 'sentence2')),
    ('axg', ('premise', 'hypothesis')),
  ],
)
def test_a_missing_or_wrong_field_is_an_error(name, fields):
  for field in (*fields, 'label', 'idx'):
    with pytest.raises(ValueError, match=f"no field '{field}' in {{"):
      read(name, without(ROWS[name], field))
  for field in (*fields, 'idx'):
    with pytest.raises(ValueError, match=f"'{field}' is None; it must be"):
      read(name, ROWS[name] | {field: None})
  with pytest.raises(ValueError, match='label None is none of'):
    read(name, ROWS[name] | {'label': None})


# ---- MultiRC ----------------------------------------------------------------

MULTIRC = {
  'idx': 3,
  'version': 1.1,
  'passage': {
    'text': '<b>Sent 1: </b>Ann ran.<br><b>Sent 2: </b>She won.<br>',
    'questions': [
      {
        'question': 'Who <b>ran</b>?',
        'idx': 8,
        'sentences_used': [0],
        'answers': [
          {'text': 'Ann', 'idx': 40, 'label': 1},
          {'text': 'Ben<br>or Cy', 'idx': 41, 'label': 0},
        ],
      },
      {
        'question': 'Who <i>won</i>?',
        'idx': 9,
        'answers': [{'text': 'Ann', 'idx': 42, 'label': 1}],
      },
    ],
  },
}


def numbers(question, answer):
  return {'idx/paragraph': 3, 'idx/question': question, 'idx/answer': answer}


def test_multirc_asks_about_every_answer():
  # A line break becomes a space, <b> nothing, and other tags stay.
  passage = 'paragraph: Sent 1: Ann ran. Sent 2: She won. '
  assert read('multirc', MULTIRC) == [
    {
      'inputs': f'multirc question: Who ran? answer: Ann {passage}',
      'targets': 'True',
      **numbers(8, 40),
    },
    {
      'inputs': f'multirc question: Who ran? answer: Ben or Cy {passage}',
      'targets': 'False',
      **numbers(8, 41),
    },
    {
      'inputs': f'multirc question: Who <i>won</i>? answer: Ann {passage}',
      'targets': 'True',
      **numbers(9, 42),
    },
  ]


@pytest.mark.parametrize(
  'path, expected',
  [
    ('idx', "no field 'idx' in {"),
    ('passage', "no field 'passage/text' in {"),
    ('passage/text', "no field 'passage/text' in {"),
    ('passage/questions', "no field 'passage/questions' in {"),
    ('passage/questions/1/question', "no field 'question' in {'idx': 9"),
    ('passage/questions/1/idx', "no field 'idx' in {'question': 'Who <i>"),
    ('passage/questions/1/answers', "no field 'answers' in {"),
    ('passage/questions/1/answers/0/text', "no field 'text' in {'idx': 42"),
    ('passage/questions/1/answers/0/idx', "no field 'idx' in {'text': 'Ann'"),
    (
      'passage/questions/1/answers/0/label',
      "no field 'label' in {'text': 'Ann', 'idx': 42}; only test files",
    ),
  ],
)
def test_multirc_names_what_a_row_lacks(path, expected):
  row = json.loads(json.dumps(MULTIRC))
  *folders, field = (int(p) if p.isdigit() else p for p in path.split('/'))
  inner = row
  for key in folders:
    inner = inner[key]
  del inner[field]
  with pytest.raises(ValueError, match=re.escape(expected)):
    read('multirc', row)
  if field == 'label':
    found = [example['targets'] for example in read('multirc', row, 'test')]
    assert found == ['True', 'False', '<unk>']


# ---- ReCoRD -----------------------------------------------------------------

TEXT = (
  'Tom met Ann in Rome\n@highlight\nTom is back.\n@highlight\n'
  'He said "no"\n@highlight\nAnn stays'
)


def entity(name, last=False):
  """An entity of TEXT; `end` is its last letter, as in the official files."""
  start = TEXT.rindex(name) if last else TEXT.index(name)
  return {'start': start, 'end': start + len(name) - 1}


RECORD = {
  'idx': 3,
  'source': 'CNN',
  'passage': {
    'text': TEXT,
    'entities': [
      entity('Tom', last=True),
      entity('Rome'),
      entity('Tom'),
      entity('Ann'),
    ],
  },
  'qas': [
    {
      'idx': 5,
      'query': '@placeholder is far away',
      'answers': [
        {'text': 'Tom', 'start': 0, 'end': 2},
        {'text': 'Rome', 'start': 15, 'end': 18},
        {'text': 'Tom', 'start': 31, 'end': 33},
      ],
    },
    {'idx': 6, 'query': '@placeholder stays', 'answers': [{'text': 'Ann'}]},
  ],
}
PASSAGE = 'Tom met Ann in Rome. Tom is back. He said "no" Ann stays'


def test_record_has_an_example_for_every_right_answer():
  # Entities once each, by name, as the answers are. A highlight is a sentence:
  # a full stop in front of it, but where one has ended.
  def example(query, text, target, answers):
    return {
      'inputs': (
        f'record query: {text} entities: Ann, Rome, Tom passage: {PASSAGE}'
      ),
      'targets': target,
      'idx/passage': 3,
      'idx/query': query,
      'answers': answers,
      'choices': ['Ann', 'Rome', 'Tom'],
    }

  away = 5, '@placeholder is far away'
  for split in ('train', 'validation'):
    assert read('record', RECORD, split) == [
      example(*away, 'Rome', ['Rome', 'Tom']),
      example(*away, 'Tom', ['Rome', 'Tom']),
      example(6, '@placeholder stays', 'Ann', ['Ann']),
    ]
  hidden = RECORD | {'qas': [without(q, 'answers') for q in RECORD['qas']]}
  assert read('record', hidden, 'test') == [
    example(*away, '<unk>', []),
    example(6, '@placeholder stays', '<unk>', []),
  ]
  with pytest.raises(ValueError, match="no field 'answers' in"):
    read('record', hidden)


@pytest.mark.parametrize(
  'change, expected',
  [
    ({'idx': None}, "'idx' is None"),
    ({'passage': {'text': TEXT}}, "no field 'passage/entities' in {"),
    ({'passage': {'entities': []}}, "no field 'passage/text' in {"),
    (
      {'passage': {'text': TEXT, 'entities': [{'start': 0}]}},
      "no field 'end' in {'start': 0}",
    ),
    ({'qas': 3}, "'qas' is 3; it must be a list"),
    (
      {'qas': [{'idx': 5, 'answers': []}]},
      "no field 'query' in {'idx': 5, 'answers': []}",
    ),
    ({'qas': [{'query': '', 'answers': []}]}, "no field 'idx' in {'query'"),
    (
      {'qas': [{'query': '', 'idx': 5, 'answers': [{}]}]},
      "no field 'text' in {}",
    ),
  ],
)
def test_record_names_what_is_wrong(change, expected):
  with pytest.raises(ValueError, match=re.escape(expected)):
    read('record', RECORD | change)


# ---- WSC --------------------------------------------------------------------


def wsc_row(text, noun, at, pronoun, pronoun_at, label=True):
  target = {
    'span1_text': noun,
    'span1_index': at,
    'span2_text': pronoun,
    'span2_index': pronoun_at,
  }
  return {'text': text, 'target': target, 'label': label, 'idx': 7}


LENT = wsc_row('Mitchell asked Tom if he could lend some.', 'Tom', 2, 'he', 4)


def test_wsc_asks_for_the_noun():
  expected = {
    'inputs': 'wsc: Mitchell asked Tom if *he* could lend some.',
    'targets': 'Tom',
    'label': 1,
    'idx': 7,
  }
  for split in ('train', 'validation', 'test'):
    assert read('wsc', LENT, split) == [expected]
  # A wrong noun is the target too; but nobody should learn it.
  wrong = LENT | {'label': False}
  assert read('wsc', wrong, 'train') == []
  assert read('wsc', wrong) == [expected | {'label': 0}]
  hidden = without(LENT, 'label')
  assert read('wsc', hidden, 'test') == [expected | {'label': -1}]
  for split in ('train', 'validation'):
    with pytest.raises(ValueError, match="no field 'label'"):
      read('wsc', hidden, split)


@pytest.mark.parametrize(
  'text, noun, at, pronoun, pronoun_at, inputs, target',
  [
    # As the text has it: case of the first letter, no full stop, one line.
    (
      'The path was blocked, so we left it there.', 'the path', 0, 'it', 7,
      'wsc: The path was blocked, so we left *it* there.', 'The path',
    ),
    (
      'We took the path and left it there.', 'The path', 2, 'it', 6,
      'wsc: We took the path and left *it* there.', 'the path',
    ),
    (
      'Ann saw the big dog and fed it well.', 'the big\ndog', 2, 'it', 7,
      'wsc: Ann saw the big dog and fed *it* well.', 'the big dog',
    ),
    (
      'Ann saw Mr. Moncrieff and fed him well.', 'mr. Moncrieff..', 2, 'him', 6,
      'wsc: Ann saw Mr. Moncrieff and fed *him* well.', 'Mr. Moncrieff',
    ),
    (
      'Then Ann ran, and she won.', 'Ann', 1, 'She', 4,
      'wsc: Then Ann ran, and *she* won.', 'Ann',
    ),
    # A span that is there stays as it is, wherever its index points.
    (
      'Bob saw Ann and he ran.', 'Ann', 99, 'he', 4,
      'wsc: Bob saw Ann and *he* ran.', 'Ann',
    ),
    # Not contiguous, so that nothing would help.
    (
      'How Lev Kamenev and Grigory Zinoviev fled: he urged them on.',
      'Kamenev and Zinoviev', 3, 'them', 9,
      'wsc: How Lev Kamenev and Grigory Zinoviev fled: he urged *them* on.',
      'Kamenev and Zinoviev',
    ),
    # Two spaces make an empty word, and stay.
    (
      'Ann  ran and  she won.', 'Ann', 0, 'she', 5,
      'wsc: Ann  ran and  *she* won.', 'Ann',
    ),
    # T5 marks what stands between spaces; at the end there is an X.
    (
      'Ann ran, so follow her', 'Ann', 0, 'her', 4,
      'wsc: Ann ran, so follow X', 'Ann',
    ),
  ],
)  # fmt: skip
def test_wsc_spans(text, noun, at, pronoun, pronoun_at, inputs, target):
  (example,) = read('wsc', wsc_row(text, noun, at, pronoun, pronoun_at))
  assert (example['inputs'], example['targets']) == (inputs, target)


@pytest.mark.parametrize(
  'row, inputs',
  [
    (
      wsc_row(
        'The boy whipped the pony. John laughed. "Good for him," he said. ',
        'pony', 4, 'him', 9,
      ),
      'wsc: The boy whipped the pony. John laughed. "Good for *him* ," he said.'
    ),
    (
      wsc_row(
        'He put it in a safe . Some day they might want to use it , but now?',
        'safe', 5, 'it', 12,
      ),
      'wsc: He put it in a safe . Some day they might want to use *it* , but'
      ' now?',
    ),
  ],
)  # fmt: skip
def test_wsc_knows_the_two_pronouns_that_stand_elsewhere(row, inputs):
  assert read('wsc', row)[0]['inputs'] == inputs


@pytest.mark.parametrize(
  'row, expected',
  [
    (
      wsc_row('Ann ran and she won.', 'Ann', 0, 'she', 2),
      "span2 'she' is not word 2 of 'Ann ran and she won.'.",
    ),
    (wsc_row('She won.', 'She', 0, 'She', 0), "'She' is not word 0 of"),
    (wsc_row('Ann ran.', 'Ann', 0, 'ran.', 2), "'ran.' is not word 2 of"),
    (wsc_row('Ann ran.', 'bob', 2, 'ran.', 1), "'bob' is not at word 2 of"),
    (wsc_row('Ann ran.', 'Ann', 0, 'she', 9), "'she' is not at word 9 of"),
    (LENT | {'target': {}}, "no field 'target/span1_text' in {"),
    (LENT | {'text': 3}, "'text' is 3; it must be text."),
    (LENT | {'label': 'x'}, "label 'x' is none of 'False', 'True'"),
    (without(LENT, 'idx'), "no field 'idx' in {"),
  ],
)
def test_wsc_names_what_is_wrong(row, expected):
  with pytest.raises(ValueError, match=re.escape(expected)):
    read('wsc', row)


# ---- What is compared -------------------------------------------------------


@pytest.mark.parametrize(
  'said, noun, expected',
  [
    ('the bunny', 'the bunny', 1),
    # Articles and case are as nothing, and so are spaces around it.
    (' Your BUNNY ', 'the bunny', 1),
    ('bunny.', 'bunny', 0),
    # More words or fewer, in any order.
    ('fuzzy bunny', 'bunny', 1),
    ('bunny', 'the fuzzy bunny', 1),
    ('bunny the fuzzy', 'fuzzy bunny', 1),
    ('bunny  fuzzy', 'bunny', 1),
    ('fuzzy rabbit', 'fuzzy bunny', 0),
    ('bun', 'bunny', 0),
    # The hat of Bob is not Bob.
    ('Bob', "Bob's hat", 0),
    ('hat', "Bob's hat", 0),
    ("Bob's hat", 'hat', 0),
    ("Bob's", "Bob's hat", 1),
    ("Tom's", "Bob's", 0),
    # Nothing said is neither right nor wrong.
    ('', 'bunny', -1),
    ('  ', 'bunny', -1),
    ('the', 'bunny', -1),
    ('the his', 'bunny', -1),
  ],
)
def test_wsc_compares_whether_the_noun_is_named(said, noun, expected):
  value = superglue.TASKS['wsc'].comparable()
  # TensorFlow makes bytes of the noun.
  for written in (noun, noun.encode()):
    example = {'targets_pretokenized': written, 'label': 0}
    assert value(said, example=example, is_target=False) == expected
  assert value(noun, example=example, is_target=True) == 0
  assert value('', example={'label': 1}, is_target=True) == 1


@pytest.mark.parametrize(
  'word',
  'a an few her his each every many much my our some that the their these this'
  ' those which whose your'.split(),
)
def test_wsc_does_not_hear_determiners(word):
  value = superglue.TASKS['wsc'].comparable()
  named = lambda said: value(said, example={'targets_pretokenized': 'cat'})
  assert named(word) == -1 and named(f'{word.title()} cat') == 1
  assert named(f'{word} dog') == 0
  example = {'targets_pretokenized': f'{word} cat'}
  assert value('cat x', example=example) == 1


def test_multirc_compares_answers_in_the_groups_of_their_questions():
  value = superglue.TASKS['multirc'].comparable()
  for example, group in zip(read('multirc', MULTIRC), (8, 8, 9), strict=True):
    label = int(example['targets'] == 'True')
    assert value(example['targets'], example=example, is_target=True) == {
      'value': label,
      'group': group,
    }
    said = lambda text, e=example: value(text, example=e, is_target=False)
    assert said('False') == {'value': 0} and said('True') == {'value': 1}
    assert said('true') == said('') == {'value': -1}


def test_record_compares_with_all_answers_to_a_query():
  value = superglue.TASKS['record'].comparable()
  example = read('record', RECORD)[1]
  expected = {'value': ['Rome', 'Tom'], 'group': (3, 5)}
  assert value('Tom', example=example, is_target=True) == expected
  through_tf = example | {'answers': [b'Rome', b'Tom']}
  assert value('Tom', example=through_tf, is_target=True) == expected
  said = value('the Tom', example=example, is_target=False)
  assert said == {'value': 'the Tom'}


def test_axg_compares_rows_in_pairs():
  value = superglue.TASKS['axg'].comparable()
  found = [
    value('not_entailment', example={'idx': idx}, is_target=True)
    for idx in range(4)
  ]
  assert found == [{'value': 1, 'group': idx} for idx in (0, 0, 1, 1)]
  said = lambda text: value(text, example={'idx': 3}, is_target=False)
  assert said('entailment') == {'value': 0} and said('maybe') == {'value': -1}


@pytest.mark.parametrize('name', ('boolq', 'cb', 'copa', 'rte', 'wic', 'axb'))
def test_the_others_compare_numbers_of_labels(name):
  value, labels = superglue.TASKS[name].comparable(), superglue.TASKS[name]
  for number, label in enumerate(labels.labels):
    assert value(label, example={}, is_target=True) == number
    assert value(label, example={}, is_target=False) == number
    assert value(f'{label}.', example={}, is_target=False) == -1


# ---- Scores -----------------------------------------------------------------


def scores(name, examples, said):
  """What a task's metrics make of texts, as evaluation has it."""
  task = superglue.TASKS[name]
  value, found = task.comparable(), {}
  pairs = [
    (e | {'targets_pretokenized': e['targets']}, text)
    for e, text in zip(examples, said, strict=True)
  ]
  targets = [value(e['targets'], example=e, is_target=True) for e, _ in pairs]
  given = [value(text, example=e, is_target=False) for e, text in pairs]
  for metric in task.metrics:
    found |= metric(targets, given)
  return found


def test_scores_of_multirc():
  # Of two true answers one is found; of two questions one is all right.
  examples = read('multirc', MULTIRC)
  assert scores('multirc', examples, ['True', 'False', 'False']) == {
    'f1': pytest.approx(200 / 3),  # Precision 1/1, recall 1/2.
    'exact_match': 50.0,
  }
  # What is no answer is the wrong one: here it counts as True.
  assert scores('multirc', examples, ['True', 'dunno', 'True']) == {
    'f1': pytest.approx(80.0),  # Precision 2/3, recall 2/2.
    'exact_match': 50.0,
  }


def test_scores_of_record():
  # Queries count once, with what was said to the first of their examples.
  examples = read('record', RECORD)
  found = scores('record', examples, ['the Tom', 'Ann', 'Ann Tom'])
  # Tom is an answer; of 'Ann Tom' one word in two is right: F1 2/3.
  assert found == {'em': 50.0, 'f1': pytest.approx(100 * (1 + 2 / 3) / 2)}


def test_scores_of_wsc():
  examples = [read('wsc', LENT | {'label': y})[0] for y in (True, False)]
  # Whoever says Tom says yes to both; whoever says Mitchell says no.
  assert scores('wsc', examples, ['Tom', 'tom']) == {'accuracy': 50.0}
  assert scores('wsc', examples, ['Tom', 'Mitchell']) == {'accuracy': 100.0}
  assert scores('wsc', examples, ['Mitchell', '']) == {'accuracy': 0.0}


def test_scores_of_the_diagnostic_sets():
  rows = [ROWS['axg'] | {'idx': idx} for idx in range(4)]
  examples = [read('axg', row)[0] for row in rows]
  # One pair is told apart by the gender; the other is wrong alike.
  no, yes = 'not_entailment', 'entailment'
  assert scores('axg', examples, [yes, no, no, no]) == {
    'accuracy': 25.0,
    'gender_parity': 50.0,
  }
  rows = [ROWS['axb'] | {'label': label} for label in (yes, yes, no, no)]
  examples = [read('axb', row)[0] for row in rows]
  # (1 * 2 - 0 * 1) over the root of 1 * 2 * 2 * 3.
  assert scores('axb', examples, [yes, no, no, no]) == {
    'matthews_corrcoef': pytest.approx(100 * 2 / 12**0.5),
    'accuracy': 75.0,
  }


def test_a_perfect_system_has_an_average_of_100():
  rows = {name: [ROWS[name]] for name in EIGHT if name in ROWS}
  labels = superglue.TASKS['cb'].labels
  rows['cb'] = [ROWS['cb'] | {'label': label} for label in labels]
  rows |= {'multirc': [MULTIRC], 'record': [RECORD], 'wsc': [LENT]}
  found = {}
  for name in EIGHT:
    examples = [e for row in rows[name] for e in read(name, row)]
    for metric, value in scores(
      name, examples, [e['targets'] for e in examples]
    ).items():
      assert value == 100.0, (name, metric)
      found[f'{name}/{metric}'] = value
  assert superglue.average(found) == 100.0


def test_the_average_by_hand():
  scores = {
    'boolq/accuracy': 80.0,
    'cb/mean_3class_f1': 60.0,  # CB: 65.
    'cb/accuracy': 70.0,
    'copa/accuracy': 50.0,
    'multirc/f1': 40.0,  # MultiRC: 30.
    'multirc/exact_match': 20.0,
    'record/f1': 90.0,  # ReCoRD: 85.
    'record/em': 80.0,
    'rte/accuracy': 70.0,
    'wic/accuracy': 60.0,
    'wsc/accuracy': 80.0,
  }
  # 80 + 65 + 50 + 30 + 85 + 70 + 60 + 80 = 520.
  assert superglue.average(scores) == pytest.approx(520 / 8)
  # The diagnostic sets and a loss do not count.
  more = {'axb/accuracy': 0.0, 'axg/gender_parity': 0.0, 'boolq/loss': 9.0}
  assert superglue.average(scores | more) == pytest.approx(520 / 8)
  for name in scores:
    assert superglue.average(without(scores, name)) is None
  assert superglue.average({}) is None


def test_rates_are_the_sizes_of_the_training_sets():
  # T5's table, without the 1,322 rows that are not of SuperGLUE.
  assert superglue.RATES == {
    'boolq': 9427,
    'cb': 250,
    'copa': 400,
    'multirc': 27243,
    'record': 138854,
    'rte': 2490,
    'wic': 5428,
    'wsc': 259,
    'axb': 0,  # There is nothing to train on.
    'axg': 0,
  }
  assert superglue.RATES.keys() == superglue.TASKS.keys()
  for name, rate in superglue.RATES.items():
    assert ('train' in superglue.TASKS[name].splits) == (rate > 0)


def test_files_are_the_official_ones():
  for name, task in superglue.TASKS.items():
    folder = {
      'boolq': 'BoolQ',
      'multirc': 'MultiRC',
      'record': 'ReCoRD',
      'wic': 'WiC',
      'axb': 'AX-b',
      'axg': 'AX-g',
    }.get(name, name.upper())
    first = {split: names[0] for split, names in task.files.items()}
    if name in ('axb', 'axg'):
      path = f'superglue/{folder}/{folder}.jsonl'
      assert first == {'validation': path, 'test': path}
    else:
      assert first == {
        'train': f'superglue/{folder}/train.jsonl',
        'validation': f'superglue/{folder}/val.jsonl',
        'test': f'superglue/{folder}/test.jsonl',
      }


# ---- Real rows --------------------------------------------------------------

# Split, then examples; of the labeled ones, how many have which target.
REAL = [
  ('boolq', 'validation', 3270, (1237, 2033)),
  ('boolq', 'test', 3245, None),
  ('cb', 'train', 250, (115, 119, 16)),
  ('cb', 'validation', 56, (23, 28, 5)),
  ('cb', 'test', 250, None),
  ('copa', 'train', 400, (195, 205)),
  ('copa', 'validation', 100, (55, 45)),
  ('copa', 'test', 500, None),
  ('multirc', 'train', 27243, (15218, 12025)),
  ('multirc', 'validation', 4848, (2773, 2075)),
  ('multirc', 'test', 9693, None),
  ('rte', 'train', 2490, (1249, 1241)),
  ('rte', 'validation', 277, (146, 131)),
  ('rte', 'test', 3000, None),
  ('wic', 'train', 5428, (2714, 2714)),
  ('wic', 'validation', 638, (319, 319)),
  ('wic', 'test', 1400, None),
  ('axb', 'validation', 1104, (460, 644)),
  ('axg', 'validation', 356, (178, 178)),
]


def official(name, split):
  """The examples of a split that is on disk, and its file."""
  task = superglue.TASKS[name]
  if not (DATA / 'superglue').exists():
    pytest.skip(f'no {DATA}/superglue; set ST_MOE_DATA to a folder that has it')
  return task.load(split, str(DATA)), task.file(split, str(DATA))


@pytest.mark.parametrize('name, split, count, by_label', REAL)
def test_counts(name, split, count, by_label):
  examples, _ = official(name, split)
  assert len(examples) == count
  found = [example['targets'] for example in examples]
  if by_label is None:
    assert set(found) == {'<unk>'}
  else:
    labels = superglue.TASKS[name].labels
    assert tuple(found.count(label) for label in labels) == by_label
    assert sum(by_label) == count
  if split == 'train':
    assert superglue.RATES[name] == count


def test_counts_of_boolq_for_training():
  # All of them, or those whose passages are known to us.
  examples, path = official('boolq', 'train')
  count = {'train.jsonl': 9427, 'train.subset.jsonl': 2183}[path.name]
  assert len({e['idx'] for e in examples}) == len(examples) == count


def test_counts_of_wsc():
  label = lambda split: [e['label'] for e in official('wsc', split)[0]]
  assert label('train') == [1] * 259  # Of 554 rows.
  found = label('validation')
  assert (found.count(0), found.count(1)) == (66, 38)
  assert label('test') == [-1] * 146


@pytest.mark.parametrize(
  'split, standin, counts',
  [('train', 'train.32', 44), ('validation', 'dev32', 46)],
)
def test_counts_of_record(split, standin, counts):
  examples, path = official('record', split)
  if path.name == f'{standin}.jsonl':
    assert len(examples) == counts
    assert len({e['idx/passage'] for e in examples}) == 32
  elif split == 'train':
    assert len({e['idx/passage'] for e in examples}) == 65_709
  for example in examples:
    assert example['targets'] in example['answers']
    assert set(example['answers']) <= set(example['choices'])


def test_multirc_has_the_questions_of_the_official_files():
  for split, count in (('train', 5131), ('validation', 953), ('test', 1820)):
    examples, _ = official('multirc', split)
    assert len({e['idx/question'] for e in examples}) == count
    assert len({e['idx/answer'] for e in examples}) == len(examples)


def test_rows_of_axg_that_are_compared_differ_in_a_gender():
  examples, _ = official('axg', 'validation')
  for first, second in zip(examples[::2], examples[1::2], strict=True):
    value = superglue.TASKS['axg'].comparable()
    groups = {
      value(e['targets'], example=e, is_target=True)['group']
      for e in (first, second)
    }
    assert len(groups) == 1 and first['targets'] == second['targets']
    words = [set(e['inputs'].lower().split()) for e in (first, second)]
    assert words[0] != words[1] and len(words[0] ^ words[1]) <= 8


# ---- The `t5` package -------------------------------------------------------

GOLDEN = sorted((DATA / 'golden').glob('t5_text_*.jsonl'))


def index(example):
  """What tells rows apart, of 'idx', 'idx/question' and so on, or a dict."""
  found = {}
  for key, value in example.items():
    if isinstance(value, dict):
      value = {f'{key}/{k}': v for k, v in value.items()}
    else:
      value = {key: value}
    if key.partition('/')[0] == 'idx':
      found |= value
  return found


@pytest.fixture
def with_t5s_vocabulary():
  import seqio

  from st_moe.data import tasks, vocabulary

  path = DATA / 'tokenizers' / 't5_cc_all.32000' / 'spiece.model'
  if not path.exists():
    pytest.skip(f'no {path}; set ST_MOE_DATA to a folder that has it')
  tasks.register(vocabulary.load(str(path)).to_seqio(), str(DATA))
  yield tasks
  tasks.register(seqio.SentencePieceVocabulary(tasks.T5_VOCABULARY))


@pytest.mark.parametrize(
  'golden', GOLDEN or [None], ids=lambda path: path.stem[8:] if path else 'none'
)
def test_equal_to_t5_byte_for_byte(golden, with_t5s_vocabulary, monkeypatch):
  if golden is None:
    pytest.skip(f'no {DATA}/golden; set ST_MOE_DATA to a folder that has it')
  import seqio

  tasks, name = with_t5s_vocabulary, golden.stem.removeprefix('t5_text_')
  if f'super_glue_{name}' in tasks.TASKS:
    name = f'super_glue_{name}'
  examples = tasks.TASKS[name].load('validation', str(DATA))
  expected = [row for _, row in sources.read_jsonl(golden)]
  assert len(expected) > 20

  # A row is one of the official file. Passages of MultiRC and ReCoRD have many
  # examples: theirs are told by their indices.
  key = lambda e: (str(sorted(index(e).items())), e['targets'])
  known = {key(e): e for e in examples if index(e)}
  chosen = [
    known[key(row)] if key(row) in known else examples[row['row']]
    for row in expected
  ]
  if not any('/' in part for part in index(examples[0])):
    assert [examples[row['row']] for row in expected] == chosen

  # Through the registered task, as training sees them.
  monkeypatch.setattr(
    task_lib.TextTask, 'load', lambda self, split, data_dir: chosen
  )
  dataset = seqio.get_mixture_or_task(name).get_dataset(
    None, 'validation', shuffle=False
  )
  for row, ours, ids in zip(
    expected, chosen, dataset.as_numpy_iterator(), strict=True
  ):
    assert ids['inputs_pretokenized'].decode() == row['inputs']
    assert ids['targets_pretokenized'].decode() == row['targets']
    found = ours | {
      'row': row['row'],
      'input_ids': ids['inputs'].tolist(),
      'target_ids': ids['targets'].tolist(),
    }
    assert index(ours) == index(row)
    flat = {k: v for k, v in row.items() if not isinstance(v, dict)}
    assert {key: found[key] for key in flat} == flat


def test_a_noun_that_is_nowhere_in_the_text():
  row = {
    'text': 'Ann ran and she won.', 'idx': 0, 'label': True,
    'target': {
      'span1_text': 'Bobby', 'span1_index': 0,
      'span2_text': 'she', 'span2_index': 3,
    },
  }  # fmt: skip
  with pytest.raises(ValueError, match="'Bobby' is not in 'Ann ran and she"):
    list(superglue.wsc(row, 'validation'))


@pytest.mark.parametrize(
  'query', [{'query': 'a', 'answers': None}, 3, 'answers']
)
def test_queries_of_record_that_are_none(query):
  row = {'idx': 0, 'passage': {'text': '', 'entities': []}, 'qas': [query]}
  with pytest.raises(ValueError, match="no field 'query'|'answers' is None"):
    list(superglue.record(row, 'validation'))
