"""Balance of the whole batch, whoever shares a group with whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import about, config_file, sharding
from st_moe.config import Part
from st_moe.model import parts
from st_moe.model.moe import MoE
from st_moe.routing.losses import LOSSES
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, Routed, Scores
from st_moe.train import terms
from tests.helpers import assert_trees_close, jit, random_params, slow_softmax
from tests.methods import steps

E, S, K = 4, 6, 2
BALANCE = ['load_balance', 'load_balance_all']


@functools.cache
def _compiled(name, scope):
  """(logits, valid) -> (the loss, its slope by the logits)."""

  def loss(logits, valid):
    ctx = RouteContext(valid=valid)
    scores = Scores.of(logits)
    seats = top_k(scores, ctx, None, S, k=K)
    routed = Routed(None, scores, seats, ctx, None, {})
    total, weight = LOSSES[name](routed, scope=scope)
    return total / jnp.maximum(weight, 1)

  return jit(jax.value_and_grad(loss))


def _measure(name, logits, valid=None, scope='batch'):
  logits = jnp.asarray(logits, jnp.float32)
  valid = np.full(logits.shape[:2], True) if valid is None else valid
  return jax.device_get(_compiled(name, scope)(logits, jnp.asarray(valid)))


def _tokens():
  """Four groups, with padding; the last of them empty."""
  rng = np.random.default_rng(1)
  logits = 2 * rng.normal(size=(4, S, E))
  valid = rng.random((4, S)) < 0.7
  valid[:3, 0], valid[3] = True, False
  return logits, valid


def test_groups_may_favour_other_experts():
  # Group 0 asks experts 0 and 1, group 1 the others: even (1) over the batch,
  # while inside each group half of the experts do all (2).
  logits = np.zeros((2, S, E))
  logits[0, :3, 0] = logits[0, 3:, 1] = logits[1, :3, 2] = logits[1, 3:, 3] = 50
  assert _measure('load_balance', logits)[0] == pytest.approx(1)
  group, _ = _measure('load_balance', logits, scope='group')
  assert group == pytest.approx(2)
  # All to one expert is as bad as it can be in either.
  logits[:] = [50, 0, 0, 0]
  for scope in ('batch', 'group'):
    assert _measure('load_balance', logits, scope=scope)[0] == pytest.approx(E)


@pytest.mark.parametrize('name', BALANCE)
def test_by_a_loop_over_the_tokens(name):
  logits, valid = _tokens()
  f, p, count = np.zeros(E), np.zeros(E), 0
  for token, real in zip(logits.reshape(-1, E), valid.reshape(-1), strict=True):
    if real:
      first, second = np.argsort(-token)[:2]
      f[first] += 1
      f[second] += name == 'load_balance_all'
      p += slow_softmax(token)
      count += 1
  found, slope = _measure(name, logits, valid)
  assert found == pytest.approx(E * (f / count * p / count).sum(), rel=1e-5)
  assert abs(found - _measure(name, logits, valid, 'group')[0]) > 1e-2
  # d loss / d p_e = e f_e / count of each token, through its softmax.
  probs = slow_softmax(logits)
  push = E * f / count / count
  expected = probs * (push - (probs * push).sum(-1, keepdims=True))
  expected[~valid] = 0
  np.testing.assert_allclose(slope, expected, atol=1e-7)


@pytest.mark.parametrize('name', BALANCE)
def test_blind_to_who_shares_a_group(name):
  logits, valid = _tokens()
  value, slope = _measure(name, logits, valid)
  order = np.random.default_rng(2).permutation(4 * S)
  mixed = lambda a: a.reshape(4 * S, -1)[order].reshape(2, 2 * S, -1)
  other = _measure(name, mixed(logits), mixed(valid)[..., 0])
  assert other[0] == pytest.approx(value, rel=1e-6)
  np.testing.assert_allclose(other[1], mixed(slope), atol=1e-7)


def test_padding_and_empty_groups_count_nothing():
  logits, valid = _tokens()
  filled = np.where(valid[..., None], logits, 7.0 * np.arange(E))
  for name in BALANCE:
    value, slope = _measure(name, logits, valid)
    assert _measure(name, filled, valid)[0] == value
    assert not slope[~valid].any()
    assert _measure(name, logits[:3], valid[:3])[0] == pytest.approx(value)
    assert _measure(name, logits, np.zeros_like(valid))[0] == 0


def test_microbatches_are_refused_as_long_as_one_would_not_know_the_others():
  for name in BALANCE:
    for scope, whole in (('group', False), ('batch', True)):
      part = Part.of(name, scope=scope, weight=0.01)
      assert about.of(parts.choose('losses', part)).whole is whole
      model = steps.encoder(moe={'losses': (part,)})
      terms.check(model, 1)
      if whole:
        with pytest.raises(ValueError, match=f'{name} is of a whole batch'):
          terms.check(model, 2)
      else:
        terms.check(model, 2)
  with pytest.raises(ValueError, match="losses.scope 'all'"):
    parts.choose('losses', Part.of('load_balance', scope='all'))


def _model(scope='batch'):
  loss = Part.of('load_balance', scope=scope, weight=1.0)
  calm = Part.of('top_k', k=2, train_policy='all')
  return steps.encoder(group_size=8, moe={'losses': (loss,), 'selector': calm})


def test_eight_devices_are_one():
  # 8 groups, one a device; each alone knows the f and p of an eighth.
  model = _model()
  layer = MoE(model, model.moe, 8)
  x = np.random.default_rng(0).standard_normal((8, 8, 16), np.float32)
  valid = jnp.arange(8) < 1 + jnp.arange(8)[:, None]
  ctx = RouteContext(valid=valid)
  params = random_params(layer, x, ctx)

  def loss(params, x):
    _, sown = layer.apply({'params': params}, x, ctx, mutable=['intermediates'])
    total, weight = sown['intermediates']['record']['losses']['load_balance']
    return total / weight

  run = lambda x: jit(jax.value_and_grad(loss))(params, x)
  one = run(x)
  with sharding.use(sharding.make_mesh(data=2, expert=4)) as mesh:
    eight = run(jax.device_put(x, sharding.batch_sharding(mesh)))
  np.testing.assert_allclose(eight[0], one[0], rtol=2e-6)
  router = lambda found: found[1]['router']
  assert_trees_close(router(eight), router(one), tolerance=2e-6)
  assert np.abs(router(one)['kernel']).max() > 1e-3


def test_a_step_minimises_it():
  run = steps.Run(steps.config_of(_model()))
  first, last = run.take()['load_balance'], run.take(10)['load_balance']
  assert 0.9 < last < first and run.evaluated() < 100


def test_the_config_says_the_method_and_no_more():
  load = lambda arg: config_file.to_dict(
    config_file.load(f'configs/methods/global_balance.py:{arg}runlocal')
  )
  assert config_file.diff(load('base,'), load('')) == [
    "model.moe.losses.load_balance.scope: None -> 'batch'"
  ]
