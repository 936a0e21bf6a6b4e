"""The kernels of `grouped` against plain loops, and inside a sparse layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from st_moe import sharding
from st_moe.config import Capacity, Part
from st_moe.model import grouped, grouped_tpu
from st_moe.model.dispatch import DISPATCHERS
from st_moe.model.moe import MoE
from st_moe.plan import plan_flags, topology
from st_moe.routing.types import RouteContext
from tests.helpers import assert_trees_close, jit, random_params, tiny


@pytest.fixture
def a_tpu(monkeypatch):
  """The way of a TPU, interpreted: memory that nobody wrote is NaN."""
  run = lambda *args, default, tpu=None: (tpu or default)(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', run)
  interpreted = functools.partial(pl.pallas_call, interpret=True)
  monkeypatch.setattr(pl, 'pallas_call', interpreted)


# Six blocks of five rows; experts 0 and 3 have none, and two blocks no expert.
EXPERT = np.array([1, 1, 1, 2, 4, 4], np.int32)


def _in_loops(x, w, dy, experts):
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
  for b, e in enumerate(EXPERT):
    if e < experts:
      y[b], dx[b] = x[b] @ w[e], dy[b] @ w[e].T
      dw[e] += x[b].T @ dy[b]
  return y, dx, dw


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  ('k', 'n', 'tile'),
  [(24, 40, 4 << 20), (256, 200, 1 << 16), (200, 256, 1 << 16)],
  ids=['whole', 'deep and ragged', 'ragged and deep'],
)
def test_blocks_by_their_experts(k, n, tile, dtype, a_tpu, monkeypatch):
  # 64 KiB hold 128 x 128 numbers, or twice as many of bfloat16.
  monkeypatch.setattr(grouped_tpu, '_TILE', tile)
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  x, w, dy = normal(6, 5, k), normal(4, k, n), normal(6, 5, n)

  def run(x, w, dy):
    y, back = jax.vjp(lambda x, w: grouped_tpu.product(x, w, EXPERT), x, w)
    return y, *back(dy)

  got, want = jit(run)(x, w, dy), _in_loops(x, w, dy, experts=4)
  rtol = 1e-6 if dtype == 'float32' else 4e-3
  for a, b in zip(got, want, strict=True):
    assert a.dtype == dtype
    assert np.linalg.norm(np.asarray(a, np.float64) - b) <= rtol * (
      np.linalg.norm(b)
    )
  y, dx, dw = got
  assert not np.asarray(y[4:]).any() and not np.asarray(dx[4:]).any()
  assert not np.asarray(dw[0]).any() and not np.asarray(dw[3]).any()


# In a sparse layer.


def _layer(dropout=0.0, **changes):
  calm = Part.of('top_k', k=2, train_policy='all')
  moe = dict(
    selector=calm,
    dispatcher='grouped',
    multiplicative_bias=True,
    expert_dropout=dropout,
    train_capacity=Capacity(dropless=True),
  )
  config = tiny(moe=moe, **changes)
  return MoE(config, config.moe, 16)


def _inputs(layer):
  shape, dtype = (8, 16, layer.config.embed_dim), layer.config.dtype
  x = jax.random.normal(jax.random.key(0), shape, dtype)
  ctx = RouteContext(valid=jnp.ones(x.shape[:2], bool), deterministic=False)
  return random_params(layer, x, ctx), x, ctx


def _answer(layer, params, x, ctx):
  rngs = {'dropout': jax.random.key(3)}
  return layer.apply({'params': params}, x, ctx, rngs=rngs)


def _slopes(layer, params, x, ctx):
  loss = lambda *of: (_answer(layer, *of, ctx).astype(jnp.float32) ** 2).sum()
  return jax.grad(loss, argnums=(0, 1))(params, x)


def _in_blocks(monkeypatch, rows, block=16):
  """So many rows a turn."""
  monkeypatch.setattr(grouped, '_AT_ONCE', rows)
  small = functools.partial(grouped.grouped, block=block)
  monkeypatch.setitem(DISPATCHERS, 'grouped', small)


@pytest.mark.parametrize(
  ('dtype', 'rows'), [('float32', 48), ('bfloat16', 48), ('float32', 1 << 15)]
)
def test_a_layer_as_on_a_cpu(dtype, rows, monkeypatch, request):
  _in_blocks(monkeypatch, rows)
  layer = _layer(dtype=dtype)
  params, x, ctx = _inputs(layer)
  run = functools.partial(_slopes, layer)
  expected = jit(run)(params, x, ctx)
  request.getfixturevalue('a_tpu')
  found = jit(lambda *of: run(*of))(params, x, ctx)
  assert_trees_close(found, expected, 2e-5 if dtype == 'float32' else 2e-2)


def test_devices_as_one(monkeypatch):
  # In one turn each: interpreted, they would wait for each other's last.
  _in_blocks(monkeypatch, 1 << 15, block=64)
  monkeypatch.setattr(grouped, '_SLACK', 100)
  layer = _layer(activation='relu')
  params, x, ctx = _inputs(layer)
  run = functools.partial(_slopes, layer)
  expected = jit(run)(params, x, ctx)
  choose = lambda *args, default, tpu=None: (tpu or default)(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', choose)
  mesh = sharding.make_mesh(data=2, expert=2, model=2)
  with sharding.use(mesh), pltpu.force_tpu_interpret_mode():
    found = jit(lambda *of: run(*of))(params, x, ctx)
  assert_trees_close(found, expected)


def test_it_knows_the_slope_of_what_it_drops(a_tpu, monkeypatch):
  # Against finite differences: the way back drops the same hidden units.
  _in_blocks(monkeypatch, 48)
  layer = _layer(dropout=0.3, activation='gelu')
  params, x, ctx = _inputs(layer)
  answer = lambda experts: _answer(
    layer, {**params, 'experts': experts}, x, ctx
  )
  check_grads(
    jax.jit(answer), (params['experts'],), 1, ['rev'], atol=0.02, rtol=0.02
  )


def test_it_compiles_for_tpus():
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  plan_flags.prepare()
  # Ready for whatever load, so in turns: of an even one, one.
  layer = _layer(dtype='bfloat16')
  params, x, ctx = _inputs(layer)
  devices = topology.devices('v5e:2x2')
  mesh = sharding.make_mesh(expert=2, data=2, devices=devices)
  init = lambda: layer.init(jax.random.key(0), x, ctx)['params']
  with sharding.use(mesh):
    boxed = sharding.of_boxed(jax.eval_shape(init), mesh)
    params = sharding.placed(params, boxed)
    x = sharding.placed(x, sharding.batch_sharding(mesh))
    run = functools.partial(_slopes, layer)
    text = jax.jit(run).lower(params, x, ctx).compile().as_text()
  # Three products there; these again, and six of slopes, on the way back.
  assert text.count('custom_call_target="tpu_custom_call"') == 12
