"""`attend` on a TPU: scores are made and used up in VMEM, never in HBM.

T5's sequences are short: all scores of some heads fit there at once, keys as
rows and queries as lanes, so that what each query has one of is a row. Heads
lie side by side as projections write them, so many that they fill the lanes:

  query, key, value   [batch, length, heads * d]
  bias                float32 [heads, k, q], if there is one
  log_total           float32 [batch, heads / group, group, q]
  sees, seen          int32 [batch, 1, q], [batch, 1, k]: numbers of `Sight`
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from st_moe.model.tiles import LANES, VMEM, like, tile_product

_HIDDEN = -1e9
# What fits in the 16 MiB of a v4 in float32 too; others have more.
_MOST = 1 << 19  # Scores of a group of heads.
_LONGEST = 1024


def suits(query, key) -> bool:
  """Whether queries fill lanes, and a step fits in VMEM."""
  q, k = query.shape[2], key.shape[2]
  small = max(q, k) <= _LONGEST and _group(query) * q * k <= _MOST
  return small and q >= LANES // 2


def forward(query, key, value, bias, sight):
  """As `attend.at_once`."""
  found = _call(
    functools.partial(_forward_kernel, query.shape[-1], sight.causal),
    (query, key),
    _given(query, key, value, bias, sight),
    dict(y=query.dtype, log_total=jnp.float32),
    products=2,
  )
  y = _apart(found['y'], query.shape[1])
  return y, found['log_total'].reshape(query.shape[:3])


def backward(query, key, value, bias, sight, y, log_total, dy):
  """As `attend._at_once_backward`."""
  given = _given(query, key, value, bias, sight)
  of_total, _ = _blocks(query, key)['log_total']
  given.update(log_total=log_total.reshape(of_total), dy=_joined(dy))
  dtypes = dict(dquery=query.dtype, dkey=key.dtype, dvalue=value.dtype)
  found = _call(
    functools.partial(_backward_kernel, query.shape[-1], sight.causal),
    (query, key),
    given,
    dtypes if bias is None else dict(**dtypes, dbias=bias.dtype),
    products=5,
  )
  slopes = (_apart(found[name], query.shape[1]) for name in dtypes)
  return *slopes, None if bias is None else found['dbias'].swapaxes(1, 2)[None]


def _forward_kernel(d, causal, of, found):
  sees = _who_sees(of, causal)
  for head, at in _heads(of, d):
    logits = _logits(of, head, at, sees)
    top = logits.max(0, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(0, keepdims=True)
    value = of['value'][at]
    y = tile_product('kd,kq->dq', value, weights.astype(value.dtype)) / total
    blind = top == _HIDDEN
    found['y'][at] = jnp.where(blind, 0, y).T.astype(value.dtype)
    log_total = jnp.where(blind, 0, top + jnp.log(total))
    found['log_total'][head : head + 1] = log_total


def _backward_kernel(d, causal, of, found):
  if 'dbias' in found:

    @pl.when(pl.program_id(1) == 0)
    def _():
      found['dbias'][...] = jnp.zeros_like(found['dbias'])

  sees = _who_sees(of, causal)
  for head, at in _heads(of, d):
    query, key, value, dy = (of[n][at] for n in ('query', 'key', 'value', 'dy'))
    logits = _logits(of, head, at, sees)
    weights = jnp.exp(logits - of['log_total'][head : head + 1])
    dvalue = tile_product('kq,qd->kd', weights.astype(dy.dtype), dy)
    slopes = weights * tile_product('kd,qd->kq', value, dy)
    # Were all of its weights to grow, they would not.
    slopes -= weights * slopes.sum(0, keepdims=True)
    if 'dbias' in found:
      found['dbias'][head] += slopes
    slopes = slopes.astype(query.dtype)
    dkey = tile_product('kq,qd->kd', slopes, query)
    dquery = tile_product('kd,kq->dq', key, slopes).T
    for name, slope in dict(dquery=dquery, dkey=dkey, dvalue=dvalue).items():
      found[name][at] = slope.astype(found[name].dtype)


def _heads(of, d):
  """Numbers of the heads of a group, and where they lie."""
  n = of['query'].shape[-1] // d
  return ((i, (slice(None), slice(i * d, (i + 1) * d))) for i in range(n))


def _who_sees(of, causal):
  """bool [k, q]."""
  sees = of['seen'][...].T == of['sees'][...]
  if causal:
    at = functools.partial(jax.lax.broadcasted_iota, jnp.int32, sees.shape)
    sees &= at(0) <= at(1)
  return sees


def _logits(of, head, at, sees):
  logits = tile_product('kd,qd->kq', of['key'][at], of['query'][at])
  if 'bias' in of:
    logits += of['bias'][head]
  return jnp.where(sees, logits, _HIDDEN)


def _group(query) -> int:
  """How many heads fill whole lanes; all, where no fewer do."""
  _, heads, _, d = query.shape
  whole = (n for n in range(1, heads) if heads % n == 0 and n * d % LANES == 0)
  return next(whole, heads)


def _blocks(query, key):
  """{name: (shape, block of a step)}, by head and then by row.

  So the bias of some heads stays, and its slope until it is complete.
  """
  (b, h, q, d), k, g = query.shape, key.shape[2], _group(query)
  tokens = lambda n: pl.BlockSpec((None, n, g * d), lambda h, b: (b, 0, h))
  numbers = lambda n: pl.BlockSpec((None, 1, n), lambda h, b: (b, 0, 0))
  scores = pl.BlockSpec((g, k, q), lambda h, b: (h, 0, 0))
  of_query, of_key = (((b, n, h * d), tokens(n)) for n in (q, k))
  return dict(
    **dict.fromkeys(('query', 'y', 'dy', 'dquery'), of_query),
    **dict.fromkeys(('key', 'value', 'dkey', 'dvalue'), of_key),
    **dict.fromkeys(('bias', 'dbias'), ((h, k, q), scores)),
    log_total=(
      (b, h // g, g, q),
      pl.BlockSpec((None, None, g, q), lambda h, b: (b, h, 0, 0)),
    ),
    sees=((b, 1, q), numbers(q)),
    seen=((b, 1, k), numbers(k)),
  )


def _given(query, key, value, bias, sight):
  joined = dict(query=query, key=key, value=value)
  given = {name: _joined(a) for name, a in joined.items()}
  given.update(sees=sight.query[:, None], seen=sight.key[:, None])
  return given if bias is None else dict(**given, bias=bias[0].swapaxes(1, 2))


def _call(kernel, of, given, dtypes, products):
  """Runs `kernel` on `given`, for arrays of such `dtypes`, all by name."""
  blocks, (b, h, q, d) = _blocks(*of), of[0].shape
  shapes = {
    name: like(of[0], blocks[name][0], dtype) for name, dtype in dtypes.items()
  }
  specs = lambda names: ({name: blocks[name][1] for name in names},)
  scores = b * h * q * of[1].shape[2]
  bytes_of = lambda a: a.size * a.dtype.itemsize
  run = pl.pallas_call(
    kernel,
    (shapes,),
    grid=(h // _group(of[0]), b),
    in_specs=specs(given),
    out_specs=specs(dtypes),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * scores * d,
      transcendentals=scores,
      bytes_accessed=sum(map(bytes_of, [*given.values(), *shapes.values()])),
    ),
  )
  return run(given)[0]


def _joined(a):
  """[b, h, n, d] -> [b, n, h * d]."""
  return a.swapaxes(1, 2).reshape(len(a), a.shape[2], -1)


def _apart(a, heads: int):
  return a.reshape(*a.shape[:2], heads, -1).swapaxes(1, 2)
