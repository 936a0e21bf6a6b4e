"""Every way to decode and to score, against loops over the whole decoder."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.config import Capacity, StackConfig
from st_moe.decode import decoding
from st_moe.decode.methods import Contrast, Method
from st_moe.model.transformer import Transformer
from st_moe.routing.selectors import dropless
from st_moe.routing.types import RouteOverride
from tests.helpers import examples, padded_batch, random_params, tiny

# With a limit of one place per expert, half of the routes would find no seat.
LIMITED = tiny(
  encoder=StackConfig(1, 1, 0, group_size=16),
  decoder=StackConfig(1, 1, 0, group_size=8),
  moe={'eval_capacity': Capacity(0.5, minimum=1), 'extra_ffn': 'none'},
)
MODEL = Transformer(dropless(LIMITED))
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
def _forward(override=None):
  """(prompts, inputs) -> logits; `override` are fields of the decoder's."""

  @jax.jit
  def forward(prompts, inputs):
    apply = functools.partial(
      MODEL.apply, {'params': _params()}, enable_dropout=False
    )
    routes = override and RouteOverride(jnp.zeros((1, 4)), **dict(override))
    return apply(
      apply(prompts, method='encode'),
      prompts,
      inputs,
      jnp.ones_like(inputs),
      override=routes,
      method='decode',
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


# Every method, a prompt at a time, in plain Python.


def _next_logits(b, texts, override=None):
  """Logits [v] after each of `texts`, begun answers to prompt `b`."""
  found = []
  for start in range(0, len(texts), 4):
    inputs = np.zeros((4, LENGTH), np.int32)
    part = texts[start : start + 4]
    for row, text in zip(inputs, part, strict=False):
      row[1 : 1 + len(text)] = text
    logits = _forward(override)(PROMPTS[[b] * 4], inputs)
    found += [logits[i, len(text)] for i, text in enumerate(part)]
  return found


def _log_softmax(z):
  return z - z.max() - math.log(np.exp(z - z.max()).sum())


def _adjust(z, text, method):
  z = np.array(z)
  if method.repetition_penalty != 1:
    for token in {0, *text}:  # Every answer begins behind a 0.
      p = method.repetition_penalty
      z[token] = z[token] / p if z[token] > 0 else z[token] * p
  for token in method.forbidden:
    z[token] = -np.inf
  return z


def _truncate(z, method):
  """Sorted out one token at a time, likeliest first."""
  z = z / method.temperature
  order = sorted(range(len(z)), key=lambda v: -z[v])
  if method.top_k:
    for v in order[method.top_k :]:
      z[v] = -np.inf
  held, p = 0.0, np.exp(_log_softmax(z))
  for v in order:
    if held >= method.top_p:
      z[v] = -np.inf
    held += p[v]
  return z


def _slow_rows(b, method, eos, prefix, keys):
  """Greedy decoding or sampling of one prompt."""
  found = []
  for r in range(method.num_return):
    text, logprobs = [], []
    while len(text) < method.max_length and eos not in text:
      (z,) = _next_logits(b, [text])
      scores = z
      if method.contrast:
        c = method.contrast
        weak = (('k', 1), ('rank', c.rank - 1))
        (faint,) = _next_logits(b, [text], weak)
        scores = (1 + c.beta) * z - c.beta * faint
        best = max(z[v] for v in range(len(z)) if v not in method.forbidden)
        scores[z < best + math.log(c.alpha)] = -np.inf
      scores = _adjust(scores, text, method)
      if method.temperature:
        key = jax.random.fold_in(jax.random.fold_in(keys[b], r), len(text))
        noise = jax.random.gumbel(key, z.shape)
        scores = _truncate(scores, method) + np.asarray(noise, np.float64)
      token = int(scores.argmax())
      if len(text) < len(prefix):
        token = prefix[len(text)]
      logprobs.append(_log_softmax(z)[token])
      text.append(token)
    found.append((sum(logprobs), text, logprobs))
  return found


def _slow_beams(b, method, eos, prefix, keys):
  """Beam search of one prompt, with lists."""
  n = method.num_beams
  running, finished, is_open = [(0.0, [], [])], [], True
  worst = lambda: finished[n - 1][0] if len(finished) == n else -math.inf
  for i in range(method.max_length):
    if not is_open:
      break
    grown = []
    texts = [text for _, text, _ in running]
    for (score, text, said), z in zip(
      running, _next_logits(b, texts), strict=True
    ):
      logprobs = _log_softmax(z)
      scores = _adjust(logprobs, text, method)
      for v in range(len(z)):
        if i < len(prefix):
          if v == prefix[i]:
            grown.append((score, [*text, v], [*said, logprobs[v]]))
        else:
          grown.append((score + scores[v], [*text, v], [*said, logprobs[v]]))
    grown = sorted(grown, key=lambda g: -g[0])[: 2 * n]
    last = i + 1 == method.max_length
    ended = [last or text[-1] == eos for _, text, _ in grown]
    length = max(i + 1 - len(prefix), 1)
    for (score, text, said), ends in list(zip(grown, ended, strict=True))[:n]:
      if ends:
        finished.append((score / length**method.length_penalty, text, said))
    finished = sorted(finished, key=lambda g: -g[0])[:n]
    running = [g for g, e in zip(grown, ended, strict=True) if not e][:n]
    if method.early_stopping is True and len(finished) == n:
      is_open = False
    if running and len(finished) == n:
      if method.early_stopping == 'never' and method.length_penalty > 0:
        length = method.max_length - len(prefix)
      is_open &= running[0][0] / length**method.length_penalty > worst()
  return finished[: method.num_return]


_SAMPLE = Method(max_length=LENGTH, temperature=1.0)
METHODS = {
  'greedy': Method(max_length=LENGTH),
  'no token twice': Method(max_length=LENGTH, repetition_penalty=50.0),
  'some forbidden': Method(max_length=LENGTH, forbidden=tuple(range(0, 32, 2))),
  'sample': _SAMPLE,
  'three cold samples': dataclasses.replace(
    _SAMPLE, temperature=0.3, num_return=3, repetition_penalty=2.0
  ),
  'top 3': dataclasses.replace(_SAMPLE, top_k=3, temperature=2.0),
  'top half': dataclasses.replace(_SAMPLE, top_p=0.5, temperature=2.0),
  'both': dataclasses.replace(_SAMPLE, top_p=0.7, top_k=5, temperature=2.0),
  'beams': Method(max_length=LENGTH, num_beams=3, num_return=3),
  'beams, long': Method(
    max_length=LENGTH, num_beams=2, length_penalty=3.0, early_stopping='never'
  ),
  'beams, early': Method(
    max_length=LENGTH,
    num_beams=3,
    num_return=2,
    length_penalty=0.5,
    early_stopping=True,
    repetition_penalty=1.7,
    forbidden=(5,),
  ),
  'contrast': Method(
    max_length=LENGTH, contrast=Contrast(beta=2.0, alpha=0.01, rank=4)
  ),
}
METHODS['contrast, some forbidden'] = dataclasses.replace(
  METHODS['contrast'], forbidden=METHODS['some forbidden'].forbidden
)
# So likely in this model that some answers end early and others do not.
OFTEN = 9


@functools.cache
def _generate(method):
  def run(params, prompts, prefix, keys):
    return decoding.generate(
      MODEL, params, prompts, method, eos=OFTEN, prefix=prefix, keys=keys
    )

  return jax.jit(run)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('prefix', [(), (7, 3)], ids=['free', 'given 7 3'])
def test_each_method_is_its_slow_loop(name, prefix):
  method = METHODS[name]
  slow = _slow_beams if method.num_beams > 1 else _slow_rows
  keys = jax.random.split(jax.random.key(1), 4)
  given = np.zeros((4, 2), np.int32)
  given[:, : len(prefix)] = prefix
  found = jax.device_get(_generate(method)(_params(), PROMPTS, given, keys))
  assert found.tokens.shape == (4, method.num_return, LENGTH)
  for b in range(4):
    want = slow(b, method, OFTEN, prefix, keys)
    assert len(want) == method.num_return
    for r, (score, text, logprobs) in enumerate(want):
      pad = [0] * (LENGTH - len(text))
      assert found.tokens[b, r].tolist() == text + pad, (b, r)
      close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=0)
      close(found.logprobs[b, r], logprobs + pad)
      close(found.scores[b, r], score)


def _tokens(method, seed=1):
  keys = jax.random.split(jax.random.key(seed), 4)
  none = np.zeros((4, 2), np.int32)
  return np.asarray(_generate(method)(_params(), PROMPTS, none, keys).tokens)


def test_methods_differ():
  """Or the above would say little."""
  found = {
    name: _tokens(method)[:, 0].tolist() for name, method in METHODS.items()
  }
  assert len({str(tokens) for tokens in found.values()}) == len(METHODS)
  ends = {
    name: sum(OFTEN in row for row in rows) for name, rows in found.items()
  }
  assert 0 < ends['sample'] < 4 and 0 < ends['beams'] < 4


def test_contrast_without_weight_is_greedy():
  method = Method(max_length=LENGTH, contrast=Contrast(beta=0.0))
  np.testing.assert_array_equal(_tokens(method), _tokens(METHODS['greedy']))
  # As is one whose only plausible token is the likeliest.
  method = Method(max_length=LENGTH, contrast=Contrast(beta=9.0, alpha=1.0))
  np.testing.assert_array_equal(_tokens(method), _tokens(METHODS['greedy']))


def test_a_seed_is_an_answer():
  sample = METHODS['sample']
  np.testing.assert_array_equal(_tokens(sample), _tokens(sample))
  assert (_tokens(sample, seed=2) != _tokens(sample)).any()


def test_token_logprobs_sum_to_scores():
  run = jax.jit(functools.partial(decoding.token_logprobs, MODEL))
  targets = ANSWERS[[0, 1, 2, 1]]
  found = np.asarray(run(_params(), PROMPTS, targets))
  assert ((found == 0) == (targets == 0)).all()
  whole = np.asarray(_score()(_params(), PROMPTS, ANSWERS))
  np.testing.assert_allclose(
    found.sum(-1), whole[range(4), [0, 1, 2, 1]], rtol=1e-5
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'max_length': 0}, 'max_length 0 must be at least 1'),
    ({'temperature': -1}, r'temperature -1 must be 0 \(greedy\) or more'),
    ({'top_p': 0}, 'top_p 0 must be above 0'),
    ({'top_k': 3}, 'top_k and top_p are of sampling: set a temperature'),
    ({'contrast': 0.5}, 'contrast 0.5 must be a Contrast'),
    ({'early_stopping': 1}, "early_stopping 1 must be true, false or 'never'"),
    ({'early_stopping': 'maybe'}, "'maybe' must be true, false or 'never'"),
    ({'num_beams': 2, 'temperature': 1}, 'exclude each other'),
    (
      {'num_beams': 2, 'num_return': 3},
      'num_return 3 is more than num_beams 2',
    ),
    ({'num_return': 2}, 'Greedy decoding has one answer'),
  ],
)
def test_a_method_that_cannot_be(options, message):
  with pytest.raises(ValueError, match=message):
    Method(**options)


def test_what_contrast_needs():
  weak = functools.partial(decoding.weakened, MODEL.config, None)
  assert weak(4).rank == 3
  with pytest.raises(ValueError, match='rank 5: there are 4 experts'):
    weak(5)
  dense = tiny(decoder=StackConfig(1, 0, 0))
  with pytest.raises(ValueError, match='needs a sparse layer in the decoder'):
    decoding.weakened(dense, None, 2)
  with pytest.raises(ValueError, match='Sampling needs a random key'):
    decoding.generate(MODEL, _params(), PROMPTS, METHODS['sample'])


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


# To each prompt its own answers, the second of the last prompt none at all.
OWN = np.random.default_rng(5).integers(1, 32, (4, 3, 4), dtype=np.int32)
OWN[0, :, 2:] = OWN[2, 1, 1:] = OWN[3, 1] = 0


def _slow_score(b, answer):
  """Of one answer to one prompt, after whole passes without the others."""
  total = 0
  for t, token in enumerate(answer[answer > 0]):
    (z,) = _next_logits(b, [answer[:t]])
    total += _log_softmax(z)[token]
  return total


def test_each_answer_is_scored_as_if_alone():
  found = np.asarray(_score()(_params(), PROMPTS, OWN))
  assert found.shape == (4, 3)
  for b, a in np.ndindex(4, 3):
    want = _slow_score(b, OWN[b, a])
    assert found[b, a] == pytest.approx(want, abs=1e-4), (b, a)
  assert found[3, 1] == 0
  assert len({round(x, 3) for x in found.ravel().tolist()}) == 12


def test_rows_of_padding_move_nothing():
  found = np.asarray(_score()(_params(), PROMPTS, OWN))
  for kept in range(3):
    alone = OWN * (np.arange(3) == kept)[:, None]
    scores = np.asarray(_score()(_params(), PROMPTS, alone))
    np.testing.assert_allclose(scores[:, kept], found[:, kept], atol=1e-5)
    assert (np.delete(scores, kept, axis=1) == 0).all()
  # One answer a prompt: as many rows as prompts, which share nothing.
  one = np.asarray(_score()(_params(), PROMPTS, OWN[:, :1]))
  np.testing.assert_allclose(one[:, 0], found[:, 0], atol=1e-5)


def test_answers_of_all_prompts_are_those_of_each():
  shared = np.asarray(_score()(_params(), PROMPTS, ANSWERS))
  each = np.broadcast_to(ANSWERS, (4, *ANSWERS.shape))
  np.testing.assert_array_equal(_score()(_params(), PROMPTS, each), shared)


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
