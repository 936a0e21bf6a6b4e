"""Questions to a model, of many tasks at once: answers scored, answers said.

Whatever task they come from, questions of like shapes share a batch, the
longest first: shapes are few, only the last batch of a shape is ragged, and
what does not fit into memory fails at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from st_moe import sharding
from st_moe.infer import decoding
from st_moe.infer.batching import bucket, chunks, padded
from st_moe.infer.methods import Method

_MOST_ROWS = 8  # Answers a question in a batch of full size.


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, answers whose worth is asked, and room for one of its own."""

  prompt: Sequence[int]
  answers: Sequence[Sequence[int]] = ()  # Each with its EOS.
  room: int = 0  # Tokens of an own answer at most; 0: none is asked.

  @property
  def shape(self) -> tuple[int, int, int]:
    """Answers, their length, length of an own one: padded, so shared."""
    longest = max(map(len, self.answers), default=0)
    rows = bucket(len(self.answers), 4) if self.answers else 0
    return rows, bucket(longest, 8), self.room and bucket(self.room, 8)


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
    def reply(params, prompts, answers):
      # Both encode the prompts; the compiler does it once.
      scores = spoken = None
      if answers is not None:
        scores = decoding.score(self._model, params, prompts, answers)
      if room:
        spoken = decoding.generate(
          self._model, params, prompts, Method(max_length=room), eos=self._eos
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
    shape = [q.shape for q in questions]
    order = sorted(
      range(len(questions)),
      key=lambda n: (shape[n], len(questions[n].prompt)),
      reverse=True,
    )
    replies, waiting = [None] * len(questions), []

    def collect():
      numbers, found = waiting.pop()
      scores, spoken = jax.device_get(found)
      for row, n in enumerate(numbers):
        replies[n] = self._reply(questions[n], row, scores, spoken)
      progress(len(numbers))

    for shape, numbers in itertools.groupby(
      order, lambda n: questions[n].shape
    ):
      numbers = list(numbers)
      size = self._batch_size(shape[0], len(numbers))
      for batch in chunks(numbers, size):
        found = self._run(params, [questions[n] for n in batch], shape, size)
        if waiting:  # Read while the next one runs.
          collect()
        waiting.append((batch, found))
    if waiting:
      collect()
    return replies

  def _batch_size(self, rows: int, questions: int) -> int:
    """Fewer where each has many answers, or where there are few."""
    most = self._size * _MOST_ROWS // max(rows, _MOST_ROWS)
    return self._whole(min(most, bucket(questions, 4)))

  def _run(self, params, batch, shape, size):
    rows, length, room = shape
    prompts = [q.prompt[: self._longest] for q in batch]
    most = min(bucket(max(map(len, prompts))), self._longest)
    fill = [[]] * (size - len(batch))  # Asks nothing.
    prompts = padded(prompts + fill, most)
    answers = None
    if rows:
      empty = np.zeros((rows, length), np.int32)
      answers = np.stack([_stacked(q.answers, rows, length) for q in batch])
      answers = np.concatenate([answers, *[empty[None]] * len(fill)])
    with sharding.use(self._mesh):
      given = jax.device_put(
        (prompts, answers), sharding.batch_sharding(self._mesh)
      )
      return self._compiled(room)(params, *given)

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
