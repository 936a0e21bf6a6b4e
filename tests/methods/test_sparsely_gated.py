"""Noisy top-k gating: noise by token, chances, both matrices learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths
from st_moe.config import StackConfig
from st_moe.model.gates import NoisyGate
from st_moe.model.transformer import Transformer
from st_moe.routing import losses
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, Routed, Scores
from tests.helpers import (
  examples,
  jit,
  method_lines,
  padded_batch,
  random_params,
  slow_softmax,
  tiny,
)
from tests.methods import steps

S, D, E, K = 2000, 3, 8, 4
GATE = NoisyGate(E)


def _draw(params, x, key):
  """Scores, seats and weights by expert of a group in training."""
  ctx = RouteContext(jnp.full(x.shape[:2], True), deterministic=False)
  rngs = {'dropout': key}
  scores = GATE.apply({'params': params}, x, ctx, None, rngs=rngs)
  seats = top_k(scores, ctx, None, S, k=K, train_policy='all')
  return scores, seats, seats.dense(S)


_drawn = jit(_draw)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'kernel': draw(D, E), 'noise_kernel': draw(D, E)}
  x = draw(1, S, D)
  return params, x, jax.device_get(_drawn(params, x, jax.random.key(0)))


def test_noise_is_as_large_as_the_token_says(case):
  params, x, (scores, _, _) = case
  clean = x.astype(float) @ params['kernel']
  std = np.log1p(np.exp(x.astype(float) @ params['noise_kernel']))
  np.testing.assert_allclose(scores.logits, clean, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(scores.aside['std'], std, rtol=1e-5)
  eps = (scores.select - clean) / std
  # 16,000 draws: mean 0 and deviation 1, each to four of its errors.
  assert abs(eps.mean()) < 0.032 and abs(eps.std() - 1) < 0.023
  # Of each expert its own: no two go together.
  apart = np.corrcoef(eps[0].T) - np.eye(E)
  assert np.abs(apart).max() < 4 / np.sqrt(S)


def test_weights_are_a_softmax_over_the_k_largest(case):
  _, _, (scores, _, weights) = case
  for t in range(50):
    h = scores.select[0, t]
    kept = np.full(E, -np.inf)
    best = np.argsort(-h)[:K]
    kept[best] = h[best]
    np.testing.assert_allclose(weights[0, t], slow_softmax(kept), atol=1e-6)
  assert ((weights > 0).sum(-1) == K).all()
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_at_birth_every_expert_is_as_likely():
  x = np.random.default_rng(1).normal(size=(1, S, D)).astype(np.float32)
  ctx = RouteContext(np.full((1, S), True))
  boxed = GATE.init(jax.random.key(0), x, ctx, None)['params']
  params = jax.tree.map(np.asarray, jax.tree.leaves(boxed))
  assert len(params) == 2 and not any(p.any() for p in params)
  zeros = {name: np.zeros((D, E), np.float32) for name in boxed}
  scores, seats, _ = _drawn(zeros, x, jax.random.key(1))
  np.testing.assert_allclose(scores.aside['std'], np.log(2), rtol=1e-6)
  # K / E of the tokens each, to four deviations.
  share = np.asarray(seats.chosen(S)).mean((0, 1))
  np.testing.assert_allclose(share, K / E, atol=4 * 0.5 / np.sqrt(S))


def test_evaluation_draws_nothing(case):
  params, x, _ = case
  ctx = RouteContext(np.full((1, S), True))
  scores = GATE.apply({'params': params}, x, ctx, None)
  np.testing.assert_array_equal(scores.select, scores.logits)
  assert not scores.aside


def test_inputs_out_of_all_bounds():
  far = dict.fromkeys(('kernel', 'noise_kernel'), np.ones((D, E), np.float32))

  def total(x):
    scores, _, weights = _draw(far, x, jax.random.key(0))
    chances = losses.chances(scores, K)
    return (weights**2).sum() + chances.sum()

  x = 1e4 * np.sign(np.random.default_rng(0).normal(size=(1, S, D)))
  value, slope = jit(jax.value_and_grad(total))(x.astype(np.float32))
  assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize('k', [1, 2, 4])
def test_chances_against_fresh_draws(k):
  # Two tokens, a deviation for each expert; one noise is drawn again, the
  # others stay: 10^5 draws have errors of at most 0.0016.
  rng = np.random.default_rng(k)
  logits, std = rng.normal(size=(2, 5)), rng.uniform(0.3, 2, (2, 5))
  h = logits + std * rng.normal(size=(2, 5))
  scores = Scores(*(jnp.asarray(a[None]) for a in (logits, h, h)))
  found = losses.chances(scores.replace(aside={'std': jnp.asarray(std)}), k)[0]
  for t in range(2):
    for e in range(5):
      fresh = logits[t, e] + std[t, e] * rng.normal(size=100_000)
      ahead = (np.delete(h[t], e)[:, None] > fresh).sum(0)
      assert float(found[t, e]) == pytest.approx((ahead < k).mean(), abs=0.01)


def _loss(loss, logits, k):
  ctx = RouteContext(np.full(logits.shape[:2], True))
  scores = Scores.of(logits, std=jnp.ones(logits.shape))
  seats = top_k(scores, ctx, None, 99, k=k)
  return losses.LOSSES[loss](Routed(None, scores, seats, ctx, None, {}))[0]


@pytest.mark.parametrize('loss', ['importance', 'load'])
def test_losses_are_0_where_experts_are_even(loss):
  # Each token likes an expert of its own, by as much.
  logits = jnp.asarray([[np.roll([3.0, 1, 0, 0], i) for i in range(4)]])
  value = jit(lambda l: _loss(loss, l, 2))
  assert float(value(logits)) == pytest.approx(0, abs=1e-6)
  assert float(value(logits[:, [0, 0, 0, 1]])) > 1


@pytest.mark.parametrize('of', ['weights', 'importance', 'load'])
def test_both_matrices_hear_of_everything(case, of):
  params, x, _ = case
  x = x[:, :64]

  def total(params):
    ctx = RouteContext(jnp.full(x.shape[:2], True), deterministic=False)
    rngs = {'dropout': jax.random.key(0)}
    scores = GATE.apply({'params': params}, x, ctx, None, rngs=rngs)
    seats = top_k(scores, ctx, None, 64, k=K, train_policy='all')
    if of == 'weights':
      return (seats.weight**2).sum()
    return losses.LOSSES[of](Routed(x, scores, seats, ctx, None, {}))[0]

  slopes = jit(jax.grad(total))(params)
  assert all(np.abs(slopes[name]).min() > 1e-4 for name in params)


MOE = config_file.load('configs/methods/sparsely_gated.py:runlocal').model.moe


def _model(layers):
  stack = StackConfig(layers, 1, 0, group_size=16)
  return tiny(encoder=stack, decoder=None, moe=MOE)


def test_a_model_trains_and_evaluates():
  run = steps.Run(steps.config_of(_model(1)))
  found, evaluated = run.take(), run.terms()
  routers = 0.1 * (found['importance'] + found['load'])
  plain = found['cross_entropy'] + 1e-4 * found['z_loss']
  assert float(found['loss']) == pytest.approx(float(plain + routers), rel=1e-5)
  assert found['load'] > 0 and found['encoder/active_experts'] == K
  assert found['encoder/dropped_routes'] == 0
  assert all(run.moved().values())
  assert paths.count(run.start)['router'] == 2 * 16 * E
  assert not evaluated['load'][1].any()


def test_scanned_and_unrolled_are_equal():
  # The decisions of two layers, and what they answer.
  model = _model(2)
  flat = dataclasses.replace(model, scan_layers=False)
  inputs = padded_batch(model, examples(model))
  params = random_params(Transformer(model), **inputs)

  def run(model, params):
    return Transformer(model).apply(
      {'params': params}, **inputs, enable_dropout=False
    )

  scanned = jit(functools.partial(run, model))(params)
  unrolled = jit(functools.partial(run, flat))(paths.unroll(params, model))
  np.testing.assert_allclose(unrolled, scanned, rtol=2e-5, atol=2e-5)


def test_the_config_changes_the_method_alone():
  assert method_lines('sparsely_gated') == [
    'model.moe.eval_capacity.dropless: False -> True',
    "model.moe.extra_ffn: 'after' -> 'none'",
    "model.moe.gate.name: 'linear' -> 'noisy'",
    "model.moe.losses.importance: None -> {'weight': 0.1}",
    "model.moe.losses.load: None -> {'weight': 0.1}",
    "model.moe.losses.load_balance: {'weight': 0.01} -> None",
    "model.moe.losses.router_z: {'weight': 0.001} -> None",
    'model.moe.selector.k: 2 -> 4',
    'model.moe.selector.normalize: None -> True',
    "model.moe.selector.train_policy: None -> 'all'",
    'model.moe.train_capacity.dropless: False -> True',
  ]
