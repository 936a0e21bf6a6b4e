"""Token ids to buckets: tables and mixes of hash layers (arXiv:2106.04426).

Tables are made once, by numpy: int [vocab], the bucket of each id.
"""

import heapq

import jax.numpy as jnp
import numpy as np


def mixed(*numbers):
  """uint32 in which every bit of whole `numbers` is in every bit.

  They broadcast, and their order counts. The mix is that of MurmurHash3.
  """
  found = jnp.uint32(0)
  for number in numbers:
    found += jnp.asarray(number).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)
    found = (found ^ (found >> 16)) * jnp.uint32(0x85EBCA6B)
    found = (found ^ (found >> 13)) * jnp.uint32(0xC2B2AE35)
    found ^= found >> 16
  return found


def zipf(vocab: int) -> np.ndarray:
  """Frequencies of ids that stand in their order, as SentencePiece has them.

  The first three are padding, the end and the unknown, which texts hardly have.
  """
  return np.concatenate([np.zeros(3), 1 / np.arange(1, vocab)])[:vocab]


def balanced(frequencies, buckets: int, rng=None) -> np.ndarray:
  """Ids by falling frequency, each to the bucket that is lightest so far.

  So no bucket is heavier than the mean by more than the largest frequency. What
  never occurs goes where fewest ids are.

  Args:
    rng: for another table that is as good: ids within a factor of 2 of one
      another may change places.
  """
  n = len(frequencies)
  keys = frequencies * (1 if rng is None else rng.uniform(0.5, 1, n))
  table = np.zeros(n, int)
  lightest = [(0.0, 0, bucket) for bucket in range(buckets)]
  for i in np.argsort(-keys, kind='stable'):
    load, ids, table[i] = lightest[0]
    more = load + float(frequencies[i])
    heapq.heapreplace(lightest, (more, ids + 1, table[i]))
  return table


def clustered(vectors, buckets: int, rng) -> np.ndarray:
  """Ids whose `vectors` [vocab, d] are near share a bucket: k-means."""
  squares = (vectors**2).sum(-1)[:, None]
  distances = lambda centers: (
    squares - 2 * vectors @ centers.T + (centers**2).sum(-1)
  )
  # Centers far from those there are (k-means++), or two would share a cluster.
  centers, far = vectors[[rng.integers(len(vectors))]], np.inf
  while len(centers) < buckets:
    far = np.minimum(far, np.maximum(distances(centers[-1:])[:, 0], 0))
    share = far.astype(float) / far.sum(dtype=float) if far.any() else None
    another = rng.choice(len(vectors), p=share)
    centers = np.concatenate([centers, vectors[[another]]])
  table = None
  for _ in range(50):
    last, table = table, distances(centers).argmin(-1)
    if last is not None and (last == table).all():
      break
    for bucket in np.unique(table):  # One that lost all stays where it is.
      centers[bucket] = vectors[table == bucket].mean(0)
  return table


def dispersed(vectors, buckets: int, rng) -> np.ndarray:
  """The ids of each cluster are dealt to all buckets in turn."""
  clusters = clustered(vectors, buckets, rng)
  order = np.lexsort((rng.random(len(clusters)), clusters))
  table = np.zeros(len(clusters), int)
  table[order] = np.arange(len(clusters)) % buckets
  return table
