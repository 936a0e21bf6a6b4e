"""T5X's checkpoints, both layouts, dense and MoE."""

import dataclasses
import gzip
import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import st_moe
from st_moe import paths
from st_moe.config import Config, Part, StackConfig
from st_moe.interop import convert, ours, t5x, t5x_orbax
from st_moe.model.transformer import Transformer
from tests.helpers import (
  layers,
  random_params,
  tiny,
)
from tests.interop.make_golden import GOLDEN, batch

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(os.environ.get('ST_MOE_DATA', ROOT / '../shared/data'))
REAL = DATA / 'checkpoints/t5x_test_t5_tiny/test_t5_tiny.checkpoint_0'

SWITCH = {'selector': Part.of('top_k', k=1), 'extra_ffn': 'none'}
MODELS = {
  'st_moe': tiny(),
  'unrolled': tiny(scan_layers=False),
  'switch': tiny(moe=SWITCH, activation='relu', tie_embeddings=True),
  'all sparse': tiny(
    encoder=StackConfig(3, 1, 0), decoder=StackConfig(5, 4, 3), moe=SWITCH
  ),
  'tables of layers': tiny(
    encoder=StackConfig(2, 0, 0),
    decoder=StackConfig(1, 0, 0),
    relpos_per_layer=True,
  ),
  'dense': tiny(encoder=StackConfig(2, 0, 0), decoder=StackConfig(1, 0, 0)),
}


@pytest.fixture(params=MODELS)
def config(request):
  return Config(model=MODELS[request.param])


def _params(config):
  ids = jnp.ones((1, 2), jnp.int32)
  return random_params(Transformer(config.model), ids, ids, ids)


def _equal(a, b):
  a, b = paths.by_path(a), paths.by_path(b)
  assert a.keys() == b.keys()
  for path, leaf in a.items():
    np.testing.assert_array_equal(leaf, b[path], path)


@pytest.mark.parametrize('format', ['t5x', 't5x, zarr', 't5x_orbax'])
def test_there_and_back(config, format, tmp_path, monkeypatch):
  format, _, large = format.partition(', ')
  if large:
    monkeypatch.setattr(t5x, '_INLINE', 0)  # As if every array were large.
  params = _params(config)
  ours.save(f'{tmp_path}/a', params, config, None)
  convert.convert(f'{tmp_path}/a', f'{format}:{tmp_path}/b')
  lines = convert.convert(
    f'{format}:{tmp_path}/b',
    f'{tmp_path}/c',
    overrides={'model.scan_layers': config.model.scan_layers},
  )
  assert any('0 tied, 0 unused' in line for line in lines)
  back = st_moe.load(f'{tmp_path}/c')
  _equal(back.params, params)
  for field in ('embed_dim', 'num_heads', 'head_dim', 'mlp_dim', 'activation',
                'tie_embeddings', 'vocab_size'):  # fmt: skip
    assert getattr(back.config.model, field) == getattr(config.model, field)
  for stack in config.model.stacks:
    assert layers(back.config.model, stack) == layers(config.model, stack)
  if any(config.model.plan(s).num_sparse for s in config.model.stacks):
    k = config.model.moe.selector.kwargs['k']
    assert back.config.model.moe.selector.kwargs['k'] == k


def test_the_names_of_flaxformer(tmp_path):
  config = Config(model=tiny())
  ours.save(f'{tmp_path}/a', _params(config), config, None)
  convert.convert(f'{tmp_path}/a', f't5x:{tmp_path}/b')
  shapes = t5x.open_source(f'{tmp_path}/b').shapes
  for name, shape in {
    'token_embedder/embedding': (32, 16),
    'decoder/logits_dense/kernel': (16, 32),
    'encoder/relpos_bias/rel_embedding': (2, 32),
    'encoder/encoder_norm/scale': (16,),
    'encoder/layers_0/pre_attention_layer_norm/scale': (16,),
    'encoder/layers_0/attention/query/kernel': (16, 16),
    'encoder/layers_0/mlp/wi_0/kernel': (16, 24),
    'encoder/layers_1/mlp/router/router_weights/w/kernel': (16, 4),
    'encoder/layers_1/mlp/expert/wi_0/kernel': (4, 16, 24),
    'encoder/layers_1/mlp/expert/wo/kernel': (4, 24, 16),
    'encoder/layers_1/pre_extra_mlp_layer_norm/scale': (16,),
    'encoder/layers_1/extra_mlp/wo/kernel': (24, 16),
    'decoder/layers_0/pre_self_attention_layer_norm/scale': (16,),
    'decoder/layers_0/self_attention/out/kernel': (16, 16),
    'decoder/layers_1/pre_cross_attention_layer_norm/scale': (16,),
    'decoder/layers_1/encoder_decoder_attention/value/kernel': (16, 16),
  }.items():
    assert shapes.pop(name) == shape, name
  assert not [n for n in shapes if not n.startswith(('encoder/', 'decoder/'))]


def _real():
  if not REAL.exists():
    pytest.skip(f'no {REAL}; set ST_MOE_DATA to a folder that has it')
  return str(REAL)


def test_a_real_one_says_what_huggingface_says_with_its_weights():
  params, model = st_moe.interop.load(f't5x:{_real()}')
  golden = json.loads((GOLDEN / 't5x_tiny.json').read_text())
  data = batch()
  logits = Transformer(dataclasses.replace(model, dtype='float32')).apply(
    {'params': params}, data['inputs'], data['shifted'], data['targets'],
    enable_dropout=False,
  )  # fmt: skip
  real = data['targets'] > 0
  want = np.array(golden['logits'])[real]
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(logits[real][:, :48], want, rtol=0, atol=1e-4)


def test_a_real_one_comes_back(tmp_path):
  convert.convert(f't5x:{_real()}', f'{tmp_path}/a')
  convert.convert(f'{tmp_path}/a', f't5x:{tmp_path}/b')
  before, after = (t5x.open_source(w) for w in (_real(), f'{tmp_path}/b'))
  assert before.shapes == after.shapes and len(before.shapes) == 52
  for name in before.shapes:
    np.testing.assert_array_equal(after.read(name), before.read(name), name)


# What others wrote, and what is broken.


@pytest.fixture
def zarr(tmp_path, monkeypatch):
  """A checkpoint whose arrays are all in folders of their own."""
  monkeypatch.setattr(t5x, '_INLINE', 0)
  config = Config(model=tiny())
  t5x.save(f'{tmp_path}/z', _params(config), config, None)
  return tmp_path / 'z'


NAME = 'token_embedder/embedding'
FOLDER = 'target.token_embedder.embedding'


@pytest.mark.parametrize('old', [False, True])
def test_specs_of_a_bucket_are_read_here(zarr, old):
  """Written on a bucket, a spec names it; old ones have `path` at the top."""
  file = zarr / 'checkpoint'
  tree = serialization.msgpack_restore(file.read_bytes())
  table = tree['optimizer']['target']['token_embedder']
  want = np.asarray(t5x.open_source(zarr).read(NAME))
  place = f'gone/checkpoint_7/{FOLDER}/'
  kvstore = {'driver': 'gcs', 'bucket': 't5x-dummy-bucket'}
  table['embedding'] |= {
    'kvstore': kvstore if old else {**kvstore, 'path': place}
  }
  if old:
    table['embedding']['path'] = place
  file.write_bytes(serialization.msgpack_serialize(tree))
  np.testing.assert_array_equal(t5x.open_source(zarr).read(NAME), want)


def test_a_chunk_that_is_gone(zarr):
  (zarr / FOLDER / '0.0').unlink()
  with pytest.raises(ValueError, match=f'{NAME} is damaged: its chunk .*/0.0'):
    t5x.open_source(zarr)


def test_a_folder_that_is_gone(zarr):
  (zarr / FOLDER).rename(zarr / 'elsewhere')
  with pytest.raises(ValueError, match=f'{NAME} is damaged: there is no'):
    t5x.open_source(zarr)


def test_a_chunk_that_is_cut_short(zarr, tmp_path):
  chunk = zarr / FOLDER / '0.0'
  chunk.write_bytes(chunk.read_bytes()[:300])
  with pytest.raises(ValueError, match=f'{NAME} cannot be read'):
    convert.convert(f't5x:{zarr}', f'{tmp_path}/to')
  assert not (tmp_path / 'to').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'shape': [10**12, 16], 'chunks': [1, 1]},
      'all of its 16,000,000,000,000',
    ),
    ({'shape': [10**12, 16], 'chunks': [10**12, 16]}, 'are said to be 16,000,'),
    ({'chunks': [0, 16]}, 'says shape .*, chunks'),
    ({'chunks': [16]}, 'says shape .*, chunks'),
    ({'shape': 'many'}, 'says shape many, chunks'),
    ({'shape': [-32, 16]}, 'says shape .*, chunks'),
    ({'dtype': '|O'}, 'cannot be read'),
  ],
)
def test_a_folder_that_claims_what_is_not_so(zarr, changes, message):
  about = zarr / FOLDER / '.zarray'
  about.write_text(json.dumps({**json.loads(about.read_text()), **changes}))
  with pytest.raises(ValueError, match=message):
    t5x.open_source(zarr)


def test_a_spec_of_the_folder_above(zarr):
  file = zarr / 'checkpoint'
  tree = serialization.msgpack_restore(file.read_bytes())
  table = tree['optimizer']['target']['token_embedder']
  table['embedding']['kvstore']['path'] = 'here/..'
  file.write_bytes(serialization.msgpack_serialize(tree))
  with pytest.raises(ValueError, match="it is said to be in 'here/..'"):
    t5x.open_source(zarr)


def test_numbers_that_are_none(zarr, tmp_path):
  table = np.full((32, 16), np.nan, 'f4')
  (zarr / FOLDER / '0.0').write_bytes(gzip.compress(table.tobytes()))
  with pytest.raises(ValueError, match=f'{NAME} holds NaN or infinite'):
    convert.load(f't5x:{zarr}')
  words = {'token_embedder': {'embedding': 'words'}}
  where = _write(tmp_path / 'a', words)
  with pytest.raises(
    ValueError, match=r'embedding is \[\]; a model has a matrix'
  ):
    convert.open_source(f't5x:{where}')


def test_an_array_of_orbax_that_nobody_wrote(tmp_path):
  """Only claimed: zarr would make zeros of it, as many as it claims."""
  import tensorstore

  config = Config(model=tiny())
  t5x_orbax.save(f'{tmp_path}/a', _params(config), config, None)
  base = {'driver': 'file', 'path': f'{tmp_path}/a/state/'}
  for shape, chunk, message in (
    ([32, 16], [32, 16], f'{NAME} is damaged: its chunk .*0.0 is gone'),
    ([10**12, 16], [1, 1], 'not all of its 16,000,000,000,000 chunks are in'),
  ):
    spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'ocdbt', 'base': base, 'path': f'{FOLDER}/'},
      'metadata': {'shape': shape, 'chunks': chunk, 'dtype': '<f4'},
    }
    tensorstore.open(spec, create=True, delete_existing=True).result()
    with pytest.raises(ValueError, match=message):
      convert.load(f't5x:{tmp_path}/a')


@pytest.mark.parametrize('bytes_', [b'', b'no msgpack', None])
def test_another_file(zarr, bytes_):
  file = zarr / 'checkpoint'
  file.write_bytes(file.read_bytes()[:300] if bytes_ is None else bytes_)
  with pytest.raises(ValueError, match='no T5X checkpoint, or a truncated one'):
    t5x.open_source(zarr)


def test_another_directory(tmp_path):
  with pytest.raises(ValueError, match='neither a file `checkpoint` nor'):
    t5x.open_source(tmp_path)
  with pytest.raises(ValueError, match='nowhere is not there'):
    t5x.open_source(tmp_path / 'nowhere')


def _write(path, target):
  tree = {'version': 3, 'optimizer': {'target': target, 'state': {}}}
  path.mkdir()
  (path / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  return str(path)


def test_a_scanned_flaxformer_is_refused(tmp_path):
  table = {'embedding': np.zeros((8, 4), 'f4')}
  scanned = {'encoder': {'subblock_0': {'x': np.zeros(2, 'f4')}}}
  where = _write(tmp_path / 'a', {'token_embedder': table, 'encoder': scanned})
  with pytest.raises(ValueError, match='position biases for every layer'):
    t5x.open_source(where)
  where = _write(tmp_path / 'b', {'params': {'x': np.zeros(2, 'f4')}})
  with pytest.raises(ValueError, match="no T5 of T5X. It has .'params/x'"):
    t5x.open_source(where)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'moe': {'extra_ffn': 'before'}}, 'extra FFN after the sparse one only'),
    ({'moe': {'multiplicative_bias': True}}, 'no multiplicative bias'),
    ({'decoder': None}, 'encoder-decoders only'),
  ],
)
def test_what_has_no_name_there(changes, message):
  with pytest.raises(ValueError, match=message):
    t5x.check_export(Config(model=tiny(**changes)))
