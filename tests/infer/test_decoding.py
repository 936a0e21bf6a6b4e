"""Greedy decoding and scores, against loops over the whole decoder."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.config import Capacity, StackConfig
from st_moe.infer import decoding
from st_moe.model.transformer import Transformer
from tests.helpers import examples, padded_batch, random_params, tiny

# With a limit of one place per expert, half of the routes would find no seat.
LIMITED = tiny(
  encoder=StackConfig(1, 1, 0, group_size=16),
  decoder=StackConfig(1, 1, 0, group_size=8),
  moe={'eval_capacity': Capacity(0.5, minimum=1), 'extra_ffn': 'none'},
)
MODEL = Transformer(LIMITED.dropless())
LENGTH = 6
_ROWS = examples(LIMITED, [(5, 1), (8, 1), (3, 1), (7, 1)])
PROMPTS = padded_batch(LIMITED, _ROWS)['encoder_input_tokens']


@functools.cache
def _params():
  return random_params(
    MODEL, PROMPTS, np.ones((4, LENGTH), 'i4'), np.ones((4, LENGTH), 'i4')
  )


@functools.cache
def _greedy():
  decode = functools.partial(decoding.greedy, MODEL, max_length=LENGTH)
  return jax.jit(lambda p, prompts, eos: decode(p, prompts, eos=eos))


@functools.cache
def _score(config=MODEL.config):
  return jax.jit(functools.partial(decoding.score, Transformer(config)))


@functools.cache
def _forward():
  @jax.jit
  def forward(prompts, inputs):
    return MODEL.apply(
      {'params': _params()},
      prompts,
      inputs,
      jnp.ones_like(inputs),
      enable_dropout=False,
    )

  return lambda *args: np.asarray(forward(*args), np.float64)


def _slow_greedy(prompts, eos):
  """Runs encoder and decoder anew, at full length, for every token."""
  tokens = np.zeros((len(prompts), LENGTH), np.int32)
  for t in range(LENGTH):
    inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    logits = _forward()(prompts, inputs.astype(np.int32))
    for b in range(len(prompts)):
      if eos not in tokens[b, :t]:
        tokens[b, t] = logits[b, t].argmax()
  return tokens


def _decode(prompts, eos=99):
  return np.asarray(_greedy()(_params(), prompts, eos))


def test_greedy_is_the_slow_loop_token_for_token():
  found = _decode(PROMPTS)  # No token is 99: nothing stops it.
  np.testing.assert_array_equal(found, _slow_greedy(PROMPTS, 99))
  assert (found > 0).all()
  # Prompts that differ are answered differently, with more than one token.
  assert len({tuple(row) for row in found}) == 4
  assert all(len(set(row)) > 1 for row in found.tolist())


def test_it_stops_at_eos_and_pads():
  whole = _decode(PROMPTS)
  eos = whole[0, 2]  # What row 0 says third is made the end of a text.
  found = _decode(PROMPTS, eos)
  np.testing.assert_array_equal(found, _slow_greedy(PROMPTS, eos))
  assert found[0, 2] == eos and (found[0, 3:] == 0).all()
  for row, before in zip(found, whole, strict=True):
    ends = np.flatnonzero(before == eos)
    used = ends[0] + 1 if ends.size else LENGTH
    np.testing.assert_array_equal(row[:used], before[:used])
    assert (row[used:] == 0).all()
  assert (found[:, -1] > 0).any()  # Others go on.


def test_an_answer_does_not_know_its_neighbours():
  found = _decode(PROMPTS)
  # Row 1 among copies of row 0, and in another place.
  others = PROMPTS[[0, 0, 1, 0]]
  np.testing.assert_array_equal(_decode(others)[2], found[1])
  np.testing.assert_array_equal(_decode(others)[0], found[0])


# Three answers of 2, 4 and 1 tokens, each ending in EOS, padded.
ANSWERS = np.array([[9, 1, 0, 0], [9, 30, 4, 1], [1, 0, 0, 0]], np.int32)


def test_score_is_the_sum_of_log_softmax():
  found = np.asarray(_score()(_params(), PROMPTS, ANSWERS))
  assert found.shape == (4, 3)
  for a, answer in enumerate(ANSWERS):
    # The decoder at the full length of greedy: what comes later does not count.
    inputs = np.zeros((4, LENGTH), np.int32)
    inputs[:, 1:4] = answer[:3]
    logits = _forward()(PROMPTS, inputs)
    for b in range(len(PROMPTS)):
      total = 0
      for t, token in enumerate(answer):
        if token > 0:
          z = logits[b, t]
          total += z[token] - math.log(sum(math.exp(v) for v in z))
      assert found[b, a] == pytest.approx(total, rel=1e-5)


def test_a_score_does_not_know_its_neighbours():
  """True of a model that drops nobody, and of no other."""
  others = PROMPTS[[0, 0, 1, 0]]

  def scores(config):
    score = _score(config)
    alone = score(_params(), PROMPTS, ANSWERS)
    return np.asarray(alone), np.asarray(score(_params(), others, ANSWERS))

  before, after = scores(MODEL.config)
  np.testing.assert_allclose(after[2], before[1], rtol=1e-6)
  before, after = scores(LIMITED)
  assert np.abs(after[2] - before[1]).max() > 0.01
