"""HuggingFace's models say through ours what they say by themselves.

What transformers made of them is in golden/ (see make_golden.py); where it is
installed, it is asked again.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import st_moe
from st_moe import cli, config_file, paths
from st_moe.config import Capacity, Config, MoEConfig, Part, StackConfig
from st_moe.data import pieces
from st_moe.decode import decoding, methods
from st_moe.interop import convert, huggingface, links
from st_moe.model.transformer import Transformer
from st_moe.run import begin
from st_moe.train import terms as terms_lib
from tests.helpers import jit, random_params, tiny
from tests.interop.make_golden import (
  CASES,
  GOLDEN,
  batch,
  generated,
  run,
  theirs,
  weight,
)
from tests.interop.test_hf_tokenizer import MODEL

EOS = 1


@functools.cache
def golden(case):
  return json.loads((GOLDEN / f'hf_{case}.json').read_text())


@pytest.fixture(scope='session', params=sorted(CASES))
def case(request):
  return request.param


@pytest.fixture(scope='session')
def directory(case, tmp_path_factory):
  """The case as `save_pretrained` would leave it, its weights in two shards."""
  found, path = golden(case), tmp_path_factory.mktemp(case)
  (path / 'config.json').write_text(json.dumps(found['config']))
  names = sorted(found['shapes'])
  shards = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, part in shards.items():
    tensors = {n: weight(n, found['shapes'][n]) for n in part}
    save_file(tensors, path / file)
  places = {n: file for file, part in shards.items() for n in part}
  index = {'metadata': {}, 'weight_map': places}
  (path / 'model.safetensors.index.json').write_text(json.dumps(index))
  return path


@pytest.fixture(scope='session')
def loaded(directory):
  params, config = st_moe.interop.load(f'hf:{directory}')
  return params, dataclasses.replace(config, dtype='float32')


def _forward(config, params, routing=False):
  data = batch()
  return Transformer(config).apply(
    {'params': params},
    data['inputs'],
    data['shifted'],
    data['targets'],
    enable_dropout=False,
    mutable=['routing'] if routing else False,
  )


def test_logits(case, loaded):
  params, config = loaded
  logits = jit(functools.partial(_forward, config))(params)
  real = batch()['targets'] > 0  # Theirs lets padding see and be routed.
  want = np.array(golden(case)['logits'])
  np.testing.assert_allclose(logits[real], want[real], rtol=0, atol=1e-4)


def test_loss_and_gradients(case, directory, loaded):
  params, config = loaded
  targets = batch()['targets']

  def objective(params):
    weights = (targets > 0).astype(jnp.float32)
    terms = terms_lib.token_terms(_forward(config, params), targets, weights)
    total, count = terms['cross_entropy']
    return total / count

  value, grads = jit(jax.value_and_grad(objective))(params)
  assert value == pytest.approx(golden(case)['loss'], rel=1e-4)
  if case == 't5_1_1_tied':
    return  # One tensor of theirs is two of ours, and has one gradient.
  theirs = huggingface.open_source(str(directory)).links
  want = golden(case)['gradient_norms']
  found = {
    name: np.linalg.norm(make())
    for name, _, _, make in links.tensors(grads, config, theirs)
  }
  assert found.keys() == want.keys()
  for name, norm in want.items():
    assert found[name] == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def test_expert_choices(case, loaded):
  params, config = loaded
  _, sown = jit(functools.partial(_forward, config, routing=True))(params)
  data, want = batch(), golden(case)['experts']
  valid = {'encoder': data['inputs'] > 0, 'decoder': data['targets'] > 0}
  found = {}
  for path, leaf in paths.by_path(sown.get('routing', {})).items():
    if not path.endswith('moe/seats/expert'):
      continue
    for piece, i in paths.unrolled_paths(path, config):
      stack, layer = piece.split('/')[:2]
      n = 2 if stack == 'decoder' else 1
      name = (
        f'{stack}.block.{layer.removeprefix("layers_")}.layer.{n}.mlp.router'
      )
      found[name] = np.asarray(leaf if i is None else leaf[i])
  assert found.keys() == want.keys()
  assert len(found) == {'switch_8': 4, 'switch_32': 6}.get(case, 0)
  for name, experts in want.items():
    real = valid[name.split('.')[0]]
    got = found[name].reshape(real.shape)
    np.testing.assert_array_equal(got[real], np.array(experts)[real], name)


def test_greedy_decoding(case, loaded):
  """Its capacity drops in the encoder; a decoder's single token always sits."""
  params, config = loaded
  greedy = functools.partial(decoding.greedy, Transformer(config), max_length=9)
  got = np.asarray(jit(greedy)(params, batch()['inputs']))
  for row, want in zip(got, golden(case)['greedy'], strict=True):
    assert row.tolist() == want + [0] * (9 - len(want))


def test_beam_search(case, loaded):
  params, config = loaded
  method = methods.Method(
    max_length=9, num_beams=3, num_return=2, length_penalty=0.5
  )
  model = Transformer(config)
  search = functools.partial(decoding.generate, model, method=method)
  found = np.asarray(jit(search)(params, batch()['inputs']).tokens)
  for row, want in zip(
    found.reshape(-1, 9), golden(case)['beams'], strict=True
  ):
    assert row.tolist() == want + [0] * (9 - len(want))


def test_places_run_out():
  """The above has dropped tokens in it, or it would not show what it says."""
  for case in ('switch_8', 'switch_32'):
    found = golden(case)
    places = found['config']['expert_capacity']
    longest = max(
      np.bincount(row[: int(n)]).max()
      for name, experts in found['experts'].items()
      if name.startswith('encoder')
      for row, n in zip(experts, (batch()['inputs'] > 0).sum(1), strict=True)
    )
    assert longest > places


def test_there_and_back(case, directory, tmp_path):
  """hf -> ours, unrolled -> ours, scanned -> hf: every bit."""
  scan = lambda way: {'model.scan_layers': way}
  convert.convert(
    f'hf:{directory}', f'st_moe:{tmp_path}/a', overrides=scan('false')
  )
  convert.convert(f'{tmp_path}/a', f'{tmp_path}/b', overrides=scan('true'))
  convert.convert(f'{tmp_path}/b', f'hf:{tmp_path}/c')
  back = huggingface.open_source(f'{tmp_path}/c')
  shapes = golden(case)['shapes']
  if case == 't5_1_1_tied':
    shapes = {**shapes, 'lm_head.weight': shapes['shared.weight']}
  assert set(back.shapes) == set(shapes) and not back.unused
  for name in golden(case)['shapes']:
    np.testing.assert_array_equal(back.read(name), weight(name, shapes[name]))
  before = huggingface.open_source(str(directory)).config.model
  if case != 't5_1_1_tied':
    routed = [dataclasses.replace(c, moe=MoEConfig()) for c in
              (back.config.model, before)]  # fmt: skip
    assert routed[0] == routed[1]


def test_as_transformers_says_today(case):
  reason = "transformers is not installed: pip install -e '.[hf]'"
  pytest.importorskip('transformers', reason=reason)
  now, then = run(case), golden(case)
  for name in ('experts', 'greedy', 'beams'):
    assert now[name] == then[name]
  np.testing.assert_allclose(now['logits'], then['logits'], rtol=0, atol=1e-5)


_METHODS = {
  'greedy': ({}, {}),
  'repetition': ({'repetition_penalty': 1.3}, {}),
  'beams': ({'num_beams': 4}, {}),
  'early': (
    {'num_beams': 4, 'length_penalty': 0.6, 'early_stopping': True},
    {'num_return_sequences': 3},
  ),
  'never': (
    {'num_beams': 3, 'length_penalty': 2.0, 'early_stopping': 'never'},
    {},
  ),
}


@pytest.mark.parametrize('name', _METHODS)
def test_a_hundred_prompts_as_transformers_answers_today(case, loaded, name):
  reason = "transformers is not installed: pip install -e '.[hf]'"
  pytest.importorskip('transformers', reason=reason)
  options, returned = _METHODS[name]
  rng = np.random.default_rng(5)
  inputs = rng.integers(2, 48, (100, 12)).astype(np.int32)
  inputs[np.arange(12) >= rng.integers(2, 13, (100, 1))] = 0
  want = generated(
    theirs(case), inputs, max_new_tokens=12, **options, **returned
  )
  method = methods.Method(max_length=12, num_return=len(want) // 100, **options)
  params, config = loaded
  answer = functools.partial(
    decoding.generate, Transformer(config), method=method
  )
  found = np.asarray(jax.jit(answer)(params, inputs).tokens).reshape(-1, 12)
  assert [row.tolist() for row in found] == [
    text + [0] * (12 - len(text)) for text in want
  ]


# What cannot be


def _t5(path, **changes):
  return _saved(path, 't5', **changes)


def _saved(path, case, **changes):
  """A case in `path`, its config changed; returns the tensors."""
  found = golden(case)
  about = {**found['config'], **changes}
  (path / 'config.json').write_text(json.dumps(about))
  tensors = {n: weight(n, s) for n, s in found['shapes'].items()}
  save_file(tensors, path / 'model.safetensors')
  return tensors


def test_st_moe_has_no_class_there(tmp_path):
  config = Config(model=tiny())
  with pytest.raises(ValueError) as e:
    huggingface.check_export(config)
  for reason in (
    'no ST-MoE',
    'experts are geglu networks',
    'an extra FFN',
    'more than one expert',
  ):
    assert reason in str(e.value)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'bert'}, "is a 'bert'; known are t5, mt5, switch"),
    ({'num_layers': -1}, 'config.json: num_layers is -1; it should be a whole'),
    (
      {'num_layers': 10**9},
      'num_layers is 1000000000; .* from 1 to 47, as many',
    ),
    ({'num_layers': 1e9}, 'num_layers is 1000000000.0; it should be a whole'),
    ({'num_layers': True}, 'num_layers is True; it should be a whole number'),
    ({'num_decoder_layers': 0}, 'num_decoder_layers is 0; it should be'),
    ({'d_model': 0}, 'd_model is 0; it should be a whole number from 1 to 48'),
    ({'d_model': '16'}, "d_model is '16'; it should be a whole number"),
    ({'d_ff': 10**12}, 'd_ff is 1000000000000; .* the longest side'),
    ({'vocab_size': 10**30}, 'vocab_size is 1000'),
    ({'d_kv': None}, 'has no d_kv: it is damaged, or of another model'),
    ({'num_heads': [2]}, r'num_heads is .2.; it should be'),
    ({'dropout_rate': float('nan')}, 'dropout_rate is nan; .* from 0 to 1'),
    ({'dropout_rate': -0.1}, 'dropout_rate is -0.1; it should be a number'),
    ({'dropout_rate': '0.1'}, "dropout_rate is '0.1'; it should be a number"),
    (
      {'relative_attention_num_buckets': 1},
      'relative_attention_num_buckets is 1; it should be .* from 4 to 48',
    ),
    (
      {'relative_attention_max_distance': 16},
      'relative_attention_max_distance is 16; .* from 17 to',
    ),
    ({'tie_word_embeddings': 'false'}, "is 'false'; it should be true or fal"),
    ({'feed_forward_proj': ['relu']}, 'no activation .*relu.* here'),
    (
      {'pad_token_id': 1, 'eos_token_id': 2},
      'config.json: pad_token_id 1, eos_token_id 2, decoder_start_token_id 0',
    ),
    ({'eos_token_id': [1, 7]}, r'eos_token_id .1, 7., .* that end in 1'),
    ({'decoder_start_token_id': 5}, 'decoder_start_token_id 5; known here'),
    ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon 1e-05 is not the 1e-06'),
    ({'feed_forward_proj': 'gated-silu'}, "no activation 'gated-silu' here"),
    (
      {'d_model': 24},
      'final_layer_norm.weight is .16., which does not make the .24.',
    ),
    (
      {'num_layers': 3},
      'has no tensor encoder.block.2.layer.1.Dense',
    ),
  ],
)
def test_a_config_that_does_not_fit(changes, message, tmp_path):
  _t5(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  assert not (tmp_path / 'to').exists()


def test_a_config_that_is_damaged(tmp_path):
  _t5(tmp_path)
  file = tmp_path / 'config.json'
  about = json.loads(file.read_text())
  del about['d_kv']
  file.write_text(json.dumps(about))
  with pytest.raises(ValueError, match='has no d_kv: it is damaged, or of an'):
    convert.open_source(f'hf:{tmp_path}')
  file.write_text('{"d_kv": ')
  with pytest.raises(ValueError, match='config.json is no JSON'):
    convert.open_source(f'hf:{tmp_path}')
  for text in ('[1]', '3', 'null'):
    file.write_text(text)
    with pytest.raises(ValueError, match='config.json is no JSON, or damag'):
      convert.open_source(f'hf:{tmp_path}')
  file.write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match='config.json is no JSON'):
    convert.open_source(f'hf:{tmp_path}')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_experts': 10**9}, 'num_experts is 1000000000; .* as many as it has'),
    ({'num_experts': 0}, 'num_experts is 0; it should be'),
    ({'expert_capacity': -3}, 'expert_capacity is -3; it should be'),
    ({'num_sparse_encoder_layers': 'x'}, 'num_sparse_encoder_layers is .x.;'),
    ({'router_jitter_noise': float('inf')}, 'router_jitter_noise is inf; it'),
    ({'router_z_loss_coef': float('nan')}, 'router_z_loss_coef is nan; it'),
    ({'router_aux_loss_coef': -1}, 'router_aux_loss_coef is -1; it should'),
  ],
)
def test_a_switch_that_cannot_be(changes, message, tmp_path):
  _saved(tmp_path, 'switch_8', **changes)
  with pytest.raises(ValueError, match=message):
    convert.open_source(f'hf:{tmp_path}')


def test_how_texts_end_as_generation_config_says(tmp_path):
  _saved(tmp_path, 't5', eos_token_id=[1])
  assert convert.open_source(f'hf:{tmp_path}').config.model.vocab_size == 48
  file = tmp_path / 'generation_config.json'
  file.write_text(json.dumps({'eos_token_id': 1, 'pad_token_id': None}))
  convert.open_source(f'hf:{tmp_path}')
  file.write_text(json.dumps({'eos_token_id': [1, 32]}))
  with pytest.raises(ValueError, match=r'generation_config.json.*_id .1, 32.'):
    convert.open_source(f'hf:{tmp_path}')


# Where the embedding lies


def _table(seed):
  return np.random.default_rng(seed).standard_normal((48, 16)).astype('f4')


@pytest.mark.parametrize(
  ('own', 'named'),
  [
    ({'encoder.embed_tokens': 1}, 'encoder.embed_tokens.weight,'),
    ({'decoder.embed_tokens': 1}, 'decoder.embed_tokens.weight,'),
    (
      {'encoder.embed_tokens': 1, 'decoder.embed_tokens': 2},
      'decoder.embed_tokens.weight and encoder.embed_tokens.weight,',
    ),
  ],
)
@pytest.mark.parametrize('case', ['t5', 'mt5', 'switch_8'])
def test_tables_of_its_own(case, own, named, tmp_path):
  tensors = _saved(tmp_path, case, tie_word_embeddings=False)
  tensors |= {f'{name}.weight': _table(seed) for name, seed in own.items()}
  save_file(tensors, tmp_path / 'model.safetensors')
  message = f'has tables of its own for {named} which differ from shared.weight'
  with pytest.raises(ValueError, match=message):
    convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  assert not (tmp_path / 'to').exists()


@pytest.mark.parametrize(
  ('layout_', 'tied'),
  [
    ('shared', 'lm_head'),
    ('decoder.embed_tokens', 'encoder.embed_tokens'),
    ('encoder.embed_tokens', ''),
    ('decoder.embed_tokens', ''),
  ],
)
def test_one_table_by_any_name(layout_, tied, tmp_path):
  tensors = _saved(tmp_path, 't5')
  table = tensors.pop('shared.weight')
  for name in filter(None, (layout_, tied)):
    tensors[f'{name}.weight'] = table.copy()
  save_file(tensors, tmp_path / 'model.safetensors')
  lines = convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  params = st_moe.load(f'{tmp_path}/to').params
  np.testing.assert_array_equal(params['token_embedder']['embedding'], table)
  assert 'logits_dense' not in params  # As one tensor of theirs.
  said = f'  tied: {tied}.weight = {layout_}.weight'
  assert [line for line in lines if 'tied:' in line] == [said] * bool(tied)


def test_a_head_beside_a_table_of_the_decoder(tmp_path):
  """MADLAD's layout: no tensor is called shared."""
  tensors = _saved(tmp_path, 't5', tie_word_embeddings=False)
  tensors['decoder.embed_tokens.weight'] = tensors.pop('shared.weight')
  tensors['lm_head.weight'] = _table(3)
  save_file(tensors, tmp_path / 'model.safetensors')
  params, config = st_moe.interop.load(f'hf:{tmp_path}')
  assert not config.tie_embeddings
  kernel = params['logits_dense']['kernel']
  np.testing.assert_array_equal(kernel, _table(3).T / (
    1 if not golden('t5')['config'].get('scale_decoder_outputs') else 4
  ))  # fmt: skip


# The encoder alone


@pytest.mark.parametrize('kind', ['t5', 'umt5'])
def test_an_encoder_alone(kind, tmp_path):
  found = golden(f'{kind}_encoder')
  _saved(tmp_path, f'{kind}_encoder')
  (tmp_path / 'spiece.model').write_bytes(pieces.with_tokens(MODEL, 0, ()))
  (tmp_path / 'tokenizer_config.json').write_text('{"extra_ids": 0}')
  convert.convert(f'hf:{tmp_path}', f'{tmp_path}/a')
  convert.convert(f'{tmp_path}/a', f'hf:{tmp_path}/b')
  loaded = st_moe.load(f'hf:{tmp_path}/b')
  inputs, want = batch()['inputs'], np.array(found['encodings'])
  encode = functools.partial(loaded.model.apply, enable_dropout=False)
  got = encode({'params': loaded.params}, inputs, method='encode')
  real = inputs > 0
  np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5)
  back = json.loads((tmp_path / 'b' / 'config.json').read_text())
  assert back['architectures'] == found['config']['architectures']
  written = load_file(tmp_path / 'b' / 'model.safetensors')
  assert written.keys() == found['shapes'].keys()
  for name, array in written.items():
    np.testing.assert_array_equal(array, weight(name, array.shape))
  # Texts are encoded; there is nobody to answer.
  (encoded,) = loaded.encode(['the class'])
  assert encoded.shape == (3, 16)
  with pytest.raises(ValueError, match='has no decoder'):
    loaded.generate(['the class'])


def test_the_encoder_of_a_whole_model(tmp_path):
  """As transformers: the class that is asked for says what is read."""
  _saved(tmp_path, 't5', architectures=['T5EncoderModel'])
  source = convert.open_source(f'hf:{tmp_path}')
  assert source.config.model.stacks == ('encoder',)
  assert all(name.startswith('decoder.') for name in source.unused)
  # And one that should have a decoder is damaged.
  tensors = _saved(tmp_path, 't5', architectures=['T5ForConditionalGeneration'])
  tensors = {n: a for n, a in tensors.items() if not n.startswith('decoder.')}
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='has no tensor decoder.final_'):
    st_moe.interop.load(f'hf:{tmp_path}')


# What is written


_ROUTER = {'router_aux_loss_coef': 0.05, 'router_z_loss_coef': 0.02}


@pytest.mark.parametrize(
  ('kind', 'changes'),
  [
    ('t5', {'dropout_rate': 0.25, 'relative_attention_max_distance': 99}),
    ('t5_1_1', {'num_decoder_layers': 2}),
    ('umt5', {'dropout_rate': 0.0}),
    (
      'switch_8',
      {'router_jitter_noise': 0.03, 'num_sparse_decoder_layers': 1, **_ROUTER},
    ),
  ],
)
def test_every_field_that_is_read_is_written(kind, changes, tmp_path):
  """Of a config.json with no number as it is by default."""
  _saved(tmp_path, kind, **changes)
  read = set()

  class Watched(huggingface._Fields):
    def get(self, name, default=None):
      read.add(name)
      return super().get(name, default)

  about = Watched(tmp_path / 'config.json')
  huggingface._check_special(about)
  shapes = convert.open_source(f'hf:{tmp_path}').shapes
  config, _ = huggingface._config(about, shapes, 'x')
  tied = convert.open_source(f'hf:{tmp_path}').config.model.tie_embeddings
  model = dataclasses.replace(config.model, tie_embeddings=tied)
  back = huggingface.check_export(dataclasses.replace(config, model=model))
  about = golden(kind)['config'] | changes
  for name in read & about.keys():
    # An untied head is a projection of ours, whatever they call it.
    if name not in ('tie_word_embeddings', 'scale_decoder_outputs'):
      assert back[name] == about[name], name
  assert {'vocab_size', 'd_ff', 'dropout_rate', *changes} <= read


# What --verify is for


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [(0.01, 'logits differ from hf by at most 0.01, of'), (np.nan, 'most nan')],
)
def test_verify_refuses(wrong, message, tmp_path, monkeypatch, capsys):
  _saved(tmp_path, 't5')
  params, config = st_moe.interop.load(f'hf:{tmp_path}')

  def theirs(where, inputs, shifted):  # transformers is not always here.
    found = Transformer(config).apply(
      {'params': params}, inputs, shifted, shifted + 1, enable_dropout=False
    )
    return found.at[0, 0, 0].add(monkeypatch.off)

  monkeypatch.off = 1e-4  # Of logits of about 5.
  monkeypatch.setattr(huggingface, 'logits', theirs)
  lines = convert.convert(f'hf:{tmp_path}', f'{tmp_path}/a', verify=True)
  assert 'logits differ from hf by at most 0.0001' in lines[-2]
  monkeypatch.off = wrong
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  with pytest.raises(SystemExit) as status:
    cli.main(
      ['convert', f'--from=hf:{tmp_path}', f'--to={tmp_path}/b', '--verify']
    )
  assert status.value.code == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'b').exists()


def test_places_are_exported_as_they_are():
  moe = {
    'selector': Part.of('top_k', k=1),
    'extra_ffn': 'none',
    'eval_capacity': Capacity(count=600),
  }
  config = Config(model=tiny(activation='relu', moe=moe))
  assert huggingface.check_export(config)['expert_capacity'] == 600


@pytest.fixture
def switch(tmp_path):
  """A Switch with an output projection, and where it was saved."""
  moe = {
    'selector': Part.of('top_k', k=1),
    'extra_ffn': 'none',
    'eval_capacity': Capacity(dropless=True),
  }
  model = tiny(activation='relu', moe=moe)
  tokens = jnp.ones((1, 1), jnp.int32)
  params = random_params(Transformer(model), *[tokens] * 3)
  huggingface.save(tmp_path / 'to', params, Config(model=model), None)
  return model, params, tmp_path / 'to'


def test_untied_its_embedding_has_three_names(switch):
  # Or transformers begins both stacks with random ones.
  _, params, where = switch
  found = load_file(where / 'model.safetensors')
  for name in ('shared', 'encoder.embed_tokens', 'decoder.embed_tokens'):
    np.testing.assert_array_equal(
      found[f'{name}.weight'], params['token_embedder']['embedding']
    )
  again, _ = st_moe.interop.load(f'hf:{where}')
  assert paths.by_path(again).keys() == paths.by_path(params).keys()


def test_untied_it_says_there_what_it_says_here(switch):
  reason = "transformers is not installed: pip install -e '.[hf]'"
  pytest.importorskip('transformers', reason=reason)
  model, params, where = switch
  inputs, shifted = (batch()[name] % 32 for name in ('inputs', 'shifted'))
  here = Transformer(model).apply(
    {'params': params}, inputs, shifted, shifted + 1, enable_dropout=False
  )
  there = huggingface.logits(where, inputs, shifted)
  np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)


def test_what_is_left_over_is_named(tmp_path):
  tensors = _t5(tmp_path)
  tensors['encoder.embed_tokens.weight'] = tensors['shared.weight']
  tensors['decoder.extra.weight'] = np.zeros((2, 3), np.float16)
  save_file(tensors, tmp_path / 'model.safetensors')
  lines = convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  assert lines[1].endswith('47 mapped, 1 tied, 1 unused')
  assert '  tied: encoder.embed_tokens.weight = shared.weight' in lines
  assert '  unused: decoder.extra.weight [2, 3]' in lines


def test_half_precision_is_said(tmp_path):
  tensors = _t5(tmp_path)
  tensors = {n: a.astype(jnp.bfloat16) for n, a in tensors.items()}
  save_file(tensors, tmp_path / 'model.safetensors')
  lines = convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  assert '  dtype: bfloat16 -> float32' in lines
  params = st_moe.load(f'{tmp_path}/to').params
  table = params['token_embedder']['embedding']
  np.testing.assert_array_equal(table, tensors['shared.weight'].astype('f4'))


def test_a_target_that_is_there_stays(directory, tmp_path):
  for target in (f'hf:{tmp_path}/a', f'st_moe:{tmp_path}/b'):
    convert.convert(f'hf:{directory}', target)
    with pytest.raises(ValueError, match='is not empty; name a new directory'):
      convert.convert(f'hf:{directory}', target)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
  config = tiny(
    activation='relu',
    moe={'selector': Part.of('top_k', k=1), 'extra_ffn': 'none'},
  )
  params = random_params(Transformer(config), *_arguments())

  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(huggingface.safetensors, '_write_shard', fail)
  with pytest.raises(OSError, match='No space'):
    huggingface.save(f'{tmp_path}/to', params, Config(model=config), None)
  assert list(tmp_path.iterdir()) == []


def _arguments():
  ids = jnp.ones((1, 2), jnp.int32)
  return ids, ids, ids


@pytest.mark.parametrize('keep', [100, -3])
def test_a_truncated_file(keep, tmp_path):
  _t5(tmp_path)
  path = tmp_path / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match='model.safetensors is truncated'):
    convert.open_source(f'hf:{tmp_path}')


def test_a_shard_that_is_missing(directory, tmp_path):
  index = 'model.safetensors.index.json'
  for name in ('config.json', index, 'a.safetensors'):
    (tmp_path / name).write_bytes((directory / name).read_bytes())
  with pytest.raises(ValueError, match='b.safetensors is missing, though the'):
    convert.open_source(f'hf:{tmp_path}')


def test_pickles_are_refused(tmp_path):
  _t5(tmp_path)
  (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')
  message = 'is a pickle, which can run any code .*save_pretrained'
  with pytest.raises(ValueError, match=message):
    convert.open_source(f'hf:{tmp_path}')


def test_a_place_that_is_none(tmp_path):
  with pytest.raises(ValueError, match='holds no config.json'):
    convert.open_source(f'hf:{tmp_path}')
  with pytest.raises(ValueError, match='neither a directory nor the id'):
    convert.open_source(f'hf:{tmp_path}/nothing/here')
  with pytest.raises(ValueError, match="format 'hg'. Known: .'hf', "):
    convert.open_source('hg:google/switch-base-8')


def test_what_a_config_continues(tmp_path):
  """--config.init=hf:DIR: the model is that of DIR, unless flags differ."""
  _t5(tmp_path)
  base = lambda init: config_file.to_dict(convert.open_source(init).config)
  flags = {'init': f'hf:{tmp_path}', 'model.dropout': '0.3'}
  config = config_file.load('configs/finetune.py', flags, base=base)
  assert config.model.encoder == StackConfig(2, 0, 0, group_size=512)
  assert config.model.tie_embeddings and config.model.activation.name == 'relu'
  assert config.model.dropout == 0.3
  found_vocabulary = lambda: begin.find_vocabulary(
    '', tmp_path / 'run', None, convert.open_source(config.init)
  )
  with pytest.raises(ValueError, match='without a vocabulary: set data.vocab'):
    found_vocabulary()
  # A vocabulary that is none is no vocabulary.
  (tmp_path / 'spiece.model').write_bytes(b'pieces')
  with pytest.raises(ValueError, match='is not a SentencePiece model'):
    found_vocabulary()
  (tmp_path / 'spiece.model').write_bytes(MODEL)
  found = found_vocabulary()
  assert found.model == MODEL


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number(value, tmp_path):
  tensors = _t5(tmp_path)
  name = 'decoder.block.1.layer.2.DenseReluDense.wo.weight'
  tensors[name][3, 5] = value
  save_file(tensors, tmp_path / 'model.safetensors')
  message = f'{tmp_path}: {name} holds NaN or infinite numbers'
  with pytest.raises(ValueError, match=message):
    st_moe.interop.load(f'hf:{tmp_path}')
  with pytest.raises(ValueError, match=message):
    convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  assert not (tmp_path / 'to').exists()


@pytest.mark.parametrize('kind', [np.float64, np.int8, np.int32, np.bool_])
def test_weights_of_other_types(kind, tmp_path):
  """Of 64 bits they may be too large; integers are quantized, or no weights."""
  tensors = {n: a.astype(kind) for n, a in _t5(tmp_path).items()}
  if kind is np.float64:
    save_file(tensors, tmp_path / 'model.safetensors')
    st_moe.interop.load(f'hf:{tmp_path}')
    tensors['shared.weight'][0, 0] = 1e300
  save_file(tensors, tmp_path / 'model.safetensors')
  message = (
    'NaN or infinite' if kind is np.float64 else 'is of type .*; weights'
  )
  with pytest.raises(ValueError, match=message):
    st_moe.interop.load(f'hf:{tmp_path}')


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('vocab_size', 0), ('d_model', '16'), ('d_ff', 10**30), ('num_heads', -2),
    ('d_kv', 8.0), ('num_layers', True), ('num_layers', 10**9),
    ('num_decoder_layers', 10**9), ('relative_attention_num_buckets', 0),
  ],
)  # fmt: skip
def test_a_size_that_is_none(field, value, tmp_path):
  _t5(tmp_path, **{field: value})
  message = f'{field} is .* it should be a whole num'
  with pytest.raises(ValueError, match=message):
    convert.open_source(f'hf:{tmp_path}')


def test_words_of_another_kind(tmp_path):
  _t5(tmp_path, feed_forward_proj=['relu'])
  with pytest.raises(ValueError, match=r"no activation \['relu'\] here"):
    convert.open_source(f'hf:{tmp_path}')


def test_a_broken_vocabulary_is_not_passed_on(tmp_path):
  _t5(tmp_path)
  (tmp_path / 'spiece.model').write_bytes(b'no pieces')
  with pytest.raises(ValueError, match='is not a SentencePiece model'):
    convert.convert(f'hf:{tmp_path}', f'{tmp_path}/to')
  assert not (tmp_path / 'to').exists()
