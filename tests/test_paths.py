"""Who is trained: the sets of the paper on a real tree; what freezing saves."""

import functools

import jax
import numpy as np
import pytest

from st_moe import paths, sharding
from st_moe.config import Config, OptimizerConfig
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer, step
from st_moe.train.state import abstract_params, init_state, parameter_axes
from tests.helpers import tiny

MODEL = Transformer(tiny())
SHAPES = abstract_params(MODEL)
BATCH = {
  'encoder_input_tokens': np.full((2, 8), 3, np.int32),
  'decoder_input_tokens': np.full((2, 4), 4, np.int32),
  'decoder_target_tokens': np.full((2, 4), 5, np.int32),
  'decoder_loss_weights': np.ones((2, 4), np.float32),
}


def _trained(train):
  mine, _ = paths.split(SHAPES, train)
  return set(paths.by_path(mine))


def test_the_sets_of_the_paper():
  everything = _trained('all')
  assert everything == set(paths.by_path(SHAPES))
  # 2 stacks, one sparse layer each: a router and 3 matrices of the experts.
  assert len(_trained('moe')) == 8 and len(_trained('router')) == 2
  assert _trained('router') < _trained('moe')
  assert _trained('moe') | _trained('non_moe') == everything
  assert not _trained('moe') & _trained('non_moe')
  # 2 x 2 layers of self-attention and 2 of cross-attention, 4 kernels each, and
  # 2 tables of positions.
  assert len(_trained('attention')) == 4 * (2 * 2 + 2) + 2
  # 2 x 2 layers, each with a dense FFN (the sparse one has it behind): 3 each.
  assert len(_trained('ffn')) == 3 * 2 * 2
  for train in ('attention', 'ffn'):
    assert _trained(train) < _trained('non_moe')
    assert not any('norm' in path for path in _trained(train))


def test_a_pattern_names_what_has_it_in_its_path():
  assert _trained('^decoder/.*/router/') == {
    path for path in _trained('router') if path.startswith('decoder/')
  }
  assert _trained('norm/scale$') == {
    path for path in _trained('all') if path.endswith('norm/scale')
  }


@pytest.mark.parametrize('train', ['all', 'moe', 'attention', 'logits'])
def test_parts_join_to_the_whole(train):
  tree = jax.tree.map(lambda a: np.zeros(a.shape), SHAPES)
  joined = paths.merge(*paths.split(tree, train))
  assert jax.tree.structure(joined) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(tree), strict=True):
    assert a is b


def test_nothing_to_train_is_an_error():
  with pytest.raises(ValueError, match="'expert' trains nothing"):
    paths.split({'encoder': {'mlp': 1}}, 'expert')
  with pytest.raises(ValueError, match='no regular expression: missing'):
    paths.split(SHAPES, '(')


def _lowered(train, name):
  """A first state and the FLOPs of a step; nothing is compiled."""
  config = Config(
    model=MODEL.config, optimizer=OptimizerConfig(name=name, train=train)
  )
  made = optimizer.make(config.optimizer, parameter_axes(MODEL))
  init = functools.partial(init_state, MODEL, made)
  state = sharding.unbox(jax.eval_shape(init, jax.random.key(0)))
  run = jax.jit(step.make_train_step(MODEL, made, config))
  return state, run.lower(state, BATCH).cost_analysis()['flops']


@pytest.mark.parametrize(('name', 'copies'), [('adafactor', 1), ('adamw', 2)])
def test_frozen_parameters_have_no_gradient_and_no_slots(name, copies):
  state, flops = _lowered('router', name)
  # Two routers [16, 4]: one second moment a weight, for AdamW a first one too.
  sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
  assert sum(n for n in sizes if n > 1) == copies * 2 * 16 * 4
  # A backward pass costs two forward ones; without gradients of weights, one.
  _, whole = _lowered('all', name)
  assert flops < 0.75 * whole
