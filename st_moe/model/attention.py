"""Multi-head attention: T5's relative position bias, a cache for decoding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from st_moe.model.attend import Sight, attend
from st_moe.model.layers import Kernel, flat, product
from st_moe.sharding import annotate, constrain


class Attention(nn.Module):
  """Self-attention (`memory` None) or attention to a `memory`."""

  num_heads: int
  head_dim: int
  dropout: float
  init_scale: float
  dtype: jnp.dtype
  sums: jnp.dtype = jnp.float32  # In which gradients of weights add up.

  @nn.compact
  def __call__(
    self,
    x,
    memory,
    bias,
    sight: Sight,
    *,
    deterministic: bool,
    index=None,
    room=0,
  ) -> jax.Array:
    """Maps `x` [batch, q, embed] to the same.

    With an `index` (int32 []) this is one step of decoding: `x` holds one
    token, whose key and value join the cache at that place. The first such
    call makes a cache with `room` for so many.

    A `memory` [batch / r, k, embed] is shared by each r rows of `x`, as the
    beams of a prompt do. Its keys and values are kept in the collection
    'memory' where that is mutable, and taken from there where they are.
    """

    d, joined = x.shape[-1], (self.num_heads, self.head_dim)
    # Flat once, or the backward pass would keep it for each projection.
    here = x, flat(x)
    times = lambda x, w: product('td,df->tf', x, w, self.sums)
    there = here if memory is None else (memory, flat(memory))

    def project(of, name, scale=1.0):
      x, tokens = of
      kernel = Kernel(
        (d, *joined),
        ('embed', 'heads', 'kv'),
        self.init_scale * scale,
        self.dtype,
        name=name,
      )()
      y = times(tokens, kernel.reshape(d, -1))
      return y.reshape(*x.shape[:2], *joined).swapaxes(1, 2)

    query = project(here, 'query', scale=1 / self.head_dim)  # Of the variance.
    if memory is None:
      key, value = project(here, 'key'), project(here, 'value')
      if index is not None:
        key, value = self._cached(key, value, index, room)
    else:
      key, value = (self._kept(n, there, project) for n in ('key', 'value'))
      query = _by_memory(query, len(key))
    axes = ('batch', 'activation_heads', 'length', 'activation_kv')
    query, key, value = (constrain(a, *axes) for a in (query, key, value))
    # A weight is dropped for all queries at once, and so with what it weighs.
    drop = nn.Dropout(self.dropout, broadcast_dims=(-1,))
    value = drop(value, deterministic=deterministic)
    with jax.named_scope('attention'):
      y = attend(query, key, value, bias, sight)
    out = Kernel(
      (*joined, d),
      ('heads', 'kv', 'embed'),
      self.init_scale,
      self.dtype,
      fan_in=(0, 1),
      name='out',
    )()
    y = _by_row(y, len(x)).swapaxes(1, 2).reshape(len(here[1]), -1)
    return times(y, out.reshape(-1, d)).reshape(x.shape)

  def _kept(self, name, memory, project):
    if self.has_variable('memory', name):
      return self.get_variable('memory', name)
    made = project(memory, name)
    if self.is_mutable_collection('memory') and not self.is_initializing():
      self.put_variable('memory', name, made)
    return made

  def _cached(self, key, value, index, room):
    """Keys and values so far; none in the call that makes the room."""
    ready = self.has_variable('cache', 'cached_key')
    shape = (*key.shape[:2], room, key.shape[-1])
    zeros = functools.partial(jnp.zeros, shape, key.dtype)
    keys = self.variable('cache', 'cached_key', zeros)
    values = self.variable('cache', 'cached_value', zeros)
    if ready:
      keys.value = jax.lax.dynamic_update_slice_in_dim(
        keys.value, key, index, axis=2
      )
      values.value = jax.lax.dynamic_update_slice_in_dim(
        values.value, value, index, axis=2
      )
      return keys.value, values.value
    return key, value


def _by_memory(query, batch: int):
  """[batch * r, h, q, d] -> [batch, h, r * q, d]: rows of a memory as one."""
  if len(query) == batch:
    return query
  _, h, q, d = query.shape
  rows = query.reshape(batch, -1, h, q, d).swapaxes(1, 2)
  return rows.reshape(batch, h, -1, d)


def _by_row(y, rows: int):
  """The inverse of `_by_memory`."""
  if len(y) == rows:
    return y
  batch, h, _, d = y.shape
  y = y.reshape(batch, h, rows // batch, -1, d).swapaxes(1, 2)
  return y.reshape(rows, h, -1, d)


class RelativePositionBias(nn.Module):
  """T5's bucketed bias on attention logits: the table of a stack or layer."""

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
    # As a product: to look up single numbers is slow on every machine.
    chosen = jax.nn.one_hot(bucket, self.num_buckets)
    return jnp.einsum('hn,qkn->hqk', table, chosen, precision='highest')[None]


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
