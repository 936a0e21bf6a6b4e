"""The embedded fine-tuning tasks: a tiny world, in SuperGLUE's file formats.

Generated toys, not SuperGLUE. Somebody is in a room, somebody is sad, somebody
drops a cup; nobody is in two rooms or in two moods. What they measure:

  boolq  find the sentence about one person among 2 to 4; is its place the one
         the question names?
  cb     the same with places and moods: the hypothesis repeats a sentence
         (entailment), gives the person another value of the same kind
         (contradiction), or speaks of a kind that the premise leaves open
         for that person (neutral)
  copa   eight rules of cause and effect, read in both directions

The rows have the fields and labels of the official files of the same names, so
whatever reads those reads these. A score here says nothing about a score there.

Words alone give nothing away. Rows are made in groups, one row per answer
(COPA: two), and within a group

  boolq, cb  the question or hypothesis is the same, and so are the words of the
             passage, one by one; only who goes with what differs
  copa       the choices are the same, in either order, under either premise

so for a model that counts words, or reads one field only, every example has a
twin with another answer, and labels are exactly balanced (where `size` is a
multiple of 12: other sizes may cut the last group).

No sentence is in both splits, true or false, statement or question: a fact
(person and place, person and mood, adjective and thing) belongs to one split
by the hash of its words, whatever the seed.
"""

import functools
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from st_moe.data import files, superglue

# Rows of a split where no `size` is asked for. Multiples of every group.
SIZES = {'train': 9600, 'validation': 600}

NAMES = tuple(
  'Alan Anna Ben Beth Carl Cora Dan Dana Emma Eric Fay Fred Gina Greg Hana '
  'Hugo Iris Ivan Jane Ken Kate Leo Lisa Mary Max Nick Nora Olga Omar Paul '
  'Pia Rosa Ruth Sam Tina Tom Vera Walt Wendy Zoe'.split()
)
PLACES = tuple(
  'attic bank barn bathroom bedroom cellar church forest garage garden hall '
  'hotel kitchen library museum office park school shop tower'.split()
)
MOODS = tuple(
  'angry bored calm confused excited happy jealous lonely proud sad scared '
  'shy'.split()
)
THINGS = tuple(
  'basket bell bottle bowl box camera chair clock cup doll drum flute glass '
  'guitar jar kettle kite lamp mirror mug pen phone pipe plate pot radio '
  'table toy tray vase'.split()
)
ADJECTIVES = tuple(
  'big black blue brown green heavy light little new old red round small '
  'strange white yellow'.split()
)

# What is said of a person, and the words for it.
KINDS = {'place': PLACES, 'mood': MOODS}
_SAID = {'place': 'is in the {}', 'mood': 'is {}'}

# Event -> outcome. No outcome fits two of the events.
RULES = (
  ('{} dropped the {}.', 'The {} broke.'),
  ('{} poured water on the {}.', 'The {} got wet.'),
  ('{} heated the {}.', 'The {} became hot.'),
  ('{} cooled the {}.', 'The {} became cold.'),
  ('{} painted the {}.', 'The {} changed color.'),
  ('{} polished the {}.', 'The {} began to shine.'),
  ('{} sold the {}.', 'The {} belonged to a neighbor.'),
  ('{} hid the {}.', 'The {} went missing.'),
)


def generate(
  task: str, split: str, *, seed: int = 0, size: int | None = None
) -> list[dict]:
  """The rows of `split` of 'boolq', 'cb' or 'copa'; the same for a seed."""
  if task not in _GROUPS:
    raise ValueError(f'No tiny task {task!r}; there are {", ".join(_GROUPS)}.')
  if split not in SIZES:
    raise ValueError(f'No split {split!r}; there are {", ".join(SIZES)}.')
  size = SIZES[split] if size is None else size
  if size < 1:
    raise ValueError(f'size {size}: a split needs at least one row.')

  # Seeded by text, as `random` hashes it: the same on every Python.
  rng = random.Random(f'{task} {split} {seed}')
  rows, seen = [], set()
  for _ in range(100 + 10 * size):
    if len(rows) >= size:
      break
    group = _GROUPS[task](rng, split)
    keys = [json.dumps(row) for row in group]
    if seen.isdisjoint(keys):
      seen.update(keys)
      rows += group
  else:
    raise ValueError(
      f'{size} rows of {task} {split} are more than this tiny world has '
      f'(stopped at {len(rows)} different ones); ask for a smaller size.'
    )
  rows = rows[:size]
  rng.shuffle(rows)
  return [{**row, 'idx': i} for i, row in enumerate(rows)]


def write(directory: epath.PathLike, *, seed: int = 0) -> None:
  """Writes all splits as official files: `<directory>/CB/val.jsonl`, ..."""
  for task in _GROUPS:
    for split in SIZES:
      path = superglue.file_of(superglue.FORMATS[task], split, directory)
      rows = generate(task, split, seed=seed)
      lines = ''.join(json.dumps(row) + '\n' for row in rows)
      files.write_whole(path, lines.encode())


def text(seed: int = 0) -> Iterator[str]:
  """All training examples as a model reads them, for training a vocabulary."""
  for task in _GROUPS:
    for row in generate(task, 'train', seed=seed):
      example = superglue.to_text(superglue.FORMATS[task], row)
      yield f'{example["inputs"]} {example["targets"]}'


def stories(split: str, *, seed: int = 0, size: int = 8000) -> Iterator[str]:
  """Text without questions: a few facts told, then told again in other order.

  For pre-training: a word taken out of one telling stands in the other.
  """
  rng = random.Random(f'stories {split} {seed}')
  for _ in range(size):
    facts, taken = [], []
    for _ in range(rng.randint(2, 4)):
      kind = rng.choice(sorted(KINDS))
      facts.append(_bystander(rng, kind, split, taken))
      taken += facts[-1]
    yield f'{_tell(rng, facts)} {_tell(rng, facts)}'


def split_of(*words: str) -> str:
  """The one split whose sentences may hold these words: 1 in 4 validation."""
  digest = hashlib.sha256(' '.join(words).encode()).digest()
  return 'train' if digest[0] % 4 else 'validation'


# People: who is where, who feels what.


@functools.cache
def _facts(kind: str, split: str) -> Mapping[str, Sequence[str]]:
  """Person -> the values of `kind` that `split` may give them."""
  return {
    name: [value for value in KINDS[kind] if split_of(name, value) == split]
    for name in NAMES
  }


def _say(name: str, kind: str, value: str) -> str:
  return f'{name} {_SAID[kind].format(value)}'


def _tell(rng: random.Random, facts: Sequence[tuple[str, str, str]]) -> str:
  """The facts (person, kind, value) as sentences, in any order."""
  return ' '.join(f'{_say(*f)}.' for f in rng.sample(facts, len(facts)))


def _two_by_two(
  rng: random.Random, facts: Mapping[str, Sequence[str]]
) -> tuple[str, str, str, str]:
  """Two people and two values such that all four facts are of the split."""
  while True:
    a, b = rng.sample(NAMES, 2)
    shared = [value for value in facts[a] if value in facts[b]]
    if len(shared) >= 2:
      return a, b, *rng.sample(shared, 2)


def _bystander(
  rng: random.Random, kind: str, split: str, taken: Sequence[str]
) -> tuple[str, str, str]:
  """A fact about another person and another value than those `taken`."""
  facts = _facts(kind, split)
  while True:
    name = rng.choice(NAMES)
    free = [value for value in facts[name] if value not in taken]
    if free and name not in taken:
      return name, kind, rng.choice(free)


def _boolq(rng: random.Random, split: str) -> list[dict]:
  """A yes and a no to one question, from passages with the same words."""
  a, b, here, there = _two_by_two(rng, _facts('place', split))
  taken, others = [a, b, here, there], []
  for _ in range(rng.randint(0, 2)):
    others.append(_bystander(rng, 'place', split, taken))
    taken += others[-1]
  yes = [(a, 'place', here), (b, 'place', there)]
  no = [(a, 'place', there), (b, 'place', here)]
  return [
    {
      'question': f'is {a} in the {here}',
      'passage': _tell(rng, facts + others),
      'label': label,
    }
    for label, facts in ((True, yes), (False, no))
  ]


def _cb(rng: random.Random, split: str) -> list[dict]:
  """One hypothesis under three premises with the same words."""
  kind, other = rng.sample(sorted(KINDS), 2)
  mine, theirs = _facts(kind, split), _facts(other, split)
  # `c` holds a value of the other kind where `a` is spoken of, and takes over
  # the value of the hypothesis where it is not: both must be of the split.
  swaps = []
  while not swaps:
    a, b, claimed, actual = _two_by_two(rng, mine)
    swaps = [
      (c, state)
      for c in NAMES
      if c not in (a, b) and claimed in mine[c]
      for state in theirs[a]
      if state in theirs[c]
    ]
  c, state = rng.choice(swaps)
  others = []
  if rng.random() < 0.5:
    taken = (a, b, c, claimed, actual, state)
    others.append(_bystander(rng, other, split, taken))
  premises = {
    'entailment': [(a, kind, claimed), (b, kind, actual), (c, other, state)],
    'contradiction': [(a, kind, actual), (b, kind, claimed), (c, other, state)],
    'neutral': [(a, other, state), (b, kind, actual), (c, kind, claimed)],
  }
  return [
    {
      'premise': _tell(rng, facts + others),
      'hypothesis': _say(a, kind, claimed),
      'label': label,
    }
    for label, facts in premises.items()
  ]


# Things: what happens to them, and why.


@functools.cache
def _things(split: str) -> Sequence[str]:
  """Things with their adjective ('old cup') that `split` may speak of."""
  return [
    f'{adjective} {thing}'
    for adjective in ADJECTIVES
    for thing in THINGS
    if split_of(adjective, thing) == split
  ]


def _copa(rng: random.Random, split: str) -> list[dict]:
  """Two choices in both orders, and the two premises that they answer."""
  name, thing = rng.choice(NAMES), rng.choice(_things(split))
  events, outcomes = zip(*rng.sample(RULES, 2), strict=True)
  events = [event.format(name, thing) for event in events]
  outcomes = [outcome.format(thing) for outcome in outcomes]
  question = rng.choice(('cause', 'effect'))
  premises, choices = (
    (events, outcomes) if question == 'effect' else (outcomes, events)
  )
  return [
    {
      'premise': premises[right],
      'choice1': choices[first],
      'choice2': choices[1 - first],
      'question': question,
      'label': int(right != first),
    }
    for right in (0, 1)
    for first in (0, 1)
  ]


_GROUPS = {'boolq': _boolq, 'cb': _cb, 'copa': _copa}
