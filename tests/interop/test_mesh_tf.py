"""Checkpoints of Mesh-TensorFlow, as its T5 and MoE layers name variables."""

import pathlib

import numpy as np
import pytest

from st_moe import paths
from st_moe.config import Part
from st_moe.interop import convert, mesh_tf

D, F, H, KV, E, V = 8, 12, 2, 3, 4, 16  # Sizes of everything here.


def _variables(*, gated, tied, sparse, extra, gate='top_2_gating', blocks=2):
  """name -> shape. `sparse`: every second pair of layers is a block's MoE."""
  found = {'shared/embedding': (V, D), 'global_step': ()}
  if not tied:
    found['decoder/logits/kernel'] = (D, V)
  matrices = ['wi_0', 'wi_1'] if gated else ['wi']

  def ffn(where, kind):
    bank = (E,) if kind == 'MoE1D' else ()
    for w in matrices:
      found[f'{where}/{kind}/{w}/kernel'] = (*bank, D, F)
    found[f'{where}/{kind}/wo/kernel'] = (*bank, F, D)
    if bank:
      found[f'{where}/{kind}/{gate}/kernel'] = (D, E)

  def attention(where, kind):
    for letter in 'qkv':
      found[f'{where}/{kind}/{letter}'] = (D, H * KV)
    found[f'{where}/{kind}/o'] = (H * KV, D)

  for stack in ('encoder', 'decoder'):
    found[f'{stack}/final_layer_norm/scale'] = (D,)
    mixers = ['SelfAttention'] + ['EncDecAttention'] * (stack == 'decoder')
    # One block is a dense layer and, with `sparse`, a sparse one behind it.
    kinds = [*mixers, 'DenseReluDense']
    if sparse:
      kinds += [*mixers, 'MoE1D'] + ['DenseReluDense'] * extra
    for block in range(blocks):
      for i, kind in enumerate(kinds):
        where = f'{stack}/block_{block:03}/layer_{i:03}'
        found[f'{where}/layer_norm/scale'] = (D,)
        put = attention if 'Attention' in kind else ffn
        put(where, kind)
    first = f'{stack}/block_000/layer_000/SelfAttention'
    found[f'{first}/relative_attention_bias'] = (H, 32)
  found['shared/embedding_slot_vr'] = (V,)
  return found


def _write(path, shapes, seed=0):
  """A TensorFlow checkpoint of random numbers; returns them."""
  import tensorflow as tf

  rng = np.random.default_rng(seed)
  tensors = {n: rng.standard_normal(s).astype('f4') for n, s in shapes.items()}
  prefix = f'{path}/model.ckpt-7'
  tf.raw_ops.SaveV2(
    prefix=prefix,
    tensor_names=list(tensors),
    shape_and_slices=[''] * len(tensors),
    tensors=list(tensors.values()),
  )
  return prefix, tensors


CASES = {
  't5': dict(gated=False, tied=True, sparse=False, extra=False),
  't5_1_1': dict(gated=True, tied=False, sparse=False, extra=False),
  'switch': dict(
    gated=False, tied=True, sparse=True, extra=False, gate='switch_gating'
  ),
  'st_moe': dict(gated=True, tied=False, sparse=True, extra=True),
}


@pytest.mark.parametrize('case', CASES)
def test_every_variable_finds_its_place(case, tmp_path):
  prefix, tensors = _write(tmp_path, _variables(**CASES[case]))
  source = mesh_tf.open_source(prefix)
  asked, model = CASES[case], source.config.model
  assert source.unused == []
  assert model.activation.name == ('geglu' if asked['gated'] else 'relu')
  assert model.tie_embeddings == asked['tied']
  assert (model.num_heads, model.head_dim) == (H, KV)
  if asked['sparse']:
    assert model.encoder.sparse_every == 2 and model.encoder.sparse_offset == 1
    k = 1 if case == 'switch' else 2
    assert model.moe.selector == Part.of('top_k', k=k)
    assert model.moe.extra_ffn == ('after' if asked['extra'] else 'none')
  params, _ = convert.load(f'mtf:{prefix}')
  unrolled = paths.by_path(paths.unroll(params, model))
  first = 'encoder/block_000/layer_000'
  np.testing.assert_array_equal(
    unrolled['encoder/layers_0/self_attention/key/kernel'],
    tensors[f'{first}/SelfAttention/k'].reshape(D, H, KV),
  )
  np.testing.assert_array_equal(
    unrolled['encoder/relpos_bias/rel_embedding'],
    tensors[f'{first}/SelfAttention/relative_attention_bias'],
  )
  # The decoder's last sublayer, in the second block.
  last = {'t5': ('layers_1', 2), 'switch': ('layers_3', 5)}
  if case in last:
    layer, i = last[case]
    where = f'decoder/block_001/layer_{i:03}'
    name, kind = ('moe/experts', 'MoE1D') if i == 5 else ('mlp',) * 2
    kind = kind if i == 5 else 'DenseReluDense'
    np.testing.assert_array_equal(
      unrolled[f'decoder/{layer}/{name}/wo/kernel'],
      tensors[f'{where}/{kind}/wo/kernel'],
    )
  if case == 'st_moe':
    where = 'decoder/block_001/layer_006/DenseReluDense'
    np.testing.assert_array_equal(
      unrolled['decoder/layers_3/extra_mlp/wi_1/kernel'],
      tensors[f'{where}/wi_1/kernel'],
    )
    gate = 'encoder/block_001/layer_003/MoE1D/top_2_gating/kernel'
    np.testing.assert_array_equal(
      unrolled['encoder/layers_3/moe/router/kernel'], tensors[gate]
    )


def test_tables_of_layers(tmp_path):
  shapes = _variables(**CASES['t5'])
  for stack in ('encoder', 'decoder'):
    where = f'{stack}/block_001/layer_000/SelfAttention'
    shapes[f'{where}/relative_attention_bias'] = (H, 32)
  prefix, tensors = _write(tmp_path, shapes)
  source = mesh_tf.open_source(prefix)
  assert source.config.model.relpos_per_layer and source.unused == []
  params, model = convert.load(f'mtf:{prefix}')
  unrolled = paths.by_path(paths.unroll(params, model))
  name = 'SelfAttention/relative_attention_bias'
  for stack in ('encoder', 'decoder'):
    np.testing.assert_array_equal(
      unrolled[f'{stack}/layers_1/relpos_bias/rel_embedding'],
      tensors[f'{stack}/block_001/layer_000/{name}'],
    )


def test_what_cannot_be(tmp_path):
  with pytest.raises(ValueError, match='no TensorFlow checkpoint, or'):
    mesh_tf.open_source(f'{tmp_path}/model.ckpt-1')
  shapes = _variables(**CASES['switch'])
  odd = {
    n.replace('switch_gating', 'ntlb_gating'): s for n, s in shapes.items()
  }
  prefix, _ = _write(tmp_path, odd)
  with pytest.raises(ValueError, match=r"routes by \['ntlb_gating'\]; known"):
    mesh_tf.open_source(prefix)
  prefix, _ = _write(tmp_path, {'other': (2,)})
  with pytest.raises(ValueError, match='no shared/embedding: no T5 of'):
    mesh_tf.open_source(prefix)
  del shapes['decoder/block_001/layer_003/SelfAttention/v']
  prefix, _ = _write(tmp_path, shapes)
  with pytest.raises(ValueError, match='has no tensor decoder/block_001/'):
    convert.load(f'mtf:{prefix}')
  prefix, _ = _write(tmp_path, _variables(**CASES['t5']))
  data = tmp_path / 'model.ckpt-7.data-00000-of-00001'
  data.write_bytes(data.read_bytes()[:200])
  with pytest.raises(ValueError, match='cannot be read'):
    convert.load(f'mtf:{prefix}')
  prefix, _ = _write(tmp_path, _variables(**CASES['t5']))
  with pytest.raises(ValueError, match='is read here and not written'):
    convert.convert(f'mtf:{prefix}', f'mtf:{tmp_path}/to')


def test_a_directory_names_what_lies_in_it(tmp_path):
  """The file `checkpoint` may name another folder: that of then, or any."""
  for name in ('here', 'there'):
    (tmp_path / name).mkdir()
    _write(tmp_path / name, _variables(**CASES['t5']), seed=len(name))
  other = tmp_path / 'there' / 'model.ckpt-7'
  state = f'model_checkpoint_path: "{other}"'
  (tmp_path / 'here' / 'checkpoint').write_text(state)
  read = lambda place: mesh_tf.open_source(str(place)).read('shared/embedding')
  found, own = read(tmp_path / 'here'), read(tmp_path / 'here/model.ckpt-7')
  np.testing.assert_array_equal(found, own)
  assert not np.array_equal(found, read(other))


def test_an_index_that_claims_more_than_there_is(tmp_path):
  # The index of twice as many letters, beside the data of these.
  prefix, _ = _write(tmp_path, _variables(**CASES['t5']))
  (tmp_path / 'big').mkdir()
  big = {n: (2 * s[0], *s[1:]) if s else s
         for n, s in _variables(**CASES['t5']).items()}  # fmt: skip
  larger, _ = _write(tmp_path / 'big', big)
  pathlib.Path(f'{larger}.index').rename(f'{prefix}.index')
  with pytest.raises(ValueError, match='cannot be read: its index describes'):
    mesh_tf.open_source(prefix)


def test_a_variable_of_nan(tmp_path):
  import tensorflow as tf

  prefix, tensors = _write(tmp_path, _variables(**CASES['t5']))
  tensors['shared/embedding'][2, 3] = np.nan
  tf.raw_ops.SaveV2(
    prefix=prefix,
    tensor_names=list(tensors),
    shape_and_slices=[''] * len(tensors),
    tensors=list(tensors.values()),
  )
  with pytest.raises(ValueError, match='shared/embedding holds NaN'):
    convert.load(f'mtf:{prefix}')
