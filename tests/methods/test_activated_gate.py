"""An activation and a temperature before the softmax, by hand."""

import functools
import math

import jax
import numpy as np
import pytest

from st_moe import config_file, paths
from st_moe.config import Part
from st_moe.model import parts
from st_moe.model.gates import ActivatedGate, LinearGate
from st_moe.routing.types import RouteContext
from tests.helpers import assert_trees_close, jit, slow_gelu, slow_softmax
from tests.methods import steps

G, S, D, E = 2, 5, 6, 4
ACTS = {
  'sigmoid': lambda h: 1 / (1 + np.exp(-h)),
  'tanh': np.tanh,
  'gelu': slow_gelu,
  'identity': lambda h: h,
}
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(G, S, D)).astype(np.float32)
PARAMS = {
  'kernel': _RNG.normal(size=(D, E)).astype(np.float32),
  'bias': _RNG.normal(size=E).astype(np.float32),
}


@functools.cache
def _compiled(**options):
  gate = ActivatedGate(E, **options)

  def score(params, x, step):
    ctx = RouteContext(valid=np.full((G, S), True), step=step)
    return gate.apply({'params': params}, x, ctx, None)

  return jit(score)


def _score(params=PARAMS, *, step=None, **options):
  return jax.device_get(_compiled(**options)(params, X, step))


@pytest.mark.parametrize('act', ACTS)
def test_by_its_formula(act):
  h = ACTS[act](X.astype(float) @ PARAMS['kernel'] + PARAMS['bias'])
  scores = _score(act=act, temperature=0.5)
  # The z-loss is of what the temperature divides.
  np.testing.assert_allclose(scores.logits, h, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(scores.select, h / 0.5, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(scores.probs, slow_softmax(h / 0.5), rtol=1e-4)
  assert all(a.dtype == np.float32 for a in jax.tree.leaves(scores))


def test_the_identity_is_the_plain_gate():
  plain = LinearGate(E).apply(
    {'params': {'kernel': PARAMS['kernel']}},
    X,
    RouteContext(valid=np.full((G, S), True)),
    None,
  )
  params = {**PARAMS, 'bias': np.zeros(E, np.float32)}
  found = _score(params, act='identity')
  jax.tree.map(np.testing.assert_array_equal, found, plain)


@pytest.mark.parametrize('act', ['sigmoid', 'gelu'])
def test_hot_is_even_and_cold_is_sure(act):
  hot = _score(act=act, temperature=1e4).probs
  np.testing.assert_allclose(hot, 1 / E, atol=1e-3)
  cold = _score(act=act, temperature=1e-6)
  np.testing.assert_allclose(cold.probs.max(-1), 1, rtol=1e-5)
  assert (cold.probs.argmax(-1) == cold.logits.argmax(-1)).all()


def test_a_temperature_that_falls():
  falls = Part.of('linear', start=2.0, end=0.5, steps=10)
  sizes = [
    np.abs(_score(step=step, act='identity', temperature=falls).select).max()
    for step in (0, 10, None)  # An evaluation knows no step.
  ]
  assert sizes[1] == sizes[2] == pytest.approx(4 * sizes[0], rel=1e-5)


def test_a_temperature_that_is_learned():
  fixed = _score(act='tanh', temperature=0.5)
  params = {**PARAMS, 'temperature': np.ones(1, np.float32)}
  born = _score(params, act='tanh', temperature=0.5, learned=True)
  np.testing.assert_allclose(born.probs, fixed.probs, rtol=1e-5)
  # A factor of e for each 1, and so never below 0.
  later = {**PARAMS, 'temperature': np.zeros(1, np.float32)}
  later = _score(later, act='tanh', temperature=0.5, learned=True)
  np.testing.assert_allclose(later.select, math.e * born.select, rtol=1e-5)

  gate = ActivatedGate(E, act='tanh', temperature=0.5, learned=True)
  ctx = RouteContext(valid=np.full((G, S), True))
  sharpness = lambda params: (
    gate.apply({'params': params}, X, ctx, None).probs ** 2
  ).sum()
  slopes = jit(jax.grad(sharpness))(params)
  assert all(np.isfinite(s).all() for s in slopes.values())
  assert slopes['temperature'] < 0 and np.abs(slopes['bias']).min() > 0


def test_large_inputs_stay_finite():
  for act in ACTS:
    scores = _compiled(act=act)(PARAMS, 1e4 * X, None)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(scores))


def _encoder(layers=1, **options):
  gate = Part.of('activated', **{'act': 'sigmoid', 'learned': True, **options})
  return steps.encoder(layers, moe={'gate': gate, 'extra_ffn': 'none'})


def test_a_schedule_is_not_learned():
  falls = Part.of('linear', start=2.0, end=0.5, steps=10)
  parts.check(_encoder(temperature=falls, learned=False))
  with pytest.raises(ValueError, match='starts at a number'):
    parts.check(_encoder(temperature=falls))
  with pytest.raises(ValueError, match="'sigmoid' or 'tanh'|sigmoid"):
    parts.check(_encoder(act='sigmiod'))


def test_it_trains_and_evaluates():
  run = steps.Run(steps.config_of(_encoder()))
  before = jax.device_get(paths.by_path(run.state.params))
  first = run.take()
  assert run.take(10)['cross_entropy'] < first['cross_entropy']
  assert 0 < run.evaluated() < first['cross_entropy']
  after = paths.by_path(jax.device_get(run.state.params))
  router = {p for p in before if '/router/' in p}
  assert {p.rpartition('/')[2] for p in router} == {
    'kernel',
    'bias',
    'temperature',
  }
  assert all((before[p] != after[p]).all() for p in router)


def test_scanned_layers_have_a_temperature_each():
  assert_trees_close(*steps.both_ways(_encoder(layers=2)), tolerance=2e-6)


def test_the_config_says_the_method_and_no_more():
  load = lambda arg: config_file.load(f'configs/methods/activated_gate.py{arg}')
  config = load('')
  gate = config.model.moe.gate
  assert gate.kwargs['temperature'].kwargs['steps'] == config.total_steps
  parts.check(config.model)
  changed = config_file.diff(
    *(config_file.to_dict(load(a)) for a in (':base,runlocal', ':runlocal'))
  )
  assert all(line.startswith('model.moe.gate') for line in changed)
