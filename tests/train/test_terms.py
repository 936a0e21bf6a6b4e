"""Losses by hand: cross-entropy, z-loss, smoothing, weights, router terms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.config import LossConfig, MoEConfig, Part, StackConfig
from st_moe.model.transformer import Transformer
from st_moe.paths import unroll
from st_moe.train import terms as terms_lib
from tests.helpers import examples, padded_batch, random_params, tiny

# Softmaxes of these are 1/8, 2/8, 5/8: logsumexp is log 8.
_LOGITS = np.log(np.array([1, 2, 5], np.float32))


def _terms(targets, weights, **options):
  logits = jnp.broadcast_to(_LOGITS, (*np.shape(targets), 3))
  terms = terms_lib.token_terms(
    logits, jnp.array(targets), jnp.array(weights, jnp.float32), **options
  )
  return {k: (float(s), float(w)) for k, (s, w) in terms.items()}


def test_cross_entropy_and_z_loss_by_hand():
  # Two real targets (classes 2 and 0) and one padded away.
  terms = _terms([[2, 0, 1]], [[1, 1, 0]])
  assert terms['cross_entropy'] == pytest.approx(
    (math.log(8 / 5) + math.log(8 / 1), 2)
  )
  assert terms['z_loss'] == pytest.approx((2 * math.log(8) ** 2, 2))
  assert terms['accuracy'] == (1, 2)  # The likeliest is class 2.


def test_weights_count_tokens_by_halves():
  terms = _terms([[2, 0], [1, 2]], [[0.5, 0], [2, 1]])
  assert terms['cross_entropy'] == pytest.approx(
    (1.5 * math.log(8 / 5) + 2 * math.log(8 / 2), 3.5)
  )
  assert terms['accuracy'] == (1.5, 3.5)


def test_label_smoothing_spreads_a_share_over_all_classes():
  # 0.7 of the target and 0.3 of the mean over the three classes.
  each = [math.log(8 / n) for n in (1, 2, 5)]
  expected = 0.7 * each[2] + 0.3 * sum(each) / 3
  terms = _terms([[2]], [[1]], label_smoothing=0.3)
  assert terms['cross_entropy'] == pytest.approx((expected, 1), rel=1e-6)
  # The z-loss knows no targets.
  assert terms['z_loss'] == pytest.approx((math.log(8) ** 2, 1))


@pytest.mark.parametrize('positions', [0, 1, 3, 4, 7, 9])
def test_logits_of_a_few_positions_at_a_time_lose_as_much(positions):
  rng = np.random.default_rng(0)
  x, kernel = (
    jnp.asarray(rng.normal(size=size), jnp.float32)
    for size in ((2, 7, 4), (4, 50))
  )
  targets = jnp.asarray(rng.integers(0, 50, (2, 7)))
  weights = jnp.asarray(rng.random((2, 7)), jnp.float32)

  def summed(positions, x, kernel):
    terms = terms_lib.token_terms_of(
      lambda x: x @ kernel,
      x,
      targets,
      weights,
      positions=positions,
      label_smoothing=0.1,
    )
    return sum(s for s, _ in terms.values()), terms

  grad = jax.grad(summed, argnums=(1, 2), has_aux=True)
  expected, found = grad(0, x, kernel), grad(positions, x, kernel)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  # And what waits for the backward pass has no logits.
  run = functools.partial(summed, positions)
  back = jax.eval_shape(
    lambda *args: jax.vjp(run, *args, has_aux=True)[1], x, kernel
  )
  largest = max(a.size for a in jax.tree.leaves(back))
  assert (largest < 2 * 7 * 50) == (0 < positions < 7)


def test_z_loss_sees_a_shift_that_cross_entropy_does_not():
  logits, targets = jnp.asarray(_LOGITS), jnp.array(1)
  here, z = terms_lib.cross_entropy(logits, targets)
  there, shifted = terms_lib.cross_entropy(logits + 10, targets)
  assert float(there) == pytest.approx(float(here), abs=1e-5)
  assert float(shifted) == pytest.approx((math.log(8) + 10) ** 2, rel=1e-6)
  assert float(z) == pytest.approx(math.log(8) ** 2, rel=1e-6)


def test_large_logits_stay_finite():
  found, z = terms_lib.cross_entropy(jnp.array([2000.0, 0.0]), jnp.array(1))
  assert float(found) == 2000 and float(z) == 4e6


# Two sparse layers: 3 tokens with balance 1.5, 6 with balance 1.0.
_TERMS = {
  'cross_entropy': (jnp.array(8.0), jnp.array(4.0)),
  'z_loss': (jnp.array(20.0), jnp.array(4.0)),
  'load_balance': (jnp.array([4.5, 6.0]), jnp.array([3.0, 6.0])),
  'router_z': (jnp.array([30.0, 12.0]), jnp.array([3.0, 6.0])),
}
_WEIGHTS = {name: weight for name, (_, weight) in _TERMS.items()}


def _total(terms=_TERMS, weights=_WEIGHTS, *, layers='sum', **changes):
  counts = {'z_loss': 1e-4, 'load_balance': 1e-2, 'router_z': 1e-3, **changes}
  counts = {'cross_entropy': 1.0, **counts}
  return float(terms_lib.total(terms, weights, counts, layers))


def test_total_by_hand():
  # 8/4 + 1e-4 * 20/4 + 1e-2 * (1.5 + 1) + 1e-3 * (10 + 2)
  assert _total() == pytest.approx(2 + 5e-4 + 2.5e-2 + 1.2e-2, rel=1e-6)
  # The mean of two layers is half of their sum.
  expected = 2 + 5e-4 + 1.25e-2 + 0.6e-2
  assert _total(layers='mean') == pytest.approx(expected, rel=1e-6)
  assert _total(z_loss=0.0, load_balance=0.0, router_z=1.0) == pytest.approx(14)


def test_total_divides_by_the_weights_of_the_whole_batch():
  """Parts divided by common weights add up; parts by their own would not."""
  rng = np.random.default_rng(0)
  parts = [
    {
      name: (jnp.asarray(rng.random(s.shape)), jnp.asarray(rng.random(w.shape)))
      for name, (s, w) in _TERMS.items()
    }
    for _ in range(3)
  ]
  pair = lambda x: isinstance(x, tuple)
  whole = jax.tree.map(lambda *a: sum(a), *parts)
  weights = {k: 10 * whole[k][1] for k in whole}
  together = _total(whole, weights)
  assert sum(_total(p, weights) for p in parts) == pytest.approx(together)
  own = [jax.tree.map(lambda t: t[1], p, is_leaf=pair) for p in parts]
  apart = sum(_total(p, w) for p, w in zip(parts, own, strict=True))
  assert apart != pytest.approx(together)


def test_a_batch_of_padding_costs_nothing():
  nothing = jax.tree.map(jnp.zeros_like, _TERMS)
  weights = jax.tree.map(jnp.zeros_like, _WEIGHTS)
  assert _total(nothing, weights) == 0


def test_a_dense_model_has_no_router_terms():
  assert terms_lib.records({}) == {} and terms_lib.router_terms({}) == {}
  terms = {k: _TERMS[k] for k in ('cross_entropy', 'z_loss')}
  weights = {k: _WEIGHTS[k] for k in terms}
  assert _total(terms, weights) == pytest.approx(2 + 5e-4)


def test_a_weight_may_change_with_the_step_and_from_stack_to_stack():
  falling = dict(name='linear', start=1.0, end=0.0, steps=10)
  moe = MoEConfig(4, losses=(Part.of('router_z', weight=falling),))
  own = MoEConfig(4, losses=(Part.of('router_z', weight=3.0),))
  model = tiny(
    moe=moe,
    encoder=StackConfig(4, 2, 1),
    decoder=StackConfig(2, 2, 1, moe=own),
  )
  found = terms_lib.coefficients(model, LossConfig(), jnp.int32(5))
  assert found['cross_entropy'] == 1 and found['z_loss'] == 1e-4
  # The decoder's one sparse layer, then the encoder's two.
  np.testing.assert_allclose(found['router_z'], [3, 0.5, 0.5])
  end = terms_lib.coefficients(model, LossConfig(), None)
  np.testing.assert_allclose(end['router_z'], [3, 0, 0])


def _record(layer):
  """What sparse layer `layer` would sow, its number in every leaf."""
  number = float(layer)
  return {
    'losses': {'load_balance': (number, 10 * number)},
    'gauges': {},
    'load': np.array([layer, 100 + layer]),
  }


def test_records_stand_in_the_order_of_the_layers():
  # Twelve layers, sparse at 2, 6 and 10: scanned in three periods of four, or
  # each by itself. By name alone, layers_10 would come before layers_2.
  deep = [2, 6, 10]
  rows = [_record(i) for i in deep]
  stacked = jax.tree.map(lambda *a: np.stack(a), *rows)
  scanned = {'layers': {'layer_2': {'moe': {'record': stacked}}}}
  unrolled = {
    f'layers_{i}': {'moe': {'record': row}}
    for i, row in zip(deep, rows, strict=True)
  }
  decoder = {'layers_0': {'moe': {'record': _record(50)}}}
  for encoder in (scanned, unrolled):
    found = terms_lib.records({'encoder': encoder, 'decoder': decoder})
    assert list(found) == ['encoder', 'decoder']
    load = found['encoder']['load']
    assert load.tolist() == [[2, 102], [6, 106], [10, 110]]
    sums, weights = terms_lib.router_terms(found)['load_balance']
    # Stacks by name, whatever the order they ran in.
    assert sums.tolist() == [50, 2, 6, 10]
    assert weights.tolist() == [500, 20, 60, 100]


def test_a_remainder_comes_after_the_scanned_layers():
  stacked = jax.tree.map(lambda *a: np.stack(a), _record(0), _record(2))
  encoder = {
    'layers_4': {'moe': {'record': _record(4)}},
    'layers': {'layer_0': {'moe': {'record': stacked}}},
  }
  load = terms_lib.records({'encoder': encoder})['encoder']['load']
  assert load[:, 0].tolist() == [0, 2, 4]


def test_scanned_and_unrolled_models_record_the_same():
  # Layers 0 and 2 are sparse; 2 is what the scan over pairs leaves.
  config = tiny(decoder=None, encoder=StackConfig(3, 2, 0, group_size=16))
  batch = padded_batch(config, examples(config))
  params = random_params(Transformer(config), **batch)

  def rows(config, params):
    _, sown = Transformer(config).apply(
      {'params': params}, **batch, enable_dropout=False, mutable='intermediates'
    )
    return terms_lib.records(sown['intermediates'])['encoder']

  scanned = jax.jit(lambda p: rows(config, p))(params)
  apart = dataclasses.replace(config, scan_layers=False)
  unrolled = jax.jit(lambda p: rows(apart, p))(unroll(params, config))
  assert scanned['load'].shape == (2, 4)
  np.testing.assert_array_equal(unrolled['load'], scanned['load'])
  assert len({tuple(row) for row in scanned['load'].tolist()}) == 2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), unrolled, scanned
  )
