"""Multi-head attention: T5's relative position bias, a cache for decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from st_moe.model.layers import Kernel
from st_moe.sharding import annotate, constrain


def attend(query, key, value, bias, mask, *, dropout=None) -> jax.Array:
  """softmax(q k^T + bias) v, softmax in float32 for stability.

  T5 does not divide by sqrt(head_dim): its query kernels start that much
  smaller.

  Args:
    query: [batch, q, heads, head_dim].
    key, value: [batch, k, heads, head_dim].
    bias: float32 [1, heads, q, k], or None.
    mask: bool, broadcasts to [batch, heads, q, k]; False is not seen.
    dropout: applied to the attention weights.
  """
  logits = jnp.einsum(
    'bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits += bias
  # Finite, so that a row of padding that sees nothing stays finite too.
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e9)).astype(value.dtype)
  if dropout is not None:
    weights = dropout(weights)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


class Attention(nn.Module):
  """Self-attention (`memory` None) or attention to a `memory`."""

  num_heads: int
  head_dim: int
  dropout: float
  init_scale: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x, memory, bias, mask, *, deterministic: bool, index=None
  ) -> jax.Array:
    """Maps `x` [batch, q, embed] to the same.

    With an `index` (int32 []) this is one step of decoding: `x` holds one
    token, whose key and value join the cache at that place.
    """

    d, joined = x.shape[-1], (self.num_heads, self.head_dim)

    def project(x, name, scale=1.0):
      kernel = Kernel(
        (d, *joined),
        ('embed', 'heads', 'kv'),
        self.init_scale * scale,
        self.dtype,
        name=name,
      )()
      return jnp.einsum('bld,dhk->blhk', x, kernel)

    source = x if memory is None else memory
    query = project(x, 'query', scale=1 / self.head_dim)  # Of the variance.
    key, value = project(source, 'key'), project(source, 'value')
    if memory is None and index is not None:
      key, value = self._cached(key, value, index)
    axes = ('batch', 'length', 'activation_heads', 'activation_kv')
    query, key, value = (constrain(a, *axes) for a in (query, key, value))
    drop = nn.Dropout(self.dropout, broadcast_dims=(-2,))
    y = attend(
      query,
      key,
      value,
      bias,
      mask,
      dropout=lambda w: drop(w, deterministic=deterministic),
    )
    out = Kernel(
      (*joined, d),
      ('heads', 'kv', 'embed'),
      self.init_scale,
      self.dtype,
      fan_in=(0, 1),
      name='out',
    )()
    return jnp.einsum('blhk,hkd->bld', y, out)

  def _cached(self, key, value, index):
    """Keys and values so far. The first, full-length call makes the room."""
    ready = self.has_variable('cache', 'cached_key')
    keys = self.variable('cache', 'cached_key', jnp.zeros_like, key)
    values = self.variable('cache', 'cached_value', jnp.zeros_like, value)
    if ready:
      keys.value = jax.lax.dynamic_update_slice_in_dim(
        keys.value, key, index, axis=1
      )
      values.value = jax.lax.dynamic_update_slice_in_dim(
        values.value, value, index, axis=1
      )
      return keys.value, values.value
    return key, value


class RelativePositionBias(nn.Module):
  """T5's bucketed bias on attention logits, one table for a whole stack."""

  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool
  init_scale: float

  @nn.compact
  def __call__(self, query_positions, key_positions) -> jax.Array:
    """float32 [1, heads, q, k]."""
    table = self.param(
      'rel_embedding',
      annotate(
        nn.initializers.variance_scaling(self.init_scale, 'fan_avg', 'uniform'),
        ('heads', 'relpos_buckets'),
      ),
      (self.num_heads, self.num_buckets),
    )
    distance = key_positions[None, :] - query_positions[:, None]
    bucket = relative_bucket(
      distance,
      bidirectional=self.bidirectional,
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    return jnp.take(table, bucket, axis=1)[None]


def relative_bucket(distance, *, bidirectional, num_buckets, max_distance):
  """Bucket of key position minus query position (arXiv:1910.10683, 2.1).

  Half of the buckets hold one distance each, the others grow by equal ratios
  up to `max_distance`. Without `bidirectional` the future shares bucket 0.
  """
  base = 0
  if bidirectional:
    num_buckets //= 2
    base = (distance > 0) * num_buckets
    distance = jnp.abs(distance)
  else:
    distance = jnp.maximum(-distance, 0)
  exact = num_buckets // 2
  ratio = jnp.log(jnp.maximum(distance, 1) / exact + np.finfo(np.float32).eps)
  ratio /= np.log(max_distance / exact)
  far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
  far = jnp.minimum(far, num_buckets - 1)
  return base + jnp.where(distance < exact, distance, far)
