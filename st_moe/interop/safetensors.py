"""Safetensors files, one tensor in memory at a time.

8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data, each byte of it in one tensor. Large models are cut into shards,
which an index names. A header is checked whole before anything is read.
"""

import json
import math
import pathlib
import struct
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from st_moe.data import files

_DTYPES = {
  'F64': np.dtype('float64'),
  'F32': np.dtype('float32'),
  'F16': np.dtype('float16'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'I64': np.dtype('int64'),
  'I32': np.dtype('int32'),
  'I16': np.dtype('int16'),
  'I8': np.dtype('int8'),
  'U64': np.dtype('uint64'),
  'U32': np.dtype('uint32'),
  'U16': np.dtype('uint16'),
  'U8': np.dtype('uint8'),
  'BOOL': np.dtype('bool'),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WHOLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_MOST_HEADER = 100_000_000  # Bytes; the reference implementation has it.


class Reader:
  """The tensors of a directory, by name; read when asked for."""

  def __init__(self, directory):
    """Checks headers, and that all the data is there.

    As `transformers` does it reads model.safetensors, else what the index
    names, and nothing that lies beside.

    Raises:
      ValueError: no safetensors, a file that is missing, truncated or none, or
        several of which nothing says how they belong together.
    """
    directory = pathlib.Path(directory)
    wanted = {}  # name -> the file that the index has it in.
    if (directory / _WHOLE).exists():
      paths = [directory / _WHOLE]
    elif (directory / _INDEX).exists():
      wanted = _read_index(directory / _INDEX)
      paths = [directory / name for name in sorted(set(wanted.values()))]
    else:
      # A LoRA's weights are no part of the model that they were trained on.
      found = sorted(directory.glob('*.safetensors'))
      paths = [p for p in found if not p.name.startswith('adapter_')]
    if not paths:
      raise _no_safetensors(directory)
    self._places = {}
    for path in paths:
      for name, place in _header(path).items():
        if wanted.get(name, path.name) != path.name:
          continue
        if name in self._places:
          raise ValueError(
            f'{path} and {self._places[name][0]} both hold {name}, and no'
            f' {_INDEX} says which counts: leave one, named {_WHOLE}.'
          )
        self._places[name] = path, *place
    for name, file in wanted.items():
      if name not in self._places:
        raise ValueError(
          f'{directory / file} has no {name}, though the index names it there.'
        )
    self.shapes = {n: shape for n, (_, shape, *_) in self._places.items()}
    self.dtypes = {n: dtype for n, (_, _, dtype, _) in self._places.items()}

  def read(self, name: str) -> np.ndarray:
    """The tensor, mapped from its file: nothing is read before it is used."""
    path, shape, dtype, offset = self._places[name]
    if not math.prod(shape):
      return np.zeros(shape, dtype)
    return np.memmap(path, dtype, 'r', offset, shape)


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """The file of each tensor, as the index of a cut model says.

  Raises:
    ValueError: it is no index, or names a file outside of its folder.
  """
  places = files.read_json(path).get('weight_map')
  if not isinstance(places, Mapping) or not places:
    raise ValueError(f'{path} is damaged: it has no weight_map.')
  for file in places.values():
    # By name alone: the hub's files are links to elsewhere.
    inside = isinstance(file, str) and pathlib.PurePath(file).name == file
    if not inside or not file.endswith('.safetensors') or '\\' in file:
      raise ValueError(
        f'{path} names {file!r}; it must be a *.safetensors beside it.'
      )
  return dict(places)


def _header(path: pathlib.Path) -> dict[str, tuple]:
  """name -> (shape, dtype, offset), all of which have been checked."""
  if not path.exists():
    raise ValueError(f'{path} is missing, though the index names it.')
  files.check_regular(path)
  size = path.stat().st_size
  with path.open('rb') as file:
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else size
    if length > size - 8:
      raise ValueError(f'{path} is truncated or no safetensors file.')
    if length > _MOST_HEADER:
      raise ValueError(
        f'{path} has a header of {length:,} bytes; {_MOST_HEADER:,} are the'
        ' most that safetensors allow.'
      )
    text = file.read(length)
  if not text.startswith(b'{'):
    raise ValueError(f'{path} is no safetensors file.')
  header = files.parse_json(text, path)
  found, spans = {}, []
  for name, about in header.items():
    if name == '__metadata__':
      continue
    shape, dtype, (first, stop) = _described(path, name, about)
    found[name] = shape, dtype, 8 + length + first
    spans.append((first, stop, name))
  end = 0
  for first, stop, name in sorted(spans):
    if first != end:
      what = 'overlaps' if first < end else 'leaves a hole before'
      raise ValueError(
        f'{path} is damaged: its {name} begins at {first}, which {what} what'
        f' ends at {end}.'
      )
    end = stop
  if 8 + length + end > size:
    raise ValueError(
      f'{path} is truncated: {size} bytes instead of {8 + length + end}.'
    )
  if 8 + length + end < size:
    raise ValueError(
      f'{path} is damaged: {size - 8 - length - end} bytes at its end are of'
      ' no tensor.'
    )
  return found


def _described(path, name: str, about) -> tuple[tuple, np.dtype, list[int]]:
  """(shape, dtype, data_offsets) of a tensor, which must fit together."""
  try:
    kind, shape, span = (about[k] for k in ('dtype', 'shape', 'data_offsets'))
    numbers = [*shape, *span]
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
    lists = isinstance(shape, list) and isinstance(span, list)
    if not (whole and lists and len(span) == 2 and isinstance(kind, str)):
      raise TypeError
  except (KeyError, TypeError):
    raise ValueError(
      f'{path} is damaged: its header says of {name}:'
      f' {json.dumps(about)[:200]}.'
    ) from None
  if kind not in _DTYPES:
    raise ValueError(
      f'{path}: {name} is of type {kind}; known are {sorted(_DTYPES)}.'
    )
  dtype = _DTYPES[kind]
  if (needed := math.prod(shape) * dtype.itemsize) != span[1] - span[0]:
    raise ValueError(
      f'{path} is damaged: {name}, {kind} {shape}, needs {needed:,} bytes and'
      f' has {span[1] - span[0]:,}.'
    )
  return tuple(shape), dtype, span


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
