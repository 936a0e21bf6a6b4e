"""Every model into every format: written so that it comes back, or refused."""

import contextlib
import functools
import importlib
import itertools
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import st_moe
from st_moe import cli, paths
from st_moe.config import Config, Part, StackConfig
from st_moe.data import pieces, vocabulary
from st_moe.interop import convert, huggingface, links, ours, t5x
from st_moe.model.transformer import Transformer
from st_moe.train.state import abstract_params
from tests.helpers import (
  layers,
  random_params,
  tiny,
)
from tests.interop.test_hf_tokenizer import MODEL

DENSE = {'encoder': StackConfig(2, 0, 0), 'decoder': StackConfig(2, 0, 0)}
SWITCH = {
  'moe': {'selector': Part.of('top_k', k=1), 'extra_ffn': 'none'},
  'activation': 'relu',
}
KINDS = {'st_moe': {}, 'switch': SWITCH, 'dense': DENSE}
# What a model may have besides; a value of each that is not the default.
PARTS = {
  'nothing': {},
  'tied': {'tie_embeddings': True},
  'gelu': {'activation': 'gelu'},
  'an encoder alone': {'decoder': None},
  'a tied encoder alone': {'decoder': None, 'tie_embeddings': True},
  'a decoder alone': {'encoder': None},
  'tables of layers': {'relpos_per_layer': True},
  'the dense twin': {'dense': True},
  'an extra FFN before': {'moe': {'extra_ffn': 'before'}},
  'an extra FFN after': {'moe': {'extra_ffn': 'after'}},
  'a bias': {'moe': {'multiplicative_bias': True}},
  'wide experts': {'moe': {'hidden_dim': 40}},
}


def _save(path, model, vocabulary=None):
  ids = jnp.ones((1, 2), jnp.int32)
  params = random_params(Transformer(model), ids, ids, ids)
  ours.save(str(path), params, Config(model=model), vocabulary)
  return params


def _model(kind, part):
  changes = {**KINDS[kind], **PARTS[part]}
  changes['moe'] = {
    **KINDS[kind].get('moe', {}), **PARTS[part].get('moe', {})
  }  # fmt: skip
  return tiny(scan_layers=False, **changes)


@functools.cache
def _shapes(kind, part):
  return abstract_params(Transformer(_model(kind, part)))


# How a refusal begins.
REFUSED = {
  'hf': 'HuggingFace has ',
  't5x': '(Flaxformer|T5X) has ',
  't5x_orbax': '(Flaxformer|T5X) has ',
  'mtf': 'Mesh-TensorFlow is read here and not written',
}


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('kind', KINDS)
def test_it_is_written_so_that_it_comes_back_or_refused(kind, part, tmp_path):
  model, abstract = _model(kind, part), _shapes(kind, part)
  config = Config(model=model)
  for format, refusal in REFUSED.items():
    try:
      convert.check_export(format, config, abstract)
    except ValueError as e:
      assert re.match(refusal, str(e)) and '\n' not in str(e), e
      continue
    module = importlib.import_module(convert.FORMATS[format])
    theirs = links.tensors(abstract, model, module.names(model))
    shapes = {name: shape for name, shape, _, _ in theirs}
    if format == 'hf':
      about = tmp_path / 'config.json'
      about.write_text(json.dumps(huggingface.check_export(config)))
      found, _ = huggingface._config(huggingface._Fields(about), shapes, 'x')
    else:
      found = t5x._config('x', shapes)
    for stack in ('encoder', 'decoder'):
      assert bool(model.stack(stack)) == bool(found.model.stack(stack))
      if model.stack(stack):
        assert layers(found.model, stack) == layers(model, stack), format
    assert found.model.relpos_per_layer == model.relpos_per_layer
    if format == 'hf':
      assert found.model.activation == model.activation


def test_some_are_written():
  """The above refuses no more than it should."""

  def written(format):
    found = set()
    for kind, part in itertools.product(KINDS, PARTS):
      config = Config(model=_model(kind, part))
      with contextlib.suppress(ValueError):
        convert.check_export(format, config, _shapes(kind, part))
        found.add((kind, part))
    return found

  plain = {'nothing', 'tied', 'tables of layers', 'wide experts'}
  both = {(kind, part) for kind in ('switch', 'dense') for part in plain}
  assert both - {
    ('switch', 'tables of layers'),
    ('switch', 'wide experts'),
  } <= written('hf')
  assert ('dense', 'a tied encoder alone') in written('hf')
  assert both | {('st_moe', part) for part in plain} <= written('t5x')


# Where to


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  path = tmp_path_factory.mktemp('small') / 'model'
  model = tiny(**DENSE)
  _save(path, model)
  return path


@pytest.mark.parametrize('format', ['st_moe', 'hf', 't5x', 't5x_orbax'])
@pytest.mark.parametrize('where', ['out', './a/out', '~/out'])
def test_a_path_is_a_path(format, where, small, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', f'{tmp_path}/home')
  monkeypatch.setattr(t5x, '_INLINE', 0)  # Every array a folder.
  convert.convert(str(small), f'{format}:{where}')
  place = pathlib.Path(where).expanduser()
  assert any(place.iterdir()) and not pathlib.Path('~').exists()
  params, _ = st_moe.interop.load(f'{format}:{where}')
  want = st_moe.load(small).params
  _equal(params, want)


@pytest.mark.parametrize('format', ['st_moe', 'hf', 't5x', 't5x_orbax'])
def test_a_target_that_is_there_is_told_before_any_work(
  format, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'there').mkdir()
  (tmp_path / 'there' / 'file').write_text('mine')
  for where in ('there', 'there/file'):
    with pytest.raises(ValueError, match='is not empty; name a new directory'):
      convert.convert('hf:not/here/at/all', f'{format}:{where}')


def test_a_part_that_is_unknown_there_is_one_sentence(tmp_path, capsys):
  model = tiny(encoder=StackConfig(2, 0, 0), decoder=None)
  _save(tmp_path / 'a', model)
  for format, message in (
    ('t5x', 'T5X has names for encoder-decoders only'),
    ('hf', 'HuggingFace has no output projection for an encoder alone'),
    ('mtf', 'Mesh-TensorFlow is read here and not written'),
  ):
    with pytest.raises(SystemExit) as status:
      cli.main(
        ['convert', f'--from={tmp_path}/a', f'--to={format}:{tmp_path}/b']
      )
    assert status.value.code == 1
    assert capsys.readouterr().err.startswith(f'st-moe: {message}')
    assert [p.name for p in tmp_path.iterdir()] == ['a']


# What comes along


def test_a_vocabulary_comes_along_and_is_of_use(tmp_path):
  """A model like mT5: sentinels of its own, more rows than ids."""
  own = pieces.extended(MODEL)
  model = tiny(**DENSE, vocab_size=128)
  ids = jnp.ones((1, 2), jnp.int32)
  params = random_params(Transformer(model), ids, ids, ids)
  huggingface.save(f'{tmp_path}/hf', params, Config(model=model), own)
  convert.convert(f'hf:{tmp_path}/hf', f'{tmp_path}/ours')
  convert.convert(f'{tmp_path}/ours', f'hf:{tmp_path}/back')
  for place in (f'hf:{tmp_path}/hf', f'{tmp_path}/ours', f'hf:{tmp_path}/back'):
    found = st_moe.load(place).vocabulary
    assert (found.model, found.size, found.sentinel(0)) == (own, 124, 123)
  again = vocabulary.load(f'{tmp_path}/back/spiece.model')
  assert again.encode_marked('the<extra_id_1>') == [4, 122]


def test_a_vocabulary_with_more_ids_than_the_model(tmp_path):
  """Or ids past the table would be NaN."""
  model = tiny(**DENSE, vocab_size=64)
  ids = jnp.ones((1, 2), jnp.int32)
  params = random_params(Transformer(model), ids, ids, ids)
  huggingface.save(f'{tmp_path}/hf', params, Config(model=model), MODEL)
  with pytest.raises(ValueError, match='64 is smaller than .* 124 ids, of whi'):
    st_moe.load(f'hf:{tmp_path}/hf')
  with pytest.raises(ValueError, match='64 is smaller than .* 124 ids, of whi'):
    convert.convert(f'hf:{tmp_path}/hf', f'{tmp_path}/ours')
  assert not (tmp_path / 'ours').exists()
  # Where there are fewer sentinels they fit.
  about = tmp_path / 'hf' / 'tokenizer_config.json'
  about.write_text('{"extra_ids": 40}')
  assert st_moe.load(f'hf:{tmp_path}/hf').vocabulary.sentinel(0) == 63


def test_bytes_of_a_foreign_model_are_those_of_byt5(tmp_path):
  model = tiny(**DENSE, vocab_size=384)
  ids = jnp.ones((1, 2), jnp.int32)
  params = random_params(Transformer(model), ids, ids, ids)
  huggingface.save(f'{tmp_path}/a', params, Config(model=model), None)
  foreign = st_moe.load(f'hf:{tmp_path}/a', vocabulary='bytes')
  assert foreign.vocabulary.sentinel(0) == 258
  # One of ours says so.
  huggingface.save(f'{tmp_path}/b', params, Config(model=model), b'')
  ours_ = st_moe.load(f'hf:{tmp_path}/b', vocabulary='bytes')
  assert ours_.vocabulary.sentinel(0) == 358
  _equal(ours_.params, foreign.params)


def _equal(a, b):
  a, b = paths.by_path(a), paths.by_path(b)
  assert a.keys() == b.keys()
  for path, leaf in a.items():
    np.testing.assert_array_equal(leaf, b[path], path)
