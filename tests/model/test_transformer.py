"""The whole model: what it costs, what it may see, and its equal forms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from st_moe import counts, paths, sharding
from st_moe.config import Capacity, ModelConfig, MoEConfig, Part, StackConfig
from st_moe.model.attention import relative_bucket
from st_moe.model.moe import MoE
from st_moe.model.transformer import Layer, Transformer
from st_moe.routing.selectors import dropless
from st_moe.routing.types import RouteContext
from tests.helpers import (
  assert_trees_close,
  boxed_shapes,
  count_params,
  examples,
  jit,
  packed_batch,
  padded_batch,
  params_by_hand,
  random_params,
  tiny,
  with_moe,
)

# The smallest that do: every layer sparse, twice over, or one a stack.
DECODER_ONLY = tiny(encoder=None, decoder=StackConfig(2, 1, 0, 8))
ENCODER_ONLY = tiny(decoder=None)
SHALLOW = dropless(
  tiny(encoder=StackConfig(1, 1, 0, 16), decoder=StackConfig(1, 1, 0, 8))
)


def _batch(config, **kw):
  return padded_batch(config, examples(config), **kw)


def _shapes(config):
  batch = _batch(config)
  return sharding.unbox(boxed_shapes(Transformer(config), **batch))


def _params(config, seed=0):
  return random_params(Transformer(config), **_batch(config), seed=seed)


@functools.cache
def _forward(config):
  """Logits of (params, batch), without noise."""
  model = Transformer(config)
  run = lambda p, b: model.apply({'params': p}, **b, enable_dropout=False)
  return jit(run)


def _cross_entropy(logits, targets):
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return loss.mean(where=targets > 0)


@functools.cache
def _step(config):
  """(loss, gradients) of (params, batch) in evaluation mode."""
  model = Transformer(config)

  def loss(params, batch):
    logits = model.apply({'params': params}, **batch, enable_dropout=False)
    stack = 'decoder_target' if config.decoder else 'encoder_input'
    return _cross_entropy(logits, batch[f'{stack}_tokens'])

  return jit(jax.value_and_grad(loss))


# What it costs.


@pytest.mark.parametrize(
  'config',
  [
    tiny(),
    tiny(activation='relu', tie_embeddings=True),
    tiny(moe={'extra_ffn': 'none', 'multiplicative_bias': True}),
    tiny(moe={'extra_ffn': 'before', 'hidden_dim': 40}),
    tiny(dense=True, moe={'train_capacity': Capacity(1.0, minimum=1)}),
    tiny(encoder=None, decoder=StackConfig(5, 2, 1)),  # A layer remains.
    tiny(decoder=None, encoder=StackConfig(3, 0, 0)),
    tiny(scan_layers=False),
    tiny(relpos_per_layer=True),
  ],
  ids=[
    'st-moe',
    'relu tied',
    'bias, no extra FFN',
    'extra FFN before, wide experts',
    'dense twin',
    'decoder-only 5 layers',
    'encoder-only dense',
    'unrolled',
    'tables of layers',
  ],
)
def test_parameters_are_counted_right(config):
  assert paths.count(_shapes(config)) == params_by_hand(config)


def _paper(d, mlp, heads, head, experts):
  return ModelConfig(
    embed_dim=d,
    mlp_dim=mlp,
    num_heads=heads,
    head_dim=head,
    encoder=StackConfig(24, 4, 3),
    decoder=StackConfig(24, 4, 3, group_size=456),
    moe=MoEConfig(num_experts=experts),
  )


ST_MOE_32B = _paper(5120, 20480, 64, 128, 64)


@pytest.mark.parametrize(
  ('config', 'billions'),
  [(ST_MOE_32B, 269.105), (_paper(1024, 2816, 16, 64, 32), 4.105)],
  ids=['ST-MoE-32B', 'ST-MoE-L'],
)
def test_parameters_of_the_paper(config, billions):
  assert round(count_params(_shapes(config)) / 1e9, 3) == billions
  assert round(sum(params_by_hand(config).values()) / 1e9, 3) == billions


def test_flops_of_the_paper():
  # Table 11: 20.2T for 512 + 114 tokens.
  assert counts.forward_flops(ST_MOE_32B, 512, 114) == pytest.approx(
    20.2e12, rel=0.01
  )


def _dot_flops(jaxpr) -> int:
  """2 m n k of every matrix product in it, scan bodies as often as they run."""
  flops = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      k = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      flops += 2 * k * math.prod(eqn.outvars[0].aval.shape)
    times = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        flops += times * _dot_flops(inner)
        if eqn.primitive.name == 'cond':  # One of its branches runs.
          break
  return flops


@pytest.mark.parametrize(
  'config',
  [
    tiny(),
    tiny(encoder=StackConfig(4, 2, 1, group_size=16), activation='relu'),
    tiny(decoder=None, moe={'train_capacity': Capacity(0.5, minimum=1)}),
    tiny(encoder=None, dense=True),
    tiny(moe={'beside': Part.of('shared', count=2)}),
    tiny(moe={'beside': 'conditional'}),
  ],
  ids=[
    'both',
    'scanned relu',
    'encoder-only',
    'decoder-only dense',
    'shared',
    'conditional',
  ],
)
def test_flops_are_those_of_the_traced_products(config):
  # Two sequences of 8 and 4 tokens fill a group in either stack, so nothing
  # is rounded; attention counts all pairs, as here, not the causal half.
  rows = examples(config, [(8, 4)] * 2)
  batch = padded_batch(config, rows, length=(8, 4))
  model = Transformer(config)
  params = sharding.unbox(boxed_shapes(model, **batch))
  run = lambda p: model.apply(
    {'params': p}, **batch, rngs={'dropout': jax.random.key(0)}
  )
  traced = _dot_flops(jax.make_jaxpr(run)(params).jaxpr)
  # f and p of the balance loss are two small products, and position biases are
  # chosen by one: nobody counts those.
  chosen = 2 * config.num_heads * config.relpos_buckets
  biases = sum(
    chosen * n * n
    for stack, n in (('encoder', 8), ('decoder', 4))
    if stack in config.stacks
  )
  tokens = {'encoder': 16, 'decoder': 8}
  losses = sum(
    config.plan(stack).num_sparse * 2 * 2 * tokens[stack] * 4
    for stack in config.stacks
  )
  assert traced - losses - biases == 2 * counts.forward_flops(config, 8, 4)


def test_the_dense_twin_costs_what_the_sparse_model_does():
  config = dataclasses.replace(ST_MOE_32B, dense=True)
  sparse, twin = (
    counts.forward_flops(c, 512, 114) for c in (ST_MOE_32B, config)
  )
  # All but the routers: 12 layers of 2 d e FLOPs a token. And the twin has
  # whole hidden units: a decoder's group of 456 has 64 x 8 places, which are
  # 22995.09 units a token.
  routers = 2 * 5120 * 64 * 6 * (512 + 114)
  units = 114 * 64 * 8 // 456 * 20480 - 114 * 22995
  assert sparse - twin == routers + 6 * 3 * 2 * 5120 * units
  assert config.plan('encoder').layers[3][1].dim == 20480 * 1.25


# What it may see.


@pytest.mark.parametrize('dispatcher', ['index', 'grouped'])
def test_no_token_hears_of_later_ones(dispatcher):
  """Dropless: with places to run out of, later first choices displace earlier
  second ones (facts 13.8), which `test_selectors` shows."""
  config = with_moe(dropless(DECODER_ONLY), dispatcher=dispatcher)
  params = _params(config)['decoder']
  model = Transformer(config)
  ctx = RouteContext(valid=jnp.full((1, 6), True))
  mix = np.random.default_rng(0).standard_normal((1, 6, 16))

  def said(x):
    """One number a position."""
    y = model.apply(
      {'params': {'decoder': params}}, x, method=lambda m, x: m.decoder(x, ctx)
    )
    return (y * mix).sum((0, 2))

  x = np.random.default_rng(1).standard_normal((1, 6, 16), np.float32)
  influence = np.abs(jit(jax.jacrev(said))(x)).sum((1, 3))  # [said, heard]
  assert not influence[np.triu_indices(6, 1)].any()
  assert influence[np.tril_indices(6)].all()


def _real(config, batch, logits):
  return logits[batch['decoder_target_tokens'] > 0]


def test_padding_moves_nothing():
  config = SHALLOW
  params, rows = _params(config), examples(config)
  batches = [padded_batch(config, rows, n) for n in [(8, 6), (11, 8)]]
  a, b = (_real(config, x, _forward(config)(params, x)) for x in batches)
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_packed_examples_are_what_they_are_alone():
  config = SHALLOW
  params, rows = _params(config), examples(config)
  alone, packed = padded_batch(config, rows), packed_batch(config, rows)
  assert (
    packed['decoder_segment_ids'].tolist()[0] == [1] * 4 + [2] * 6 + [0] * 2
  )
  a, b = (
    _real(config, x, _forward(config)(params, x)) for x in (alone, packed)
  )
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  # Told apart by their segments: without those they would see each other.
  blind = {k: v for k, v in packed.items() if 'segment' not in k}
  c = _real(config, blind, _forward(config)(params, blind))
  assert np.abs(c - a).max() > 0.1


# Its equal forms.

ODD = tiny(
  encoder=None,
  decoder=StackConfig(5, 2, 1, group_size=8),
  moe={'eval_capacity': Capacity(1.0, minimum=1)},
)


def test_scanned_and_unrolled_models_are_equal():
  flat = dataclasses.replace(ODD, scan_layers=False)
  params, batch = _params(ODD), _batch(ODD)
  unrolled = paths.unroll(params, ODD)
  # Two periods of two layers, and a fifth layer behind the scan.
  assert sorted(params['decoder']) == [
    'decoder_norm', 'layers', 'layers_4', 'relpos_bias',
  ]  # fmt: skip
  assert jax.tree.map(np.shape, unrolled) == jax.tree.map(
    np.shape, _shapes(flat)
  )
  loss, grads = _step(ODD)(params, batch)
  loss_flat, grads_flat = _step(flat)(unrolled, batch)
  np.testing.assert_allclose(loss, loss_flat, rtol=1e-6)
  assert_trees_close(grads_flat, paths.unroll(grads, ODD))


def test_layers_with_equal_tables_are_a_stack_with_one():
  """Scanned, and unrolled; and each layer hears of its own table alone."""
  dense = {'encoder': StackConfig(2, 0, 0), 'decoder': StackConfig(2, 0, 0)}
  one, each = (tiny(**dense, relpos_per_layer=own) for own in (False, True))
  params, batch = _params(one), _batch(one)
  copied = {**params}
  for stack in one.stacks:
    tree = {**params[stack]}
    table = tree.pop('relpos_bias')['rel_embedding']
    both = {'relpos_bias': {'rel_embedding': np.stack([table, table])}}
    tree['layers'] = {'layer_0': {**tree['layers']['layer_0'], **both}}
    copied[stack] = tree
  want = _forward(one)(params, batch)
  np.testing.assert_allclose(
    _forward(each)(copied, batch), want, rtol=1e-5, atol=1e-5
  )
  flat = dataclasses.replace(each, scan_layers=False)
  own = paths.unroll(copied, each)
  np.testing.assert_allclose(
    _forward(flat)(own, batch), want, rtol=1e-5, atol=1e-5
  )
  second = own['encoder']['layers_1']['relpos_bias']['rel_embedding']
  own['encoder']['layers_1']['relpos_bias'] = {'rel_embedding': second[:, ::-1]}
  assert np.abs(_forward(flat)(own, batch) - want).max() > 0.01


@pytest.mark.parametrize('config', [tiny(), ODD], ids=['both stacks', 'odd'])
def test_roll_is_the_inverse_of_unroll(config):
  params = _params(config)
  before = paths.by_path(params)
  after = paths.by_path(paths.roll(paths.unroll(params, config), config))
  assert before.keys() == after.keys()
  for path in before:
    np.testing.assert_array_equal(before[path], after[path])
  # Layer i of the unrolled model is repetition i // 2 of place i % 2.
  flat = paths.by_path(paths.unroll(params, config))
  place = 'decoder/layers/layer_0/self_attention/query/kernel'
  for i, row in enumerate(before[place]):
    name = place.replace('layers/layer_0', f'layers_{2 * i}')
    np.testing.assert_array_equal(flat[name], row)


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_no_number(remat):
  params, batch = _params(DECODER_ONLY), _batch(DECODER_ONLY)
  plain = _step(DECODER_ONLY)(params, batch)
  again = _step(dataclasses.replace(DECODER_ONLY, remat=remat))(params, batch)
  np.testing.assert_allclose(again[0], plain[0], rtol=1e-6)
  assert_trees_close(again[1], plain[1])


def test_decoding_one_token_at_a_time_is_teacher_forcing():
  config = SHALLOW
  # No padding in the middle of what is decoded; inputs padded.
  rows = examples(config, [(5, 6), (8, 6), (3, 6), (7, 6)])
  params, batch = _params(config), padded_batch(config, rows)
  forced = _forward(config)(params, batch)
  model = Transformer(config)
  length = batch['decoder_input_tokens'].shape[1]
  inputs = batch['encoder_input_tokens']
  encoded = jit(
    lambda p: model.apply(
      {'params': p}, inputs, enable_dropout=False, method='encode'
    )
  )(params)

  def decode(params, cache, tokens):
    return model.apply(
      {'params': params, **cache},
      encoded,
      inputs,
      tokens,
      tokens,
      enable_dropout=False,
      decode=True,
      max_decode_length=length,
      mutable=['cache'],
      method='decode',
    )

  # A first call at full length makes the room, and fills none of it.
  whole = batch['decoder_input_tokens']
  _, shapes = jax.eval_shape(decode, params, {}, whole)
  cache = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
  keys = [
    a for p, a in paths.by_path(cache).items() if p.endswith('cached_key')
  ]
  assert {a.shape for a in keys} == {(1, 4, 2, length, 8)}  # Scanned.
  step = jit(decode)
  for i in range(length):
    logits, cache = step(params, cache, whole[:, i : i + 1])
    np.testing.assert_allclose(logits[:, 0], forced[:, i], rtol=1e-4, atol=1e-4)
  assert cache['cache']['decoder']['cache_index'] == length


# Precision.


def test_bfloat16_is_never_promoted():
  config = tiny(dtype='bfloat16', dropout=0.1)
  batch, model = _batch(config), Transformer(config)
  watched = lambda m, name: isinstance(m, Layer | MoE) and name == '__call__'
  logits, seen = jax.eval_shape(
    lambda p: model.apply(
      {'params': p},
      **batch,
      rngs={'dropout': jax.random.key(0)},
      capture_intermediates=watched,
      mutable=['intermediates'],
    ),
    sharding.unbox(boxed_shapes(model, **batch)),
  )
  assert logits.dtype == jnp.float32
  stream = {
    path: leaf.dtype
    for path, leaf in paths.by_path(seen).items()
    if '__call__' in path
  }
  assert len(stream) == 2 * 3  # Two layers and a sparse sublayer a stack.
  assert set(stream.values()) == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('tied', [False, True])
def test_the_output_product_is_float32(tied):
  # Neither its weights nor its sums are rounded to bfloat16's 1/256.
  config = tiny(dtype='bfloat16', tie_embeddings=tied)
  params = _params(config)
  x = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
  logits = Transformer(config).apply({'params': params}, x, method='project')
  if tied:  # A table of unit variance wants the 1 / sqrt(d).
    kernel = params['token_embedder']['embedding'].T / 4
  else:
    kernel = params['logits_dense']['kernel']
  exact = np.asarray(x, np.float64) @ kernel.astype(np.float64)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-6)


# It learns.


@pytest.mark.parametrize(
  'config',
  [
    DECODER_ONLY,
    dataclasses.replace(ENCODER_ONLY, tie_embeddings=True),
  ],
  ids=['decoder-only', 'encoder-only tied'],
)
def test_one_step_lowers_the_loss(config):
  params, batch = _params(config), _batch(config)
  loss, grads = _step(config)(params, batch)
  assert math.isfinite(loss)
  still = [
    p for p, g in paths.by_path(grads).items() if not np.asarray(g).any()
  ]
  assert still == []
  params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
  after, _ = _step(config)(params, batch)
  assert after < loss - 0.01


def test_a_tied_model_has_one_table():
  tied = _shapes(tiny(tie_embeddings=True))
  assert 'logits_dense' not in tied and 'logits_dense' in _shapes(tiny())


def test_names_of_submodules():
  """They are an API: checkpoints, maps to other codes and masks use them."""
  config = tiny(moe={'selector': Part.of('top_k', k=1)})
  names = set(paths.by_path(_shapes(config)))
  first, second = (f'decoder/layers/layer_{i}' for i in (0, 1))
  for name in [
    'token_embedder/embedding',
    'logits_dense/kernel',
    'encoder/encoder_norm/scale',
    'encoder/relpos_bias/rel_embedding',
    f'{first}/pre_attention_layer_norm/scale',
    f'{first}/self_attention/query/kernel',
    f'{first}/pre_cross_attention_layer_norm/scale',
    f'{first}/encoder_decoder_attention/out/kernel',
    f'{first}/pre_mlp_layer_norm/scale',
    f'{first}/mlp/wi_0/kernel',
    f'{first}/mlp/wo/kernel',
    f'{second}/moe/router/kernel',
    f'{second}/moe/experts/wi_0/kernel',
    f'{second}/moe/experts/wo/kernel',
    f'{second}/extra_mlp/wo/kernel',
    f'{second}/pre_extra_mlp_layer_norm/scale',
  ]:
    assert name in names, name


# Positions.


def _slow_bucket(distance, bidirectional, buckets, far):
  base = 0
  if bidirectional:
    buckets //= 2
    if distance > 0:
      base = buckets
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = buckets // 2
  if distance < exact:
    return base + distance
  ratio = math.log(distance / exact) / math.log(far / exact)
  return base + min(exact + int(ratio * (buckets - exact)), buckets - 1)


def _buckets(bidirectional, buckets, far):
  options = dict(num_buckets=buckets, max_distance=far)
  bucket = functools.partial(relative_bucket, bidirectional=bidirectional)
  return jit(functools.partial(bucket, **options))


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize(('buckets', 'far'), [(32, 128), (8, 20)])
def test_relative_buckets(bidirectional, buckets, far):
  distance = np.arange(-200, 201)
  got = _buckets(bidirectional, buckets, far)(distance)
  want = [_slow_bucket(n, bidirectional, buckets, far) for n in distance]
  np.testing.assert_array_equal(got, want)


def test_relative_buckets_by_hand():
  # 32 buckets both ways: 0 to 7 each, then 8-11, 12-15, 16-22, ..., 91 on.
  both = _buckets(True, 32, 128)
  got = both(np.array([0, -7, -8, -11, -12, -128, -900, 1, 7, 8, 900]))
  assert got.tolist() == [0, 7, 8, 8, 9, 15, 15, 17, 23, 24, 31]
  past = _buckets(False, 32, 128)
  got = past(np.array([5, 0, -1, -15, -16, -200]))
  assert got.tolist() == [0, 0, 1, 15, 16, 31]
