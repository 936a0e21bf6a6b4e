"""What is done to the inputs of `tests.hostile`, kind by kind."""

import functools
import gzip
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from tests import hostile_bases as given


def _cut(path: pathlib.Path, rng: random.Random) -> None:
  os.truncate(path, rng.randrange(path.stat().st_size))


def _flip(path: pathlib.Path, rng: random.Random) -> None:
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def _noise(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(rng.randbytes(path.stat().st_size))


def _empty(path: pathlib.Path, rng: random.Random) -> None:
  path.write_bytes(b'')


def _gone(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()


def _pipe(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()
  os.mkfifo(path)


def _device(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()
  path.symlink_to('/dev/zero')


def _folder(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()
  path.mkdir()


def _huge(path: pathlib.Path, rng: random.Random) -> None:
  os.truncate(path, 20 << 30)  # None of which is on the disk.


def _more(path: pathlib.Path, rng: random.Random) -> None:
  with path.open('ab') as file:
    file.write(rng.randbytes(64))


_CHANGES = {
  'cut off': _cut, 'a bit turned over': _flip, 'noise': _noise,
  'empty': _empty, 'gone': _gone, 'a pipe': _pipe, 'a device': _device,
  'a folder': _folder, 'of 20 GB': _huge, 'longer': _more,
}  # fmt: skip
_NO_FILE = ('a pipe', 'a device', 'a folder', 'of 20 GB')


def _changed(base: str, file: str, change: str, attempt: Callable) -> Callable:
  """A case's `make`: `file` of a copy of `base` ('' is all) changed."""

  def make(bases, folder, rng):
    copy = bases.copy(base, folder)
    _CHANGES[change](copy / file if file else copy, rng)
    return attempt(bases, copy, folder)

  return make


def _several(kind, base, file, attempt, **times) -> Iterator[given.Case]:
  for change, count in times.items():
    change = change.replace('_', ' ')
    for n in range(count):
      name = f'{file or base} {change} {n}'
      yield given.Case(kind, name, _changed(base, file, change, attempt))


def _plain(base: str, code: str) -> Callable:
  return lambda bases, copy, folder: given.convert(
    f'{code}{copy}', folder, base
  )


# ---- Safetensors ------------------------------------------------------------


def _header(change: Callable) -> Callable:
  """A case's `make`: `change(header, name)` of a tensor drawn by chance."""

  def make(bases, folder, rng):
    copy = bases.copy('hf', folder)
    path = copy / 'model.safetensors'
    data = path.read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    names = sorted(set(header) - {'__metadata__'})
    text = change(header, rng.choice(names), rng)
    text = json.dumps(header).encode() if text is None else text
    start = struct.pack('<Q', len(text)) + text
    path.write_bytes(start + data[8 + length :])
    return given.convert(f'hf:{copy}', folder, 'hf')

  return make


def _field(field: str, change: Callable) -> Callable:
  def changed(header, name, rng):
    header[name][field] = change(header[name][field])

  return _header(changed)


def _twice(header, name, rng):
  text = json.dumps(header).encode()
  return text[:-1] + f', "{name}": {json.dumps(header[name])}}}'.encode()


def _swapped(header, name, rng):
  """The bytes of two tensors of other shapes, exchanged."""
  other = rng.choice(
    [n for n in header if header[n].get('shape') != header[name]['shape']]
  )
  other = other if 'data_offsets' in header[other] else name
  a, b = header[name]['data_offsets'], header[other]['data_offsets']
  header[name]['data_offsets'], header[other]['data_offsets'] = b, a
  if other == name:
    header[name]['data_offsets'] = [b[1], b[0]]


def _over(header, name, rng):
  size = header[name]['data_offsets'][1] - header[name]['data_offsets'][0]
  header['another'] = {
    **header[name],
    'data_offsets': [size // 2, size // 2 + size],
  }


_HEADERS = {
  'offsets negative': _field('data_offsets', lambda o: [o[0] - o[1], 0]),
  'offsets reversed': _field('data_offsets', lambda o: o[::-1]),
  'offsets shifted': _field('data_offsets', lambda o: [o[0] + 4, o[1] + 4]),
  'offsets past the end': _field('data_offsets', lambda o: [o[0], o[1] << 40]),
  'offsets as text': _field('data_offsets', lambda o: '01'),
  'offsets as fractions': _field('data_offsets', lambda o: [*map(float, o)]),
  'one offset': _field('data_offsets', lambda o: o[:1]),
  'shape longer': _field('shape', lambda s: [s[0] + 1, *s[1:]]),
  'shape shorter': _field('shape', lambda s: [s[0] - 1, *s[1:]]),
  'shape negative': _field('shape', lambda s: [-n for n in s]),
  'shape of 2 ** 62': _field('shape', lambda s: [2**62, *s[1:]]),
  'shape of 2 ** 70': _field('shape', lambda s: [2**70, 0]),
  'shape of 100 axes': _field('shape', lambda s: [*s, *[1] * 100]),
  'shape null': _field('shape', lambda s: None),
  'shape turned': _field('shape', lambda s: [*s[::-1], 1]),
  'dtype wider': _field('dtype', lambda d: 'F64'),
  'dtype narrower': _field('dtype', lambda d: 'F16'),
  'dtype of integers': _field('dtype', lambda d: 'I32'),
  'dtype unknown': _field('dtype', lambda d: 'PICKLE'),
  'dtype a list': _field('dtype', lambda d: ['F32']),
  'dtype missing': _header(lambda h, n, r: h[n].pop('dtype') and None),
  'a tensor missing': _header(lambda h, n, r: h.pop(n) and None),
  'a tensor renamed': _header(
    lambda h, n, r: h.update({f'{n}\x1b[2J': h.pop(n)})
  ),
  'a tensor twice': _header(_twice),
  'tensors swapped': _header(_swapped),
  'tensors overlapping': _header(_over),
  'a tensor null': _header(lambda h, n, r: h.update({n: None})),
  'brackets': _header(lambda h, n, r: b'{"a":' + b'[' * 200_000),
  'a list of all': _header(lambda h, n, r: b'[]'),
  'half a header': _header(lambda h, n, r: json.dumps(h).encode()[:-40]),
  'no UTF-8': _header(lambda h, n, r: b'{"\xff\xfe": {}}'),
}  # fmt: skip


def _values(value: float) -> Callable:
  """A case's `make`: one number of a tensor drawn by chance is `value`."""

  def make(bases, folder, rng):
    copy = bases.copy('hf', folder)
    path = copy / 'model.safetensors'
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack('<Q', data[:8])
    header = json.loads(data[8 : 8 + length])
    used = [n for n in sorted(header) if 'weight' in n]
    first, stop = header[rng.choice(used)]['data_offsets']
    at = 8 + length + rng.randrange(first, stop, 4)
    data[at : at + 4] = struct.pack('<f', value)
    path.write_bytes(data)
    return given.convert(f'hf:{copy}', folder, 'hf')

  return make


def _length(length: int) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('hf', folder)
    with (copy / 'model.safetensors').open('r+b') as file:
      file.write(struct.pack('<Q', length))
    return given.convert(f'hf:{copy}', folder, 'hf')

  return make


def safetensors_cases() -> Iterator[given.Case]:
  kind = 'safetensors'
  for name, make in _HEADERS.items():
    for n in range(2):
      yield given.Case(kind, f'{name} {n}', make)
  for value in (np.nan, np.inf, -np.inf):
    for n in range(2):
      yield given.Case(kind, f'a weight of {value} {n}', _values(value))
  for length in (0, 1, 2**31, 2**63, 2**64 - 1):
    yield given.Case(kind, f'a header of {length} bytes', _length(length))
  yield from _several(
    kind, 'hf', 'model.safetensors', _plain('hf', 'hf:'),
    cut_off=8, noise=2, empty=1, gone=1, a_pipe=1, a_device=1, a_folder=1,
    of_20_GB=1, longer=2,
  )  # fmt: skip


# ---- Folders of HuggingFace -------------------------------------------------

_BAD = {
  'huge': 10**9, 'huger': 10**30, 'zero': 0, 'negative': -3, 'text': 'many',
  'null': None, 'a list': [1], 'half': 0.5, 'truth': True, 'an object': {},
}  # fmt: skip
_SIZES = ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_heads', 'num_layers')


def _about(change: Callable) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('hf', folder)
    path = copy / 'config.json'
    about = json.loads(path.read_text())
    text = change(about)
    path.write_text(json.dumps(about) if text is None else text)
    return given.convert(f'hf:{copy}', folder, 'hf')

  return make


def _index(change: Callable) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('hf_cut', folder)
    path = copy / 'model.safetensors.index.json'
    about = json.loads(path.read_text())
    name = rng.choice(sorted(about['weight_map']))
    text = change(about, name, copy, folder)
    path.write_text(json.dumps(about) if text is None else text)
    return given.convert(f'hf:{copy}', folder, 'hf')

  return make


def _outside(where: str) -> Callable:
  def change(about, name, copy, folder):
    file = about['weight_map'][name]
    shutil.move(copy / file, folder / file)
    for each, place in about['weight_map'].items():
      if place == file:
        about['weight_map'][each] = where.format(folder=folder, file=file)

  return change


def _placed(place) -> Callable:
  return lambda about, name, *_: about['weight_map'].update({name: place})


_INDEXES = {
  'a shard in the folder above': _outside('../{file}'),
  'a shard by its whole path': _outside('{folder}/{file}'),
  'a shard that is gone': _placed('x.safetensors'),
  'a shard that is a pickle': _placed('x.bin'),
  'a shard that is a number': _placed(3),
  'a shard without a name': _placed(''),
  'another shard': lambda a, n, *_: a['weight_map'].update(
    {n: next(f for f in a['weight_map'].values() if f != a['weight_map'][n])}
  ),
  'a tensor that is nowhere': lambda a, *_: a['weight_map'].update(
    {'x': 'model-00001-of-00002.safetensors'}
  ),
  'a map that is a list': lambda a, *_: a.update(weight_map=[1]),
  'no map': lambda a, *_: a.pop('weight_map') and None,
  'half of it': lambda a, *_: json.dumps(a)[:40],
}  # fmt: skip


def _pickled(bases, folder, rng):
  copy = bases.copy('hf', folder)
  (copy / 'model.safetensors').unlink()
  (copy / 'pytorch_model.bin').write_bytes(pickle.dumps(_Bomb(folder)))
  return given.convert(f'hf:{copy}', folder, 'hf')


class _Bomb:
  """What runs when it is unpickled."""

  def __init__(self, folder):
    self.folder = folder

  def __reduce__(self):
    return os.mkdir, (str(self.folder / 'canary'),)


def _two(names: list[str]) -> Callable:
  """Several files without an index, which have tensors in common."""

  def make(bases, folder, rng):
    copy = bases.copy('hf', folder)
    source = (copy / 'model.safetensors').rename(copy / 'first.safetensors')
    for name in names:
      shutil.copy(source, copy / name)
    return given.convert(f'hf:{copy}', folder, '')

  return make


def huggingface_cases() -> Iterator[given.Case]:
  kind = 'HuggingFace folder'
  for field in _SIZES:
    for what, value in _BAD.items():
      change = lambda about, f=field, v=value: about.update({f: v})
      yield given.Case(kind, f'{field} {what}', _about(change))
  for field, value in {
    'model_type': 'os.system', 'feed_forward_proj': ['relu'],
    'layer_norm_epsilon': 'small', 'relative_attention_num_buckets': 10**9,
    'num_decoder_layers': 10**8, 'dropout_rate': 'much',
  }.items():  # fmt: skip
    change = lambda about, f=field, v=value: about.update({f: v})
    yield given.Case(kind, f'{field} of {value}', _about(change))
  for field in _SIZES:
    change = lambda about, f=field: about.pop(f) and None
    yield given.Case(kind, f'no {field}', _about(change))
  for name, text in {
    'half of': '{"d_model":', 'a list as': '[]', 'nothing in': '',
    'brackets in': '{"a":' + '[' * 200_000,
    'a long number in': '{"a": ' + '9' * 9999,
    'a field twice in': '{"model_type": "t5", "model_type": "mt5"}',
  }.items():  # fmt: skip
    yield given.Case(kind, f'{name} config.json', _about(lambda a, t=text: t))
  for name, change in _INDEXES.items():
    yield given.Case(kind, name, _index(change))
  yield given.Case(kind, 'a pickle alone', _pickled)
  yield given.Case(kind, 'two files, no index', _two(['second.safetensors']))
  convert = _plain('hf', 'hf:')
  yield from _several(
    kind, 'hf', 'config.json', convert, noise=1, gone=1, a_pipe=1, a_device=1,
    a_folder=1, of_20_GB=1,
  )  # fmt: skip
  yield from _several(
    kind, 'hf', 'spiece.model', convert,
    cut_off=3, noise=1, empty=1, a_pipe=1, a_device=1, a_folder=1, of_20_GB=1,
  )  # fmt: skip


# ---- T5X --------------------------------------------------------------------


def _leaf(tree: dict) -> tuple[dict, str]:
  table = tree['optimizer']['target']['token_embedder']
  return table, 'embedding'


def _packed(change: Callable, base: str = 't5x') -> Callable:
  """A case's `make`: the tree of a legacy checkpoint, changed."""

  def make(bases, folder, rng):
    import msgpack
    from flax import serialization

    copy = bases.copy(base, folder)
    path = copy / 'checkpoint'
    tree = serialization.msgpack_restore(path.read_bytes())
    table, name = _leaf(tree)
    data = change(tree, table, name)
    if data is None:
      data = serialization.msgpack_serialize(tree)
    path.write_bytes(data if isinstance(data, bytes) else msgpack.packb(data))
    return given.convert(f't5x:{copy}', folder, base)

  return make


def _array(shape, dtype: str, data: bytes):
  """An array as flax packs it, which says what it likes."""
  import msgpack

  said = msgpack.packb((shape, dtype, data), use_bin_type=True)
  return msgpack.ExtType(1, said)


def _lying(shape=None, dtype='float32', data=None) -> Callable:
  def change(tree, table, name):
    from flax import serialization

    whole = np.asarray(table[name])
    table[name] = '@'
    packed = serialization.msgpack_serialize(tree)
    import msgpack

    put = _array(
      list(whole.shape) if shape is None else shape,
      dtype,
      whole.tobytes() if data is None else data,
    )
    return packed.replace(msgpack.packb('@'), msgpack.packb(put))

  return change


def _with(value) -> Callable:
  return lambda tree, table, name: table.update({name: value(table[name])})


def _nan(array):
  array = np.array(array)
  array[3, 5] = np.nan
  return array


_TREES = {
  'a shape that is longer': _lying(shape=[300, 16]),
  'a shape of 2 ** 40': _lying(shape=[2**40, 16]),
  'a negative shape': _lying(shape=[-1, 16]),
  'a shape of text': _lying(shape=['a', 'b']),
  'a dtype of objects': _lying(dtype='O'),
  'a dtype that is none': _lying(dtype='pickle'),
  'a dtype that is wider': _lying(dtype='float64'),
  'a dtype of integers': _lying(dtype='int32'),
  'too few bytes': _lying(data=b'\0' * 100),
  'NaN': _with(_nan),
  'Inf': _with(lambda a: np.asarray(a) * np.float32(3e38) * 10),
  'complex numbers': _with(lambda a: np.asarray(a).astype('c8')),
  'a table of one axis': _with(lambda a: np.asarray(a).ravel()),
  'a table of no axis': _with(lambda a: np.float32(3)),
  'a table that is text': _with(lambda a: 'table'),
  'a table that is null': _with(lambda a: None),
  'a table that is a list': _with(lambda a: [1, 2]),
  'chunks of the wrong size': _with(
    lambda a: {
      '__msgpack_chunked_array__': True,
      'shape': {'0': 256, '1': 16},
      'chunks': {'0': np.zeros(5, 'f4')},
    }
  ),
  'chunks without a shape': _with(
    lambda a: {'__msgpack_chunked_array__': True, 'chunks': {}}
  ),
  'a spec of nothing': _with(lambda a: {'driver': 'zarr'}),
  'a spec of the folder above': _with(
    lambda a: {'driver': 'zarr', 'kvstore': {'path': '../..'}}
  ),
  'a spec of a number': _with(
    lambda a: {'driver': 'zarr', 'kvstore': {'path': 3}}
  ),
  'no optimizer': lambda tree, *_: tree.pop('optimizer') and None,
  'no target': lambda tree, *_: tree['optimizer'].pop('target') and None,
  'a target of text': lambda tree, *_: tree['optimizer'].update(target='x'),
  'a layer 10 ** 9': lambda tree, *_: tree['optimizer']['target'][
    'encoder'
  ].update({'layers_1000000000': {'x': np.zeros(2, 'f4')}}),
  'heads that are 0': lambda tree, *_: tree['optimizer']['target']['encoder'][
    'relpos_bias'
  ].update(rel_embedding=np.zeros((0, 32), 'f4')),
  'no query': lambda tree, *_: tree['optimizer']['target']['encoder'][
    'layers_0'
  ]['attention'].pop('query')
  and None,
  'keys that are numbers': lambda *_: {
    'optimizer': {'target': {1: {2: 3}}}
  },
}  # fmt: skip
_EMBEDDING = 'target.token_embedder.embedding'


def _zarray(change: Callable) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('t5x_zarr', folder)
    path = copy / _EMBEDDING / '.zarray'
    about = json.loads(path.read_text())
    text = change(about)
    path.write_text(json.dumps(about) if text is None else text)
    return given.convert(f't5x:{copy}', folder, 't5x_zarr')

  return make


_ZARRAYS = {
  'a shape of 10 ** 12': lambda a: a.update(shape=[10**12, 16]),
  'chunks of 1 in a shape of 10 ** 12': lambda a: a.update(
    shape=[10**12, 16], chunks=[1, 1]
  ),
  'one chunk of 10 ** 12': lambda a: a.update(
    shape=[10**12, 16], chunks=[10**12, 16]
  ),
  'chunks of 0': lambda a: a.update(chunks=[0, 16]),
  'chunks of one axis': lambda a: a.update(chunks=[16]),
  'a negative shape': lambda a: a.update(shape=[-256, 16]),
  'a shape of text': lambda a: a.update(shape='many'),
  'a shape that is shorter': lambda a: a.update(shape=[255, 16]),
  'a dtype of objects': lambda a: a.update(dtype='|O'),
  'a dtype of integers': lambda a: a.update(dtype='<i4'),
  'a dtype that is wider': lambda a: a.update(dtype='<f8'),
  'no compressor': lambda a: a.update(compressor=None),
  'another compressor': lambda a: a.update(compressor={'id': 'bz2'}),
  'nothing': lambda a: a.clear(),
  'half of it': lambda a: json.dumps(a)[:50],
}  # fmt: skip


def t5x_cases() -> Iterator[given.Case]:
  kind = 'T5X, legacy'
  for name, change in _TREES.items():
    yield given.Case(kind, name, _packed(change))
  yield from _several(
    kind, 't5x', 'checkpoint', _plain('t5x', 't5x:'),
    cut_off=8, noise=2, empty=1, gone=1, a_pipe=1, a_device=1, longer=1,
  )  # fmt: skip
  for name, change in _ZARRAYS.items():
    yield given.Case(kind, f'.zarray with {name}', _zarray(change))
  chunk = f'{_EMBEDDING}/0.0'
  convert = _plain('t5x_zarr', 't5x:')
  yield from _several(
    kind, 't5x_zarr', chunk, convert,
    cut_off=3, a_bit_turned_over=8, noise=1, empty=1, gone=1, a_pipe=1,
  )  # fmt: skip
  kind = 'T5X, Orbax'
  convert = _plain('t5x_orbax', 't5x:')
  for file in ('state/_METADATA', 'state/manifest.ocdbt'):
    yield from _several(
      kind, 't5x_orbax', file, convert,
      cut_off=4, noise=1, empty=1, gone=1, a_pipe=1,
    )  # fmt: skip
  yield from _several(
    kind, 't5x_orbax', 'state/manifest.ocdbt', convert, a_bit_turned_over=8
  )
  for name, change in {
    'longer': lambda n: n + 1, '10 ** 12 times as long': lambda n: n * 10**12,
    'negative': lambda n: -n, 'text': str,
  }.items():  # fmt: skip
    yield given.Case(kind, f'a shape in _METADATA {name}', _metadata(change))
  for n in range(6):
    yield given.Case(kind, f'a data file cut off {n}', _data_of_orbax(_cut))
  for n in range(2):
    yield given.Case(kind, f'a data file gone {n}', _data_of_orbax(_gone))
    yield given.Case(kind, f'a data file of noise {n}', _data_of_orbax(_noise))


def _metadata(change: Callable) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('t5x_orbax', folder)
    path = copy / 'state/_METADATA'

    def walk(value):
      if isinstance(value, dict):
        return {
          k: [*map(change, v)]
          if k in ('shape', 'write_shape') and isinstance(v, list)
          else walk(v)
          for k, v in value.items()
        }
      return value

    path.write_text(json.dumps(walk(json.loads(path.read_text()))))
    return given.convert(f't5x:{copy}', folder, 't5x_orbax')

  return make


def _data_of_orbax(change: Callable) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('t5x_orbax', folder)
    found = sorted(p for p in copy.rglob('d/*') if p.stat().st_size)
    change(rng.choice(found), rng)
    return given.convert(f't5x:{copy}', folder, 't5x_orbax')

  return make


# ---- Mesh-TensorFlow --------------------------------------------------------


def mesh_tf_cases() -> Iterator[given.Case]:
  kind, convert = 'Mesh-TensorFlow', _plain('mtf', 'mtf:')
  for file in ('model.ckpt-7.index', 'model.ckpt-7.data-00000-of-00001'):
    yield from _several(
      kind, 'mtf', file, convert,
      cut_off=6, a_bit_turned_over=12, noise=2, empty=1, gone=1, a_folder=1,
    )  # fmt: skip
  for name, text in {
    'names nothing': '', 'is no text': '\x00\x01', 'names another': (
      'model_checkpoint_path: "model.ckpt-8"'
    ),
  }.items():  # fmt: skip
    yield given.Case(kind, f'`checkpoint` {name}', _names(text))


def _names(text: str) -> Callable:
  def make(bases, folder, rng):
    copy = bases.copy('mtf', folder)
    (copy / 'checkpoint').write_text(text)
    return given.convert(f'mtf:{copy}', folder, 'mtf')

  return make


# ---- Vocabularies, archives, texts ------------------------------------------


def _piece(change: Callable) -> Callable:
  def make(bases, folder, rng):
    path = folder / 'a.model'
    path.write_bytes(change(bases['a.model'].read_bytes()))
    return given.vocabulary(path, folder)

  return make


def vocabulary_cases() -> Iterator[given.Case]:
  kind = 'SentencePiece'
  yield from _several(
    kind, 'a.model', '', lambda _, copy, folder: given.vocabulary(copy, folder),
    cut_off=14, noise=2, empty=1, gone=1, a_pipe=1, a_device=1, a_folder=1,
    of_20_GB=1, longer=2,
  )  # fmt: skip
  for name, change in {
    'a text': lambda m: b'hello\n' * 99,
    'a pickle': lambda m: pickle.dumps({'a': 1}),
    'a piece that says it is long': lambda m: b'\x0a\xff\xff\xff\xff\x07' + m,
    'a number without end': lambda m: b'\xff' * 40 + m,
    'a field of another type': lambda m: b'\x08\x01' + m,
    'twice': lambda m: m + m,
  }.items():
    yield given.Case(kind, name, _piece(change))


def _archive(change: Callable) -> Callable:
  """A case's `make`: `change(name, content)` is put into the archive."""

  def make(bases, folder, rng):
    path = folder / 'a.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      for name in given.official():
        for each, content in change(name, given.content(name)):
          archive.writestr(each, content)
    return given.superglue(path, folder)

  return make


def _bomb(bases, folder, rng):
  """4 GB of zeros in the place of one file, in 4 MB."""
  path = folder / 'a.zip'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, True, 1) as archive:
    for name in given.official():
      if name != 'BoolQ/train.jsonl':
        archive.writestr(name, given.content(name))
        continue
      with archive.open(name, 'w', force_zip64=True) as file:
        for _ in range(1 << 12):
          file.write(bytes(1 << 20))
  return given.superglue(path, folder)


def archive_cases() -> Iterator[given.Case]:
  kind = 'zip'
  attempt = lambda bases, copy, folder: given.superglue(copy, folder)
  yield from _several(
    kind, 'a.zip', '', attempt,
    cut_off=6, a_bit_turned_over=20, noise=1, empty=1, gone=1, a_folder=1,
  )  # fmt: skip
  first = 'CB/train.jsonl'
  for name, change in {
    'a file of other content': lambda n, c: [(n, c[1:] if n == first else c)],
    'a file missing': lambda n, c: [(n, c)] if n != first else [],
    'a file outside': lambda n, c: [(f'../{n}', c)],
    'files without content': lambda n, c: [(n, b'')],
  }.items():
    yield given.Case(kind, name, _archive(change))
  yield given.Case(kind, 'a bomb of 4 GB', _bomb)


def _text(name: str, data: bytes | Callable) -> Callable:
  def make(bases, folder, rng):
    path = folder / name
    path.write_bytes(data() if callable(data) else data)
    return given.prepared(path, folder, '')

  return make


def _asked(data: bytes | Callable) -> Callable:
  def make(bases, folder, rng):
    path = folder / 'a.jsonl'
    path.write_bytes(data() if callable(data) else data)
    return given.answers(path, bases)

  return make


def _long_packed() -> bytes:
  """A line of 600 MB in 600 KB."""
  out = io.BytesIO()
  with gzip.GzipFile(fileobj=out, mode='wb', compresslevel=9) as file:
    file.write(b'{"text": "')
    for _ in range(600):
      file.write(b'a' * (1 << 20))
    file.write(b'"}\n')
  return out.getvalue()


_ROWS = {
  'broken JSON': b'{"text": "a", "inputs": "a"}\n{"text": "a"',
  'a list': b'["text", "inputs"]',
  'a number': b'3',
  'null': b'null',
  'no field': b'{"body": "a"}',
  'a field of numbers': b'{"text": 3, "inputs": 3}',
  'a field that is null': b'{"text": null, "inputs": null}',
  'a field that is a list': b'{"text": ["a"], "inputs": ["a"]}',
  'half a surrogate': b'{"text": "\\ud800", "inputs": "\\ud800"}',
  'no UTF-8': b'{"text": "caf\xe9", "inputs": "caf\xe9"}',
  'UTF-16': '{"text": "a", "inputs": "a"}'.encode('utf-16'),
  'brackets': b'{"text": ' + b'[' * 200_000,
  'a long number': b'{"text": ' + b'9' * 9999 + b'}',
  'zeros': bytes(1000),
  'control characters': b'{"text": "a\x00b", "inputs": "a\x00b"}',
  'a pickle': pickle.dumps({'text': 'a'}),
}


def text_cases() -> Iterator[given.Case]:
  kind = 'gzip'
  attempt = lambda bases, copy, folder: given.prepared(
    copy, folder, 'a.jsonl.gz'
  )
  yield from _several(
    kind, 'a.jsonl.gz', '', attempt,
    cut_off=8, a_bit_turned_over=16, noise=2, empty=1, gone=1, a_pipe=1,
    a_device=1, a_folder=1, longer=1,
  )  # fmt: skip
  yield given.Case(kind, 'a line of 600 MB', _text('a.jsonl.gz', _long_packed))
  yield given.Case(kind, 'a list of 600 MB', _text('a.json.gz', _long_packed))
  yield given.Case(kind, 'a text of 600 MB', _text('a.txt.gz', _long_packed))
  kind = 'JSON and JSONL'
  for name, data in _ROWS.items():
    yield given.Case(kind, f'texts: {name}', _text('a.jsonl', data))
    yield given.Case(kind, f'prompts: {name}', _asked(data))
  for name, data in _ROWS.items():
    if name not in ('a number', 'null'):
      yield given.Case(kind, f'a list: {name}', _text('a.json', b'[' + data))
  for file in ('a.jsonl', 'a.json', 'a.txt'):
    attempt = lambda bases, copy, folder, f=file: given.prepared(
      copy, folder, f
    )
    yield from _several(
      kind, file, '', attempt, empty=1, noise=2, **dict.fromkeys(
        (n.replace(' ', '_') for n in _NO_FILE), 1
      ),
    )  # fmt: skip
  for source in ('/dev/zero', '/dev/urandom', '/proc/self/mem'):
    make = lambda bases, folder, rng, s=source: given.answers(s, bases)
    yield given.Case(kind, f'prompts from {source}', make)


# ---- Our own ----------------------------------------------------------------


def _anywhere(base: str, change: str, attempt: Callable) -> Callable:
  """A case's `make`: any file of a copy of `base` is changed."""

  def make(bases, folder, rng):
    copy = bases.copy(base, folder)
    found = sorted(p for p in copy.rglob('*') if p.is_file())
    found = [p for p in found if p.stat().st_size]
    _CHANGES[change](rng.choice(found), rng)
    return attempt(bases, copy, folder)

  return make


def _saved(change: Callable) -> Callable:
  """A whole checkpoint of ours, whose run says what it likes."""

  def make(bases, folder, rng):
    from st_moe import checkpoint

    params, run = _own(bases)
    run = json.loads(json.dumps(run))
    change(run)
    checkpoint.save_params(folder / 'own', params, run)
    return given.convert(f'{folder / "own"}', folder, 'own')

  return make


@functools.cache
def _own(bases: given.Bases):
  from st_moe import checkpoint
  from st_moe.infer.load import load

  return load(bases['own']).params, checkpoint.read_run(bases['own'])


def _model(field: str, value) -> Callable:
  def change(run):
    *path, last = field.split('.')
    here = run['config']['model']
    for name in path:
      here = here[name]
    here[last] = value

  return change


def _elsewhere(bases, folder, rng):
  """A checkpoint that says where shards are to be written."""
  attempt = _saved(
    lambda run: run['config']['data'].update(
      mixture={'python_reference': 1.0}, cache_dir=str(folder / 'elsewhere')
    )
  )(bases, folder, rng)
  attempt.command = [
    'evaluate',
    f'--checkpoint={folder / "own"}',
    '--submission',
  ]
  attempt.never = folder / 'elsewhere'
  return attempt


def _secret(bases, folder, rng):
  """A checkpoint that says which files of the user's are read."""
  (folder / 'secret.txt').write_text('password ' * 500)
  attempt = _saved(
    lambda run: run['config']['data'].update(
      mixture={'mine': 1.0},
      files={'mine': {'validation': str(folder / 'secret.txt')}},
      cache_dir=str(folder / 'elsewhere'),
    )
  )(bases, folder, rng)
  attempt.command = ['evaluate', f'--checkpoint={folder / "own"}']
  attempt.never = folder / 'elsewhere'
  return attempt


def own_cases() -> Iterator[given.Case]:
  kind, convert = 'our checkpoints', _plain('own', '')
  for n in range(40):
    make = _anywhere('own', 'a bit turned over', convert)
    yield given.Case(kind, f'a bit turned over {n}', make)
  for change, count in {
    'cut off': 12,
    'gone': 6,
    'empty': 4,
    'noise': 6,
  }.items():
    for n in range(count):
      yield given.Case(
        kind, f'a file {change} {n}', _anywhere('own', change, convert)
      )
  for field, value in {
    'encoder.num_layers': 10**9, 'decoder.num_layers': -1,
    'vocab_size': 10**15, 'embed_dim': 10**9, 'num_heads': 0,
    'moe.num_experts': 10**12, 'activation': 'os.system', 'head_dim': 'x',
    'encoder': 7, 'moe.selector': {'name': 'exec'}, 'no_such_field': 1,
    'relpos_buckets': 10**12,
  }.items():  # fmt: skip
    yield given.Case(
      kind, f'model.{field}={value}', _saved(_model(field, value))
    )
  for name, change in {
    'no config': lambda run: run.pop('config'),
    'a config of text': lambda run: run.update(config='x'),
    'a vocabulary that is none': lambda run: run.update(vocabulary='eHh4'),
    'a vocabulary no base64': lambda run: run.update(vocabulary='\x00é'),
    'a vocabulary of numbers': lambda run: run.update(vocabulary=[1, 2]),
    'no vocabulary field': lambda run: run.pop('vocabulary'),
  }.items():
    yield given.Case(kind, name, _saved(change))
  yield given.Case(kind, 'a cache elsewhere', _elsewhere)
  yield given.Case(kind, 'files of the user', _secret)

  kind = 'our shards'

  def prepare(bases, copy, folder):
    command = given.prepare(bases['a.jsonl'], copy)
    return given.Attempt(command, lambda: given.digest_of_cache(copy), 'cache')

  for change, count in {
    'a bit turned over': 12, 'cut off': 8, 'gone': 4, 'empty': 4, 'noise': 4,
  }.items():  # fmt: skip
    for n in range(count):
      yield given.Case(
        kind, f'a file {change} {n}', _anywhere('cache', change, prepare)
      )


@functools.cache
def table() -> tuple[given.Case, ...]:
  found = (
    *safetensors_cases(), *huggingface_cases(), *t5x_cases(), *mesh_tf_cases(),
    *vocabulary_cases(), *archive_cases(), *text_cases(), *own_cases(),
  )  # fmt: skip
  assert len({str(case) for case in found}) == len(found)
  return found
