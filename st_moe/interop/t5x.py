"""T5X checkpoints: minimal T5 and Flaxformer MoE trees, both ways.

Read: the legacy layout (msgpack, large arrays beside it as zarr) and Orbax's of
today. Written: the legacy one as `t5x:DIR`, Orbax's as `t5x_orbax:DIR`. Places
may be `gs://`. A checkpoint says nothing of its model but names and shapes:
what these leave open (experts per token, capacity) is as Flaxformer has it.
"""

import collections
import functools
import itertools
import math
import os
import pathlib
import re

import numpy as np
from etils import epath
from flax import serialization, traverse_util

from st_moe import checkpoint, config_file, paths
from st_moe.config import Config, ModelConfig
from st_moe.data import files
from st_moe.interop.links import (
  Link,
  Source,
  attention,
  has_extra_ffn,
  matrices,
  positions,
  stack_of,
  tensors,
  two_sizes,
  unknown_parts,
)

_STACKS = ('encoder', 'decoder')


def open_source(where: str) -> Source:
  """Opens a checkpoint file or directory, legacy or Orbax's.

  Raises:
    ValueError: no such place, or no T5X checkpoint of a model we have.
  """
  path = epath.Path(where).expanduser()
  path = path if files.is_remote(where) else path.resolve()  # As Orbax wants.
  if not path.exists():
    raise ValueError(f'{where} is not there.')
  if path.is_dir() and not (path / 'checkpoint').exists():
    shapes, dtypes, read = _open_orbax(path)
  else:
    shapes, dtypes, read = _open_legacy(path)
  if 'token_embedder/embedding' not in shapes:
    raise ValueError(
      f'{where} has no token_embedder/embedding: no T5 of T5X. It has'
      f' {sorted(shapes)[:3]} ...'
    )
  if any(re.match(r'(en|de)coder/(en|de)coder/', name) for name in shapes):
    raise ValueError(
      f'{where} is of a scanned Flaxformer model, which has a table of position'
      ' biases for every layer in one array: not read here.'
    )
  config = _config(epath.Path(where).name, shapes)
  return Source(
    where=f't5x:{where}',
    config=config,
    vocabulary=None,
    links=names(config.model),
    shapes=shapes,
    dtypes=dtypes,
    read=read,
  )


# ---- Reading ----------------------------------------------------------------


def _open_legacy(path: epath.Path):
  directory = path if path.is_dir() else path.parent
  file = path / 'checkpoint' if path.is_dir() else path
  files.check_regular(file)
  try:
    tree = serialization.msgpack_restore(file.read_bytes())
    leaves = traverse_util.flatten_dict(
      tree['optimizer']['target'],
      sep='/',
      is_leaf=lambda _, tree: 'driver' in tree,
    )
    specs = {n: a for n, a in leaves.items() if isinstance(a, dict)}
    inline = {n: np.asarray(a) for n, a in leaves.items() if n not in specs}
  except Exception as e:  # Whatever msgpack makes of another file.
    raise ValueError(
      f'{file} is no T5X checkpoint, or a truncated one'
      f' ({type(e).__name__}: {e}).'
    ) from None
  arrays = {n: _zarr(directory, n, spec) for n, spec in specs.items()}
  both = {**inline, **arrays}
  shapes = {n: tuple(a.shape) for n, a in both.items()}
  dtypes = {n: np.dtype(getattr(a.dtype, 'numpy_dtype', a.dtype))
            for n, a in both.items()}  # fmt: skip

  def read(name):
    return inline[name] if name in inline else _read(arrays[name], name)

  return shapes, dtypes, read


def _zarr(directory: epath.Path, name: str, spec: dict):
  # Specs written elsewhere name a bucket of then; the folder's name is what
  # counts. Old ones have it at the top.
  place = spec.get('path') or spec['kvstore']['path']
  folder = os.path.basename(place.rstrip('/'))
  if folder in ('', '.', '..'):
    raise ValueError(f'{name} is damaged: it is said to be in {place!r}.')
  folder = directory / folder
  _check_folder(folder, name, spec.get('metadata', {}).get('shape'))
  return _open_array({'driver': 'zarr', 'kvstore': _kvstore(folder)}, name)


# A packed chunk is this many times as long at most, as by DEFLATE; one that
# says more would ask for memory that nothing in the file explains.
_MOST_PACKED = 1100
_SMALL = 64 << 20  # Bytes that may be asked for anyway.


def _check_folder(folder: epath.Path, name: str, shape=None) -> None:
  """Checks the chunks of an array, of that shape, in a folder of its own."""
  if files.is_remote(folder):
    return
  about = folder / '.zarray'
  if not about.exists():
    raise ValueError(f'{name} is damaged: there is no {about}.')
  there = {}
  for path in folder.iterdir():
    files.check_regular(path)
    there[path.name] = os.stat(path).st_size
  found = files.read_json(about)
  _check_chunks(name, folder, found, there, sum(there.values()))
  if shape not in (None, found['shape']):
    raise ValueError(
      f'{name} is damaged: {about} says shape {found["shape"]}, and the'
      f' checkpoint {shape}.'
    )


def _check_chunks(name, folder, about: dict, there, stored: int) -> None:
  """Raises where an array is not what its .zarray says.

  To zarr a chunk that is not there is one of zeros.

  Args:
    there: names of its chunks.
    stored: bytes in which they are.
  """
  shape, chunks = about.get('shape'), about.get('chunks')
  whole = lambda of, least: (
    isinstance(of, list) and all(type(n) is int and n >= least for n in of)
  )
  if not (whole(shape, 0) and whole(chunks, 1) and len(shape) == len(chunks)):
    raise ValueError(
      f'{name} is damaged: its .zarray says shape {shape}, chunks {chunks}.'
    )
  counts = [-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True)]
  if math.prod(counts) > len(there):
    raise ValueError(
      f'{name} is damaged: not all of its {math.prod(counts):,} chunks are in'
      f' {folder}.'
    )
  for index in itertools.product(*map(range, counts)):
    chunk = str(about.get('dimension_separator', '.')).join(map(str, index))
    if (chunk or '0') not in there:
      raise ValueError(
        f'{name} is damaged: its chunk {folder / chunk} is gone.'
      )
  for numbers in (math.prod(shape), math.prod(chunks)):
    if 2 * numbers > _SMALL + _MOST_PACKED * stored:
      raise ValueError(
        f'{name} is damaged: {stored:,} bytes are said to be {numbers:,}'
        ' numbers.'
      )


def _open_orbax(path: epath.Path):
  import orbax.checkpoint as ocp

  state = path / 'state' if (path / 'state').exists() else path
  if not files.is_remote(state):
    for each in pathlib.Path(state).rglob('*'):
      if not each.is_dir():
        files.check_regular(each)
  try:
    with checkpoint.patient_loops():
      tree = ocp.PyTreeCheckpointHandler().metadata(state)
  except Exception as e:  # Whatever Orbax makes of another directory.
    raise ValueError(
      f'{path} holds no T5X checkpoint: neither a file `checkpoint` nor what'
      f' Orbax wrote ({type(e).__name__}).'
    ) from None
  leaves = {
    name.removeprefix('target/'): leaf
    for name, leaf in paths.by_path(getattr(tree, 'tree', tree)).items()
    if name.startswith('target/')
  }
  ocdbt = (state / 'manifest.ocdbt').exists()
  if ocdbt and not files.is_remote(state):
    _check_ocdbt(state, leaves)

  @functools.cache
  def array(name):
    place = 'target.' + name.replace('/', '.')
    if ocdbt:
      base = _kvstore(state)
      store = {'driver': 'ocdbt', 'base': base, 'path': place}
    else:
      _check_folder(state / place, name)
      store = _kvstore(state / place)
    return _open_array({'driver': 'zarr', 'kvstore': store}, name)

  shapes = {n: tuple(leaf.shape) for n, leaf in leaves.items()}
  dtypes = {n: np.dtype(leaf.dtype) for n, leaf in leaves.items()}
  return shapes, dtypes, lambda name: _read(array(name), name)


def _check_ocdbt(state: epath.Path, names) -> None:
  """Checks the chunks of arrays that share files."""
  import tensorstore

  paths = pathlib.Path(state).rglob('*')
  stored = sum(p.stat().st_size for p in paths if p.is_file())
  spec = {'driver': 'ocdbt', 'base': _kvstore(state)}
  places = {name: 'target.' + name.replace('/', '.') for name in names}
  there = collections.defaultdict(set)
  try:
    store = tensorstore.KvStore.open(spec).result()
    for key in store.list().result():
      place, _, chunk = key.decode().rpartition('/')
      there[place].add(chunk)
    about = {
      name: store.read(f'{place}/.zarray').result().value
      for name, place in places.items()
    }
  except Exception as e:  # Whatever tensorstore makes of a broken file.
    raise _broken(state, e) from None
  for name, place in places.items():
    said = files.parse_json(about[name], f'{state / place}/.zarray')
    _check_chunks(name, state / place, said, there[place], stored)


def _kvstore(path: epath.Path) -> dict:
  if not files.is_remote(path):
    return {'driver': 'file', 'path': f'{files.absolute(path)}/'}
  bucket, _, rest = os.fspath(path).removeprefix('gs://').partition('/')
  return {'driver': 'gcs', 'bucket': bucket, 'path': f'{rest}/'}


def _open_array(spec: dict, name: str):
  import tensorstore

  try:
    return tensorstore.open(spec, open=True, read=True).result()
  except Exception as e:  # Whatever tensorstore makes of a broken file.
    raise _broken(name, e) from None


def _read(array, name: str) -> np.ndarray:
  try:
    return np.asarray(array.read().result())
  except Exception as e:  # Whatever tensorstore makes of a broken file.
    raise _broken(name, e) from None


def _broken(name: str, e: Exception) -> ValueError:
  line = str(e).strip().splitlines()[0][:200]
  return ValueError(f'{name} cannot be read: {line}')


# ---- What model it is -------------------------------------------------------


def _config(name: str, shapes: dict) -> Config:
  vocab, d = two_sizes(shapes, 'token_embedder/embedding')
  stacks = {s: _stack(shapes, s) for s in _STACKS}
  # One for all layers, or one for each (UMT5).
  table = 'relpos_bias/rel_embedding'
  each = f'encoder/{table}' not in shapes
  heads, buckets = shapes[f'encoder/{"layers_0/" if each else ""}{table}']
  joined = shapes['encoder/layers_0/attention/query/kernel'][1]
  find = lambda pattern: [
    shapes[n] for n in sorted(shapes) if re.search(pattern, n)
  ]
  dense = find(r'layers_\d+/(extra_)?mlp/wi(_0)?/kernel$')
  banks = find(r'layers_\d+/mlp/expert/wi(_0)?/kernel$')
  gated = bool(find(r'/wi_0/kernel$'))
  extra = bool(find(r'/extra_mlp/'))
  width = dense[0][1] if dense else banks[0][2]
  values = {
    'name': name,
    'model': {
      'vocab_size': vocab,
      'embed_dim': d,
      'num_heads': heads,
      'head_dim': joined // heads,
      'mlp_dim': width,
      'activation': 'geglu' if gated else 'relu',
      'relpos_buckets': buckets,
      'relpos_per_layer': each,
      'tie_embeddings': 'decoder/logits_dense/kernel' not in shapes,
      'init_scale': 1.0,
      **stacks,
    },
  }
  if banks:
    values['routing'] = 'flaxformer'
    values['model']['moe'] = {
      'num_experts': banks[0][0],
      'hidden_dim': banks[0][2] if banks[0][2] != width else 0,
      # ST-MoE's are top-2, Switch's top-1; only the extra FFN tells.
      'selector': {'name': 'top_k', 'k': 2 if extra else 1},
      'extra_ffn': 'after' if extra else 'none',
    }
  return config_file.from_dict(config_file.routed(values))


def _stack(shapes: dict, stack: str) -> dict:
  layers = lambda part: {
    int(m[1])
    for n in shapes
    if (m := re.match(rf'{stack}/layers_(\d+)/{part}', n))
  }
  if not layers(''):
    raise ValueError(f'The checkpoint has no {stack}/layers_0.')
  count = max(layers('')) + 1
  if count != len(layers('')):
    raise ValueError(
      f'The {stack} has {len(layers(""))} layers, and one of number'
      f' {count - 1}.'
    )
  return stack_of(stack, count, layers('mlp/expert/'), group_size=4096)


# ---- Names ------------------------------------------------------------------


def names(config: ModelConfig) -> dict[str, Link]:
  """Our unrolled parameters, by T5X's names."""
  found = {
    'token_embedder/embedding': Link.to('token_embedder/embedding'),
  }
  if not config.tie_embeddings:
    found['logits_dense/kernel'] = Link.to('decoder/logits_dense/kernel')
  for stack in config.stacks:
    for path in (*positions(config, stack), f'{stack}/{stack}_norm/scale'):
      found[path] = Link.to(path)
    for i, sublayers in enumerate(config.plan(stack).layers):
      here = f'{stack}/layers_{i}'
      for sublayer in sublayers:
        norm, name = _names(stack, sublayer)
        found[f'{here}/{sublayer.norm}/scale'] = Link.to(f'{here}/{norm}/scale')
        parts = _parts(config, sublayer.kind, f'{here}/{name}')
        for path, link in parts.items():
          found[f'{here}/{sublayer.name}/{path}'] = link
  return found


def _names(stack: str, sublayer) -> tuple[str, str]:
  """Their names of a norm and of what it stands before."""
  if sublayer.kind == 'self_attention':
    own = {'encoder': 'attention', 'decoder': 'self_attention'}[stack]
    return f'pre_{own}_layer_norm', own
  if sublayer.kind == 'moe':
    return sublayer.norm, 'mlp'
  return sublayer.norm, sublayer.name


def _parts(config: ModelConfig, kind: str, where: str) -> dict[str, Link]:
  to = lambda path: Link.to(f'{where}/{path}/kernel')
  if kind == 'mlp':
    return {f'{w}/kernel': to(w) for w in matrices(config)}
  if kind == 'moe':
    bank = {f'experts/{w}/kernel': to(f'expert/{w}') for w in matrices(config)}
    return {'router/kernel': to('router/router_weights/w'), **bank}
  return attention(config, lambda ours: f'{where}/{ours}/kernel')


# ---- Writing ----------------------------------------------------------------

_INLINE = 1 << 20  # Bytes of an array that stays inside the msgpack.


def check_export(config: Config) -> None:
  model = config.model
  if model.stacks != _STACKS:
    raise ValueError('T5X has names for encoder-decoders only.')
  sparse = any(model.plan(s).num_sparse for s in model.stacks)
  if wrong := unknown_parts(model):
    raise ValueError(f'Flaxformer has no such parts: {"; ".join(wrong)}.')
  moe = model.moe_of(model.stacks[-1])
  if sparse and moe.extra_ffn == 'before':
    raise ValueError('Flaxformer has the extra FFN after the sparse one only.')
  if sparse and moe.multiplicative_bias:
    raise ValueError('Flaxformer has no multiplicative bias in its experts.')
  if not sparse and has_extra_ffn(model):
    raise ValueError('T5X has one FFN in each layer; here some have an extra.')
  widths = {
    s.dim
    for stack in model.stacks
    for layer in model.plan(stack).layers
    for s in layer
    if s.kind == 'mlp'
  }
  if len(widths) > 1:
    raise ValueError(
      f'T5X has one width for all dense FFNs; here are {sorted(widths)}.'
    )


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  """Writes the legacy layout, parameters only; whole or not at all."""
  del vocabulary  # T5X names one in its gin files.
  with files.directory_appearing(where) as directory:
    theirs = tensors(params, config.model, names(config.model))
    leaves = {t[0]: _write_array(directory, *t) for t in theirs}
    target = traverse_util.unflatten_dict(leaves, sep='/')
    # No slots, not even none: T5X would take an empty dict for an array.
    state = {'step': np.int32(0)}
    tree = {'version': 3, 'optimizer': {'target': target, 'state': state}}
    data = serialization.msgpack_serialize(tree)
    (directory / 'checkpoint').write_bytes(data)


def _write_array(directory, name: str, shape, dtype, make):
  """The array itself if small, else a spec of the zarr folder it is now in."""
  import tensorstore

  if int(np.prod(shape)) * dtype.itemsize <= _INLINE:
    return np.ascontiguousarray(make())
  folder = 'target.' + name.replace('/', '.')
  rows = max(1, (64 << 20) // (int(np.prod(shape[1:])) * dtype.itemsize))
  chunks = [min(rows, shape[0]), *shape[1:]]
  metadata = {
    'shape': list(shape),
    'chunks': chunks,
    'dtype': dtype.str,
    'compressor': {'id': 'gzip', 'level': 1},
  }
  spec = {
    'driver': 'zarr',
    'metadata': metadata,
    'store_data_equal_to_fill_value': True,  # Or zeros would look damaged.
  }
  place = {'driver': 'file', 'path': f'{directory / folder}/'}
  array = tensorstore.open(
    {**spec, 'kvstore': place}, create=True, open=True
  ).result()
  array.write(make()).result()
  kvstore = {'driver': 'file', 'path': folder}
  return {'driver': 'zarr', 'metadata': metadata, 'kvstore': kvstore}
