"""Lengths and batches: few sizes, little padding, nothing lost."""

import numpy as np
import pytest

from st_moe.decode.batching import bucket, chunks, padded


def _series(least):
  doubles = [least * 2**k for k in range(13)]
  between = [n * 3 // 2 for n in doubles if n > 1]  # 1.5 is no size.
  return sorted(doubles + between)


def test_the_series():
  assert sorted({bucket(n) for n in range(513)}) == [
    16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512,
  ]  # fmt: skip
  assert sorted({bucket(n, 4) for n in range(20)}) == [4, 6, 8, 12, 16, 24]
  assert sorted({bucket(n, 1) for n in range(9)}) == [1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize('least', [1, 2, 4, 8, 16, 256])
def test_a_bucket_is_the_smallest_that_holds(least):
  sizes = _series(least)
  for n in range(3000):
    assert bucket(n, least) == next(s for s in sizes if s >= n)


def test_a_third_is_padding_at_most():
  waste = lambda n: (bucket(n) - n) / bucket(n)
  # 16 are too few for 17: 7 of 24 are padding. Worse is a length that is one
  # more than a power of two, and worst a long one.
  assert waste(17) == 7 / 24 and waste(16) == waste(24) == 0
  worst = max(range(16, 5000), key=waste)
  assert worst == 4097 and 0.332 < waste(worst) < 1 / 3


def test_padding_stands_behind():
  found = padded([[5, 6], (), [7]], 3)
  np.testing.assert_array_equal(found, [[5, 6, 0], [0, 0, 0], [7, 0, 0]])
  assert found.dtype == np.int32
  # Rows may come one by one.
  np.testing.assert_array_equal(padded(iter([[5]]), 1), [[5]])
  assert padded([], 3).shape == (0, 3)


def test_a_row_too_long_is_an_error():
  with pytest.raises(ValueError):
    padded([[1, 2, 3, 4]], 3)


def test_chunks_lose_nothing():
  assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
  assert list(chunks('abcd', 4)) == ['abcd'] == list(chunks('abcd', 9))
  assert list(chunks([], 3)) == []
