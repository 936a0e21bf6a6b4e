"""Thresholds that an even share of tokens passes; the rule that moves them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths, sharding
from st_moe.config import Capacity, OptimizerConfig, Part
from st_moe.model import parts
from st_moe.routing.selectors import top_k
from st_moe.routing.shaping import quantile
from st_moe.routing.types import RouteContext, Scores
from st_moe.train import step
from st_moe.train.after import averaged, rules_after
from tests.helpers import assert_trees_close, jit, slow_softmax
from tests.methods import steps

E, S, K = 8, 64, 2


def _tokens(seed=0):
  """Four groups in which some experts please more; with padding, one empty."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(4, S, E)) + rng.normal(size=E)
  valid = rng.random((4, S)) < 0.8
  valid[3] = False
  return jnp.asarray(logits, jnp.float32), jnp.asarray(valid)


def _shaped(threshold, logits, valid, train=True):
  ctx = RouteContext(valid=valid, deterministic=not train)
  return quantile(
    Scores.of(logits), ctx, None, {'threshold': jnp.asarray(threshold)}, k=K
  )


_left = jit(lambda *args: _shaped(*args).aside['kept']['threshold'])


@functools.partial(jit, static_argnames='train')
def _load(threshold, logits, valid, train=True):
  """How much more or less than its share each expert is asked for."""
  ctx = RouteContext(valid=valid, deterministic=not train)
  scores = _shaped(threshold, logits, valid, train)
  seats = top_k(scores, ctx, None, S, k=K, train_policy='all')
  asked = seats.chosen(S).sum((0, 1))
  return asked / asked.mean() - 1


def _slow(threshold, logits, valid):
  """Where thresholds should be, token by token; and how many tokens say so."""
  above = []
  for logit in np.asarray(logits, float)[np.asarray(valid)]:
    probs = slow_softmax(logit)
    best = np.sort(probs - threshold)[::-1]
    above.append(probs - (best[K - 1] + best[K]) / 2)
  n = len(above)
  # So many are above the one that follows them.
  found = np.sort(above, 0)[::-1][n * K // E]
  return found - found.mean(), n


@pytest.mark.parametrize('threshold', [np.zeros(E), np.linspace(-0.2, 0.3, E)])
def test_by_a_loop_over_the_tokens(threshold):
  logits, valid = _tokens()
  threshold = threshold.astype(np.float32)
  found, count = _slow(threshold, logits, valid)
  summed, weight = _left(threshold, logits, valid)
  assert weight == count > 100
  np.testing.assert_allclose(summed / weight, found, atol=2e-6)
  # Neither what padding holds nor a group of it counts.
  filled = jnp.where(valid[..., None], logits, 9.0 * jnp.arange(E))
  again, _ = _left(threshold, filled[:3], valid[:3])
  np.testing.assert_array_equal(again, summed)


def test_a_threshold_by_hand():
  # Two experts and one choice: the cutoff is 1/2, and of expert 0 the tokens
  # are .4, .3, .2 and .1 above it; two of four pass .2. Of expert 1 they are
  # as much below; two pass -.3. Centred, these are .25 and -.25.
  logits = jnp.log(
    jnp.array([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]])
  )
  ctx = RouteContext(valid=jnp.full((1, 4), True), deterministic=False)
  run = jit(
    lambda t: quantile(Scores.of(logits), ctx, None, {'threshold': t}, k=1)
  )
  summed, weight = run(jnp.zeros(2)).aside['kept']['threshold']
  np.testing.assert_allclose(summed / weight, [0.25, -0.25], atol=1e-6)
  moved = run(summed / weight)
  np.testing.assert_array_equal(moved.select.argmax(-1), [[0, 0, 1, 1]])
  # In no weight.
  np.testing.assert_array_equal(moved.probs, Scores.of(logits).probs)


def test_loads_become_even():
  logits, valid = _tokens()
  rule = rules_after(OptimizerConfig(after=(Part.of('averaged', rate=0.5),)))
  state = {'moe': {'kept_threshold': jnp.zeros(E)}}
  begin = _load(state['moe']['kept_threshold'], logits, valid)
  assert np.abs(begin).max() > 0.5
  for i in range(30):
    said = _left(state['moe']['kept_threshold'], logits, valid)
    state = rule(state, state, {'moe/kept_threshold': said}, i)
  for train in (True, False):
    even = _load(state['moe']['kept_threshold'], logits, valid, train)
    assert np.abs(even).max() < 0.1
  # Evaluation has nothing to say of a batch: it does not look at one.
  assert not _shaped(jnp.zeros(E), logits, valid, train=False).aside


def test_who_is_ruled_out_stays_so():
  logits, valid = _tokens()
  ctx = RouteContext(valid=valid, deterministic=False)
  scores = Scores.of(logits)
  out = scores.replace(select=scores.select.at[:, :9, 2:].set(-jnp.inf))
  shaped = jit(
    lambda out: quantile(out, ctx, None, {'threshold': jnp.zeros(E)}, k=K)
  )(out)
  np.testing.assert_array_equal(
    shaped.select == -jnp.inf, out.select == -jnp.inf
  )
  # Tokens without a choice say nothing.
  summed, weight = shaped.aside['kept']['threshold']
  assert weight == valid[:, 9:].sum() and np.isfinite(summed).all()


def test_eight_devices_are_one():
  logits, valid = (jnp.concatenate([a, a[::-1]]) for a in _tokens())
  one = _left(jnp.zeros(E), logits, valid)
  with sharding.use(sharding.make_mesh(data=2, expert=4)) as mesh:
    put = lambda a: jax.device_put(a, sharding.batch_sharding(mesh))
    eight = jit(lambda *args: _shaped(*args).aside['kept']['threshold'])(
      jnp.zeros(E), put(logits), put(valid)
    )
  for a, b in zip(eight, one, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_rule_by_hand():
  # Two scanned layers, of which the second saw nobody; and what is not kept.
  params = {
    'layer': {
      'kept_threshold': jnp.array([[1.0, 2.0], [3.0, 4.0]]),
      'kernel': jnp.ones(2),
    }
  }
  said = jnp.array([[6.0, 0.0], [0.0, 0.0]]), jnp.array([2.0, 0.0])
  moved = averaged(None, params, {'layer/kept_threshold': said}, 0, rate=0.5)
  np.testing.assert_array_equal(
    moved['layer']['kept_threshold'], [[2, 1], [3, 4]]
  )
  np.testing.assert_array_equal(moved['layer']['kernel'], [1, 1])


QUANTILE = (Part.of('quantile', k=2),)


def _model(layers=1, shaping=QUANTILE, **moe):
  calm = Part.of('top_k', k=2, train_policy='all')
  losses = (Part.of('router_z', weight=1e-3),)
  return steps.encoder(
    layers,
    moe={'shaping': shaping, 'selector': calm, 'losses': losses, **moe},
  )


def _run(rate, model=None, learning_rate=0.01, **changes):
  adam = OptimizerConfig(
    'adamw',
    learning_rate=learning_rate,
    after=(Part.of('averaged', rate=rate),),
  )
  config = steps.config_of(model or _model(), optimizer=adam, **changes)
  return steps.Run(config)


def _threshold(run):
  (found,) = [
    leaf
    for path, leaf in paths.by_path(run.state.params).items()
    if path.endswith('/moe/kept_threshold')
  ]
  return np.asarray(found)


def test_steps_make_the_loads_of_a_layer_even():
  # Two microbatches of 48 tokens with two choices; nothing else learns.
  run = _run(
    0.5,
    _model(train_capacity=Capacity(dropless=True)),
    learning_rate=0.0,
    microbatches=2,
  )
  run.state = run.state.replace(
    params=paths.map_by_path(
      lambda path, a: (
        a * (0 if 'kept' in path else 4 if 'router' in path else 1)
      ),
      run.state.params,
    )
  )
  halves = [
    jax.tree.map(lambda a, i=i: a[4 * i : 4 * i + 4], run.batch)
    for i in range(2)
  ]
  said = jit(
    lambda params, half: step.forward(
      run.model,
      run.config.loss,
      params,
      half,
      rng=jax.random.key(0),
      step=jnp.int32(0),
    )[2]
  )
  both = [
    next(v for k, v in said(run.state.params, half).items() if 'kept' in k)
    for half in halves
  ]
  first = run.take()['encoder/load'][0]
  assert np.abs(first / 24 - 1).max() > 0.3
  (a, n), (b, m) = both
  assert n + m == 48 and n != m
  np.testing.assert_allclose(_threshold(run), (a + b) / 48 / 2, atol=1e-7)
  last = run.take(20)['encoder/load'][0]
  assert last.sum() == 96 and np.abs(last / 24 - 1).max() < 0.1
  assert 0 < run.evaluated() < 100


def test_thresholds_of_0_and_a_rate_of_0_are_the_base():
  logits, valid = _tokens()

  @jit
  def seats(logits):
    ctx = RouteContext(valid=valid, deterministic=False)
    pick = lambda scores: top_k(scores, ctx, None, S, k=K, train_policy='all')
    plain = Scores.of(logits)
    return pick(plain), pick(_shaped(jnp.zeros(E), logits, valid))

  base, still = seats(logits)
  jax.tree.map(np.testing.assert_array_equal, base, still)
  kept = jnp.linspace(-0.2, 0.3, E)
  said = {'kept_threshold': (jnp.ones(E), jnp.ones(()))}
  moved = averaged(None, {'kept_threshold': kept}, said, 0, rate=0.0)
  np.testing.assert_array_equal(moved['kept_threshold'], kept)


def test_scanned_layers_have_thresholds_each():
  assert_trees_close(*steps.both_ways(_model(layers=2)), tolerance=2e-6)


def test_another_k_than_the_selector_is_refused():
  parts.check(_model())
  with pytest.raises(ValueError, match='quantile.k = 3 should be .*top_k., 2'):
    parts.check(_model(shaping=(Part.of('quantile', k=3),)))


def test_the_config_says_the_method_and_no_more():
  load = lambda arg: config_file.to_dict(
    config_file.load(f'configs/methods/quantile_balancing.py:{arg}runlocal')
  )
  assert config_file.diff(load('base,'), load('')) == [
    "model.moe.losses.load_balance: {'weight': 0.01} -> None",
    "model.moe.shaping.quantile: None -> {'k': 2}",
    "optimizer.after.averaged: None -> {'rate': 0.5}",
  ]
  parts.check(config_file.load('configs/methods/quantile_balancing.py').model)
