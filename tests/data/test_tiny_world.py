"""The embedded tasks: what they say is true, and words alone do not tell it."""

import collections
import hashlib
import json
import re

import numpy as np
import pytest

from st_moe.data import sources, superglue, tiny_world

FIELDS = {
  'boolq': ('passage', 'question'),
  'cb': ('premise', 'hypothesis'),
  'copa': ('premise', 'choice1', 'choice2', 'question'),
}
LABELS = {
  'boolq': (False, True),
  'cb': ('entailment', 'contradiction', 'neutral'),
  'copa': (0, 1),
}
TASKS = sorted(FIELDS)
SPLITS = ('train', 'validation')


def words(text):
  return re.findall(r'\w+', text.lower())


def statements(task, row):
  """Every sentence of a row as words; a question as the sentence it asks for.

  'Ann heated the old cup. Ben is sad.' -> ('ann', 'heated', ...), ...
  """
  found = []
  for field in FIELDS[task]:
    if task == 'copa' and field == 'question':
      continue  # 'cause' or 'effect': the same few for everybody.
    for sentence in row[field].split('.'):
      spoken = words(sentence)
      if task == 'boolq' and field == 'question':
        *thing, state = spoken[1:]
        spoken = [*thing, 'is', state]
      if spoken:
        found.append(tuple(spoken))
  return found


# Each deed -> the state that follows, and the opposite.
FOLLOWS = {
  'heated': ('hot', 'cold'),
  'cooled': ('cold', 'hot'),
  'washed': ('clean', 'dirty'),
  'soiled': ('dirty', 'clean'),
  'soaked': ('wet', 'dry'),
  'wiped': ('dry', 'wet'),
  'repaired': ('whole', 'broken'),
  'smashed': ('broken', 'whole'),
  'filled': ('full', 'empty'),
  'drained': ('empty', 'full'),
  'polished': ('shiny', 'dull'),
  'scratched': ('dull', 'shiny'),
  'hid': ('missing', 'back'),
  'found': ('back', 'missing'),
  'painted': ('bright', 'dark'),
  'burned': ('dark', 'bright'),
}


def deed(text):
  """'Ben is sad. Ann heated the old cup.' -> ('heated', 'old cup')."""
  found = [
    (verb, re.search(r'the (\w+ \w+)', sentence)[1])
    for sentence in text.split('.')
    for verb in FOLLOWS
    if verb in words(sentence)
  ]
  assert len(found) == 1, text
  return found[0]


# ---- What the rows are ------------------------------------------------------


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('split, size', [('train', 9600), ('validation', 600)])
def test_rows_have_the_fields_of_the_official_files(task, split, size):
  rows = tiny_world.generate(task, split)
  assert len(rows) == size
  assert [row['idx'] for row in rows] == list(range(size))
  for row in rows:
    assert set(row) == {*FIELDS[task], 'label', 'idx'}
    assert all(isinstance(row[field], str) for field in FIELDS[task])
    assert row['label'] in LABELS[task]
    assert type(row['label']) is type(LABELS[task][0])  # 1 is not True.


def test_boolq_answers_what_the_rules_say():
  for row in tiny_world.generate('boolq', 'train', size=1200):
    verb, thing = deed(row['passage'])
    asked, state = re.fullmatch(
      r'is the (\w+ \w+) (\w+)', row['question']
    ).groups()
    assert asked == thing
    assert state in FOLLOWS[verb]
    assert row['label'] is (state == FOLLOWS[verb][0])


def test_cb_labels_what_the_rules_say():
  for row in tiny_world.generate('cb', 'train', size=1200):
    verb, thing = deed(row['premise'])
    asked, state = re.fullmatch(
      r'the (\w+ \w+) is (\w+)', row['hypothesis']
    ).groups()
    assert asked == thing
    meaning = dict(zip(FOLLOWS[verb], LABELS['cb'][:2], strict=True))
    assert row['label'] == meaning.get(state, 'neutral')


def test_copa_labels_what_the_rules_say():
  follows = {verb: state for verb, (state, _) in FOLLOWS.items()}
  spoken = collections.Counter()
  for row in tiny_world.generate('copa', 'train', size=1200):
    choices = [row['choice1'], row['choice2']]
    right, wrong = choices[row['label']], choices[1 - row['label']]
    related = lambda choice, row=row: any(
      {verb, state} <= {*words(row['premise']), *words(choice)}
      for verb, state in follows.items()
    )
    assert related(right) and not related(wrong)
    # Cause: somebody did it. Effect: the thing is so.
    assert (right.split()[0] in follows) == (row['question'] == 'cause')
    spoken.update((word, True) for word in words(right))
    spoken.update((word, False) for word in words(wrong))
  # 'broken' is the right answer as often as it is a wrong one.
  for word in (*follows, *follows.values()):
    assert spoken[word, True] == spoken[word, False] > 0


def test_bystanders_come_and_go():
  rows = tiny_world.generate('boolq', 'train', size=1200)
  told = collections.Counter(row['passage'].count('.') for row in rows)
  assert set(told) == {1, 2, 3}
  first = [row['passage'].split('.')[0] for row in rows]
  assert any(' is ' in sentence for sentence in first)  # Not always last.


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('split', SPLITS)
def test_labels_are_balanced(task, split):
  rows = tiny_world.generate(task, split)
  counts = collections.Counter(row['label'] for row in rows)
  expected = len(rows) // len(LABELS[task])
  assert counts == dict.fromkeys(LABELS[task], expected)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('split', SPLITS)
def test_no_row_comes_twice(task, split):
  rows = tiny_world.generate(task, split)
  assert len({tuple(row[f] for f in FIELDS[task]) for row in rows}) == len(rows)


def test_twins_do_not_stand_together():
  # Made in groups, but a batch is cut from rows that follow each other.
  rows = tiny_world.generate('boolq', 'train')
  asked = [row['question'] for row in rows]
  twins = sum(a == b for a, b in zip(asked, asked[1:], strict=False))
  assert twins < 100  # Of 9599 neighbours; unshuffled it would be half.


# ---- Who may see what -------------------------------------------------------


def test_validation_shares_no_sentence_with_training():
  # Over all tasks and two seeds: a vocabulary, a mixture and a second run of
  # fine-tuning with other data must not leak into validation either.
  seen = {
    split: {
      sentence
      for task in TASKS
      for seed in (0, 1)
      for row in tiny_world.generate(task, split, seed=seed)
      for sentence in statements(task, row)
    }
    for split in SPLITS
  }
  assert min(map(len, seen.values())) > 1000
  assert not seen['train'] & seen['validation']


def test_a_seed_is_a_data_set():
  for task in TASKS:
    make = lambda task=task, **kw: tiny_world.generate(task, size=24, **kw)
    first = make(split='train', seed=3)
    assert first == make(split='train', seed=3)
    assert first != make(split='train', seed=4)
    assert first != make(split='validation', seed=3)


def test_the_default_data_set_is_pinned():
  """Scores are compared across versions of the code: so must the data be.

  A changed digest means that every figure reported on the tiny tasks is void.
  """
  digest = hashlib.sha256()
  for task in TASKS:
    for split in SPLITS:
      for row in tiny_world.generate(task, split):
        digest.update(json.dumps(row, sort_keys=True).encode())
  assert digest.hexdigest()[:16] == 'fcf0a61525ce60df'


# ---- What words alone tell --------------------------------------------------


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('split', SPLITS)
def test_a_word_has_every_answer_equally_often(task, split):
  answers = collections.defaultdict(collections.Counter)
  for row in tiny_world.generate(task, split):
    for field in FIELDS[task]:
      for word in words(row[field]):
        answers[field, word][row['label']] += 1
  for spoken, counts in answers.items():
    assert set(counts) == set(LABELS[task]), spoken
    assert len(set(counts.values())) == 1, spoken


@pytest.mark.parametrize(
  'task, fields',
  [
    ('boolq', ('question',)),
    ('cb', ('hypothesis',)),
    ('copa', ('choice1', 'choice2', 'question')),
    ('copa', ('premise', 'question')),
  ],
)
@pytest.mark.parametrize('split', SPLITS)
def test_a_question_has_every_answer_equally_often(task, fields, split):
  answers = collections.defaultdict(collections.Counter)
  for row in tiny_world.generate(task, split):
    answers[tuple(row[f] for f in fields)][row['label']] += 1
  for asked, counts in answers.items():
    assert set(counts) == set(LABELS[task]), asked
    assert len(set(counts.values())) == 1, asked


def linear_accuracy(task, train, validation, fields, *, counts, by_field):
  """Validation accuracy of softmax regression on words, in percent.

  `fields` are what it reads, each word told by its field where `by_field`;
  a feature is how often the word is there, or with `counts` False whether.
  """

  def bag(row):
    return collections.Counter(
      (field if by_field else '', word)
      for field in fields
      for word in words(row[field])
    )

  column = {
    w: i for i, w in enumerate(sorted({w for r in train for w in bag(r)}))
  }

  def features(rows):
    x = np.zeros((len(rows), len(column) + 1), np.float32)
    x[:, -1] = 1  # The bias.
    for i, row in enumerate(rows):
      for word, n in bag(row).items():
        if word in column:
          x[i, column[word]] = n if counts else 1
    return x

  classes = LABELS[task]
  y = np.eye(len(classes), dtype=np.float32)
  y = y[[classes.index(row['label']) for row in train]]
  x = features(train)
  w = np.zeros((x.shape[1], len(classes)), np.float32)
  for _ in range(200):
    p = np.exp(x @ w)
    w -= 0.1 / len(y) * x.T @ (p / p.sum(1, keepdims=True) - y)
  guess = (features(validation) @ w).argmax(1)
  truth = [classes.index(row['label']) for row in validation]
  return 100 * np.mean(guess == truth)


ASKED = {
  'boolq': ('question',),
  'cb': ('hypothesis',),
  'copa': ('choice1', 'choice2'),
}


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('reads', ['all', 'all by field', 'asked only'])
@pytest.mark.parametrize('counts', [True, False])
def test_word_counts_do_not_beat_the_majority(task, reads, counts):
  got = linear_accuracy(
    task,
    tiny_world.generate(task, 'train', size=1200),
    tiny_world.generate(task, 'validation'),
    ASKED[task] if reads == 'asked only' else FIELDS[task],
    counts=counts,
    by_field=reads != 'all',
  )
  assert abs(got - 100 / len(LABELS[task])) <= 5


@pytest.mark.parametrize('task', TASKS)
def test_word_counts_do_find_a_giveaway(task):
  """The baseline above can learn: one telling word in three rows of four."""

  def leak(rows):
    field = FIELDS[task][0]
    return [
      {**r, field: f'{r[field]} label{r["label"]}'} if r['idx'] % 4 else r
      for r in rows
    ]

  got = linear_accuracy(
    task,
    leak(tiny_world.generate(task, 'train', size=1200)),
    leak(tiny_world.generate(task, 'validation')),
    FIELDS[task],
    counts=True,
    by_field=False,
  )
  assert got > 75


# ---- Files, text, errors ----------------------------------------------------


def test_write_makes_the_official_files(tmp_path):
  tiny_world.write(tmp_path, seed=1)
  files = sorted(
    str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*.jsonl')
  )
  assert files == [
    f'{folder}/{name}.jsonl'
    for folder in ('BoolQ', 'CB', 'COPA')
    for name in ('train', 'val')
  ]
  rows = tiny_world.generate('cb', 'validation', seed=1)
  found = sources.read_jsonl(tmp_path / 'CB' / 'val.jsonl')
  assert [row for _, row in found] == rows
  # Where they are, the tasks of SuperGLUE take them for theirs.
  task = superglue.TASKS['cb']
  examples = task.load('validation', str(tmp_path))
  assert examples == [e for r in rows for e in task.examples(r, 'validation')]


@pytest.mark.parametrize('name', TASKS)
def test_the_tasks_are_those_of_superglue_without_files(name, monkeypatch):
  monkeypatch.delenv('ST_MOE_DATA', raising=False)
  task, official = tiny_world.TASKS[name], superglue.TASKS[name]
  assert (task.labels, task.metrics) == (official.labels, official.metrics)
  assert task.splits == SPLITS
  assert task.sizes == {'train': 9600, 'validation': 600}
  examples = task.load('validation')
  rows = tiny_world.generate(name, 'validation')
  for row, example in zip(rows, examples, strict=True):
    assert [example] == list(official.examples(row, 'validation'))
    # Labels in the order of the official ones.
    assert example['targets'] == task.labels[LABELS[name].index(row['label'])]


def test_text_is_the_training_examples_and_no_other():
  lines = list(tiny_world.text())
  assert len(lines) == 3 * 9600
  row = tiny_world.generate('cb', 'train')[0]
  assert (
    f'cb hypothesis: {row["hypothesis"]} premise: {row["premise"]} '
    f'{row["label"]}'
  ) in lines
  # Few enough words that a small vocabulary has a piece for each.
  assert len({word for line in lines for word in words(line)}) < 200


def test_errors_name_what_there_is(monkeypatch):
  with pytest.raises(
    ValueError, match="No tiny task 'rte'; there are boolq, cb"
  ):
    tiny_world.generate('rte', 'train')
  with pytest.raises(ValueError, match="No split 'val'; there are train, vali"):
    tiny_world.generate('cb', 'val')
  with pytest.raises(ValueError, match='size 0'):
    tiny_world.generate('cb', 'train', size=0)
  # One person, one thing, two rules: 2 questions x 2 premises x 2 orders.
  monkeypatch.setattr(tiny_world, 'NAMES', ('Tom',))
  one_sided = tuple((pair[0],) for pair in tiny_world.PAIRS[:2])
  monkeypatch.setattr(tiny_world, 'PAIRS', one_sided)
  monkeypatch.setattr(tiny_world, '_things', lambda split: ['old cup'])
  assert len(tiny_world.generate('copa', 'train', size=8)) == 8
  with pytest.raises(ValueError, match=r'9 rows .* \(stopped at 8 different'):
    tiny_world.generate('copa', 'train', size=9)
