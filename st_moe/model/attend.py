"""softmax(q k^T + bias) v, by who sees whom.

T5 does not divide by sqrt(head_dim): its query kernels start that much smaller.
The softmax is float32, for stability.

One contract, several ways:

  query        [batch, heads, q, d]
  key, value   [batch, heads, k, d]
  bias         float32 [1, heads, q, k], or None
  sight        who sees whom
  -> [batch, heads, q, d]
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from st_moe.model import attend_tpu
from st_moe.sharding import axes_of, on_shards, shards

_HIDDEN = -1e9  # Finite, as a query may see nothing; its answer is 0.
_AT_ONCE = 1 << 20  # Scores of `by_rows` at any time: they stay in a cache.


@flax.struct.dataclass
class Sight:
  """Who sees whom: a query those keys that have its number.

  With `causal` none that comes later, though.
  """

  query: jax.Array  # int32 [batch or 1, q]; -1 sees nothing.
  key: jax.Array  # int32 [batch or 1, k]; 0 is seen by nobody.
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def mask(self) -> jax.Array:
    """bool [batch or 1, 1, q, k]."""
    sees = self.query[:, None, :, None] == self.key[:, None, None]
    if self.causal:
      q, k = (jnp.arange(a.shape[1]) for a in (self.query, self.key))
      sees &= k <= q[:, None]
    return sees

  def of_all(self, batch: int, q: int, k: int) -> 'Sight':
    """A number for each."""
    return self.replace(
      query=jnp.broadcast_to(self.query, (batch, q)),
      key=jnp.broadcast_to(self.key, (batch, k)),
    )


def attend(query, key, value, bias, sight: Sight) -> jax.Array:
  """The way that suits the backend; the backward pass keeps the arguments."""
  if query.shape[2] == 1:  # A step of decoding.
    return whole(query, key, value, bias, sight)
  sight = sight.of_all(*query.shape[::2], key.shape[2])
  if shards('batch') * shards('activation_heads') == 1:
    return _attended(query, key, value, bias, sight)

  def local(query, key, value, bias, sight):
    # Its gradients differ where it does not, and are summed there.
    bias = jax.lax.pcast(bias, axes_of('batch'), to='varying')
    return _attended(query, key, value, bias, sight)

  heads = 'batch', 'activation_heads', None, None
  of_bias = None if bias is None else (None, *heads[1:])
  numbers = sight.replace(query=('batch', None), key=('batch', None))
  run = on_shards(local, (heads, heads, heads, of_bias, numbers), heads)
  return run(query, key, value, bias, sight)


def whole(query, key, value, bias, sight: Sight) -> jax.Array:
  """All scores at once: what the others are measured by."""
  mask = sight.mask()
  weights = jax.nn.softmax(_scores(query, key, bias, mask))
  weights = jnp.where(mask, weights, 0).astype(value.dtype)
  return jnp.einsum('bhqk,bhkd->bhqd', weights, value)


def _scores(query, key, bias, mask):
  logits = jnp.einsum(
    'bhqd,bhkd->bhqk', query, key, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits += bias
  return jnp.where(mask, logits, _HIDDEN)


@jax.custom_vjp
def _attended(*args) -> jax.Array:
  return _forward(*args)[0]


def _forward(*args):
  ways = dict(cpu=by_rows, default=at_once)
  if attend_tpu.suits(*args[:2]):
    ways['tpu'] = attend_tpu.forward
  return jax.lax.platform_dependent(*args, **ways)


def _backward(kept, dy):
  ways = dict(cpu=_by_rows_backward, default=_at_once_backward)
  if attend_tpu.suits(*kept[:2]):
    ways['tpu'] = attend_tpu.backward
  return *jax.lax.platform_dependent(*kept, dy, **ways), None


def _keeping(*args):
  y, log_total = _forward(*args)
  return y, (*args, y, log_total)


_attended.defvjp(_keeping, _backward)


def at_once(query, key, value, bias, sight: Sight):
  """Answers, and of each query's weights the logarithm of their sum."""
  logits = _scores(query, key, bias, sight.mask())
  top = logits.max(-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = weights.sum(-1, keepdims=True)
  y = jnp.einsum(
    'bhqk,bhkd->bhqd',
    weights.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  blind = top == _HIDDEN
  y = jnp.where(blind, 0, y / total).astype(value.dtype)
  return y, jnp.where(blind, 0, top + jnp.log(total))[..., 0]


def _at_once_backward(*kept):
  return _unturned(kept, lambda bias, rows: _slopes(bias, *rows))


def _unturned(kept, run):
  """What `run` finds of keys by queries, as gradients.

  Over the first of two axes a CPU multiplies half as fast as over the last.
  """
  query, key, value, bias, sight, y, log_total, dy = kept
  shift = (dy.astype(jnp.float32) * y).sum(-1)
  bias = None if bias is None else _turned(bias)
  rows = query, key, _turned(key), value, sight, log_total, shift, dy
  dbias, (dquery, dkey, dvalue) = run(bias, rows)
  dbias = None if bias is None else _turned(dbias)
  return _turned(dquery), dkey, dvalue, dbias


def _slopes(bias, query, key, key_turned, value, sight, log_total, shift, dy):
  over = lambda a: a[..., None, :]
  logits = _scores(key, query, bias, _turned(sight.mask()))
  weights = jnp.exp(logits - over(log_total))
  dvalue = jnp.einsum('bhkq,bhqd->bhkd', weights.astype(dy.dtype), dy)
  slopes = jnp.einsum(
    'bhkd,bhqd->bhkq', value, dy, preferred_element_type=jnp.float32
  )
  # Were all of its weights to grow, they would not (arXiv:2205.14135, B.2).
  slopes = weights * (slopes - over(shift))
  # One by one: a CPU is slow to sum over a first axis.
  dbias = None if bias is None else functools.reduce(jnp.add, slopes)[None]
  slopes = slopes.astype(query.dtype)
  dkey = jnp.einsum('bhkq,bhqd->bhkd', slopes, query)
  dquery_turned = jnp.einsum('bhdk,bhkq->bhdq', key_turned, slopes)
  return dbias, (dquery_turned, dkey, dvalue)


def by_rows(query, key, value, bias, sight: Sight):
  """`at_once` for a few rows at a time, whose scores stay in a cache."""
  cut, join = _cuts(query, key)
  some = lambda rows: at_once(*rows[:3], bias, rows[3])
  return join(jax.lax.map(some, cut((query, key, value, sight))))


def _by_rows_backward(*kept):
  cut, join = _cuts(*kept[:2])

  def run(bias, rows):
    def some(total, rows):
      dbias, found = _slopes(bias, *rows)
      return jax.tree.map(jnp.add, total, dbias), found

    start = None if bias is None else jnp.zeros_like(bias)
    dbias, found = jax.lax.scan(some, start, cut(rows))
    return dbias, join(found)

  return _unturned(kept, run)


def _turned(a: jax.Array) -> jax.Array:
  return a.swapaxes(-1, -2)


def _cuts(query, key):
  """Functions that cut arrays into some rows at a time, and join them."""
  batch, heads, q, _ = query.shape
  most = max(1, _AT_ONCE // (heads * q * key.shape[2]))
  n = max(i for i in range(1, most + 1) if batch % i == 0)
  cut = lambda a: a.reshape(batch // n, n, *a.shape[1:])
  join = lambda a: a.reshape(batch, *a.shape[2:])
  return (functools.partial(jax.tree.map, f) for f in (cut, join))
