"""Experts by a hash: what it looks at, how even it is, where it is stored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths, sharding
from st_moe.config import Config, MoEConfig, Part, StackConfig
from st_moe.decode import decoding
from st_moe.model import parts
from st_moe.model.gates import HashGate
from st_moe.model.transformer import Transformer
from st_moe.routing import tables
from st_moe.routing.losses import router_z
from st_moe.routing.selectors import dropless
from st_moe.routing.types import RouteContext, Routed
from st_moe.train import optimizer, step
from st_moe.train.state import init_params, init_state, parameter_axes
from tests.helpers import (
  examples,
  jit,
  padded_batch,
  random_params,
  tiny,
)

VOCAB = 32


def _ctx(tokens):
  tokens = jnp.asarray(tokens)
  return RouteContext(
    valid=jnp.full(tokens.shape, True),
    tokens=tokens,
    before=jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))),
    positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
  )


def _scores(tokens, num_experts=8, **options):
  """Those of a gate that is born here."""
  gate = HashGate(num_experts, **options)
  ctx = _ctx(tokens)
  x = jnp.zeros((*ctx.tokens.shape, 4))
  run = lambda: gate.init_with_output(jax.random.key(0), x, ctx, None)
  scores, variables = jax.device_get(jit(run)())
  return scores, sharding.unbox(variables.get('params', {}))


def _experts(tokens, **options):
  return _scores(tokens, **options)[0].probs.argmax(-1)


def _murmur(*numbers):
  """The finalizer of MurmurHash3 over each number in turn, in whole numbers."""
  found, most = 0, 2**32
  for number in numbers:
    found = (found + number + 0x9E3779B9) % most
    found = (found ^ (found >> 16)) * 0x85EBCA6B % most
    found = (found ^ (found >> 13)) * 0xC2B2AE35 % most
    found ^= found >> 16
  return found


TOKENS = np.random.default_rng(0).integers(1, VOCAB, (2, 12))


@pytest.mark.parametrize(
  ('table', 'looked_at'),
  [
    ('random', lambda row, t: (row[t],)),
    ('bigram', lambda row, t: (row[t - 1] if t else 0, row[t])),
    ('previous', lambda row, t: (row[t - 1] if t else 0,)),
    ('position', lambda row, t: (t,)),
  ],
)
def test_what_is_computed_is_a_mix_of_what_its_name_says(table, looked_at):
  found, params = _scores(TOKENS, table=table, salt=5)
  assert params == {}  # No router.
  for row, probs in zip(TOKENS.tolist(), found.probs, strict=True):
    each = [_murmur(5, 0, *looked_at(row, t)) % 8 for t in range(12)]
    np.testing.assert_array_equal(probs, np.eye(8)[each])
  # There is no doubt, and no z-loss.
  assert (found.select[found.probs == 0] == -np.inf).all()
  routed = Routed(None, found, None, _ctx(TOKENS), None, {})
  assert router_z(routed)[0] == 0


def test_routes_are_of_the_id_whatever_the_activations():
  gate, ctx = HashGate(8), _ctx(TOKENS)
  draw = lambda seed: jax.random.normal(jax.random.key(seed), (2, 12, 4))
  probs = jit(lambda x: gate.apply({}, x, ctx, None).probs)
  a, b = (np.asarray(probs(draw(seed))) for seed in (0, 1))
  np.testing.assert_array_equal(a, b)
  for token in np.unique(TOKENS):
    assert len(set(a.argmax(-1)[token == TOKENS].tolist())) == 1


def test_another_salt_is_another_hash_and_ids_spread():
  tokens = np.arange(4096)[None]
  a, b = (_experts(tokens, salt=salt)[0] for salt in (0, 1))
  assert 0.1 < (a == b).mean() < 0.15  # Of 8: by chance 0.125.
  # 512 each, with a deviation of 21.
  assert np.abs(np.bincount(a, minlength=8) - 512).max() < 85


@pytest.mark.parametrize('table', ['random', 'balanced', 'bigram'])
def test_each_of_two_hashes_finds_a_slice_in_its_own_group(table):
  options = {'table': table, 'vocab': VOCAB}
  both = _scores(TOKENS, hashes=2, **options)[0].probs
  assert set(np.unique(both)) == {0, 0.5}
  first, second = both[..., :4].argmax(-1), both[..., 4:].argmax(-1)
  assert (both[..., :4].sum(-1) == 0.5).all()
  # The first is the plain hash; the second is another one.
  plain = _experts(TOKENS, num_experts=4, **options)
  np.testing.assert_array_equal(first, plain)
  assert (first != second).any()


# Tables.


def _slow_balanced(frequencies, buckets):
  load, table = [0.0] * buckets, {}
  for i in sorted(range(len(frequencies)), key=lambda i: -frequencies[i]):
    table[i] = min(range(buckets), key=lambda b: load[b])
    load[table[i]] += frequencies[i]
  return [table[i] for i in range(len(frequencies))]


def test_a_balanced_table_is_as_even_as_its_largest_id_allows(tmp_path):
  counts = np.random.default_rng(1).permutation(1000 // np.arange(1, 201))
  np.save(tmp_path / 'counts.npy', counts)
  _, params = _scores(
    TOKENS,
    table='balanced',
    vocab=200,
    hashes=2,
    frequencies=str(tmp_path / 'counts.npy'),
  )
  plain, other = params['kept_table'].astype(int)
  loads = [np.bincount(t, counts, minlength=4) for t in (plain, other)]
  slow = np.bincount(_slow_balanced(counts, 4), counts, minlength=4)
  np.testing.assert_allclose(sorted(loads[0]), sorted(slow))
  # 5835 in all; one id has 1000.
  for load in loads:
    assert load.max() <= counts.sum() / 4 + counts.max()
  assert (plain != other).any()
  # By id, as they come: 1 + 1/8 + ... of a harmonic sum.
  # Padding, the end and the unknown come before them and weigh nothing.
  assert tables.zipf(6).tolist() == [0, 0, 0, 1, 1 / 2, 1 / 3]
  assert tables.zipf(2).tolist() == [0, 0]
  zipf = tables.balanced(tables.zipf(200), 8)[3:]
  assert zipf[:8].tolist() == [*range(8)] and zipf[8] == 7
  assert zipf.tolist() == _slow_balanced(tables.zipf(200)[3:], 8)


def test_what_never_occurs_is_spread_too():
  table = tables.balanced(np.array([5.0, 3.0, 0, 0, 0, 0, 0, 0]), 4)
  assert np.bincount(table).tolist() == [1, 1, 3, 3]


def test_near_vectors_share_an_expert_or_are_dealt_out(tmp_path):
  rng = np.random.default_rng(0)
  cluster = rng.permutation(np.repeat(range(4), [2, 6, 12, 12]))
  centers = 10 * np.eye(4, 6)
  np.save(tmp_path / 'v.npy', centers[cluster] + rng.normal(0, 0.1, (32, 6)))
  options = {'vocab': VOCAB, 'vectors': str(tmp_path / 'v.npy')}
  born = lambda table: _scores(TOKENS, 4, table=table, **options)
  near = born('clustered')[1]['kept_table'][0].astype(int)
  # One name for each cluster, whatever it is.
  assert len(set(zip(near, cluster, strict=True))) == 4
  found, params = born('dispersed')
  dealt = params['kept_table'][0].astype(int)
  np.testing.assert_array_equal(found.probs.argmax(-1), dealt[TOKENS])
  assert np.bincount(dealt).tolist() == [8] * 4
  for c in range(4):
    each = np.bincount(dealt[cluster == c], minlength=4)
    assert each.max() - each.min() <= 1
  # Fewer kinds of vectors than experts: some stay empty.
  few = tables.clustered(np.eye(2, 3)[[0, 1, 0, 1, 1]], 4, rng)
  assert len(set(few.tolist())) == 2 and few[0] != few[1] == few[4]


def test_files_are_read_where_parameters_are_born_and_nowhere_else(tmp_path):
  file = tmp_path / 'counts.npy'
  gate = {'table': 'balanced', 'vocab': VOCAB, 'frequencies': str(file)}
  config = _config(**gate)
  model = Transformer(config)
  born = lambda: init_params(model, jax.random.key(0))
  shapes = sharding.shapes_of(born)
  place = 'decoder/layers/layer_0/moe/router/kept_table'
  assert paths.by_path(sharding.unbox(shapes))[place].shape == (1, 1, VOCAB)
  with pytest.raises(ValueError, match=r'gate.frequencies = .* No such file'):
    jax.eval_shape(born)
  np.save(file, np.ones(31))
  with pytest.raises(ValueError, match=r'has shape \[31\]: .* \(32,\)'):
    jax.eval_shape(born)
  file.write_bytes(b'no array')
  with pytest.raises(ValueError, match='should be a .npy file'):
    jax.eval_shape(born)
  # A checkpoint has the table: the file may be gone.
  file.unlink()
  params = _params(config)
  batch = padded_batch(config, examples(config))
  run = lambda p: model.apply({'params': p}, **batch, enable_dropout=False)
  assert jax.eval_shape(run, params).shape == (4, 6, VOCAB)


def test_what_does_not_fit_is_refused():
  def check(k=1, vocab_size=VOCAB, **gate):
    selector = Part.of('top_k', k=k)
    moe = MoEConfig(4, gate=Part.of('hash', **gate), selector=selector)
    parts.check(tiny(moe=moe, vocab_size=vocab_size))

  check(table='balanced', vocab=VOCAB)
  check(table='balanced', vocab=99, vocab_size=0)  # Not known yet.
  with pytest.raises(ValueError, match='vocab = 99 ids: .* the model, 32'):
    check(table='balanced', vocab=99)
  with pytest.raises(ValueError, match='vocab = 0 ids'):
    check(table='balanced')
  with pytest.raises(ValueError, match='needs vectors'):
    check(table='dispersed', vocab=VOCAB)
  with pytest.raises(ValueError, match='hashes = 2 .* k = 1'):
    check(hashes=2)
  with pytest.raises(ValueError, match='hashes = 3'):
    check(hashes=3, k=3)
  with pytest.raises(ValueError, match='per_layer'):
    check(table='balanced', vocab=VOCAB, per_layer=True)
  check(table='bigram', hashes=2, k=2, per_layer=True)


# In a model.


def _config(layers=1, encoder=None, **gate):
  """A decoder that is sparse throughout; behind an encoder, if there is one."""
  return dropless(
    tiny(
      vocab_size=VOCAB,
      encoder=encoder,
      decoder=StackConfig(layers, 1, 0, group_size=8),
      moe={
        'gate': Part.of('hash', **gate),
        'selector': Part.of('top_k', k=1),
        'losses': (),
        'extra_ffn': 'none',
      },
    )
  )


def _params(config):
  """Random ones, but for tables: there ids."""

  def table(path, leaf):
    if not path.endswith('kept_table'):
      return leaf
    draw = np.random.default_rng(2).integers(0, 4, leaf.shape)
    return draw.astype('f4')

  batch = padded_batch(config, examples(config))
  return paths.map_by_path(table, random_params(Transformer(config), **batch))


@pytest.mark.parametrize(
  'table', ['random', 'balanced', 'bigram', 'previous', 'position']
)
def test_one_token_at_a_time_is_routed_as_all_at_once(table):
  # All that are stored are looked up alike.
  config = _config(table=table, vocab=VOCAB * (table == 'balanced'))
  model, params = Transformer(config), _params(config)
  batch = padded_batch(config, examples(config, [(5, 6), (8, 6)]))
  inputs = batch['decoder_input_tokens']

  def both(params):
    logits, sown = model.apply(
      {'params': params}, **batch, enable_dropout=False, mutable=['routing']
    )

    def decode(cache, tokens):
      logits, found = model.apply(
        {'params': params, **cache},
        None,
        None,
        tokens[:, None],
        tokens[:, None],
        enable_dropout=False,
        decode=True,
        max_decode_length=6,
        mutable=['cache'],
        method='decode',
      )
      return found, logits[:, 0]

    # The first call makes room, and hears nothing.
    empty, _ = decode({}, inputs[:, 0])
    found = jax.lax.scan(decode, empty, inputs.T)[1].swapaxes(0, 1)
    return logits, found, paths.by_path(sown['routing'])

  logits, found, routing = jit(both)(params)
  np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
  (experts,) = (v for k, v in routing.items() if k.endswith('seats/expert'))
  assert len(np.unique(experts)) > 1  # Or there was nothing to see.


def test_greedy_answers_are_those_of_the_whole_decoder():
  config = _config(1, StackConfig(1, 0, 0), table='bigram')
  model, params = Transformer(config), _params(config)
  batch = padded_batch(config, examples(config))
  prompts = batch['encoder_input_tokens']
  greedy = functools.partial(decoding.greedy, model, max_length=6, eos=99)
  found = np.asarray(jit(greedy)(params, prompts))
  inputs = np.pad(found, ((0, 0), (1, 0)))[:, :-1]
  forced = jit(
    lambda p: model.apply(
      {'params': p}, prompts, inputs, found, enable_dropout=False
    )
  )(params)
  np.testing.assert_array_equal(found, forced.argmax(-1))
  assert len({tuple(row) for row in found}) > 1


def test_each_layer_has_a_salt_of_its_own_that_no_step_moves():
  model = _config(2, table='bigram', per_layer=True)
  config = Config(model=model)
  module = Transformer(model)
  made = optimizer.make(config.optimizer, parameter_axes(module))
  place = 'decoder/layers/layer_0/moe/router/kept_salt'
  born = lambda: sharding.unbox(init_params(module, jax.random.key(0)))
  salts = jit(lambda: paths.by_path(born())[place])()
  assert salts[0] != salts[1] and (salts == salts.astype(int)).all()
  assert 2**10 < salts.min() and salts.max() < 2**24
  batch = padded_batch(model, examples(model))
  params = paths.map_by_path(
    lambda path, leaf: salts if path == place else jnp.asarray(leaf),
    random_params(module, **batch),
  )
  shapes = sharding.shapes_of(
    lambda: init_state(module, made, jax.random.key(0))
  )
  zeros = lambda a: jnp.zeros(a.shape, a.dtype)
  state = jax.tree.map(zeros, sharding.unbox(shapes)).replace(params=params)
  batch['decoder_loss_weights'] = np.ones((4, 6), 'f4')
  after, metrics = jit(step.make_train_step(module, made, config))(state, batch)
  moved = paths.by_path(after.params)
  np.testing.assert_array_equal(moved.pop(place), salts)
  assert all((moved[p] != paths.by_path(params)[p]).any() for p in moved)
  assert 'router_z' not in metrics and np.isfinite(metrics['loss'])
  # Every token asks one expert, which hears all of it.
  assert metrics['decoder/active_experts'] == 1

  def evaluated(model, params):
    apply = functools.partial(
      step.forward, Transformer(model), config.loss, rng=None
    )
    terms, *_ = jit(lambda p: apply(p, batch))(params)
    return terms['cross_entropy'][0]

  flat = dataclasses.replace(model, scan_layers=False)
  np.testing.assert_allclose(
    evaluated(model, params),
    evaluated(flat, paths.unroll(params, model)),
    rtol=1e-6,
  )


def test_the_config_is_its_base_with_a_hash_and_no_losses():
  name = 'configs/methods/hash_layers.py:{}runlocal'
  method, base = (
    config_file.to_dict(config_file.load(name.format(word), {}))
    for word in ('', 'base,')
  )
  assert config_file.diff(base, method) == [
    "model.moe.gate.name: 'linear' -> 'hash'",
    "model.moe.gate.table: None -> 'random'",
    "model.moe.losses.load_balance: {'weight': 0.01} -> None",
    "model.moe.losses.router_z: {'weight': 0.001} -> None",
    'model.moe.selector.k: 2 -> 1',
  ]
