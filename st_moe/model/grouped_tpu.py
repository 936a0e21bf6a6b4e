"""Blocks of rows by weights of their experts, on a TPU.

  x [b, r, k], w [e, k, n], expert [b] -> [b, r, n]

Blocks of one expert follow one another, and meanwhile a tile of its weights
stays in VMEM: it is read once, whatever the rows. Blocks of expert `e` are
nobody's: no weights are read for them, and their answers are 0.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from st_moe.model.tiles import LANES, VMEM, like, tile_product

_TILE = 4 << 20  # Bytes; so a step fits in the 16 MiB of a v4.


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, expert: jax.Array) -> jax.Array:
  """As `x`, of sums in float32."""
  return _by_expert('rk,kn->rn', x, w, expert)


def _backward(kept, dy):
  x, w, expert = kept
  dx = _by_expert('rn,kn->rk', dy, w, expert)
  dw = _by_blocks(x, dy, expert, w)
  # Where an expert has no block, nothing is written.
  has = (expert[:, None] == jnp.arange(len(w))).any(0)
  return dx, jnp.where(has[:, None, None], dw, 0), None


product.defvjp(lambda *args: (product(*args), args), _backward)


def _by_expert(names, x, w, expert):
  """Sums over the last axis of `x` and that one of `w` in `names`."""
  (b, r, depth), e, size = x.shape, len(w), w.dtype.itemsize
  turned = names == 'rn,kn->rk'
  width = w.shape[1 if turned else 2]
  deep = _divisor(depth, _TILE // size // LANES)
  wide = _part(width, _TILE // size // deep)
  columns, steps = pl.cdiv(width, wide), depth // deep

  def kernel(expert, x, w, y, total):
    i, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
      total[...] = jnp.zeros_like(total)

    @pl.when(expert[i] < e)
    def _():
      total[...] += tile_product(names, x[...], w[...])

    @pl.when(step == steps - 1)
    def _():
      y[...] = total[...].astype(y.dtype)

  def of_weights(j, i, k, expert):
    return _within(expert[i], e), *((j, k) if turned else (k, j))

  shape = (wide, deep) if turned else (deep, wide)
  times = min(e, b) if steps == 1 else b  # That weights are read.
  return _call(
    kernel,
    (expert, x, w),
    [
      pl.BlockSpec((None, r, deep), lambda j, i, k, _: (i, 0, k)),
      pl.BlockSpec((None, *shape), of_weights),
    ],
    like(x, (b, r, width), x.dtype),
    pl.BlockSpec((None, r, wide), lambda j, i, k, _: (i, 0, j)),
    grid=(columns, b, steps),
    flops=2 * b * r * depth * width,
    read=columns * x.nbytes + times * depth * width * size,
  )


def _by_blocks(x, dy, expert, w):
  """Of each expert, x^T dy of its blocks; as `w`."""
  (b, r, k), n, e = x.shape, dy.shape[-1], len(w)
  deep = _part(k, 1024)
  wide = _part(n, _TILE // 4 // deep)

  def kernel(expert, x, dy, dw, total):
    i = pl.program_id(2)
    e_i = expert[i]

    @pl.when((i == 0) | (e_i != expert[jnp.maximum(i - 1, 0)]))
    def _():
      total[...] = jnp.zeros_like(total)

    @pl.when(e_i < e)
    def _():
      total[...] += tile_product('rk,rn->kn', x[...], dy[...])

    last = (i == b - 1) | (e_i != expert[jnp.minimum(i + 1, b - 1)])

    @pl.when((e_i < e) & last)
    def _():
      dw[...] = total[...].astype(dw.dtype)

  deeps, wides = pl.cdiv(k, deep), pl.cdiv(n, wide)
  return _call(
    kernel,
    (expert, x, dy),
    [
      pl.BlockSpec((None, r, deep), lambda k, n, i, _: (i, 0, k)),
      pl.BlockSpec((None, r, wide), lambda k, n, i, _: (i, 0, n)),
    ],
    like(x, w.shape, w.dtype),
    pl.BlockSpec(
      (None, deep, wide),
      lambda k, n, i, expert: (_within(expert[i], e), k, n),
    ),
    grid=(deeps, wides, b),
    flops=2 * b * r * k * n,
    read=wides * x.nbytes + deeps * dy.nbytes,
  )


def _call(kernel, args, in_specs, like, out_spec, grid, flops, read):
  """Runs `kernel`, which has a total of an output's tile in float32."""
  tile = [n for n in out_spec.block_shape if n is not None]
  written = math.prod(like.shape) * like.dtype.itemsize
  return pl.pallas_call(
    kernel,
    like,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=in_specs,
      out_specs=out_spec,
      scratch_shapes=[pltpu.VMEM(tile, jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=VMEM,
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops, transcendentals=0, bytes_accessed=read + written
    ),
  )(*args)


def _within(expert, e: int):
  return jnp.minimum(expert, e - 1)


def _part(n: int, most: int) -> int:
  """The size of equal parts of n, in whole lanes."""
  parts = pl.cdiv(n, max(LANES, most))
  return n if parts == 1 else pl.cdiv(pl.cdiv(n, parts), LANES) * LANES


def _divisor(n: int, most: int) -> int:
  """The largest part of n in whole lanes; all of it, if it has none."""
  parts = range(pl.cdiv(n, most), n // LANES + 1)
  return next((n // p for p in parts if n % (p * LANES) == 0), n)
