"""HuggingFace T5, T5 1.1, Flan-T5, mT5 and Switch, both ways.

A directory with config.json, safetensors and, if it comes along, spiece.model;
or the id of one on the hub.
"""

import dataclasses
import functools
import json
import pathlib

import numpy as np

from st_moe import config_file
from st_moe.config import Config, ModelConfig
from st_moe.data import files
from st_moe.interop import safetensors
from st_moe.interop.links import Link, Source, attention, matrices, tensors

_EPSILON = 1e-6
_FILES = ('config.json', '*.safetensors', '*.safetensors.index.json')
_T5 = ('t5', 'mt5')
_SWITCH = 'switch_transformers'
_ACTIVATIONS = {'relu': 'relu', 'gelu_new': 'gelu', 'gated-gelu': 'geglu'}
_STACKS = ('encoder', 'decoder')
_COPIES = [f'{stack}.embed_tokens.weight' for stack in _STACKS]


def open_source(where: str) -> Source:
  """Opens a directory, or the hub's repository of that name.

  Raises:
    ValueError: no such place, no safetensors, or a model we have no class for.
  """
  directory = _directory(where)
  about = files.read_json(directory / 'config.json')
  reader = safetensors.Reader(directory)
  _check_numbers(about, where, len(reader.shapes))
  config, scaled = _config(about, where)
  head = 'lm_head.weight' in reader.shapes and not _tied(reader)
  tied = scaled and not head
  model = dataclasses.replace(config.model, tie_embeddings=tied)
  copies = [*_COPIES] if head else [*_COPIES, 'lm_head.weight']
  return Source(
    where=f'hf:{where}',
    config=dataclasses.replace(config, model=model),
    vocabulary=_pieces(directory / 'spiece.model'),
    links=links(model, head=head, scaled=scaled),
    shapes=reader.shapes,
    dtypes=reader.dtypes,
    read=reader.read,
    copies={n: 'shared.weight' for n in copies if n in reader.shapes},
  )


# Fields of config.json that are numbers, and so many at least.
_NUMBERS = {
  'vocab_size': 1, 'd_model': 1, 'num_heads': 1, 'd_kv': 1, 'd_ff': 1,
  'num_layers': 1, 'num_decoder_layers': 1, 'num_experts': 1,
  'num_sparse_encoder_layers': 0, 'num_sparse_decoder_layers': 0,
  'relative_attention_num_buckets': 1, 'relative_attention_max_distance': 1,
  'expert_capacity': 1,
}  # fmt: skip
_MOST = 1 << 31


def _check_numbers(about: dict, where: str, tensors: int) -> None:
  """Raises a ValueError for a size that is none, or more layers than tensors.

  Else a config alone could ask for any amount of time and memory.
  """
  for field, least in _NUMBERS.items():
    value = about.get(field)
    most = tensors if 'layers' in field or 'experts' in field else _MOST
    if value is None:
      continue  # It has a default, or is missed by name.
    if type(value) is not int or not least <= value <= most:
      raise ValueError(
        f'{where}: {field} is {value!r}, with {tensors} tensors; it must be a'
        f' whole number from {least} to {most}.'
      )


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
    found = huggingface_hub.snapshot_download(
      where, allow_patterns=[*_FILES, 'spiece.model']
    )
  except Exception as e:  # No network, no such model, no permission.
    line = str(e).strip().splitlines()[0]
    raise ValueError(
      f'{where} is no directory here and cannot be fetched from the hub'
      f' ({type(e).__name__}: {line}).'
    ) from e
  return pathlib.Path(found)


def _pieces(path: pathlib.Path) -> bytes | None:
  """The SentencePiece model, if one comes along."""
  if not path.exists():
    return None
  if not (model := files.read_bytes(path)):
    raise ValueError(f'The vocabulary {path} is empty.')
  return model


def _tied(reader) -> bool:
  """Does the output projection repeat the embedding?"""
  a, b = (reader.read(n) for n in ('lm_head.weight', 'shared.weight'))
  if a.shape != b.shape:
    return False
  step = 4096  # Rows; a whole comparison would hold both.
  return all(
    np.array_equal(a[i : i + step], b[i : i + step])
    for i in range(0, len(a), step)
  )


def _config(about: dict, where: str) -> tuple[Config, bool]:
  """Our config, and whether logits are divided by sqrt(d)."""
  kind = about.get('model_type')
  if kind not in (*_T5, _SWITCH):
    raise ValueError(
      f'{where} is a {kind!r}; known are {", ".join((*_T5, _SWITCH))}.'
    )
  if about.get('layer_norm_epsilon', _EPSILON) != _EPSILON:
    raise ValueError(
      f'{where}: layer_norm_epsilon {about["layer_norm_epsilon"]} is not the'
      f' {_EPSILON} of T5.'
    )
  switch = kind == _SWITCH
  default = 'gated-gelu' if kind == 'mt5' else 'relu'
  name = about.get('dense_act_fn' if switch else 'feed_forward_proj', default)
  if name not in _ACTIVATIONS or (switch and name != 'relu'):
    known = 'relu' if switch else ', '.join(_ACTIVATIONS)
    raise ValueError(f'{where}: no activation {name!r} here; {known}.')
  if about.get('router_bias'):
    raise ValueError(f'{where}: its routers have biases; ours have none.')
  # T5 scales by a field of its own since transformers 5, and with tying before;
  # mT5 never does, whatever is serialized.
  tied = about.get('tie_word_embeddings', True) is not False
  scaled = tied if switch else about.get('scale_decoder_outputs', tied)
  scaled &= kind != 'mt5'
  layers = about['num_layers'], about.get('num_decoder_layers')
  layers = layers[0], layers[1] or layers[0]
  sparse = [0, 0]
  if switch:
    asked = [about.get(f'num_sparse_{s}_layers', 3) for s in _STACKS]
    # As theirs counts: 0 sparse layers still make the second one sparse.
    sparse = [n // s if s else n for n, s in zip(layers, asked, strict=True)]
  encoder, decoder = (
    {
      'num_layers': n,
      'sparse_every': every,
      'sparse_offset': int(every > 1),
      'group_size': 512,
    }
    for n, every in zip(layers, sparse, strict=True)
  )
  values = {
    'name': pathlib.Path(where).name,
    'model': {
      'vocab_size': about['vocab_size'],
      'embed_dim': about['d_model'],
      'num_heads': about['num_heads'],
      'head_dim': about['d_kv'],
      'mlp_dim': about['d_ff'],
      'activation': _ACTIVATIONS[name],
      'encoder': encoder,
      'decoder': decoder,
      'dropout': about.get('dropout_rate', 0.1),
      'relpos_buckets': about.get('relative_attention_num_buckets', 32),
      'relpos_max_distance': about.get('relative_attention_max_distance', 128),
      'init_scale': 1.0,
    },
  }
  if switch:
    places = {'count': about.get('expert_capacity', 64)}
    values['routing'] = 'huggingface'
    values['model']['moe'] = {
      'num_experts': about.get('num_experts', 8),
      'train_capacity': places,
      'eval_capacity': places,
      'gate': {
        'name': 'linear',
        'jitter': float(about.get('router_jitter_noise', 0.01)),
      },
    }
    values['loss'] = {
      'z_loss': 0.0,
      'router': {
        'load_balance': about.get('router_aux_loss_coef', 0.001),
        'router_z': about.get('router_z_loss_coef', 0.001),
      },
    }
  return config_file.from_dict(config_file.routed(values)), scaled


def _flipped(name: str) -> Link:
  """A torch.nn.Linear holds its weight the other way."""
  return Link.to(name).transposed


def links(config: ModelConfig, *, head: bool, scaled: bool) -> dict[str, Link]:
  """Our unrolled parameters, by their names.

  Args:
    head: there is an output projection, `lm_head`, apart from the embedding.
    scaled: logits are divided by sqrt(d); ours are so where tied, and where
      not the division goes into the kernel.
  """
  found = {'token_embedder/embedding': Link.to('shared.weight')}
  if not config.tie_embeddings:
    name = 'lm_head.weight' if head else 'shared.weight'
    factor = config.embed_dim**-0.5
    divided = Link.to(name, lambda w: w * factor, lambda a: a / factor)
    link = divided if scaled else Link.to(name)
    found['logits_dense/kernel'] = link.transposed
  for stack in config.stacks:
    first = f'{stack}.block.0.layer.0.SelfAttention'
    found[f'{stack}/relpos_bias/rel_embedding'] = _flipped(
      f'{first}.relative_attention_bias.weight'
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
  return {**_common(config.model), **_family(config.model)}


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  """Writes a directory that `from_pretrained` reads; whole or not at all."""
  model, head = config.model, not config.model.tie_embeddings
  beside = {
    'config.json': check_export(config),
    'generation_config.json': {
      'decoder_start_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0,
    },
  }  # fmt: skip
  if vocabulary:
    about = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': 100}
    beside['tokenizer_config.json'] = about
  with files.directory_appearing(where) as directory:
    for name, value in beside.items():
      text = json.dumps(value, indent=2, sort_keys=True)
      (directory / name).write_text(f'{text}\n')
    if vocabulary:
      (directory / 'spiece.model').write_bytes(vocabulary)
    theirs = links(model, head=head, scaled=not head)
    found = [*tensors(params, model, theirs)]
    if head and beside['config.json']['model_type'] == _SWITCH:
      # Its class ties either all of these to the table or none.
      (table,) = (t for t in found if t[0] == 'shared.weight')
      found += [(name, *table[1:]) for name in _COPIES]
    safetensors.write(directory, found)


def logits(where: str, inputs, shifted) -> np.ndarray:
  """What transformers makes of token ids; 0 is padding in `inputs`."""
  try:
    import torch
    import transformers
  except ImportError as e:
    raise ValueError(
      f"--verify needs transformers and torch: pip install 'st_moe[hf]' ({e})."
    ) from None
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    _directory(where), dtype=torch.float32
  ).eval()
  ids = torch.tensor(np.asarray(inputs), dtype=torch.long)
  with torch.no_grad():
    found = model(
      input_ids=ids,
      attention_mask=(ids > 0).long(),
      decoder_input_ids=torch.tensor(np.asarray(shifted), dtype=torch.long),
    )
  return found.logits.numpy()


def _common(model: ModelConfig) -> dict:
  if model.stacks != _STACKS:
    raise ValueError('Only encoder-decoders have a HuggingFace class.')
  dense = {
    sublayer.mlp_dim
    for stack in _STACKS
    for layer in model.plan(stack).layers
    for sublayer in layer
    if sublayer.kind in ('mlp', 'moe')
  }
  if len(dense) != 1:
    raise ValueError(
      f'HuggingFace has one d_ff for all layers; here are {sorted(dense)}.'
    )
  tied = model.tie_embeddings
  return {
    'd_model': model.embed_dim,
    'd_kv': model.head_dim,
    'd_ff': dense.pop(),
    'num_heads': model.num_heads,
    'num_layers': model.encoder.num_layers,
    'num_decoder_layers': model.decoder.num_layers,
    'vocab_size': model.vocab_size,
    'dropout_rate': model.dropout,
    'relative_attention_num_buckets': model.relpos_buckets,
    'relative_attention_max_distance': model.relpos_max_distance,
    'layer_norm_epsilon': _EPSILON,
    'is_encoder_decoder': True,
    'tie_word_embeddings': tied,
    'decoder_start_token_id': 0,
    'eos_token_id': 1,
    'pad_token_id': 0,
    'dtype': 'float32',
  }


def _family(model: ModelConfig) -> dict:
  """What only T5's or only Switch's config.json has."""
  counts = [model.plan(stack).num_sparse for stack in _STACKS]
  if not any(counts):
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
      'model_type': 't5',
      'architectures': ['T5ForConditionalGeneration'],
      'feed_forward_proj': names[model.activation],
      'scale_decoder_outputs': model.tie_embeddings,
    }
  moe, places, wrong = model.moe, model.moe.eval_capacity, []
  if model.activation != 'relu':
    wrong.append(f'its experts are {model.activation} networks, not relu')
  if moe.extra_ffn != 'none':
    wrong.append('an extra FFN stands beside each sparse one')
  if moe.selector.kwargs.get('k') != 1:
    wrong.append('a token meets more than one expert')
  if moe.multiplicative_bias:
    wrong.append('its experts have biases')
  for stack, count in zip(_STACKS, counts, strict=True):
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
    'architectures': ['SwitchTransformersForConditionalGeneration'],
    'dense_act_fn': 'relu',
    'num_experts': moe.num_experts,
    'num_sparse_encoder_layers': counts[0],
    'num_sparse_decoder_layers': counts[1],
    'expert_capacity': places.count or places.slots(512, moe.num_experts),
    'router_bias': False,
    'router_jitter_noise': moe.gate.kwargs.get('jitter', 0.0),
    'router_dtype': 'float32',
    'router_ignore_padding_tokens': False,
  }
