"""Any model out of any checkpoint: by rules, and dense into sparse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import paths
from st_moe.config import Capacity, Part, StackConfig
from st_moe.interop import rules
from st_moe.model.layers import Mlp
from st_moe.model.moe import MoE
from st_moe.model.transformer import Transformer
from st_moe.routing.types import RouteContext
from tests.helpers import examples, jit, padded_batch, random_params, tiny

DENSE = tiny(encoder=StackConfig(4, 0, 0), decoder=StackConfig(4, 0, 0))
SPARSE = dataclasses.replace(
  DENSE,
  encoder=StackConfig(4, 2, 1, group_size=16),
  decoder=StackConfig(4, 2, 1, group_size=8),
  moe=dataclasses.replace(
    tiny().moe, extra_ffn='none', eval_capacity=Capacity(dropless=True)
  ),
)
UPCYCLE = rules.RULES['upcycle']


def _params(config, seed=0):
  ids = jnp.ones((1, 2), jnp.int32)
  return random_params(Transformer(config), ids, ids, ids, seed=seed)


def _there(config=DENSE):
  return paths.by_path(paths.unroll(_params(config), config))


def _logits(config, params):
  batch = padded_batch(config, examples(config))
  apply = functools.partial(Transformer(config).apply, enable_dropout=False)
  # Of real targets: an FFN answers to padding too, an expert never.
  real = batch['decoder_target_tokens'] > 0
  return np.asarray(jit(apply)({'params': params}, **batch))[real]


@pytest.mark.parametrize('scan', [True, False])
def test_an_upcycled_model_says_what_its_parent_says(scan):
  """Two equal experts with weights that sum to 1 are the FFN they were."""
  model = dataclasses.replace(SPARSE, scan_layers=scan)
  fresh = _params(model, seed=1)
  params, lines = rules.initialize(fresh, model, _there(), UPCYCLE)
  want = _logits(DENSE, _params(DENSE))
  np.testing.assert_allclose(_logits(model, params), want, rtol=2e-5, atol=2e-5)
  assert np.abs(want).max() > 0.5
  # 2 sparse layers a stack: 3 matrices each, and a router that stays new.
  assert lines[1] == (
    'copied to every expert: 12 arrays, as decoder/layers_1/moe/experts/wi_0'
    '/kernel'
  )
  assert lines[2].startswith('new: 4 arrays, as decoder/layers_1/moe/router')
  assert len(lines) == 3  # Nothing was left behind.
  routers = lambda p: {
    k: v for k, v in paths.by_path(p).items() if '/router/' in k
  }
  for path, kernel in routers(params).items():
    np.testing.assert_array_equal(kernel, routers(fresh)[path])


def test_tokens_with_both_experts_are_those_of_the_dense_layer():
  """Who keeps both seats says the same, and who lost one does not."""
  config = tiny(moe={'eval_capacity': Capacity(count=3)})
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((2, 8, 16)), jnp.float32)
  ctx = RouteContext(valid=jnp.full((2, 8), True))
  params = random_params(MoE(config, config.moe, 8), x, ctx)
  dense = {
    w: {'kernel': kernel['kernel'][0]}
    for w, kernel in params['experts'].items()
  }
  copy = lambda kernel: np.broadcast_to(kernel[:1], kernel.shape)
  params['experts'] = jax.tree.map(copy, params['experts'])
  y, sown = MoE(config, config.moe, 8).apply(
    {'params': params}, x, ctx, mutable=['routing']
  )
  mlp = Mlp(24, Part('geglu'), 0.0, 1.0, jnp.float32)
  want = mlp.apply({'params': dense}, x, deterministic=True)
  seated = np.asarray(sown['routing']['seats'].place).reshape(2, 8, 2) >= 0
  both = seated.all(-1)
  assert 3 <= both.sum() <= 13
  np.testing.assert_allclose(y[both], want[both], rtol=1e-4, atol=1e-5)
  assert (np.abs(y - want)[~both].max(-1) > 1e-4).all()


def test_the_first_rule_that_fits_wins():
  asked = {
    r'decoder/layers_1/mlp/wo/kernel': r'decoder/layers_0/mlp/wo/kernel',
    r'decoder/.*': '',
    r'encoder/layers_(\d)/mlp/(.*)': r'encoder/layers_\1/mlp/\2',
  }
  there, fresh = _there(), _params(DENSE, seed=1)
  params, lines = rules.initialize(fresh, DENSE, there, asked)
  got = paths.by_path(paths.unroll(params, DENSE))
  new = paths.by_path(paths.unroll(fresh, DENSE))
  for path, array in got.items():
    if path == 'decoder/layers_1/mlp/wo/kernel':
      want = there['decoder/layers_0/mlp/wo/kernel']
    else:
      want = (new if path.startswith('decoder') else there)[path]
    np.testing.assert_array_equal(array, want, path)
  assert lines[-1].startswith('left behind: ')


@pytest.mark.parametrize(
  ('asked', 'changes', 'message'),
  [
    (
      {'encodr/.*': ''},
      {},
      "No parameter fits the rule 'encodr/[.][*]' of init",
    ),
    ({}, {'mlp_dim': 32}, r'mlp/wi_0/kernel is \[16, 32\], and what .*16, 24'),
    (
      {},
      {'encoder': StackConfig(5, 0, 0)},
      'made of encoder/layers_4/mlp/wi_0',
    ),
    (
      {'(.*)/layers_4/(.*)': r'\1/layers_9/\2'},
      {'encoder': StackConfig(5, 0, 0)},
      "made of encoder/layers_9/mlp.* rule {'encoder/layers_4/mlp/wi_0/ker",
    ),
  ],
)
def test_what_cannot_be(asked, changes, message):
  model = dataclasses.replace(DENSE, **changes)
  with pytest.raises(ValueError, match=message):
    rules.initialize(_params(model), model, _there(), asked)


def test_names_of_rule_sets():
  assert rules.named('params', {}) == {}
  own = {'encoder/.*': ''}
  assert list(rules.named('upcycle', own)) == [*own, *UPCYCLE]
  # A rule of one's own is asked first, and stands for one of the same text.
  router = {r'.*/moe/router/.*': 'encoder/layers_1/moe/router/kernel'}
  asked = rules.named('upcycle', router)
  assert list(asked)[0] == list(router)[0] and len(asked) == len(UPCYCLE)
  assert asked[list(router)[0]] == 'encoder/layers_1/moe/router/kernel'
  with pytest.raises(
    ValueError, match="init_take 'parms'. Did you mean 'params'"
  ):
    rules.named('parms', {})


def test_the_experts_of_top_1_are_scaled():
  """Why upcycling wants k = 2 or more: a probability is less than 1."""
  one = Part.of('top_k', k=1)
  model = dataclasses.replace(
    SPARSE, moe=dataclasses.replace(SPARSE.moe, selector=one)
  )
  params, _ = rules.initialize(_params(model), model, _there(), UPCYCLE)
  want = _logits(DENSE, _params(DENSE))
  assert np.abs(_logits(model, params) - want).max() > 0.1
