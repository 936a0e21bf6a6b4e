"""Span corruption against hand-made examples and T5's rules in plain loops."""

import collections
import types

import numpy as np
import pytest

from st_moe.data import span_corruption

T5 = {'density': 0.15, 'mean_span': 3.0}
# Shuffles 0 1 2 ... to 1 2 ... 0, so that the first span has 2 tokens.
FIXED = types.SimpleNamespace(permutation=lambda n: np.roll(np.arange(n), -1))


def corrupt(tokens, rng, *, density, mean_span, **kwargs):
  return span_corruption.corrupt(
    np.array(tokens),
    rng,
    density=density,
    mean_span=mean_span,
    first_sentinel=99,
    **kwargs,
  )


def test_the_example_of_the_module():
  # 8 tokens, 3 of them noise, in 2 spans: a b [c d] e f g [h].
  inputs, targets = corrupt(range(10, 18), FIXED, density=0.375, mean_span=1.5)
  assert inputs.tolist() == [10, 11, 99, 14, 15, 16, 98, 1]
  assert targets.tolist() == [99, 12, 13, 98, 17, 1]
  assert inputs.dtype == targets.dtype == np.int32


def test_the_shortest_text():
  inputs, targets = corrupt([10, 11], np.random.default_rng(0), **T5)
  assert (inputs.tolist(), targets.tolist()) == ([10, 99, 1], [99, 11, 1])


def test_lengths_of_t5():
  assert span_corruption.chunk_lengths(512, **T5) == (568, 114)


def t5_lengths(inputs_length, density, mean_span):
  """`random_spans_helper` of T5, to the letter."""

  def lengths(tokens):
    noise = round(tokens * density)
    spans = round(noise / mean_span)
    return tokens - noise + spans + 1, noise + spans + 1

  tokens = inputs_length - 1
  while lengths(tokens + 1)[0] <= inputs_length:
    tokens += 1
  targets = lengths(tokens)[1]
  if density == 0.5 and targets > inputs_length:
    tokens, targets = tokens - 1, targets - 1
  return tokens, targets


def test_half_noise_is_that_of_t5():
  """As in UL2's and T5's ablations: inputs and targets of one length."""
  half = {'density': 0.5, 'mean_span': 3.0}
  assert span_corruption.chunk_lengths(512, **half) == (766, 512)


@pytest.mark.parametrize(
  'inputs_length', [32, 64, 100, 127, 128, 512, 513, 1024]
)
@pytest.mark.parametrize(
  'density, mean_span',
  [(0.15, 3), (0.3, 5), (0.15, 1), (0.15, 8), (0.5, 3), (0.5, 8), (0.5, 32)],
)
def test_lengths_follow_t5(inputs_length, density, mean_span):
  found = span_corruption.chunk_lengths(
    inputs_length, density=density, mean_span=mean_span
  )
  assert found == t5_lengths(inputs_length, density, mean_span)


@pytest.mark.parametrize('inputs_length', [16, 61, 128, 512])
def test_every_chunk_fills_its_lengths_exactly(inputs_length):
  tokens, targets_length = span_corruption.chunk_lengths(inputs_length, **T5)
  rng = np.random.default_rng(0)
  for _ in range(50):
    inputs, targets = corrupt(rng.integers(5, 9, tokens), rng, **T5)
    assert (len(inputs), len(targets)) == (inputs_length, targets_length)


def plain_loops(tokens, mask):
  """What corruption with this mask should give."""
  inputs, targets, sentinel = [], [], 100
  for i, token in enumerate(tokens):
    if not mask[i]:
      inputs.append(token)
      continue
    if i == 0 or not mask[i - 1]:
      sentinel -= 1
      inputs.append(sentinel)
      targets.append(sentinel)
    targets.append(token)
  return inputs + [1], targets + [1]


def restore(inputs, targets):
  """The tokens, with the spans of the targets in place of the sentinels."""
  spans, span = {}, None
  for token in targets[:-1]:
    if token > 50:
      span = spans.setdefault(token, [])
    else:
      span.append(token)
  tokens = []
  for token in inputs[:-1]:
    tokens += spans.pop(token) if token > 50 else [token]
  assert not spans
  return tokens


@pytest.mark.parametrize('length', [2, 3, 10, 97, 200])
def test_against_plain_loops_and_back(length):
  for seed in range(20):
    tokens = np.random.default_rng(seed).integers(5, 40, length).tolist()
    mask = span_corruption.noise_mask(length, np.random.default_rng(seed), **T5)
    inputs, targets = corrupt(tokens, np.random.default_rng(seed), **T5)
    assert (inputs.tolist(), targets.tolist()) == plain_loops(tokens, mask)
    assert restore(inputs.tolist(), targets.tolist()) == tokens


def spans_of(mask):
  """Lengths of the runs of a mask."""
  edges = np.flatnonzero(
    np.diff(mask, prepend=not mask[0], append=not mask[-1])
  )
  return np.diff(edges)


def test_a_mask_has_as_many_noise_spans_as_clean_ones():
  for seed in range(100):
    mask = span_corruption.noise_mask(568, np.random.default_rng(seed), **T5)
    assert not mask[0] and mask[-1]
    spans = spans_of(mask)
    assert len(spans) == 2 * 28
    assert spans[1::2].sum() == mask.sum() == 85


def test_density_and_span_length_are_those_asked_for():
  rng = np.random.default_rng(0)
  masks = np.array(
    [span_corruption.noise_mask(568, rng, **T5) for _ in range(2000)]
  )
  assert masks.mean() == pytest.approx(0.15, abs=0.001)
  # Away from the ends every place is noise equally often.
  assert masks[:, 50:-50].mean(0) == pytest.approx(0.15, abs=0.04)
  lengths = np.concatenate([spans_of(mask)[1::2] for mask in masks])
  assert lengths.mean() == pytest.approx(3, abs=0.05)
  assert set(lengths) >= set(range(1, 10))


def test_all_span_lengths_are_alike_likely():
  # 6 noise tokens in 3 spans: 10 ways, from (1, 1, 4) to (4, 1, 1).
  rng = np.random.default_rng(0)
  seen = collections.Counter(
    tuple(
      spans_of(span_corruption.noise_mask(20, rng, density=0.3, mean_span=2.0))[
        1::2
      ].tolist()
    )
    for _ in range(10_000)
  )
  assert len(seen) == 10 and {sum(spans) for spans in seen} == {6}
  assert min(seen.values()) > 880 and max(seen.values()) < 1120


def test_dense_noise_leaves_a_clean_token_before_each_span():
  mask = span_corruption.noise_mask(
    10, np.random.default_rng(0), density=0.7, mean_span=1.0
  )
  assert mask.sum() == 7 and len(spans_of(mask)) == 6


def test_more_spans_than_sentinels():
  with pytest.raises(ValueError, match='make 7 spans, but there are 5 sent'):
    corrupt(
      range(100), np.random.default_rng(0), num_sentinels=5, density=0.2,
      mean_span=3,
    )  # fmt: skip
  with pytest.raises(ValueError, match='make 101 spans, but there are 100'):
    span_corruption.check_sentinels(2020, **T5)
  span_corruption.check_sentinels(2000, **T5)


@pytest.mark.parametrize('density, mean_span', [(0, 3), (1, 3), (0.15, 0.5)])
def test_impossible_noise(density, mean_span):
  with pytest.raises(ValueError, match='must lie between 0 and 1 and mean'):
    corrupt(
      range(9), np.random.default_rng(0), density=density, mean_span=mean_span
    )


def test_too_short():
  with pytest.raises(ValueError, match='1 token cannot be split'):
    corrupt([10], np.random.default_rng(0), **T5)
  with pytest.raises(ValueError, match='inputs_length 2 is too short .* 3'):
    span_corruption.chunk_lengths(2, **T5)
