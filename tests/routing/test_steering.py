"""Experts off and on: who is asked, and what everybody else is told."""

import functools

import jax
import numpy as np
import pytest

from st_moe import paths
from st_moe.config import Part, StackConfig
from st_moe.model.transformer import Transformer
from st_moe.routing import steering
from st_moe.routing.selectors import dropless
from st_moe.routing.types import RouteOverride, Scores
from tests.helpers import examples, jit, padded_batch, random_params, tiny

# Sparse are layers 1 and 3 of the encoder, 0 and 1 of the decoder.
CONFIG = dropless(
  tiny(
    encoder=StackConfig(4, 2, 1, group_size=16),
    decoder=StackConfig(2, 1, 0, group_size=8),
    moe={'selector': Part.of('top_k', k=2), 'extra_ffn': 'none'},
  )
)
BATCH = padded_batch(CONFIG, examples(CONFIG))


@functools.cache
def _params():
  return random_params(Transformer(CONFIG), **BATCH)


@functools.cache
def _compiled(config, ks):
  def run(params, biases):
    model = Transformer(config)
    routes = {s: RouteOverride(b, ks[s]) for s, b in biases.items()}
    apply = functools.partial(
      model.apply, {'params': params}, enable_dropout=False, mutable=['routing']
    )
    encoded, a = apply(
      BATCH['encoder_input_tokens'],
      override=routes.get('encoder'),
      method='encode',
    )
    logits, b = apply(
      encoded, *BATCH.values(), override=routes.get('decoder'), method='decode'
    )
    return logits, {**a['routing'], **b['routing']}

  return jit(run)


class _Ks(dict):
  def __hash__(self):
    return hash(tuple(sorted(self.items())))


def _run(overrides, config=CONFIG, params=None):
  """Logits, and the load of every expert in every sparse layer, [e]."""
  ks = _Ks({s: o.k for s, o in overrides.items()})
  biases = {s: np.asarray(o.bias) for s, o in overrides.items()}
  logits, sown = _compiled(config, ks)(params or _params(), biases)
  load = {}
  for path, leaf in paths.by_path(sown).items():
    if path.endswith('seats/load'):
      for piece, i in paths.unrolled_paths(path, config):
        stack, layer = piece.split('/')[:2]
        number = layer.removeprefix('layers_')
        load[f'{stack}.{number}'] = np.asarray(
          leaf if i is None else leaf[i]
        ).sum(0)
  return np.asarray(logits), load


def test_who_is_off_gets_no_token_and_the_others_all():
  _, free = _run({})
  assert set(free) == {'encoder.1', 'encoder.3', 'decoder.0', 'decoder.1'}
  asked = free['encoder.3'][2], free['decoder.0'][0], free['decoder.1'][0]
  assert min(asked) > 10
  _, load = _run(steering.overrides(CONFIG, off=['encoder.3.2', 'decoder.*.0']))
  off = load['encoder.3'][2], load['decoder.0'][0], load['decoder.1'][0]
  assert off == (0, 0, 0)
  assert load['encoder.3'][[0, 1, 3]].min() > 0
  for name, each in load.items():
    assert each.sum() == free[name].sum()  # Two experts a token, as before.


def test_who_is_on_gets_every_token():
  found = steering.overrides(CONFIG, on=['decoder.1.3'])
  assert set(found) == {'decoder'}
  _, load = _run(found)
  real = (BATCH['decoder_target_tokens'] > 0).sum()
  assert load['decoder.1'][3] == real and load['decoder.0'][3] < real


def test_one_expert_a_token():
  _, load = _run(steering.overrides(CONFIG, k=1))
  real = (BATCH['encoder_input_tokens'] > 0).sum()
  assert load['encoder.1'].sum() == load['encoder.3'].sum() == real


def test_nothing_asked_changes_nothing():
  none = steering.overrides(CONFIG)
  assert none == {}
  zeros = {
    s: RouteOverride(np.zeros((2, 4), np.float32), 2)
    for s in ('encoder', 'decoder')
  }
  free, steered = _run(none), _run(zeros)
  np.testing.assert_allclose(free[0], steered[0], atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, free[1], steered[1])


def test_rows_find_their_layers_scanned_or_not():
  found = steering.overrides(
    CONFIG, off=['encoder.1.0', 'encoder.3.1', 'decoder.0.2', 'decoder.1.3']
  )
  unrolled = tiny(
    encoder=CONFIG.encoder, decoder=CONFIG.decoder, moe=CONFIG.moe,
    scan_layers=False,
  )  # fmt: skip
  params = paths.unroll(_params(), CONFIG)
  a, b = _run(found), _run(found, unrolled, params)
  np.testing.assert_allclose(a[0], b[0], atol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
  load = a[1]
  off = load['encoder.1'][0], load['encoder.3'][1]
  assert (*off, load['decoder.0'][2], load['decoder.1'][3]) == (0, 0, 0, 0)


def test_weights_are_shared_among_those_left():
  """Off is as if the router had never known the expert."""
  logits = np.array([[[2.0, 1.0, 0.5, -1.0]]], np.float32)
  scores = Scores(logits, logits, jax.nn.softmax(logits))
  bias = np.array([0, -np.inf, 0, 0], np.float32)
  steered = scores.steered(RouteOverride(bias))
  left = np.exp([2.0, 0.5, -1.0])
  np.testing.assert_allclose(
    steered.probs[0, 0, [0, 2, 3]], left / left.sum(), rtol=1e-6
  )
  assert steered.probs[0, 0, 1] == 0
  np.testing.assert_array_equal(steered.logits, logits)  # Clean, for losses.


def test_an_expert_whose_rivals_had_no_chance():
  logits = np.array([[[120.0, 0.0, -3.0]]], np.float32)
  scores = Scores(logits, logits, jax.nn.softmax(logits))
  off = scores.steered(RouteOverride(np.array([-np.inf, 0, 0], np.float32)))
  assert np.isfinite(off.probs).all() and off.probs[0, 0, 0] == 0
  on = scores.steered(RouteOverride(np.array([0, 1e4, 0], np.float32)))
  np.testing.assert_array_equal(on.probs[0, 0], [0, 1, 0])


def test_a_dense_model_has_none():
  dense = tiny(encoder=StackConfig(1, 0, 0), decoder=StackConfig(1, 0, 0))
  assert steering.overrides(dense) == {}
  with pytest.raises(ValueError, match='This model is dense'):
    steering.overrides(dense, k=1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'off': ['decoder.1']}, "'decoder.1' names no expert; they are called"),
    ({'off': ['decoder.1.4']}, 'decoder.1.4: the experts are 0, 1, 2, 3'),
    ({'on': ['encoder.0.1']}, 'sparse layers of the encoder are 1, 3'),
    ({'on': ['encodr.1.1']}, 'the sparse stacks are encoder, decoder'),
    ({'k': 5}, '5 experts per token: there are 4'),
    ({'on': ['decoder.1.*']}, 'decoder layer 1 has 4 experts on, for 2 per'),
    (
      {'off': ['decoder.0.1'], 'on': ['decoder.*.1']},
      'is asked to be both on and off',
    ),
    (
      {'off': ['encoder.1.*']},
      'encoder layer 1 has 0 of 4 experts left, for 2 per token',
    ),
  ],
)
def test_what_cannot_be_asked(options, message):
  with pytest.raises(ValueError, match=message):
    steering.overrides(CONFIG, **options)
