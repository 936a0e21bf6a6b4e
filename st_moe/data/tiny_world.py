"""The embedded fine-tuning tasks: a tiny world, in SuperGLUE's file formats.

Generated toys, not SuperGLUE. Somebody does something to a thing, which then is
in some state; somebody else stands by, in a room or in a mood. What they ask:

  boolq  is the thing in this state, or in the opposite one?
  cb     does the state follow from what was done (entailment), is it the
         opposite of what follows (contradiction), or neither (neutral)?
  copa   which of two states is the effect, which of two deeds the cause?

So they measure small rules of cause and effect, and finding the sentence that
matters. The rows have the fields and labels of the official files of the same
names: whatever reads those reads these. A score here says nothing about a score
there.

Words alone give nothing away. Rows are made in groups in which every question
(hypothesis, pair of choices) stands under every answer, and so does every word:
for a model that counts words, or reads one field only, every example has a twin
with another answer. Labels are exactly balanced (where `size` is a multiple of
12: other sizes may cut the last group).

No sentence is in both splits, true or false, statement or question: what may be
said (of a person and a place or mood, of an adjective and a thing) belongs to
one split by the hash of its words, whatever the seed.
"""

import dataclasses
import functools
import hashlib
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

# What is said of bystanders, and the words for it.
KINDS = {'place': PLACES, 'mood': MOODS}
_SAID = {'place': 'is in the {}', 'mood': 'is {}'}

# Pairs of deeds with opposite outcomes: (what is done, what the thing is then).
PAIRS = (
  (('heated', 'hot'), ('cooled', 'cold')),
  (('washed', 'clean'), ('soiled', 'dirty')),
  (('soaked', 'wet'), ('wiped', 'dry')),
  (('repaired', 'whole'), ('smashed', 'broken')),
  (('filled', 'full'), ('drained', 'empty')),
  (('polished', 'shiny'), ('scratched', 'dull')),
  (('hid', 'missing'), ('found', 'back')),
  (('painted', 'bright'), ('burned', 'dark')),
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
    keys = [files.as_json(row) for row in group]
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
      name = superglue.TASKS[task].files[split][0].partition('/')[2]
      rows = generate(task, split, seed=seed)
      lines = ''.join(files.as_json(row) + '\n' for row in rows)
      files.write_whole(epath.Path(directory) / name, lines.encode())


def text(seed: int = 0) -> Iterator[str]:
  """All training examples as a model reads them, for training a vocabulary."""
  for task in _GROUPS:
    for row in generate(task, 'train', seed=seed):
      for example in superglue.TASKS[task].examples(row, 'train'):
        yield f'{example["inputs"]} {example["targets"]}'


def split_of(*words: str) -> str:
  """The one split whose sentences may hold these words: 1 in 4 validation."""
  digest = hashlib.sha256(' '.join(words).encode()).digest()
  return 'train' if digest[0] % 4 else 'validation'


@functools.cache
def _facts(kind: str, split: str) -> Mapping[str, Sequence[str]]:
  """Person -> the values of `kind` that `split` may give them."""
  return {
    name: [value for value in KINDS[kind] if split_of(name, value) == split]
    for name in NAMES
  }


@functools.cache
def _things(split: str) -> Sequence[str]:
  """Things with their adjective ('old cup') that `split` may speak of."""
  return [
    f'{adjective} {thing}'
    for adjective in ADJECTIVES
    for thing in THINGS
    if split_of(adjective, thing) == split
  ]


def _bystanders(rng: random.Random, split: str, actor: str) -> list[str]:
  """Up to two sentences about people who have nothing to do with it."""
  others = rng.sample([n for n in NAMES if n != actor], rng.randint(0, 2))
  found = []
  for name in others:
    kind = rng.choice(sorted(KINDS))
    values = _facts(kind, split)[name]
    if values:
      found.append(f'{name} {_SAID[kind].format(rng.choice(values))}.')
  return found


def _among(rng: random.Random, sentence: str, others: Sequence[str]) -> str:
  place = rng.randint(0, len(others))
  return ' '.join([*others[:place], sentence, *others[place:]])


def _boolq(rng: random.Random, split: str) -> list[dict]:
  """Both states asked after both of a pair of deeds."""
  name, thing = rng.choice(NAMES), rng.choice(_things(split))
  pair, others = rng.choice(PAIRS), _bystanders(rng, split, name)
  return [
    {
      'question': f'is the {thing} {state}',
      'passage': _among(rng, f'{name} {deed} the {thing}.', others),
      'label': state == outcome,
    }
    for deed, outcome in pair
    for _, state in pair
  ]


def _cb(rng: random.Random, split: str) -> list[dict]:
  """The four states of two pairs, under their deed, the opposite, another."""
  name, thing = rng.choice(NAMES), rng.choice(_things(split))
  pairs, others = rng.sample(PAIRS, 2), _bystanders(rng, split, name)
  return [
    {
      'premise': _among(rng, f'{name} {deed} the {thing}.', others),
      'hypothesis': f'the {thing} is {pair[side][1]}',
      'label': label,
    }
    for pair, other in (pairs, pairs[::-1])
    for side in (0, 1)
    for label, deed in (
      ('entailment', pair[side][0]),
      ('contradiction', pair[1 - side][0]),
      ('neutral', other[side][0]),
    )
  ]


def _copa(rng: random.Random, split: str) -> list[dict]:
  """Two choices in both orders, and the two premises that they answer.

  Choices are short, and what tells them apart comes first ('hot old cup',
  'heated the old cup'): which choice is which is learnt from neighbours.
  """
  name, thing = rng.choice(NAMES), rng.choice(_things(split))
  rules = [rng.choice(pair) for pair in rng.sample(PAIRS, 2)]
  question = rng.choice(('cause', 'effect'))
  if question == 'effect':
    premises = [f'{name} {deed} the {thing}.' for deed, _ in rules]
    choices = [f'{state} {thing}' for _, state in rules]
  else:
    premises = [f'The {thing} is {state}.' for _, state in rules]
    choices = [f'{deed} the {thing}' for deed, _ in rules]
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

# The tasks of the same names, of rows that are made on the spot.
TASKS = {
  name: dataclasses.replace(
    superglue.TASKS[name],
    files={},
    generate=functools.partial(generate, name),
    sizes=SIZES,
  )
  for name in _GROUPS
}
