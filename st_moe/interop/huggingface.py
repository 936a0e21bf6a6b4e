"""HuggingFace T5, T5 1.1, Flan-T5, mT5, UMT5 and Switch, both ways.

A directory with config.json, safetensors and, if it comes along, a tokenizer;
or the id of one on the hub. Whole models, or the encoder alone.
"""

import dataclasses
import functools
import math
import pathlib

import numpy as np

from st_moe import config_file
from st_moe.config import Config, ModelConfig
from st_moe.data import files
from st_moe.interop import hf_tokenizer, safetensors
from st_moe.interop.links import (
  Link,
  Source,
  attention,
  has_extra_ffn,
  matrices,
  positions,
  tensors,
  unknown_parts,
)

_EPSILON = 1e-6
_FILES = ('config.json', 'generation_config.json', '*.safetensors',
          '*.safetensors.index.json', *hf_tokenizer.FILES)  # fmt: skip
_SWITCH = 'switch_transformers'
_TYPES = ('t5', 'mt5', _SWITCH, 'umt5')
_ACTIVATIONS = {'relu': 'relu', 'gelu_new': 'gelu', 'gated-gelu': 'geglu'}
_STACKS = ('encoder', 'decoder')
_EMBEDDING, _HEAD = 'shared.weight', 'lm_head.weight'
_COPIES = [f'{stack}.embed_tokens.weight' for stack in _STACKS]
# What begins and ends a text; all of ours have these.
_SPECIAL = {'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0}
_MOST = (1 << 31) - 1  # Of ids and places.


def open_source(where: str) -> Source:
  """Opens a directory, or the hub's repository of that name.

  Raises:
    ValueError: no such place, no safetensors, or a model we have no class for.
  """
  directory = _directory(where)
  about = _Fields(directory / 'config.json')
  _check_special(about)
  if (directory / 'generation_config.json').exists():
    _check_special(_Fields(directory / 'generation_config.json'))
  reader = safetensors.Reader(directory)
  config, scaled = _config(about, reader.shapes, where)
  model = config.model
  table, copies = _embedding(reader, model.stacks, where)
  head = bool(model.decoder) and _HEAD in reader.shapes
  if head and _equal(reader, _HEAD, table):
    head, copies = False, [*copies, _HEAD]
  # An encoder alone has no logits: it needs no matrix for them.
  tied = not model.decoder or (scaled and not head)
  model = dataclasses.replace(model, tie_embeddings=tied)
  return Source(
    where=f'hf:{where}',
    config=dataclasses.replace(config, model=model),
    vocabulary=hf_tokenizer.read(directory, about.fields),
    links=links(model, head=head, scaled=scaled, table=table),
    shapes=reader.shapes,
    dtypes=reader.dtypes,
    read=reader.read,
    copies=dict.fromkeys(copies, table),
  )


class _Fields:
  """A JSON file of theirs; each field is checked where it is read."""

  def __init__(self, path: pathlib.Path):
    self.path, self.fields = path, files.read_json(path)

  def get(self, name: str, default=None):
    """As it stands there; null is as if it did not."""
    found = self.fields.get(name)
    return default if found is None else found

  def whole(self, name: str, default=None, *, low=1, high=_MOST, why='') -> int:
    found = self.get(name, default)
    if found is None:
      raise ValueError(
        f'{self.path} has no {name}: it is damaged, or of another model.'
      )
    if type(found) is not int or not low <= found <= high:
      raise self.wrong(name, f'a whole number from {low} to {high}{why}')
    return found

  def number(self, name: str, default: float, *, high=math.inf) -> float:
    found = self.get(name, default)
    known = type(found) in (int, float) and math.isfinite(found)
    if not known or not 0 <= found <= high:
      most = f' to {high}' if high < math.inf else ' on'
      raise self.wrong(name, f'a number from 0{most}')
    return float(found)

  def flag(self, name: str, default: bool) -> bool:
    found = self.get(name, default)
    if type(found) is not bool:
      raise self.wrong(name, 'true or false')
    return found

  def wrong(self, name: str, rule: str) -> ValueError:
    found = repr(self.fields.get(name))
    found = found if len(found) <= 60 else f'{found[:60]} ...'
    return ValueError(f'{self.path}: {name} is {found}; it should be {rule}.')


def _check_special(about: _Fields) -> None:
  """Raises where texts begin, end or are padded in another way than ours."""
  found = {name: about.get(name, ours) for name, ours in _SPECIAL.items()}
  if found['eos_token_id'] == [1]:
    found['eos_token_id'] = 1
  if any(type(i) is not int for i in found.values()) or found != _SPECIAL:
    listed = ', '.join(f'{name} {i}' for name, i in found.items())
    raise ValueError(
      f'{about.path}: {listed}; known here are texts padded with 0, that end'
      ' in 1 and whose answers begin with 0.'
    )


def _embedding(reader, stacks, where: str) -> tuple[str, list[str]]:
  """The one table of embeddings and its copies, as transformers finds it."""
  own = [f'{stack}.embed_tokens.weight' for stack in reversed(stacks)]
  found = [name for name in (_EMBEDDING, *own) if name in reader.shapes]
  if not found:
    return _EMBEDDING, []  # `check` says what is missing.
  table, *copies = found
  differ = [name for name in copies if not _equal(reader, name, table)]
  if differ:
    raise ValueError(
      f'{where} has tables of its own for {" and ".join(differ)}, which differ'
      f' from {table}; ours embeds all tokens by one.'
    )
  return table, copies


def _directory(where: str) -> pathlib.Path:
  path = pathlib.Path(where).expanduser()
  if path.is_dir():
    if not (path / 'config.json').exists():
      raise ValueError(f'{path} holds no config.json: no HuggingFace model.')
    return path
  if path.exists() or where.count('/') != 1 or where.startswith(('/', '.')):
    raise ValueError(f'{where} is neither a directory nor the id of a model.')
  import huggingface_hub

  try:
    found = huggingface_hub.snapshot_download(where, allow_patterns=[*_FILES])
  except Exception as e:  # No network, no such model, no permission.
    line = str(e).strip().splitlines()[0]
    raise ValueError(
      f'{where} is no directory here and cannot be fetched from the hub'
      f' ({type(e).__name__}: {line}).'
    ) from e
  return pathlib.Path(found)


def _equal(reader, one: str, other: str) -> bool:
  """Do two tensors hold the same numbers?"""
  a, b = reader.read(one), reader.read(other)
  if a.shape != b.shape:
    return False
  step = 4096  # Rows; a whole comparison would hold both.
  return all(
    np.array_equal(a[i : i + step], b[i : i + step])
    for i in range(0, len(a), step)
  )


def _config(about: _Fields, shapes, where: str) -> tuple[Config, bool]:
  """Our config, and whether logits are divided by sqrt(d)."""
  kind = about.get('model_type')
  if kind not in _TYPES:
    raise ValueError(f'{where} is a {kind!r}; known are {", ".join(_TYPES)}.')
  epsilon = about.get('layer_norm_epsilon', _EPSILON)
  if epsilon != _EPSILON:
    raise ValueError(
      f'{where}: layer_norm_epsilon {epsilon} is not the {_EPSILON} of T5.'
    )
  switch = kind == _SWITCH
  default = 'relu' if kind in ('t5', _SWITCH) else 'gated-gelu'
  name = about.get('dense_act_fn' if switch else 'feed_forward_proj', default)
  known = ['relu'] if switch else list(_ACTIVATIONS)
  if name not in known:
    raise ValueError(
      f'{where}: no activation {name!r} here; {", ".join(known)}.'
    )
  if about.flag('router_bias', False):
    raise ValueError(f'{where}: its routers have biases; ours have none.')
  # T5 scales by a field of its own since transformers 5, and with tying before;
  # mT5 never does, whatever is serialized.
  tied = about.flag('tie_word_embeddings', True)
  scaled = tied if switch else about.flag('scale_decoder_outputs', tied)
  scaled &= kind != 'mt5'
  # No model has more layers or experts than tensors, nor a width that no
  # tensor has: told before anything of that size is made.
  count = functools.partial(
    about.whole, high=max(len(shapes), 1), why=', as many as it has tensors'
  )
  side = max((n for shape in shapes.values() for n in shape), default=1)
  size = functools.partial(
    about.whole, high=max(side, 1), why=', the longest side of its tensors'
  )
  depth = {'encoder': count('num_layers')}
  if not _encoder_alone(about, shapes):
    depth['decoder'] = count('num_decoder_layers', depth['encoder'])
  stacks = {'decoder': None}
  for stack, n in depth.items():
    every = 0
    if switch:
      # As theirs counts: 0 sparse layers still make the second one sparse.
      sparse = about.whole(f'num_sparse_{stack}_layers', 3, low=0)
      every = n // sparse if sparse else n
    stacks[stack] = {
      'num_layers': n,
      'sparse_every': every,
      'sparse_offset': int(every > 1),
      'group_size': 512,
    }
  buckets = size('relative_attention_num_buckets', 32, low=4)
  values = {
    'name': pathlib.Path(where).name,
    'model': {
      'vocab_size': size('vocab_size'),
      'embed_dim': size('d_model'),
      'num_heads': size('num_heads'),
      'head_dim': size('d_kv'),
      'mlp_dim': size('d_ff'),
      'activation': _ACTIVATIONS[name],
      **stacks,
      'dropout': about.number('dropout_rate', 0.1, high=1),
      'relpos_buckets': buckets,
      'relpos_max_distance': about.whole(
        'relative_attention_max_distance', 128, low=buckets // 2 + 1
      ),
      'relpos_per_layer': kind == 'umt5',
      'init_scale': 1.0,
    },
  }
  if switch:
    places = {'count': about.whole('expert_capacity', 64)}
    values['routing'] = 'huggingface'
    values['model']['moe'] = {
      'num_experts': count('num_experts', 8),
      'train_capacity': places,
      'eval_capacity': places,
      'gate': {
        'name': 'linear',
        'jitter': about.number('router_jitter_noise', 0.01, high=1),
      },
      'losses': {
        name: about.number(theirs, 0.001) for name, theirs in _LOSSES.items()
      },
    }
    values['loss'] = {'z_loss': 0.0}
  return config_file.from_dict(config_file.routed(values)), scaled


_LOSSES = {
  'load_balance': 'router_aux_loss_coef',
  'router_z': 'router_z_loss_coef',
}


def _encoder_alone(about: _Fields, shapes) -> bool:
  named = about.get('architectures') or []
  if named:
    return str(named[0]).endswith('EncoderModel')
  return not any(name.startswith('decoder.') for name in shapes)


def _flipped(name: str) -> Link:
  """A torch.nn.Linear holds its weight the other way."""
  return Link.to(name).transposed


def links(
  config: ModelConfig, *, head: bool, scaled: bool, table: str = _EMBEDDING
) -> dict[str, Link]:
  """Our unrolled parameters, by their names.

  Args:
    head: there is an output projection, `lm_head`, apart from the embedding.
    scaled: logits are divided by sqrt(d); ours are so where tied, and where
      not the division goes into the kernel.
    table: that of the embeddings.
  """
  found = {'token_embedder/embedding': Link.to(table)}
  if not config.tie_embeddings:
    name = _HEAD if head else table
    factor = config.embed_dim**-0.5
    divided = Link.to(name, lambda w: w * factor, lambda a: a / factor)
    link = divided if scaled else Link.to(name)
    found['logits_dense/kernel'] = link.transposed
  for stack in config.stacks:
    for i, place in enumerate(positions(config, stack)):
      found[place] = _flipped(
        f'{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight'
      )
    found[f'{stack}/{stack}_norm/scale'] = Link.to(
      f'{stack}.final_layer_norm.weight'
    )
    for i, sublayers in enumerate(config.plan(stack).layers):
      for n, sublayer in enumerate(sublayers):
        ours, theirs = f'{stack}/layers_{i}', f'{stack}.block.{i}.layer.{n}'
        found[f'{ours}/{sublayer.norm}/scale'] = Link.to(
          f'{theirs}.layer_norm.weight'
        )
        for path, link in _PARTS[sublayer.kind](config, theirs).items():
          found[f'{ours}/{sublayer.name}/{path}'] = link
  return found


def _attention(config: ModelConfig, where: str, name: str) -> dict[str, Link]:
  theirs = lambda ours: f'{where}.{name}.{ours[0]}.weight'
  found = attention(config, theirs).items()
  return {path: link.transposed for path, link in found}


def _mlp(config: ModelConfig, where: str) -> dict[str, Link]:
  sparse = any(config.plan(s).num_sparse for s in config.stacks)
  name = 'mlp' if sparse else 'DenseReluDense'
  return {
    f'{w}/kernel': _flipped(f'{where}.{name}.{w}.weight')
    for w in matrices(config)
  }


def _moe(config: ModelConfig, where: str) -> dict[str, Link]:
  bank = lambda w: tuple(
    f'{where}.mlp.experts.expert_{e}.{w}.weight'
    for e in range(config.moe.num_experts)
  )
  return {
    'router/kernel': _flipped(f'{where}.mlp.router.classifier.weight'),
    **{
      f'experts/{w}/kernel': Link(bank(w), stacked=True).transposed
      for w in matrices(config)
    },
  }


_PARTS = {
  'self_attention': functools.partial(_attention, name='SelfAttention'),
  'cross_attention': functools.partial(_attention, name='EncDecAttention'),
  'mlp': _mlp,
  'moe': _moe,
}


def check_export(config: Config) -> dict:
  """The config.json of a model.

  Raises:
    ValueError: HuggingFace has no class for it.
  """
  return {**_common(config.model), **_family(config)}


def names(config: ModelConfig) -> dict[str, Link]:
  """The links of what `save` writes."""
  head = not config.tie_embeddings
  return links(config, head=head, scaled=not head)


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  """Writes a directory that `from_pretrained` reads; whole or not at all."""
  model = config.model
  beside = {'config.json': check_export(config)}
  if model.decoder:
    beside['generation_config.json'] = _SPECIAL
  with files.directory_appearing(where) as directory:
    for name, value in beside.items():
      text = files.as_json(value, indent=2, sort_keys=True)
      (directory / name).write_text(f'{text}\n')
    if vocabulary is not None:
      hf_tokenizer.write(directory, vocabulary)
    found = [*tensors(params, model, names(model))]
    if (
      not model.tie_embeddings
      and beside['config.json']['model_type'] == _SWITCH
    ):
      # Its class ties either all of these to the table or none.
      (table,) = (t for t in found if t[0] == _EMBEDDING)
      found += [(name, *table[1:]) for name in _COPIES]
    safetensors.write(directory, found)


def logits(where: str, inputs, shifted) -> np.ndarray:
  """What transformers makes of token ids; 0 is padding in `inputs`.

  Of an encoder alone, what it makes of `inputs`.
  """
  try:
    import torch
    import transformers
  except ImportError as e:
    raise ValueError(
      f"--verify needs transformers and torch: pip install 'st_moe[hf]' ({e})."
    ) from None
  directory = _directory(where)
  about = _Fields(directory / 'config.json')
  alone = _encoder_alone(about, safetensors.Reader(directory).shapes)
  kind = 'AutoModelForTextEncoding' if alone else 'AutoModelForSeq2SeqLM'
  if alone and about.get('model_type') == _SWITCH:
    kind = 'SwitchTransformersEncoderModel'  # Which no Auto class knows.
  model = getattr(transformers, kind).from_pretrained(
    directory, dtype=torch.float32
  )
  ids = torch.tensor(np.asarray(inputs), dtype=torch.long)
  given = {'input_ids': ids, 'attention_mask': (ids > 0).long()}
  if not alone:
    shifted = torch.tensor(np.asarray(shifted), dtype=torch.long)
    given['decoder_input_ids'] = shifted
  with torch.no_grad():
    found = model.eval()(**given)
  return (found.last_hidden_state if alone else found.logits).numpy()


def _common(model: ModelConfig) -> dict:
  if not model.encoder:
    raise ValueError('HuggingFace has no class of T5 for a decoder alone.')
  if not model.decoder and not model.tie_embeddings:
    raise ValueError(
      'HuggingFace has no output projection for an encoder alone; with'
      ' model.tie_embeddings=true it is left behind.'
    )
  dense = {
    sublayer.dim
    for stack in model.stacks
    for layer in model.plan(stack).layers
    for sublayer in layer
    if sublayer.kind in ('mlp', 'moe')
  }
  if len(dense) != 1:
    raise ValueError(
      f'HuggingFace has one d_ff for all layers; here are {sorted(dense)}.'
    )
  found = {
    'd_model': model.embed_dim,
    'd_kv': model.head_dim,
    'd_ff': dense.pop(),
    'num_heads': model.num_heads,
    'num_layers': model.encoder.num_layers,
    'vocab_size': model.vocab_size,
    'dropout_rate': model.dropout,
    'relative_attention_num_buckets': model.relpos_buckets,
    'relative_attention_max_distance': model.relpos_max_distance,
    'layer_norm_epsilon': _EPSILON,
    'is_encoder_decoder': bool(model.decoder),
    'tie_word_embeddings': model.tie_embeddings,
    'dtype': 'float32',
    **_SPECIAL,
  }
  if model.decoder:
    found['num_decoder_layers'] = model.decoder.num_layers
  return found


def _family(config: Config) -> dict:
  """What only T5's, UMT5's or Switch's config.json has."""
  model = config.model
  counts = {s: model.plan(s).num_sparse for s in model.stacks}
  part = 'ForConditionalGeneration' if model.decoder else 'EncoderModel'
  if not any(counts.values()):
    if has_extra_ffn(model):
      raise ValueError(
        'HuggingFace has one FFN in each layer; here an extra one stands beside'
        ' those that were sparse.'
      )
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if (name := model.activation.name) not in names:
      raise ValueError(f'HuggingFace has no FFN of the activation {name!r}.')
    kind = 'umt5' if model.relpos_per_layer else 't5'
    return {
      'model_type': kind,
      'architectures': [f'{kind.upper()}{part}'],
      'feed_forward_proj': names[name],
      'scale_decoder_outputs': model.tie_embeddings,
    }
  moe = model.moe_of(model.stacks[0])
  places, wrong = moe.eval_capacity, unknown_parts(model)
  weights = {part.name: part.kwargs.get('weight', 1.0) for part in moe.losses}
  if model.relpos_per_layer:
    wrong.append('each layer has position biases of its own')
  if (name := model.activation.name) != 'relu':
    wrong.append(f'its experts are {name} networks, not relu')
  if moe.extra_ffn != 'none':
    wrong.append('an extra FFN stands beside each sparse one')
  if moe.k != 1:
    wrong.append('a token meets more than one expert')
  if moe.multiplicative_bias:
    wrong.append('its experts have biases')
  for stack, count in counts.items():
    cfg = model.stack(stack)
    every = cfg.sparse_every
    if every != cfg.num_layers // max(count, 1) or cfg.sparse_offset != int(
      every > 1
    ):
      wrong.append(
        f'its {stack} is not sparse in every n-th layer from layer 1'
      )
  if wrong:
    raise ValueError(
      'HuggingFace has SwitchTransformers, and no ST-MoE: ' + '; '.join(wrong)
    )
  return {
    'model_type': _SWITCH,
    'architectures': [f'SwitchTransformers{part}'],
    'dense_act_fn': 'relu',
    'num_experts': moe.num_experts,
    **{f'num_sparse_{s}_layers': count for s, count in counts.items()},
    'expert_capacity': places.count or places.slots(512, moe.num_experts),
    'router_bias': False,
    'router_jitter_noise': moe.gate.kwargs.get('jitter', 0.0),
    'router_dtype': 'float32',
    'router_ignore_padding_tokens': False,
    **{theirs: weights.get(name, 0.0) for name, theirs in _LOSSES.items()},
  }
