"""Attention against plain loops, and the ways to compute it against another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from st_moe import sharding
from st_moe.model import attend
from st_moe.model.attend import Sight
from st_moe.plan import hlo, plan_flags, topology


def _case(q=40, k=56, batch=4, heads=2, d=8, *, causal=False, dtype='float32'):
  """Random arguments: packed examples, padding at the end of some rows."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  numbers = rng.integers(1, 3, (batch, max(q, k))).cumsum(1) // 20 + 1
  numbers[1, 25:] = numbers[-1, 8:] = 0
  query, key = numbers[:, :q], numbers[:, :k]
  sight = Sight(
    jnp.where(query > 0, query, -1).astype(jnp.int32),
    jnp.asarray(key, jnp.int32),
    causal,
  )
  shapes = (batch, heads, q, d), (batch, heads, k, d), (batch, heads, k, d)
  bias = jnp.asarray(rng.normal(size=(1, heads, q, k)), jnp.float32)
  return *(normal(*shape) for shape in shapes), bias, sight


def _in_loops(query, key, value, bias, sight):
  arrays = (np.asarray(a, np.float64) for a in (query, key, value))
  query, key, value = arrays
  y = np.zeros(query.shape)
  for b, h, i in np.ndindex(query.shape[:3]):
    scores = []
    for j in range(key.shape[2]):
      sees = sight.query[b, i] == sight.key[b, j]
      sees &= not sight.causal or j <= i
      score = sum(query[b, h, i] * key[b, h, j]) + float(bias[0, h, i, j])
      scores.append(score if sees else -1e9)
    if max(scores) > -1e9:
      weights = np.exp(np.array(scores) - max(scores))
      y[b, h, i] = weights / weights.sum() @ value[b, h]
  return y


def _with_slopes(way, *case):
  *arrays, sight = case
  y, back = jax.vjp(lambda *arrays: way(*arrays, sight), *arrays)
  return y, back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


def _assert_close(ours, theirs, rtol):
  ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


def _assert_as_whole(case):
  case = dict(case)
  biased = 'bias' not in case
  case.pop('bias', None)
  query, key, value, bias, sight = _case(**case)
  args = query, key, value, bias if biased else None, sight
  rtol = 2e-6 if query.dtype == jnp.float32 else 2e-2
  expected = _with_slopes(attend.whole, *args)
  run = jax.jit(functools.partial(_with_slopes, attend.attend))
  _assert_close(run(*args), expected, rtol)


@pytest.mark.parametrize('causal', [False, True])
def test_who_sees_whom_as_in_plain_loops(causal):
  case = _case(12, 12, 2, causal=causal)
  np.testing.assert_allclose(
    attend.whole(*case), _in_loops(*case), rtol=1e-5, atol=1e-6
  )
  assert (case[4].query[-1, 8:] == -1).all()
  assert not attend.whole(*case)[-1, :, 8:].any()  # Of padding.


@pytest.mark.parametrize('scores', [1 << 20, 2 * 2 * 40 * 56, 1])
@pytest.mark.parametrize(
  'case',
  [
    dict(),
    dict(causal=True, k=40),
    dict(bias=None),
    dict(dtype='bfloat16'),
  ],
  ids=str,
)
def test_a_few_rows_at_a_time_as_all(case, scores, monkeypatch):
  monkeypatch.setattr(attend, '_AT_ONCE', scores)
  _assert_as_whole(case)


def test_all_at_once_is_another_way(monkeypatch):
  # As where the backend is no CPU.
  run = lambda *args, cpu, default: default(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', run)
  case = _case()
  expected = _with_slopes(attend.whole, *case)
  _assert_close(_with_slopes(attend.attend, *case), expected, 2e-6)


def test_no_scores_are_kept_for_the_backward_pass():
  *arrays, sight = _case(q=64, k=64)
  back = jax.eval_shape(
    lambda *arrays: jax.vjp(
      functools.partial(attend.attend, sight=sight), *arrays
    )[1],
    *arrays,
  )
  scores = 4 * 2 * 64 * 64  # Of all rows: the bias has a fourth of them.
  assert max(a.size for a in jax.tree.leaves(back)) < scores


@pytest.mark.parametrize(
  'mesh', [dict(data=4, model=2), dict(expert=4, fsdp=2)]
)
def test_devices_attend_as_one(mesh):
  case = _case(batch=8) if 'fsdp' in mesh else _case()
  expected = _with_slopes(attend.attend, *case)
  with sharding.use(sharding.make_mesh(**mesh)):
    run = jax.jit(functools.partial(_with_slopes, attend.attend))
    _assert_close(run(*case), expected, 1e-6)
    text = run.lower(*case).compile().as_text()
  assert 'all-gather' not in text and 'all-to-all' not in text


def test_dropout_of_weights_is_dropout_of_what_they_weigh():
  # One mask for all queries: a weight is dropped where its value is.
  query, key, value, bias, sight = _case()
  keep = jax.random.bernoulli(jax.random.key(0), 0.7, value.shape[:3])
  logits = attend._scores(query, key, bias, sight.mask())
  weights = jax.nn.softmax(logits) * keep[:, :, None] / 0.7
  expected = jnp.einsum('bhqk,bhkd->bhqd', weights, value)
  dropped = value * keep[..., None] / 0.7
  y = attend.attend(query, key, dropped, bias, sight)
  seen = (sight.query > 0)[:, None, :, None]
  _assert_close(y, jnp.where(seen, expected, 0), 2e-6)


@pytest.fixture
def a_tpu(monkeypatch):
  """The way of a TPU, interpreted: memory that nobody wrote is NaN."""
  run = lambda *args, tpu, **others: tpu(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', run)
  with pltpu.force_tpu_interpret_mode():
    yield


@pytest.mark.parametrize(
  'case',
  [
    dict(q=114, k=114, causal=True),
    dict(q=114, k=70, bias=None),
    dict(q=64, k=96, heads=4, d=64),  # Two heads side by side.
    dict(q=64, k=64, heads=1, dtype='bfloat16'),
  ],
  ids=str,
)
def test_a_tpu_as_all(case, a_tpu):
  _assert_as_whole(case)


@pytest.mark.parametrize('biased', [True, False])
def test_tpus_attend_as_one(biased, a_tpu):
  # Two of four heads on each, and two of eight rows.
  *args, bias, sight = _case(64, 64, batch=8, heads=4, causal=True)
  case = *args, bias if biased else None, sight
  expected = _with_slopes(attend.whole, *case)
  with sharding.use(sharding.make_mesh(data=2, fsdp=2, model=2)):
    run = jax.jit(functools.partial(_with_slopes, attend.attend))
    _assert_close(run(*case), expected, 2e-6)


def test_a_tpu_keeps_scores_to_itself():
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  plan_flags.prepare()
  here = jax.sharding.SingleDeviceSharding(topology.devices('v5e:2x2')[0])
  # As projections have them: heads side by side.
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
  batch, heads, d, q, k = 8, 4, 64, 512, 256
  tokens = lambda n: array((batch, n, heads * d), jnp.bfloat16)
  apart = lambda a: a.reshape(*a.shape[:2], heads, d).swapaxes(1, 2)

  def run(query, key, value, bias, sight):
    arrays = *map(apart, (query, key, value)), bias, sight
    return _with_slopes(attend.attend, *arrays)

  numbers = Sight(array((batch, q), jnp.int32), array((batch, k), jnp.int32))
  bias = array((1, heads, q, k), jnp.float32)
  case = tokens(q), tokens(k), tokens(k), bias, numbers
  compiled = jax.jit(run).lower(*case).compile()
  program, scores = hlo.Program(compiled.as_text()), batch * heads * q * k
  # Two products there, and five on the way back.
  assert program.flops() == 7 * 2 * scores * d
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * scores
