"""EOM, FOM, CMR: masks of answers; a dense FFN for who needs no expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths
from st_moe.config import Part
from st_moe.model import parts
from st_moe.model.beside import Conditional
from st_moe.model.dispatch import index
from st_moe.model.experts import Bank
from st_moe.model.layers import Mlp
from st_moe.model.moe import MoE
from st_moe.model.rows import Room
from st_moe.routing.losses import budget
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, Routed, Scores
from st_moe.routing.weighing import expert_output, final_output
from st_moe.train import terms
from tests.helpers import assert_trees_close, jit, random_params, tiny
from tests.methods import steps

G, S, E, K, D = 2, 6, 4, 2, 8
RATE = 0.3


def _ctx(train=True):
  valid = np.arange(S) < np.array([[S], [4]])
  return RouteContext(valid=jnp.asarray(valid), deterministic=not train)


@pytest.fixture(scope='module')
def seats():
  logits = np.random.default_rng(0).normal(size=(G, S, E)).astype('f4')
  route = lambda l: top_k(
    Scores.of(l), _ctx(), None, 4, k=K, train_policy='all'
  )
  return jit(route)(logits)


# EOM and FOM.


@pytest.fixture(scope='module')
def masks(seats):
  """Which of 10,000 draws kept each route [draw, g, s, k], by mechanism."""
  keys = jax.random.split(jax.random.key(0), 10_000)
  found = {}
  for weigh in (expert_output, final_output):
    draw = lambda key, f=weigh: f(seats, _ctx(), key, rate=RATE)
    weight = np.asarray(jit(jax.vmap(lambda k, d=draw: d(k).weight))(keys))
    kept = weight != 0
    # A weight is as it was, or 0.
    np.testing.assert_array_equal(weight, kept * np.asarray(seats.weight))
    found[weigh] = kept.reshape(-1, G, S, K)
  return found


@pytest.mark.parametrize('weigh', [expert_output, final_output])
def test_evaluation_hears_the_mean_of_all_masks(masks, seats, weigh):
  # Of 10,000 draws 0.7 +- 0.0046 stay: within 5 of those.
  share = masks[weigh].mean(0)
  np.testing.assert_allclose(share, 0.7, atol=0.023)
  heard = weigh(seats, _ctx(train=False), None, rate=RATE)
  np.testing.assert_allclose(heard.weight, 0.7 * seats.weight, rtol=1e-6)
  # Nothing else changes, in either.
  jax.tree.map(
    np.testing.assert_array_equal,
    heard.replace(weight=0),
    seats.replace(weight=0),
  )


def test_eom_masks_each_answer_by_itself_and_fom_a_token(masks):
  eom, fom = masks[expert_output], masks[final_output]
  assert (fom[..., 0] == fom[..., 1]).all()
  both = eom.all(-1).mean(0)
  np.testing.assert_allclose(both, 0.49, atol=0.025)  # 0.7 * 0.7.
  # Neighbours know nothing of each other, in either.
  for kept in (eom[..., 0], fom[..., 0]):
    pair = (kept[:, :, 0] & kept[:, :, 1]).mean(0)
    np.testing.assert_allclose(pair, 0.49, atol=0.025)


def test_a_weight_of_0_is_a_masked_answer(seats):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape).astype('f4')
  x, wi, wo = draw(G, S, D), draw(E, D, 12), draw(E, 12, D)
  heard = expert_output(seats, _ctx(), jax.random.key(3), rate=RATE)
  kept = np.asarray(heard.weight) != 0
  mask = np.zeros((G, S, E, 1), np.float32)
  for g, n in np.ndindex(kept.shape):
    mask[g, seats.token[g, n], seats.expert[g, n]] = kept[g, n]
  assert 0 < kept.mean() < 1

  def by_weight(x, wi, wo, weight):
    bank = Bank((wi,), wo, None, None, Part('relu'), 0.0)
    of = seats.replace(weight=jnp.where(kept, weight, 0))
    return index(x, of, bank, Room(4, E, 'gspmd'))

  def by_mask(x, wi, wo, weight):
    hidden = jax.nn.relu(jnp.einsum('gsd,edf->gsef', x, wi))
    answers = jnp.einsum('gsef,efd->gsed', hidden, wo) * mask
    return jnp.einsum(
      'gse,gsed->gsd', seats.replace(weight=weight).dense(S), answers
    )

  def both(f):
    loss = lambda *args: (f(*args) ** 2).sum()
    slopes = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    return jit(lambda *args: (f(*args), slopes(*args)))(x, wi, wo, seats.weight)

  a, b = both(by_weight), both(by_mask)
  names = ('y', 'loss', 'x', 'wi', 'wo', 'weight')
  flat = lambda found: dict(zip(names, jax.tree.leaves(found), strict=True))
  assert_trees_close(flat(a), flat(b), 1e-6)


def test_a_mask_needs_a_key():
  with pytest.raises(ValueError, match="rngs={'dropout': key}"):
    expert_output(None, _ctx(), None, rate=RATE)


def test_no_loss_knows_of_masks():
  """Nor do the draws of the selector: pairs with and without are alike."""
  moe = {'selector': Part.of('top_k', k=2, threshold=0.9)}
  masked = {
    'weighing': (
      Part.of('expert_output', rate=RATE),
      Part.of('final_output', rate=RATE),
    )
  }
  rows = np.random.default_rng(2).standard_normal((G, S, 16), np.float32)
  params, found = None, []
  for weighing in ({}, masked):
    config = tiny(moe={**moe, **weighing})
    layer = MoE(config, config.moe, S)
    params = params or random_params(layer, rows, _ctx(train=False))
    run = lambda layer=layer, params=params: layer.apply(
      {'params': params},
      rows,
      _ctx(),
      rngs={'dropout': jax.random.key(0)},
      mutable=['intermediates'],
    )
    found.append(jit(run)())
  (y, plain), (other, heard) = found
  jax.tree.map(np.testing.assert_array_equal, plain, heard)
  assert plain['intermediates']['record']['losses'].keys() == {
    'load_balance',
    'router_z',
  }
  silent = ~np.asarray(other).any(-1)
  assert (silent & np.asarray(y).any(-1)).any()
  assert not np.array_equal(y, other)


# CMR.

CMR = tiny(moe={'beside': Part.of('conditional', dropout=0.5)})


def _conditional(bias, train=False, key=0):
  """y and aside of x and answers, u fixed by `bias`; and the dense FFN's."""
  rng = np.random.default_rng(4)
  x, answers = rng.standard_normal((2, G, S, 16)).astype('f4')
  module = Conditional(CMR, CMR.moe, dropout=0.5)
  params = random_params(module, x, answers, _ctx(train=False))
  gate = {'kernel': np.zeros((16, 1), 'f4'), 'bias': np.float32([bias])}
  ffn = Mlp(24, Part('geglu'), 0.0, 0.1, jnp.float32)

  def run(params):
    mixed = module.apply(
      {'params': {**params, 'router': gate}},
      x,
      answers,
      _ctx(train),
      rngs={'dropout': jax.random.key(key)},
    )
    dense = ffn.apply({'params': params['mlp']}, x, deterministic=True)
    return *mixed, dense

  y, aside, dense = jax.device_get(jit(run)(params))
  return y, aside, dense, answers


def test_without_experts_it_is_the_dense_ffn_to_the_bit():
  y, aside, dense, _ = _conditional(-1e9)
  np.testing.assert_array_equal(y, dense)
  assert (aside['used'], aside['there']) == (0, 10)


def test_with_all_of_them_it_is_the_experts_and_padding_dense():
  y, aside, dense, answers = _conditional(1e9)
  valid = np.asarray(_ctx().valid)
  np.testing.assert_array_equal(y[valid], answers[valid])
  np.testing.assert_array_equal(y[~valid], dense[~valid])
  assert (aside['used'], aside['there']) == (10, 10)


def test_between_the_two_each_has_its_share():
  # sigmoid(ln 3) is 3/4.
  y, aside, dense, answers = _conditional(np.log(3))
  valid = np.asarray(_ctx().valid)[..., None]
  want = np.where(valid, dense / 4 + 3 * answers / 4, dense)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  assert aside['used'] == pytest.approx(7.5)


def test_training_drops_the_gate_and_scales_what_stays():
  # At u = 1/2 and rate 1/2 a token is all dense or all experts'.
  y, aside, dense, answers = _conditional(0.0, train=True)
  valid = np.asarray(_ctx().valid)
  dropped = (y == dense).all(-1) & valid
  np.testing.assert_array_equal(y[valid & ~dropped], answers[valid & ~dropped])
  assert 0 < dropped.sum() < 10
  assert aside['used'] == 10 - dropped.sum()


def _joined(used, there, share=0.8, weight=1.0):
  """The objective of layers that used so much, and its slope."""
  used, there = jnp.float32(used), jnp.float32(there)

  def loss(used):
    layer = lambda used, there: budget(
      Routed(None, None, None, None, None, {'used': used, 'there': there}),
      share=share,
    )
    found = {'budget': jax.vmap(layer)(used, there)}
    weights = {'budget': there}
    counts = {'budget': jnp.full(len(used), weight)}
    return terms.total(found, weights, counts, 'sum')

  value, slope = jax.value_and_grad(loss)(used)
  return float(value), np.asarray(slope)


def test_the_budget_is_of_all_layers_together():
  # 9 of 10 tokens and 7 of 10 are 16 of 20.
  assert _joined([9, 7], [10, 10])[0] == pytest.approx(0, abs=1e-7)
  # 5 of 10 and 20 of 40: half, and 0.3 too few, whatever each layer weighs.
  value, slope = _joined([5, 20], [10, 40], weight=0.1)
  assert value == pytest.approx(0.03)
  np.testing.assert_allclose(slope, [-0.1 / 50] * 2, rtol=1e-5)
  assert _joined([10, 40], [10, 40])[0] == pytest.approx(0.2)
  assert _joined([0, 0], [0, 0])[0] == 0


BUDGET = (Part.of('budget', share=0.5, weight=0.1),)


def _config(moe):
  model = steps.encoder(2, group_size=8, moe={**steps.CALM, **moe})
  return steps.config_of(model)


def test_the_budget_needs_the_gate_and_a_whole_batch():
  with pytest.raises(ValueError, match="'conditional' uses, and that is 'noth"):
    parts.check(tiny(moe={'losses': BUDGET}))
  config = _config({'beside': Part('conditional'), 'losses': BUDGET})
  parts.check(config.model)
  terms.check(config.model, 1)
  with pytest.raises(ValueError, match='losses.budget is of a whole batch'):
    terms.check(config.model, 2)


def test_a_step_and_an_evaluation_with_all_three():
  config = _config(
    {
      'weighing': (
        Part.of('expert_output', rate=0.2),
        Part.of('final_output', rate=0.2),
      ),
      'beside': Part.of('conditional', dropout=0.2),
      'losses': BUDGET,
    }
  )
  run = steps.Run(config)
  metrics = run.take()
  assert np.isfinite(metrics['loss']) and abs(metrics['budget']) < 0.5
  gate = 'encoder/layers/layer_0/moe/shared/router/'
  assert all(moved for path, moved in run.moved().items() if '/moe/' in path)
  assert {paths.role(gate + name) for name in ('kernel', 'bias')} == {'router'}
  # Scanned as unrolled.
  one, other = steps.both_ways(config.model, train=False)
  assert_trees_close(one, other, tolerance=2e-6)
  np.testing.assert_array_equal(one['budget'][1], [48, 48])


@pytest.mark.parametrize('name', ['eom', 'fom', 'cmr'])
def test_the_config(name):
  file = f'configs/methods/{name}.py'
  found = config_file.load(f'{file}:runlocal')
  parts.check(found.model)
  base = config_file.load(f'{file}:base,runlocal')
  lines = config_file.diff(*map(config_file.to_dict, (base, found)))
  field = {'cmr': 'beside'}.get(name, 'weighing')
  assert any(line.startswith(f'model.moe.{field}') for line in lines)
  assert len(lines) == {'cmr': 4}.get(name, 1)
