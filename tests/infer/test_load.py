"""What is restored for answers alone moves no number."""

import jax
import numpy as np
import pytest

import st_moe
from st_moe import paths, sharding
from st_moe.config import Config
from st_moe.data import vocabulary
from st_moe.interop import ours
from st_moe.model.transformer import Transformer
from tests.helpers import random_params, tiny

BYTES = vocabulary.load('bytes')


@pytest.fixture(scope='session')
def place(tmp_path_factory):
  """A checkpoint of a scanned bfloat16 model, four layers a stack."""
  config = tiny(vocab_size=360, dtype='bfloat16')
  one = np.ones((1, 1), np.int32)
  params = random_params(Transformer(config), one, one, one)
  path = tmp_path_factory.mktemp('load') / 'model'
  ours.save(str(path), params, Config(model=config), BYTES.model)
  return path


def _logits(model, params):
  ids = np.arange(2, 14, dtype=np.int32).reshape(2, 6)
  run = lambda p: model.apply(
    {'params': p}, ids, ids, ids, enable_dropout=False
  )
  return np.asarray(jax.jit(run)(params))


def test_weights_are_held_as_they_are_multiplied(place):
  whole, served = st_moe.load(place), st_moe.load(place, for_answers=True)
  assert whole.model.config.scan_layers and not served.model.config.scan_layers
  dtypes = {}
  for path, leaf in paths.by_path(served.params).items():
    dtypes.setdefault(paths.role(path), set()).add(leaf.dtype.name)
  half, single = {'bfloat16'}, {'float32'}
  assert dtypes['experts'] == dtypes['mlp'] == half
  assert dtypes['router'] == dtypes['norms'] == dtypes['embedding'] == single
  # Position biases are added to float32 logits.
  assert dtypes['attention'] == half | single
  assert {a.dtype.name for a in jax.tree.leaves(whole.params)} == single
  unrolled = paths.unroll(whole.params, whole.model.config)
  np.testing.assert_array_equal(
    _logits(served.model, served.params), _logits(served.model, unrolled)
  )


def test_shards_are_where_the_mesh_wants_them(place):
  mesh = sharding.make_mesh(data=2, expert=4)
  served = st_moe.load(place, mesh=mesh, for_answers=True)
  bank = served.params['encoder']['layers_1']['moe']['experts']['wo']['kernel']
  assert {s.data.shape[0] for s in bank.addressable_shards} == {1}
  assert served.generate(['hi'], max_length=2) == st_moe.load(place).generate(
    ['hi'], max_length=2
  )


def test_a_vocabulary_of_ones_own(place, tmp_path):
  found = st_moe.load(place, vocabulary='bytes')
  assert found.vocabulary.fingerprint == BYTES.fingerprint
  with pytest.raises(ValueError, match='no.model: no such file'):
    st_moe.load(place, vocabulary=f'{tmp_path}/no.model')
  (tmp_path / 'file').touch()
  for name, message in {
    '': "'' names no checkpoint: give a workdir",
    'hf:': "'hf:' names no checkpoint",
    f'{tmp_path}/file': 'file is a file; a checkpoint is a directory',
  }.items():
    with pytest.raises(ValueError, match=message):
      st_moe.load(name)
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(ValueError, match=f"HuggingFace's is hf:{tmp_path}"):
    st_moe.load(tmp_path)
  # Times of day are no formats.
  with pytest.raises(ValueError, match='No checkpoint in .*runs/12:30'):
    st_moe.load(f'{tmp_path}/runs/12:30')
