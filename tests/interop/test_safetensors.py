"""Which safetensors are read, and that their headers say what is so."""

import json
import os
import re
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from st_moe.interop.safetensors import Reader

TWO = {
  'a': np.arange(6, dtype='f4').reshape(2, 3),
  'b': np.arange(4, dtype='i8').astype('i8'),
}


def _file(path, header, data=b'\0' * 24, length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(struct.pack('<Q', length) + text + data)


def _said(shape=(2, 3), offsets=(0, 24), dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


def test_a_file_of_the_reference_implementation(tmp_path):
  save_file(TWO, tmp_path / 'model.safetensors', {'format': 'pt'})
  found = Reader(tmp_path)
  assert found.shapes == {'a': (2, 3), 'b': (4,)}
  for name, array in TWO.items():
    np.testing.assert_array_equal(found.read(name), array)
    assert found.dtypes[name] == array.dtype


# What a header may not say of 24 bytes, and what the sentence has in it.
WRONG = {
  'a negative offset': ({'a': _said(offsets=(-24, 0))}, 'header says of a'),
  'reversed offsets': ({'a': _said(offsets=(24, 0))}, 'has -24'),
  'more than the shape': ({'a': _said(shape=(2, 2))}, 'needs 16 bytes and has'),
  'less than the shape': ({'a': _said(shape=(9, 9))}, 'needs 324 bytes'),
  'past the end': ({'a': _said((2, 4), (0, 32))}, 'is truncated'),
  'short of the end': ({'a': _said((1, 3), (0, 12))}, '12 bytes at its end'),
  'an overlap': (
    {'a': _said((1, 4), (0, 16)), 'b': _said((1, 4), (8, 24))},
    'b begins at 8, which overlaps what ends at 16',
  ),
  'a hole': (
    {'a': _said((2,), (0, 8)), 'b': _said((2,), (16, 24))},
    'b begins at 16, which leaves a hole before what ends at 8',
  ),
  'a negative shape': ({'a': _said(shape=(-2, -3))}, 'header says of a'),
  'a shape of truth': ({'a': _said(shape=(True, 6))}, 'header says of a'),
  'a shape of fractions': ({'a': _said(shape=(2.0, 3))}, 'header says of a'),
  'no shape': ({'a': {'dtype': 'F32', 'data_offsets': [0, 24]}}, 'says of a'),
  'a shape that is text': ({'a': _said(shape='23')}, 'header says of a'),
  'a shape past all': ({'a': _said(shape=(2**64, 3))}, 'header says of a'),
  'three offsets': ({'a': _said(offsets=(0, 8, 24))}, 'header says of a'),
  'no such dtype': ({'a': _said(dtype='F31')}, 'a is of type F31; known'),
  'another dtype': ({'a': _said(dtype='F64')}, 'needs 48 bytes and has 24'),
  'a dtype of numbers': ({'a': _said(dtype=32)}, 'header says of a'),
  'a tensor of text': ({'a': 'F32'}, 'header says of a'),
  'nothing at all': ({'a': None}, 'header says of a'),
  'a list': (b'[1, 2]', 'is no safetensors file'),
  'a space first': (b' {}', 'is no safetensors file'),
  'a name twice': (
    b'{"a": 1, "a": %s}' % json.dumps(_said()).encode(),
    "has 'a' twice",
  ),
  'no JSON': (b'{"a": ', 'no JSON, or damaged'),
  'no UTF-8': (b'{"\xff": 1}', 'no JSON, or damaged'),
  'brackets without end': (b'{"a":' + b'[' * 100_000, 'no JSON, or damaged'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_header_that_cannot_be(case, tmp_path):
  header, message = WRONG[case]
  _file(tmp_path / 'model.safetensors', header)
  with pytest.raises(ValueError, match=re.escape(message)) as e:
    Reader(tmp_path)
  assert 'model.safetensors' in str(e.value)


def test_a_length_that_cannot_be(tmp_path):
  path = tmp_path / 'model.safetensors'
  for length in (2**63, 2**64 - 1, 10**6):
    _file(path, {'a': _said()}, length=length)
    with pytest.raises(ValueError, match='truncated or no safetensors'):
      Reader(tmp_path)
  # Of 200 MB, none of which is on the disk.
  os.truncate(path, 200_000_000)
  with path.open('r+b') as file:
    file.write(struct.pack('<Q', 100_000_001))
  with pytest.raises(ValueError, match='header of 100,000,001 bytes; 100,000'):
    Reader(tmp_path)


def test_what_is_no_file(tmp_path):
  path = tmp_path / 'model.safetensors'
  os.mkfifo(path)
  with pytest.raises(ValueError, match='model.safetensors is a pipe; a file'):
    Reader(tmp_path)
  path.unlink()
  path.symlink_to('/dev/zero')
  with pytest.raises(ValueError, match='model.safetensors is a device; a file'):
    Reader(tmp_path)


# Which files are read: as transformers does it.


def _save(path, **tensors):
  save_file({n: np.float32([x]) for n, x in tensors.items()}, path)


def _index(folder, **places):
  text = json.dumps({'weight_map': places})
  (folder / 'model.safetensors.index.json').write_text(text)


def test_the_whole_model_is_read_and_nothing_beside_it(tmp_path):
  _save(tmp_path / 'model.safetensors', a=1)
  for name in ('older-run', 'model.fp16', 'adapter_model', 'zzz'):
    _save(tmp_path / f'{name}.safetensors', a=2, b=2)
  _index(tmp_path, a='zzz.safetensors', b='zzz.safetensors')  # Of before.
  found = Reader(tmp_path)
  assert found.shapes == {'a': (1,)} and found.read('a') == 1


def test_without_one_what_the_index_names(tmp_path):
  _save(tmp_path / 'x.safetensors', a=1)
  _save(tmp_path / 'y.safetensors', b=2)
  _save(tmp_path / 'older.safetensors', a=3, c=3)
  _index(tmp_path, a='x.safetensors', b='y.safetensors')
  found = Reader(tmp_path)
  assert {n: found.read(n).item() for n in found.shapes} == {'a': 1, 'b': 2}
  _index(tmp_path, a='x.safetensors', b='x.safetensors')
  with pytest.raises(ValueError, match='x.safetensors has no b, though the in'):
    Reader(tmp_path)


def test_without_either_parts_that_have_no_tensor_in_common(tmp_path):
  _save(tmp_path / 'x.safetensors', a=1)
  _save(tmp_path / 'y.safetensors', b=2)
  _save(tmp_path / 'adapter_model.safetensors', a=3)
  found = Reader(tmp_path)
  assert {n: found.read(n).item() for n in found.shapes} == {'a': 1, 'b': 2}
  _save(tmp_path / 'older.safetensors', a=3)
  with pytest.raises(ValueError, match=r'x\.\S+ and \S+older\.\S+ both hold a'):
    Reader(tmp_path)


@pytest.mark.parametrize(
  'name', ['../x.safetensors', '/x.safetensors', 'x.bin', '..', '', 7, None]
)
def test_an_index_names_what_lies_beside_it(name, tmp_path):
  (tmp_path / 'm').mkdir()
  _save(tmp_path / 'x.safetensors', a=1)
  _index(
    tmp_path / 'm', a=str(tmp_path) + name if name == '/x.safetensors' else name
  )
  with pytest.raises(ValueError, match='it must be a .*.safetensors beside it'):
    Reader(tmp_path / 'm')


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(text, tmp_path):
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match='index.json (is no JSON|is damaged)'):
    Reader(tmp_path)
