"""Gin files with the macros of T5X, as a config of ours.

  st-moe train --gin_file=configs/gin/models/st_moe_base.gin \\
      --gin_file=configs/gin/runs/pretrain.gin --gin.TRAIN_STEPS=1000

A file is read for its macros, NAME = value, and for the few parameters of T5X
in PARAMETERS that mean something to a run of ours. What a macro is here stands
in one table, MACROS. Later files and --gin.NAME=value win over earlier ones.
"""

import dataclasses
import difflib
import logging
import pathlib
import tokenize
from collections.abc import Callable, Mapping, Sequence

from gin import config_parser

from st_moe.fields import shown, unknown
from st_moe.shipped import folder

_REQUIRED = 'gin.REQUIRED'


@dataclasses.dataclass(frozen=True)
class _Macro:
  name: str


@dataclasses.dataclass(frozen=True)
class _Object:
  """@name: a function or class of T5X's."""

  name: str


class _Delegate(config_parser.ParserDelegate):
  def configurable_reference(self, scoped_configurable_name, evaluate):
    return _Object(scoped_configurable_name)

  def macro(self, macro_name):
    return _Macro(macro_name)


def _activation(value) -> str:
  """('gelu', 'linear') is GEGLU, of three matrices."""
  found = {('gelu', 'linear'): 'geglu', ('gelu',): 'gelu', ('relu',): 'relu'}
  key = tuple(value) if isinstance(value, list | tuple) else (value,)
  if key not in found:
    raise ValueError(f'one of {", ".join(map(str, found))}')
  return found[key]


def _sparse(stack: str) -> Callable:
  def set_(value, macros):
    layers = macros.get(f'NUM_{stack.upper()}_LAYERS')
    if not isinstance(value, int) or value < 0:
      raise ValueError('a whole number of layers')
    if not value:
      return {f'model.{stack}.sparse_every': 0}
    if not isinstance(layers, int) or layers % value:
      raise ValueError(f'a divisor of NUM_{stack.upper()}_LAYERS = {layers}')
    every = layers // value
    return {
      f'model.{stack}.sparse_every': every,
      f'model.{stack}.sparse_offset': every - 1,
    }

  set_.__doc__ = (
    f'`model.{stack}.sparse_every` and `sparse_offset`: so many, evenly spread,'
    ' the last layer among them'
  )
  return set_


def _layout(value, macros):
  """MIXED is what there is: sparse layers evenly spread"""
  if str(getattr(value, 'name', value)).rpartition('.')[2] != 'MIXED':
    raise ValueError('MIXED: other layouts have no fields here')
  return {}


def _lengths(value, macros):
  """`data.inputs_length`, `data.targets_length`"""
  if not isinstance(value, Mapping) or {*value} != {'inputs', 'targets'}:
    raise ValueError("{'inputs': N, 'targets': N}")
  return {f'data.{key}_length': length for key, length in value.items()}


def _z(value, macros):
  """`model.moe.losses.router_z`; 0: no such loss"""
  return {'model.moe.losses.router_z': value or None}


# 'constant * rsqrt_decay' ... -> whether it rises first, and falls later.
_FACTORS = {
  'constant': (False, False),
  'constant * rsqrt_decay': (False, True),
  'constant * linear_warmup': (True, False),
  'constant * linear_warmup * rsqrt_decay': (True, True),
}


def _schedule(value, macros):
  """`optimizer.learning_rate`, `warmup_steps`, `constant_steps`, `decay`"""
  key = ' * '.join(part.strip() for part in str(value).split('*'))
  if key not in _FACTORS:
    raise ValueError(f'one of {", ".join(map(repr, _FACTORS))}')
  rises, falls = _FACTORS[key]
  base = macros.get('BASE_LEARNING_RATE', 0.5)
  warm = macros.get('WARMUP_STEPS', 1000)
  for name, number in (('BASE_LEARNING_RATE', base), ('WARMUP_STEPS', warm)):
    if not isinstance(number, int | float) or number <= 0:
      raise ValueError(f'{name} = {shown(number)} above 0')
  found = {
    'optimizer.learning_rate': base / warm**0.5 if falls else base,
    'optimizer.warmup_steps': warm if rises else 0,
    'optimizer.decay': 'rsqrt' if falls else 'none',
  }
  return found | ({'optimizer.constant_steps': warm} if falls else {})


def _mixture(value, macros):
  """`data.mixture`: this name, at the rate 1"""
  if not isinstance(value, str):
    raise ValueError('a name')
  return {'data.mixture': {value: 1.0}}


def _activations(value, macros):
  """`model.activation`: `('gelu', 'linear')` is `geglu`"""
  return {'model.activation': _activation(value)}


def _with_factors(value, macros):
  """a part of `LEARNING_RATE_FACTORS`"""
  if macros.get('LEARNING_RATE_FACTORS') is None:
    raise ValueError('beside LEARNING_RATE_FACTORS, which say what it is for')
  return {}


def _relative(value, macros):
  """none: `TRAIN_STEPS` are steps of this run"""
  raise ValueError('None: here TRAIN_STEPS are steps of this run')


def _per_token(value, macros):
  """`NUM_REAL_TARGET_TOKENS`: the loss is a mean over target tokens"""
  if value != 'NUM_REAL_TARGET_TOKENS':
    raise ValueError(
      "'NUM_REAL_TARGET_TOKENS' or None: the loss here is a mean over target"
      ' tokens'
    )
  return {}


def _nothing(value, macros):
  """nothing: this code chooses otherwise"""
  return {}


# Macro -> the fields of a config that are set to its value, or what makes
# {field: value} of it and of all macros. The names are T5X's and Flaxformer's;
# those below the line are ours, for what these bind as parameters.
MACROS: dict[str, tuple[str, ...] | Callable] = {
  'EMBED_DIM': ('model.embed_dim',),
  'NUM_HEADS': ('model.num_heads',),
  'HEAD_DIM': ('model.head_dim',),
  'MLP_DIM': ('model.mlp_dim',),
  'NUM_EMBEDDINGS': ('model.vocab_size',),
  'NUM_ENCODER_LAYERS': ('model.encoder.num_layers',),
  'NUM_DECODER_LAYERS': ('model.decoder.num_layers',),
  'SCALE': ('model.init_scale',),
  'ACTIVATION_DTYPE': ('model.dtype',),
  'DROPOUT_RATE': ('model.dropout',),
  'NUM_EXPERTS': ('model.moe.num_experts',),
  'NUM_ENCODER_SPARSE_LAYERS': _sparse('encoder'),
  'NUM_DECODER_SPARSE_LAYERS': _sparse('decoder'),
  'ENCODER_SPARSE_LAYOUT': _layout,
  'DECODER_SPARSE_LAYOUT': _layout,
  'NUM_SELECTED_EXPERTS': ('model.moe.selector.k',),
  'GROUP_SIZE': ('model.encoder.group_size', 'model.decoder.group_size'),
  'TRAIN_EXPERT_CAPACITY_FACTOR': ('model.moe.train_capacity.factor',),
  'EVAL_EXPERT_CAPACITY_FACTOR': ('model.moe.eval_capacity.factor',),
  'EXPERT_MLP_DIM': ('model.moe.hidden_dim',),
  'EXPERT_DROPOUT_RATE': ('model.moe.expert_dropout',),
  'AUX_LOSS_FACTOR': ('model.moe.losses.load_balance',),
  'ROUTER_Z_LOSS_FACTOR': _z,
  'LABEL_SMOOTHING': ('loss.label_smoothing',),
  'Z_LOSS': ('loss.z_loss',),
  'MIXTURE_OR_TASK_NAME': _mixture,
  'TASK_FEATURE_LENGTHS': _lengths,
  'BATCH_SIZE': ('data.batch_size',),
  'TRAIN_STEPS': ('total_steps',),
  'EVAL_STEPS': ('evaluate.batches',),
  'EVAL_PERIOD': ('evaluate.every',),
  'RANDOM_SEED': ('seed', 'data.seed'),
  'INITIAL_CHECKPOINT_PATH': ('init',),
  'NUM_EXPERT_PARTITIONS': ('mesh.expert',),
  'NUM_MODEL_PARTITIONS': ('mesh.model',),
  'USE_CACHED_TASKS': _nothing,
  'USE_HARDWARE_RNG': _nothing,
  'SHUFFLE_TRAIN_EXAMPLES': _nothing,
  'MODEL_PARALLEL_SUBMESH': _nothing,
  'EVALUATOR_USE_MEMORY_CACHE': _nothing,
  'EVALUATOR_NUM_EXAMPLES': _nothing,
  'JSON_WRITE_N_RESULTS': _nothing,
  'TRAIN_STEPS_RELATIVE': _relative,
  'LOSS_NORMALIZING_FACTOR': _per_token,
  # ----
  'DECODER_GROUP_SIZE': ('model.decoder.group_size',),
  'MIN_EXPERT_CAPACITY': (
    'model.moe.train_capacity.minimum',
    'model.moe.eval_capacity.minimum',
  ),
  'EXTRA_FFN': ('model.moe.extra_ffn',),
  'MLP_ACTIVATIONS': _activations,
  'LOGITS_VIA_EMBEDDING': ('model.tie_embeddings',),
  'ROUTING': ('routing',),
  'REMAT': ('model.remat',),
  'FSDP_PARTITIONS': ('mesh.fsdp',),
  'PAPER_PARAMS': ('paper_params',),
  'LEARNING_RATE_FACTORS': _schedule,
  'BASE_LEARNING_RATE': _with_factors,
  'WARMUP_STEPS': _with_factors,
  'CHECKPOINT_PERIOD': ('checkpoint.every',),
  'CHECKPOINT_KEEP': ('checkpoint.keep_last',),
  'NUM_MICROBATCHES': ('microbatches',),
  'INIT_SLOTS': ('init_slots',),
  'SPLIT': ('evaluate.split',),
}  # fmt: skip

# A parameter of T5X, of whatever scope -> the macro that it is here.
PARAMETERS = {
  'utils.create_learning_rate_scheduler.factors': 'LEARNING_RATE_FACTORS',
  'utils.create_learning_rate_scheduler.base_learning_rate': (
    'BASE_LEARNING_RATE'
  ),
  'utils.create_learning_rate_scheduler.warmup_steps': 'WARMUP_STEPS',
  'utils.SaveCheckpointConfig.period': 'CHECKPOINT_PERIOD',
  'utils.SaveCheckpointConfig.keep': 'CHECKPOINT_KEEP',
  'utils.DatasetConfig.split': 'SPLIT',
  'trainer.Trainer.num_microbatches': 'NUM_MICROBATCHES',
  'moe_trainer.MoeTrainer.num_microbatches': 'NUM_MICROBATCHES',
  'train_script.train.total_steps': 'TRAIN_STEPS',
  'train_script.train.eval_steps': 'EVAL_STEPS',
  'train_script.train.eval_period': 'EVAL_PERIOD',
  'train_script.train.random_seed': 'RANDOM_SEED',
  'moe_layers.MoeLayer.min_expert_capacity': 'MIN_EXPERT_CAPACITY',
  'dense.MlpBlock.activations': 'MLP_ACTIVATIONS',
  'network.T5Config.emb_dim': 'EMBED_DIM',
  'network.T5Config.num_heads': 'NUM_HEADS',
  'network.T5Config.head_dim': 'HEAD_DIM',
  'network.T5Config.mlp_dim': 'MLP_DIM',
  'network.T5Config.vocab_size': 'NUM_EMBEDDINGS',
  'network.T5Config.num_encoder_layers': 'NUM_ENCODER_LAYERS',
  'network.T5Config.num_decoder_layers': 'NUM_DECODER_LAYERS',
  'network.T5Config.mlp_activations': 'MLP_ACTIVATIONS',
  'network.T5Config.logits_via_embedding': 'LOGITS_VIA_EMBEDDING',
  'network.T5Config.dropout_rate': 'DROPOUT_RATE',
  'network.T5Config.dtype': 'ACTIVATION_DTYPE',
}

# Modules of T5X, SeqIO and Flaxformer whose other parameters are theirs alone.
_THEIRS = (
  *('train_script', 'eval_script', 'infer_script', 'gin_utils', 'utils'),
  *('partitioning', 'moe_partitioning', 'trainer', 'moe_trainer', 'seqio'),
  *('models', 'moe_models', 'network', 'adafactor', 'decoding', 'metrics'),
  *('routing', 'moe_layers', 'moe_architecture', 't5_architecture', 'dense'),
  *('embedding', 'dense_attention', 'relative_position_biases', 'layer_norm'),
  *('t5_common_layers', 'linen', 'initializers', 'jnp', 'jax', 'flax'),
)

# Macros that are flags of the verbs that have them.
FLAGS = {
  'MODEL_DIR': 'workdir',
  'MIXTURE_OR_TASK_MODULE': 'module_import',
  'CHECKPOINT_PATH': 'checkpoint',
  'EVAL_OUTPUT_DIR': 'output',
  'INFER_OUTPUT_DIR': 'output',
  'MIXTURE_OR_TASK_NAME': 'mixture',
}


def macros(files: Sequence[str], bindings: Sequence[str] = ()) -> dict:
  """The value of every macro in gin files and in bindings, 'NAME=value'.

  Raises:
    ValueError: a file that is not there or no gin; a macro or a parameter that
      means nothing here; a macro without a value.
  """
  found = {}
  for file in files:
    found |= _read(_find(file, None))
  for binding in bindings:
    name, equals, text = binding.partition('=')
    if not equals:
      raise ValueError(f'--gin.{name} needs a value: --gin.{name}=VALUE.')
    found |= _statements(f'{name} = {text}', f'--gin.{name}', None, text)
  return {name: _resolved(name, value, found) for name, value in found.items()}


def values(macros: Mapping) -> dict:
  """What macros say of a run, as a config file of Python would say it.

  Raises:
    ValueError: a value that a macro cannot have.
  """
  run = {}
  for field, value in fields(macros).items():
    *path, last = field.split('.')
    inner = run
    for name in path:
      inner = inner.setdefault(name, {})
    inner[last] = value
  return run


def fields(macros: Mapping) -> dict:
  """The same by dotted paths: {'model.embed_dim': 512}."""
  found = {}
  for name, made in MACROS.items():
    value = macros.get(name)
    if value is None:  # T5X's way to leave it open.
      continue
    if not callable(made):
      found |= dict.fromkeys(made, value)
      continue
    try:
      found |= made(value, macros)
    except ValueError as rule:
      raise ValueError(f'{name} = {shown(value)} should be {rule}.') from None
  return found


def _read(path: pathlib.Path, within: tuple = ()) -> dict:
  if path.resolve().parent == _OF_T5X.resolve():
    raise ValueError(
      f'{path} is for T5X itself: python -m st_moe.t5x_bridge train'
      f' --gin_file={path} (docs/t5x.md).'
    )
  if path.resolve() in within:
    raise ValueError(f'{path} includes itself.')
  try:
    text = path.read_text()
  except UnicodeDecodeError:
    raise ValueError(f'{path} is no text, so no gin file.') from None
  return _statements(text, str(path), path, within=(*within, path.resolve()))


def _statements(
  text: str,
  where: str,
  path: pathlib.Path | None,
  plain: str | None = None,
  within: tuple = (),
) -> dict:
  """{macro: value} of gin text; of one binding, `plain` text may be a word."""
  found, left_out = {}, []
  try:
    for statement in config_parser.ConfigParser(text, _Delegate()):
      if isinstance(statement, config_parser.IncludeStatement):
        beside = path and path.parent
        found |= _read(_find(statement.filename, beside), within)
      elif isinstance(statement, config_parser.BindingStatement):
        line = statement.location.line_num
        at = where if plain is not None else f'{where}, line {line}'
        if name := _macro_of(statement, at, left_out):
          found[name] = statement.value
  except (SyntaxError, tokenize.TokenError, ValueError) as error:
    if plain is not None and not isinstance(error, ValueError):
      name = where.removeprefix('--gin.')
      if name.isidentifier():  # An unquoted word, as a shell leaves it.
        return _statements(f'{name} = {plain!r}', where, path, plain)
    if isinstance(error, ValueError):
      raise
    line = getattr(error, 'lineno', None) or (error.args[-1] or [0])[0]
    raise ValueError(f'{where}, line {line}: no gin: {error.args[0]}') from None
  if left_out:
    logging.getLogger('st_moe').warning(
      f'{where}: no field here has {", ".join(dict.fromkeys(left_out))}.'
    )
  return found


def _macro_of(statement, where: str, left_out: list[str]) -> str:
  """The macro that a binding sets; '' where it wires objects of T5X.

  What is a value of T5X alone goes to `left_out`.
  """
  name = statement.selector
  if not statement.arg_name:
    if name in MACROS or name in FLAGS:
      return name
    if isinstance(statement.value, _Object):  # MODEL, OPTIMIZER, VOCABULARY.
      return ''
    raise ValueError(f'{where}: {unknown("macro", name, [*MACROS, *FLAGS])}')
  name = f'{name}.{statement.arg_name}'
  for known, macro in PARAMETERS.items():
    if (
      name == known or known.endswith(f'.{name}') or name.endswith(f'.{known}')
    ):
      if statement.scope == 'train' and macro == 'SPLIT':
        break  # What is evaluated has a scope of its own, or none.
      return '' if statement.value == _Macro(macro) else macro
  if isinstance(statement.value, _Object | _Macro):  # Wires what T5X has.
    return ''
  others = PARAMETERS.keys() - {name}
  misspelt = difflib.get_close_matches(name, others, cutoff=0.9)
  if misspelt or name.split('.')[0] not in _THEIRS:
    raise ValueError(f'{where}: {unknown("parameter", name, PARAMETERS)}')
  left_out.append(name)
  return ''


def _find(name: str, beside: pathlib.Path | None) -> pathlib.Path:
  """A gin file as named, beside the one that includes it, or a shipped one."""
  shipped = folder('configs')
  places = [pathlib.Path(name), shipped.parent / name, shipped / 'gin' / name]
  if beside is not None:
    places.insert(0, beside / name)
  for place in places:
    if place.is_file():
      return place
  known = [str(p.relative_to(shipped.parent)) for p in files()]
  raise unknown('gin file', name, known)


# What wires our model into T5X's own programs.
_OF_T5X = folder('configs') / 'gin' / 't5x'


def files() -> list[pathlib.Path]:
  """The gin files for a run of ours that come with the package."""
  shipped = sorted((folder('configs') / 'gin').rglob('*.gin'))
  return [path for path in shipped if path.parent != _OF_T5X]


def _resolved(name: str, value, found: Mapping, seen: tuple = ()):
  """`value` with the macros in it replaced.

  Raises:
    ValueError: one that has no value, or is made of itself.
  """
  if isinstance(value, _Macro):
    if value.name == _REQUIRED:
      raise ValueError(f'{name} has no value: --gin.{name}=VALUE gives it one.')
    if value.name in seen:
      raise ValueError(f'{name} is made of itself: {" -> ".join(seen)}.')
    if '.' in value.name:  # A constant of T5X's.
      return value
    if value.name not in found:
      raise ValueError(
        f'{name} = %{value.name}, which has no value: --gin.{value.name}=VALUE'
        ' gives it one.'
      )
    return _resolved(name, found[value.name], found, (*seen, value.name))
  if isinstance(value, dict):
    each = lambda v: _resolved(name, v, found, seen)
    return {key: each(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return type(value)(_resolved(name, v, found, seen) for v in value)
  return value
