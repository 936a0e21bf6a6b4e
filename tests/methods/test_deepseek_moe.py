"""DeepSeekMoE: finer experts, shared ones, balance by devices or by a bias."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import checkpoint, config_file, counts, paths, sharding
from st_moe.config import CheckpointConfig, OptimizerConfig, Part
from st_moe.model import parts
from st_moe.model.layers import Mlp
from st_moe.model.moe import MoE
from st_moe.plan import cost
from st_moe.routing.losses import load_balance_all, load_balance_groups
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, Routed, Scores
from st_moe.train.after import rebalanced
from tests.helpers import (
  assert_trees_close,
  jit,
  random_params,
  tiny,
  with_moe,
)
from tests.methods import steps

FILE = 'configs/methods/deepseek_moe.py'


def test_a_token_meets_as_much_however_fine_the_experts():
  vocabulary = {'model.vocab_size': 2048}
  configs = [config_file.load(f'{FILE}:m={m}', vocabulary) for m in (1, 2, 4)]
  # Two of eight experts of 256 units, one of them shared.
  assert [c.model.moe.k for c in configs] == [1, 3, 7]
  for c in configs:
    assert {c.model.executed_dim(s) for s in c.model.stacks} == {2 * 256}
  d, lengths = 128, (128, 29)
  found = []
  for c in configs:
    experts = c.model.moe.num_experts
    routers = 2 * d * experts
    # A router of m times as many columns is all that they differ by.
    active = cost.active_params(c) - routers
    flops = counts.forward_flops(c.model, *lengths)
    found.append((active, flops - 2 * d * experts * sum(lengths)))
  assert len(set(found)) == 1
  # So wide is the dense twin, too.
  twin = config_file.load(f'{FILE}:dense')
  assert [s.dim for s in twin.model.plan('encoder').layers[1]][1:] == [512]


def test_the_config_balances_devices_too():
  found = config_file.load(f'{FILE}:devices=4,runlocal').model
  parts.check(found)
  assert found.moe.losses == (
    Part.of('load_balance_all', weight=1e-2, normalized=True),
    Part.of('load_balance_groups', weight=0.05, groups=4),
  )


def test_the_config_with_a_bias_has_no_loss_of_balance():
  config = config_file.load(f'{FILE}:bias,runlocal')
  assert config.model.moe.losses == ()
  assert config.model.moe.shaping == (Part('balanced'),)
  assert config.optimizer.after == (Part('rebalanced'),)
  parts.check(config.model)
  assert config_file.load(f'{FILE}:shared=0').model.moe.k == 8


# Shared experts.

WIDE = tiny(moe={'beside': Part.of('shared', count=2), 'hidden_dim': 12})


@pytest.fixture(scope='module')
def layer():
  """(parameters, answers of x [2, 6, d] and valid, as the layer gives them)."""
  x = np.random.default_rng(0).standard_normal((2, 6, 16), np.float32)
  valid = np.arange(6) < np.array([[6], [3]])
  ctx = RouteContext(valid=jnp.asarray(valid))
  params = random_params(MoE(WIDE, WIDE.moe, 6), x, ctx)

  @jit
  def answer(config_params, x):
    return MoE(WIDE, WIDE.moe, 6).apply({'params': config_params}, x, ctx)

  plain = with_moe(WIDE, beside='nothing')
  routed = {k: v for k, v in params.items() if k != 'shared'}
  alone = jit(
    lambda x: MoE(plain, plain.moe, 6).apply({'params': routed}, x, ctx)
  )(x)
  return params, x, valid, answer, np.asarray(alone)


def test_shared_experts_answer_every_token_beside_the_routed_ones(layer):
  params, x, valid, answer, alone = layer
  y = np.asarray(answer(params, x))
  # Two experts of 12 units are one of 24: by their halves.
  kernels = {k: v['kernel'] for k, v in params['shared']['mlp'].items()}
  assert kernels['wi_0'].shape == (16, 24)
  want = alone.astype(float)
  for half in (slice(0, 12), slice(12, 24)):
    a, b = x @ kernels['wi_0'][:, half], x @ kernels['wi_1'][:, half]
    gelu = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    want = want + gelu * b @ kernels['wo'][half]
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-6)
  assert not alone[~valid].any() and y[~valid].any()


def test_no_token_hears_of_padding(layer):
  params, x, valid, answer, _ = layer
  other = np.where(valid[..., None], x, 7.0)
  a, b = np.asarray(answer(params, x)), np.asarray(answer(params, other))
  np.testing.assert_array_equal(a[valid], b[valid])


def test_the_dense_ffn_is_what_stands_beside(layer):
  # Experts that say nothing leave the dense FFN, to the bit.
  params, x, _, answer, _ = layer
  silent = jax.tree.map(np.zeros_like, params['experts'])
  y = answer({**params, 'experts': silent}, x)
  ffn = Mlp(24, Part('geglu'), 0.0, 0.1, jnp.float32)
  mlp = {'params': params['shared']['mlp']}
  want = jit(lambda x: ffn.apply(mlp, x, deterministic=True))(x)
  np.testing.assert_array_equal(y, want)


# Balance.


def _routed(logits, k):
  ctx = RouteContext(valid=jnp.full(logits.shape[:2], True))
  scores = Scores.of(logits)
  return Routed(None, scores, top_k(scores, ctx, None, 99, k=k), ctx, None, {})


def _values(logits, *losses):
  """Each loss of the two best experts of each token."""

  def means(logits):
    pairs = (loss(_routed(logits, k=2)) for loss in losses)
    return [total / weight for total, weight in pairs]

  return [*map(float, jit(means)(jnp.asarray(logits, jnp.float32)))]


SHARES = functools.partial(load_balance_all, normalized=True)
GROUPS = {
  n: functools.partial(load_balance_groups, groups=n) for n in (1, 2, 4)
}


def test_balance_is_1_at_uniform():
  # Each of 4 tokens sure of two neighbours of a ring: every expert is asked
  # twice.
  ring = np.eye(4) + np.roll(np.eye(4), 1, axis=1)
  found = _values(50 * ring[None], load_balance_all, SHARES, *GROUPS.values())
  assert found == pytest.approx([2, 1, 1, 1, 1])


def test_balance_of_devices_by_hand():
  # Probabilities .4, .3, .2, .1 of three tokens, .1, .4, .2, .3 of a fourth;
  # two are asked each: f = [3, 4, 0, 1] / 8, the mean of p is [13, 13, 8, 6] /
  # 40. Of devices 0-1 and 2-3: f = [7, 1] / 8 and p = [26, 14] / 40.
  p = np.array([[0.4, 0.3, 0.2, 0.1]] * 3 + [[0.1, 0.4, 0.2, 0.3]])
  experts = 4 * (3 * 13 + 4 * 13 + 0 + 6) / (8 * 40)
  devices = 2 * (7 * 26 + 14) / (8 * 40)
  # Each expert a device is the loss of experts; one device is always even.
  found = _values(np.log(p[None]), SHARES, GROUPS[4], GROUPS[2], GROUPS[1])
  assert found == pytest.approx([experts, experts, devices, 1])


def test_groups_divide_the_experts():
  losses = (Part.of('load_balance_groups', groups=3, weight=0.1),)
  with pytest.raises(
    ValueError, match='groups = 3 should divide the 4 experts'
  ):
    parts.check(tiny(moe={'losses': losses}))


# The bias.


def test_the_bias_by_hand():
  # Asked for 5, 1, 1 and 1 times, 2 on the average; the second layer evenly.
  params = {'moe': {'kept_bias': jnp.zeros((2, 4)), 'kernel': jnp.ones(3)}}
  wanted = {'moe': jnp.array([[5.0, 1, 1, 1], [2, 2, 2, 2]])}
  moved = rebalanced(None, params, wanted, jnp.int32(0), rate=0.25)['moe']
  want = [[-0.25, 0.25, 0.25, 0.25], [0] * 4]
  np.testing.assert_array_equal(moved['kept_bias'], want)
  np.testing.assert_array_equal(moved['kernel'], [1, 1, 1])


MODEL = steps.encoder(
  2,
  group_size=8,
  moe={
    **steps.CALM,
    'shaping': (Part('balanced'),),
    'beside': Part('shared'),
    'losses': (),
  },
)
RULE = OptimizerConfig('adamw', after=(Part.of('rebalanced', rate=0.01),))
BIASED = steps.config_of(MODEL, rows=16, optimizer=RULE)
KEPT = 'encoder/layers/layer_0/moe/kept_bias'


@pytest.fixture(scope='module')
def run():
  run = steps.Run(BIASED)
  return run, [run.take(), run.take()]


def test_the_bias_moves_by_its_rule_alone(run):
  run, metrics = run
  bias = paths.by_path(run.params)[KEPT]
  # Whoever sat more often than the mean of 96 x 2 / 4 = 48 in the first step
  # lost a hundredth, and won or lost one more in the second. No optimizer had
  # a share in it.
  first = np.sign(48 - metrics[0]['encoder/load'])
  second = np.round(100 * bias) - first
  np.testing.assert_allclose(bias, (first + second) / 100, atol=1e-8)
  assert set(np.unique(second)) <= {-1, 0, 1} and np.abs(bias).max() > 0
  assert np.isfinite([m['loss'] for m in metrics]).all()


def test_no_optimizer_has_the_bias(run):
  params = run[0].params
  assert paths.role(KEPT) == 'kept'
  for train in (*paths.TRAINED, 'kept_bias|router', '.'):
    mine, rest = (paths.by_path(p) for p in paths.split(params, train))
    assert KEPT not in mine and KEPT in rest
    # What is shared is dense, and part of the sparse layer.
    shared = any('/moe/shared/mlp/wi' in path for path in mine)
    assert shared == (train in ('all', 'moe', 'ffn', '.'))
  with pytest.raises(ValueError, match='trains nothing'):
    paths.split(params, 'kept_bias')


def test_eight_devices_two_microbatches_unrolled(run):
  flat = dataclasses.replace(MODEL, scan_layers=False)
  config = dataclasses.replace(BIASED, model=flat, microbatches=2)
  params = paths.unroll(run[0].start, MODEL)
  other = steps.Run(config, params, sharding.make_mesh(data=2, expert=4))
  last = other.take(2)
  params = paths.roll(other.params, flat)
  bias = paths.by_path(params)[KEPT]
  np.testing.assert_array_equal(bias, paths.by_path(run[0].params)[KEPT])
  assert last['loss'] == pytest.approx(float(run[1][1]['loss']), rel=2e-5)
  assert_trees_close(params, run[0].params)


def test_saved_and_restored_with_the_parameters(run, tmp_path):
  state = run[0].state
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig(), ())
  checkpoints.save(2, state, {})
  checkpoints.close()
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
  )
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig(), ())
  found, _ = checkpoints.restore(abstract, notify=print)
  checkpoints.close()
  bias = paths.by_path(found.params)[KEPT]
  np.testing.assert_array_equal(bias, paths.by_path(run[0].params)[KEPT])
