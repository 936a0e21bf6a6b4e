"""Questions of all shapes at once, against each of them asked alone."""

import collections
import functools
import math

import jax
import numpy as np
import pytest

from st_moe import sharding
from st_moe.config import Capacity, StackConfig
from st_moe.infer.questions import Asker, Question, Shape
from st_moe.model.transformer import Transformer
from st_moe.routing.selectors import dropless
from tests.helpers import random_params, tiny

# With a limit of one place per expert, neighbours would move every score.
CONFIG = tiny(
  encoder=StackConfig(1, 1, 0, group_size=16),
  decoder=StackConfig(1, 1, 0, group_size=8),
  moe={'eval_capacity': Capacity(0.5, minimum=1), 'extra_ffn': 'none'},
)
MODEL = Transformer(dropless(CONFIG))
LONGEST = 24
ROOM = 12
# So likely in this model that some answers end early and others do not.
OFTEN = 16


@functools.cache
def _params():
  one = np.ones((1, 1), np.int32)
  return random_params(MODEL, one, one, one)


@functools.cache
def _asker(batch_size=4, **mesh):
  devices = jax.devices()[: math.prod(mesh.values())]
  return Asker(
    MODEL,
    sharding.make_mesh(devices=devices, **mesh),
    batch_size=batch_size,
    longest=LONGEST,
    eos=OFTEN,
  )


# A question alone, in plain loops.


@functools.cache
def _forward():
  """Whole passes over one prompt [1, 24] and answer [1, 12], float64 [12, v]"""
  run = jax.jit(
    lambda params, prompt, inputs: MODEL.apply(
      {'params': params}, prompt, inputs, inputs + 1, enable_dropout=False
    )
  )

  def forward(prompt, text):
    prompts, inputs = np.zeros((2, 1, LONGEST), np.int32)
    prompts[0, : len(prompt)] = prompt
    inputs[0, 1 : 1 + len(text)] = text
    return np.asarray(run(_params(), prompts, inputs[:, :ROOM])[0], np.float64)

  return forward


def _logprob(z, token):
  return z[token] - z.max() - math.log(np.exp(z - z.max()).sum())


def _slow_score(prompt, answer):
  """Token by token, each after a pass of its own."""
  total = 0
  for t, token in enumerate(answer):
    total += _logprob(_forward()(prompt, answer[:t])[t], token)
  return total


def _slow_words(prompt, room):
  """The likeliest token again and again, and what all of them score."""
  text, total = [], 0
  while len(text) < room and OFTEN not in text:
    z = _forward()(prompt, text)[len(text)]
    text.append(int(z.argmax()))
    total += _logprob(z, text[-1])
  return text, total


def _check(replies, questions):
  assert len(replies) == len(questions)
  for reply, q in zip(replies, questions, strict=True):
    scores = [_slow_score(q.prompt, a) for a in q.answers]
    assert reply.scores.shape == (len(q.answers),)
    np.testing.assert_allclose(reply.scores, scores, atol=1e-4, rtol=0)
    tokens, score = _slow_words(q.prompt, q.room)
    assert reply.tokens == tokens
    assert reply.score == pytest.approx(score, abs=1e-4)


def _questions(shapes, seed=0):
  """Random ones: (length of the prompt, lengths of answers, room)."""
  rng = np.random.default_rng(seed)
  # 0 pads; an answer may hold any other token anywhere.
  draw = lambda n: rng.integers(1, CONFIG.vocab_size, n).tolist()
  return [Question(draw(n), [draw(a) for a in of], r) for n, of, r in shapes]


# Answers of one length, of many, more than four, and long ones; rooms of 1 to
# 12; words without answers, answers without words, a question about nothing.
SHAPES = [
  *((n, (3, 3), 0) for n in (24, 5, 17, 9, 16)),
  *((n, range(1, n), n) for n in (2, 4, 5, 3)),
  (20, (8, 1, 4, 2, 7, 3), 0),
  (11, (1, 1, 1, 1, 5), 0),
  *((3 * n, (9, 1 + n), 8 + n) for n in (4, 1, 3, 2)),
  *((n, (), 2 * n % 8 + 1) for n in (7, 1, 2, 23)),
  (6, (), 0),
]


@pytest.fixture(scope='module')
def mixed():
  """Questions in no order, their replies, and what progress was told."""
  order = np.random.default_rng(1).permutation(len(SHAPES))
  questions = _questions([SHAPES[n] for n in order])
  told = []
  replies = _asker().ask(_params(), questions, progress=told.append)
  return questions, replies, told


def test_each_reply_is_that_of_its_question_alone(mixed):
  questions, replies, _ = mixed
  _check(replies, questions)


def test_the_mixture_is_one(mixed):
  """Or the above would say little."""
  questions, replies, _ = mixed
  asked = {Shape.of(q, 64)[:3] for q in questions}
  assert asked == {
    (4, 8, 0), (4, 8, 8), (6, 8, 0), (4, 12, 12), (0, 0, 8), (0, 0, 0)
  }  # fmt: skip
  ended = [r.tokens[-1:] == [OFTEN] for r in replies if r.tokens]
  assert 2 < sum(ended) < len(ended) - 2
  # Rooms end answers too, not only those that are as large as their batch's.
  pairs = zip(questions, replies, strict=True)
  cut = {q.room for q, r in pairs if q.room and OFTEN not in r.tokens}
  assert cut - {8, 12}


def test_none_is_lost_or_counted_twice(mixed):
  questions, _, told = mixed
  assert sum(told) == len(questions) == 20
  # So few share two shapes, with room and without, at most four in a batch.
  assert sorted(told) == [4, 4, 4, 4, 4]


def test_nothing_asked_is_nothing_said(mixed):
  questions, replies, _ = mixed
  n = next(n for n, q in enumerate(questions) if not (q.answers or q.room))
  assert replies[n].scores.shape == (0,)
  assert replies[n].tokens == [] and replies[n].score == 0
  assert _asker().ask(_params(), []) == []


@pytest.fixture(scope='module')
def seven():
  """Of one shape, and their replies, each checked in `test_ragged_ends`."""
  shapes = [(1 + 2 * n, (3, 1, 2)[: n % 3 + 1], 3 + n % 3) for n in range(7)]
  return _questions(shapes, seed=2)


@pytest.fixture(scope='module')
def asked_of_seven(seven):
  return _asker(6).ask(_params(), seven)


def test_ragged_ends(seven, asked_of_seven):
  """One question to one more than a batch: fillings move nothing."""
  _check(asked_of_seven, seven)
  for n in range(1, 7):
    told = []
    some = _asker(6).ask(_params(), seven[:n], progress=told.append)
    _equal(some, asked_of_seven[:n])
    assert told == [n]
  # Batches of 4, of 6, and 6 again with five rows that ask nothing.
  assert _asker(6)._compiled(8)._cache_size() == 2


def _equal(found, wanted):
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4, rtol=0)
    assert a.tokens == b.tokens
    assert a.score == pytest.approx(b.score, abs=1e-4)


def test_eight_devices_answer_as_one(seven, asked_of_seven):
  # Five rows become eight, that four pairs of devices share.
  eight = _asker(5, data=2, expert=2, model=2)
  told = []
  found = eight.ask(_params(), seven, progress=told.append)
  _equal(found, asked_of_seven)
  assert told == [7]


def test_a_long_prompt_is_cut():
  (question,) = _questions([(40, (3, 3), 0)], seed=4)
  short = Question(question.prompt[:LONGEST], question.answers)
  _check(_asker().ask(_params(), [question]), [short])


# Batches and shapes, by a model of no weights.


class Fair:
  """Every token of 8 is as likely as any other, so 0 is said for ever."""

  class config:
    vocab_size = 8

  def apply(self, variables, *args, method, mutable=(), **kwargs):
    if method == 'encode':
      return args[0] * variables['params']
    shape = *args[2].shape, self.config.vocab_size
    logits = jax.numpy.zeros(shape) * variables['params']
    return (logits, {'cache': {}}) if mutable else logits


def _fair(batch_size, longest=64):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  return Asker(Fair(), mesh, batch_size=batch_size, longest=longest, eos=1)


def _batches(asker, questions):
  told = []
  replies = asker.ask(np.float32(1), questions, progress=told.append)
  for q, reply in zip(questions, replies, strict=True):
    scores = [-len(answer) * math.log(8) for answer in q.answers]
    np.testing.assert_allclose(reply.scores, scores, rtol=1e-5)
  return told


@pytest.mark.parametrize(
  ('batch_size', 'answers', 'questions', 'sizes'),
  [
    (16, 2, 40, [16, 16, 8]),
    (16, 8, 40, [16, 16, 8]),  # Eight answers a question fit.
    (16, 9, 40, [10, 10, 10, 10]),  # 12 rows each: two thirds of the batch.
    (16, 30, 9, [4, 4, 1]),  # 32 rows each: a quarter.
    (16, 300, 3, [1, 1, 1]),  # 384 each: one is too many, but must be asked.
    (2, 2, 5, [2, 2, 1]),
    (1, 1, 2, [1, 1]),
  ],
)
def test_batches_hold_fewer_questions_of_many_answers(
  batch_size, answers, questions, sizes
):
  q = Question([3], [[2, 1]] * answers)
  assert _batches(_fair(batch_size), [q] * questions) == sizes


def test_few_questions_take_a_small_batch():
  asker, q = _fair(64), Question([3], [[2, 1]])
  compiled = asker._compiled(0)
  for n in (1, 3, 4):  # Four rows.
    assert _batches(asker, [q] * n) == [n]
    assert compiled._cache_size() == 1
  assert _batches(asker, [q] * 33) == [33]  # 48.
  assert compiled._cache_size() == 2
  assert _batches(asker, [q] * 64) == [64]
  assert _batches(asker, [q] * 65) == [64, 1]
  assert compiled._cache_size() == 3


def test_shapes_are_few():
  """Three hundred questions, of 4,000 shapes there might be."""
  rng = np.random.default_rng(0)
  questions = [
    Question([2] * rng.integers(1, 65), [[2] * rng.integers(1, 9)] * a)
    for a in rng.integers(1, 9, 300)
  ]
  asker = _fair(8)
  told = _batches(asker, questions)
  # 4, 6 or 8 answers of up to 8 tokens to prompts of 16, 24, 32, 48 or 64, but
  # of those 15 some are too few.
  shapes = asker._compiled(0)._cache_size()
  counts = collections.Counter(Shape.of(q, 64) for q in questions)
  assert len(counts) == 15
  assert shapes == len(set(asker._fewer(counts).values())) < 12
  # Full batches but the last of each shape.
  assert sum(n < 8 for n in told) <= shapes
  assert _batches(asker, questions[::-1]) == told
  assert asker._compiled(0)._cache_size() == shapes


def test_few_questions_give_way_to_a_larger_shape():
  """At one question a batch, three are fewer than four batches."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  fewer = Asker(Fair(), mesh, batch_size=1, longest=64, eos=1)._fewer
  small, middle, large = (Shape(4, 8, 0, n) for n in (16, 32, 64))
  spoken, many = Shape(4, 8, 8, 16), Shape(8, 8, 0, 32)
  counts = {small: 3, middle: 2, large: 4, spoken: 1, many: 1}
  # 3 + 2 are enough. Nothing is decoded for those who did not ask for it, and
  # eight answers find no room among four.
  assert fewer(counts) == {
    small: middle, middle: middle, large: large, spoken: spoken, many: many,
  }  # fmt: skip
  assert fewer({small: 1, middle: 1, large: 1}) == {
    small: large, middle: large, large: large,
  }  # fmt: skip


def test_the_longest_come_first():
  """What does not fit into memory fails at once."""
  seen = []

  class Spy(Fair):
    def apply(self, variables, *args, method, **kwargs):
      if method == 'encode':  # Traced once a shape, in order.
        seen.append(args[0].shape[1])
      return super().apply(variables, *args, method=method, **kwargs)

  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  asker = Asker(Spy(), mesh, batch_size=1, longest=64, eos=1)
  _batches(asker, [Question([2] * n, [[1]]) for n in (3, 40, 17, 60) * 4])
  assert seen == [64, 48, 24, 16]
