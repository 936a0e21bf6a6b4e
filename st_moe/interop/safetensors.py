"""Safetensors files, one tensor in memory at a time.

8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data. Large models are cut into shards, which an index names.
"""

import json
import pathlib
import struct
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from st_moe.data import files

_DTYPES = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype('int64'),
  'I32': np.dtype('int32'),
  'U8': np.dtype('uint8'),
  'BOOL': np.dtype('bool'),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = 'model.safetensors.index.json'


class Reader:
  """The tensors of a directory, by name; read when asked for."""

  def __init__(self, directory):
    """Reads headers and checks that all the data is there.

    Raises:
      ValueError: no safetensors, or a file that is missing, truncated or none.
    """
    directory = pathlib.Path(directory)
    index = directory / _INDEX
    if index.exists():
      names = json.loads(index.read_text())['weight_map'].values()
      paths = [directory / name for name in sorted(set(names))]
    else:
      paths = sorted(directory.glob('*.safetensors'))
    if not paths:
      raise _no_safetensors(directory)
    self._places = {}
    for path in paths:
      self._places |= _header(path)
    self.shapes = {n: shape for n, (_, shape, *_) in self._places.items()}
    self.dtypes = {n: dtype for n, (_, _, dtype, _) in self._places.items()}

  def read(self, name: str) -> np.ndarray:
    """The tensor, mapped from its file: nothing is read before it is used."""
    path, shape, dtype, offset = self._places[name]
    if not np.prod(shape):
      return np.zeros(shape, dtype)
    return np.memmap(path, dtype, 'r', offset, shape)


def _header(path: pathlib.Path) -> dict[str, tuple]:
  """name -> (path, shape, dtype, offset)."""
  if not path.exists():
    raise ValueError(f'{path} is missing, though the index names it.')
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else size
    if length > size - 8:
      raise ValueError(f'{path} is truncated or no safetensors file.')
    try:
      header = json.loads(file.read(length))
    except ValueError:
      raise ValueError(f'{path} is no safetensors file.') from None
  found, end = {}, 0
  for name, about in header.items():
    if name == '__metadata__':
      continue
    if about['dtype'] not in _DTYPES:
      raise ValueError(
        f'{path}: {name} is of type {about["dtype"]}; known are'
        f' {sorted(_DTYPES)}.'
      )
    offset, stop = about['data_offsets']
    end = max(end, stop)
    dtype, shape = _DTYPES[about['dtype']], tuple(about['shape'])
    found[name] = path, shape, dtype, 8 + length + offset
  if 8 + length + end > size:
    raise ValueError(
      f'{path} is truncated: {size} bytes instead of {8 + length + end}.'
    )
  return found


def _no_safetensors(directory: pathlib.Path) -> ValueError:
  pickles = [*directory.glob('*.bin'), *directory.glob('*.pt')]
  if pickles:
    return ValueError(
      f'{pickles[0]} is a pickle, which can run any code when opened, and is'
      ' not read. Where you trust it, `from_pretrained` and `save_pretrained`'
      ' of transformers turn it into safetensors.'
    )
  return ValueError(f'{directory} holds no *.safetensors.')


def write(
  directory,
  tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, object]],
  *,
  shard_bytes: int = 5 << 30,
) -> None:
  """Writes tensors as they come, into shards of about `shard_bytes`.

  Args:
    tensors: (name, shape, dtype, call that makes the array) of each; one array
      is in memory at a time.
  """
  directory = pathlib.Path(directory)
  shards, size = [[]], 0
  for item in tensors:
    nbytes = int(np.prod(item[1])) * item[2].itemsize
    if shards[-1] and size + nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append((*item, nbytes))
    size += nbytes
  names = [
    f'model-{i:05}-of-{len(shards):05}.safetensors'
    for i in range(1, len(shards) + 1)
  ]
  if len(shards) == 1:
    names = ['model.safetensors']
  else:
    index = {
      'metadata': {'total_size': sum(t[-1] for s in shards for t in s)},
      'weight_map': {
        t[0]: name for name, s in zip(names, shards, strict=True) for t in s
      },
    }
    (directory / _INDEX).write_text(files.as_json(index, indent=2))
  for name, shard in zip(names, shards, strict=True):
    _write_shard(directory / name, shard)


def _write_shard(path: pathlib.Path, shard) -> None:
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape, dtype, _, nbytes in shard:
    header[name] = {
      'dtype': _NAMES[np.dtype(dtype)],
      'shape': list(shape),
      'data_offsets': [offset, offset + nbytes],
    }
    offset += nbytes
  text = files.as_json(header).encode()
  text += b' ' * (-len(text) % 8)  # Tensors start at multiples of 8 bytes.
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for name, shape, dtype, make, _ in shard:
      array = np.ascontiguousarray(make(), dtype)
      assert array.shape == tuple(shape), (name, array.shape, shape)
      file.write(array.data if array.ndim else array.tobytes())
