"""Questions to a model, of many tasks at once: answers scored, answers said.

Whatever task they come from, questions of like shapes share a batch. A shape of
so few questions that its compilation would take longer than its batches gives
way to a larger one. The largest go first: what does not fit into memory fails
at once.
"""

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from st_moe import hosts, sharding
from st_moe.decode import decoding
from st_moe.decode.batching import bucket, chunks, padded
from st_moe.decode.methods import Method

_MOST_ROWS = 8  # Answers a question in a batch of full size.
_FEW = 4  # Batches that are not worth a compilation.


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, answers whose worth is asked, and room for one of its own."""

  prompt: Sequence[int]
  answers: Sequence[Sequence[int]] = ()  # Each with its EOS.
  room: int = 0  # Tokens of an own answer at most; 0: none is asked.
  task: int = 0  # Whose question it is.


class Shape(NamedTuple):
  """What a batch is padded to, but for its number of questions."""

  rows: int  # Answers a question.
  length: int  # Of an answer.
  room: int  # Of an own answer.
  prompt: int  # The length of it.

  @classmethod
  def of(cls, question: Question, longest: int) -> 'Shape':
    answers = question.answers
    return cls(
      bucket(len(answers), 4) if answers else 0,
      bucket(max(map(len, answers)), 8) if answers else 0,
      question.room and bucket(question.room, 8),
      min(bucket(len(question.prompt)), longest),
    )

  @property
  def tokens(self) -> int:
    """What a question costs, roughly."""
    return self.prompt + self.rows * self.length + self.room

  def holds(self, other: 'Shape') -> bool:
    """Whether questions of `other` may be padded to this one instead."""
    decodes_alike = bool(self.room) == bool(other.room)
    return decodes_alike and all(
      a >= b for a, b in zip(self, other, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Reply:
  scores: np.ndarray  # Log-probability of each answer, nats.
  tokens: list[int]  # Of the own answer, to its EOS or its room.
  score: float  # Their log-probability.


class Asker:
  """A model to ask; compiled once per shape, on any number of devices."""

  def __init__(self, model, mesh, *, batch_size: int, longest: int, eos: int):
    """Sizes are of a batch over all devices; prompts are cut at `longest`."""
    self._mesh, self._longest, self._eos = mesh, longest, eos
    self._shards = mesh.size // mesh.shape['model']
    self._size = self._whole(batch_size)
    self._model = model
    self._compiled = functools.cache(self._compile)

  def _whole(self, size: int) -> int:
    return max(-(-size // self._shards), 1) * self._shards

  def _compile(self, room: int):
    def reply(params, prompts, answers, tasks):
      model = decoding.of_task(self._model, tasks)
      # Both encode the prompts; the compiler does it once.
      scores = spoken = None
      if answers is not None:
        scores = decoding.score(model, params, prompts, answers)
      if room:
        method = Method(max_length=room)
        spoken = decoding.generate(
          model, params, prompts, method, eos=self._eos
        )
      return scores, spoken

    whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
    return jax.jit(reply, out_shardings=whole)

  def ask(
    self,
    params,
    questions: Sequence[Question],
    *,
    progress: Callable[[int], None] = lambda done: None,
  ) -> list[Reply]:
    """The replies, in the order of the questions."""
    shapes = [Shape.of(q, self._longest) for q in questions]
    larger = self._fewer(collections.Counter(shapes))
    shapes = [larger[shape] for shape in shapes]
    cost = lambda n: (shapes[n].tokens, shapes[n])
    order = sorted(range(len(questions)), key=cost, reverse=True)
    replies, waiting = [None] * len(questions), []

    def collect():
      numbers, found = waiting.pop()
      scores, spoken = jax.device_get(found)
      for row, n in enumerate(numbers):
        replies[n] = self._reply(questions[n], row, scores, spoken)
      progress(len(numbers))

    for shape, numbers in itertools.groupby(order, shapes.__getitem__):
      numbers = list(numbers)
      few = self._whole(bucket(len(numbers), 4))
      size = min(self._most(shape.rows), few)
      for batch in chunks(numbers, size):
        found = self._run(params, [questions[n] for n in batch], shape, size)
        if waiting:  # Read while the next one runs.
          collect()
        waiting.append((batch, found))
    if waiting:
      collect()
    return replies

  def _fewer(self, counts: Mapping[Shape, int]) -> dict[Shape, Shape]:
    """Shape -> the one its questions are padded to, its own or a larger one."""
    counts, found = dict(counts), {}
    tokens = operator.attrgetter('tokens')
    for shape in sorted(counts, key=tokens):
      above = [s for s in counts if s.holds(shape) and s != shape]
      few = counts[shape] < _FEW * self._most(shape.rows)
      if few and above:
        found[shape] = min(above, key=tokens)
        counts[found[shape]] += counts.pop(shape)
    for shape in reversed(found):  # A larger one may itself have given way.
      found[shape] = found.get(found[shape], found[shape])
    return {shape: shape for shape in counts} | found

  def _most(self, rows: int) -> int:
    """Questions in a batch: fewer where each has many answers."""
    return self._whole(self._size * _MOST_ROWS // max(rows, _MOST_ROWS))

  def _run(self, params, batch, shape: Shape, size: int):
    batch = [*batch, *[Question(())] * (size - len(batch))]  # Asks nothing.
    prompts = [q.prompt[: self._longest] for q in batch]
    answers, tasks = None, np.array([q.task for q in batch], np.int32)
    if shape.rows:
      cells = shape.rows, shape.length
      answers = np.stack([_stacked(q.answers, *cells) for q in batch])
    with sharding.use(self._mesh):
      given = hosts.spread_whole(
        (padded(prompts, shape.prompt), answers, tasks),
        sharding.batch_sharding(self._mesh),
      )
      return self._compiled(shape.room)(params, *given)

  def _reply(self, question: Question, row: int, scores, spoken) -> Reply:
    tokens, score = [], 0.0
    if question.room:
      # Its room is that of the batch; what lies beyond its own is not said.
      ids = spoken.tokens[row, 0, : question.room].tolist()
      tokens = ids[: ids.index(self._eos) + 1] if self._eos in ids else ids
      score = float(spoken.logprobs[row, 0, : len(tokens)].sum())
    own = () if scores is None else scores[row, : len(question.answers)]
    return Reply(np.asarray(own), tokens, score)


def _stacked(answers, rows: int, length: int) -> np.ndarray:
  return padded([*answers, *[()] * (rows - len(answers))], length)
