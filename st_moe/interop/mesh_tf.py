"""Checkpoints of Mesh-TensorFlow, read only: T5 and its mixtures of experts.

A place is a directory, or the prefix of one checkpoint ('DIR/model.ckpt-1000'),
here or on `gs://`. A stack there is blocks of sublayers; each self-attention
begins one of our layers. Routing is the paper's, which was trained with this
code; experts per token follow from the name of the gate.
"""

import functools
import math
import os
import re

import numpy as np

from st_moe import config_file
from st_moe.config import Config, ModelConfig
from st_moe.interop.links import (
  Link,
  Source,
  attention,
  matrices,
  positions,
  stack_of,
  two_sizes,
)

_STACKS = ('encoder', 'decoder')
# A sublayer's class -> our kind.
_KINDS = {
  'SelfAttention': 'self_attention',
  'EncDecAttention': 'cross_attention',
  'DenseReluDense': 'mlp',
  'MoE1D': 'moe',
}
_GATES = {'switch_gating': 1, 'top_2_gating': 2}
_SUBLAYER = r'{}/(block_\d+/layer_\d+)/({})/'


def open_source(where: str) -> Source:
  """Opens a checkpoint.

  Raises:
    ValueError: none there, a damaged one, or of a model we do not have; no
      TensorFlow to read it by.
  """
  try:
    import tensorflow as tf
  except ImportError:
    raise ValueError(
      f'mtf:{where}: only TensorFlow reads such checkpoints, and it is not'
      " installed: pip install 'st_moe[seqio]' brings it."
    ) from None

  try:
    prefix = _prefix(str(where))
    reader = tf.train.load_checkpoint(prefix)
    found = reader.get_variable_to_shape_map()
    types = reader.get_variable_to_dtype_map()
  except Exception as e:  # Whatever TensorFlow makes of another file.
    line = (str(e).strip() or repr(e)).splitlines()[0][:200]
    raise ValueError(
      f'{where} is no TensorFlow checkpoint, or a damaged one ({line}).'
    ) from None
  _check_sizes(prefix, found, types)
  # Adafactor's statistics lie beside what they are of.
  names = [n for n in found if '_slot_' not in n and n != 'global_step']
  shapes = {n: tuple(found[n]) for n in names}
  if 'shared/embedding' not in shapes:
    raise ValueError(
      f'{where} has no shared/embedding: no T5 of Mesh-TensorFlow. It has'
      f' {sorted(shapes)[:3]} ...'
    )
  layers = {stack: _layers(shapes, stack) for stack in _STACKS}
  config = _config(str(where), shapes, layers)
  return Source(
    where=f'mtf:{where}',
    config=config,
    vocabulary=None,
    links=_links(config.model, shapes, layers),
    shapes=shapes,
    dtypes={n: np.dtype(types[n].as_numpy_dtype) for n in names},
    read=functools.partial(_read, reader),
  )


def _prefix(where: str) -> str:
  """The prefix of a checkpoint's files, or of the newest in a directory."""
  import tensorflow as tf

  if not tf.io.gfile.isdir(where):
    return where
  state = tf.train.get_checkpoint_state(where)
  if state is None:
    raise ValueError('there is no file `checkpoint` that names one')
  # The folder in which it was written is not that in which it is now.
  return os.path.join(where, os.path.basename(state.model_checkpoint_path))


def _check_sizes(prefix: str, shapes: dict, types: dict) -> None:
  """Raises where an index claims more than there is."""
  import tensorflow as tf

  parts = tf.io.gfile.glob(f'{prefix}.data-*')
  there = sum(tf.io.gfile.stat(part).length for part in parts)
  claimed = sum(
    math.prod(shape) * types[name].size for name, shape in shapes.items()
  )
  if claimed > there:
    raise ValueError(
      f'{prefix} cannot be read: its index describes {claimed:,} bytes, and'
      f' {len(parts)} data files have {there:,}.'
    )


def _read(reader, name: str) -> np.ndarray:
  try:
    return reader.get_tensor(name)
  except Exception as e:  # Or of a truncated one.
    line = str(e).strip().splitlines()[0][:200]
    raise ValueError(f'{name} cannot be read: {line}') from None


def _layers(shapes: dict, stack: str) -> list[list[tuple[str, str]]]:
  """(place, class) of every sublayer, layer by layer in the order of depth."""
  pattern = _SUBLAYER.format(stack, '|'.join(_KINDS))
  found = {m.groups() for n in shapes if (m := re.match(pattern, n))}
  layers = []
  for place, kind in sorted(found):
    if kind == 'SelfAttention':
      layers.append([])
    if not layers:
      raise ValueError(f'{stack}/{place}: {kind} before any attention.')
    layers[-1].append((f'{stack}/{place}', kind))
  if not layers:
    raise ValueError(f'The checkpoint has no {stack}/block_000/layer_000.')
  return layers


def _config(where: str, shapes: dict, layers: dict) -> Config:
  vocab, d = two_sizes(shapes, 'shared/embedding')
  first = f'{layers["encoder"][0][0][0]}/SelfAttention'
  heads, buckets = two_sizes(shapes, f'{first}/relative_attention_bias')
  find = lambda pattern: [
    shapes[n] for n in sorted(shapes) if re.search(pattern, n)
  ]
  dense = find(r'DenseReluDense/wi(_0)?/kernel$')
  banks = find(r'MoE1D/wi(_0)?/kernel$')
  width = dense[0][1] if dense else banks[0][2]
  extra, stacks = 'none', {}
  # One table for all layers, or one for each.
  tables = find(r'^encoder/.*/SelfAttention/relative_attention_bias$')
  for stack, depth in layers.items():
    kinds = [[kind for _, kind in layer] for layer in depth]
    sparse = [i for i, layer in enumerate(kinds) if 'MoE1D' in layer]
    for i in sparse:
      if 'DenseReluDense' in kinds[i]:
        after = kinds[i].index('DenseReluDense') > kinds[i].index('MoE1D')
        extra = 'after' if after else 'before'
    stacks[stack] = stack_of(stack, len(depth), sparse, group_size=2048)
  values = {
    'name': where.rstrip('/').rpartition('/')[2],
    'model': {
      'vocab_size': vocab,
      'embed_dim': d,
      'num_heads': heads,
      'head_dim': shapes[f'{first}/q'][1] // heads,
      'mlp_dim': width,
      'activation': 'geglu' if find(r'/wi_0/kernel$') else 'relu',
      'relpos_buckets': buckets,
      'relpos_per_layer': 1 < len(tables) == len(layers['encoder']),
      'tie_embeddings': 'decoder/logits/kernel' not in shapes,
      **stacks,
    },
  }
  if banks:
    values['model']['moe'] = {
      'num_experts': banks[0][0],
      'hidden_dim': banks[0][2] if banks[0][2] != width else 0,
      'selector': {'name': 'top_k', 'k': _GATES[_gate(where, shapes)]},
      'extra_ffn': extra,
    }
  return config_file.from_dict(values)


def _gate(where: str, shapes: dict) -> str:
  """The name of the gate, one for all layers."""
  gates = {n.split('/')[-2] for n in shapes if re.search(r'_gating/kernel$', n)}
  if len(gates) != 1 or not gates <= set(_GATES):
    raise ValueError(
      f'{where} routes by {sorted(gates)}; known are {sorted(_GATES)}.'
    )
  return gates.pop()


def _links(config: ModelConfig, shapes, layers) -> dict[str, Link]:
  """Our unrolled parameters, by Mesh-TensorFlow's names."""
  found = {'token_embedder/embedding': Link.to('shared/embedding')}
  if not config.tie_embeddings:
    found['logits_dense/kernel'] = Link.to('decoder/logits/kernel')
  for stack, depth in layers.items():
    final = f'{stack}/final_layer_norm/scale'
    if final not in shapes:  # As older gin files called it.
      final = f'{stack}/rms_norm/scale'
    for path, ((place, kind), *_) in zip(
      positions(config, stack), depth, strict=False
    ):
      found[path] = Link.to(f'{place}/{kind}/relative_attention_bias')
    found[f'{stack}/{stack}_norm/scale'] = Link.to(final)
    plan = config.plan(stack).layers
    for i, (sublayers, places) in enumerate(zip(plan, depth, strict=True)):
      kinds = [_KINDS[kind] for _, kind in places]
      if kinds != [s.kind for s in sublayers]:
        raise ValueError(
          f'Layer {i} of the {stack} is {kinds}, where'
          f' {[s.kind for s in sublayers]} would be like the others.'
        )
      for sublayer, (place, kind) in zip(sublayers, places, strict=True):
        ours = f'{stack}/layers_{i}'
        found[f'{ours}/{sublayer.norm}/scale'] = Link.to(
          f'{place}/layer_norm/scale'
        )
        parts = _parts(config, sublayer.kind, f'{place}/{kind}')
        for path, link in parts.items():
          found[f'{ours}/{sublayer.name}/{path}'] = link
  return found


def _parts(config: ModelConfig, kind: str, where: str) -> dict[str, Link]:
  to = lambda path: Link.to(f'{where}/{path}/kernel')
  if kind == 'mlp':
    return {f'{w}/kernel': to(w) for w in matrices(config)}
  if kind == 'moe':
    per_token = config.moe.k
    gate = next(gate for gate, k in _GATES.items() if k == per_token)
    bank = {f'experts/{w}/kernel': to(w) for w in matrices(config)}
    return {'router/kernel': to(gate), **bank}
  return attention(config, lambda ours: f'{where}/{ours[0]}')


def check_export(config: Config) -> None:
  raise ValueError('Mesh-TensorFlow is read here and not written.')
