"""T5X trains, evaluates and asks our model. The only module that knows T5X.

  python -m st_moe.t5x_bridge train --gin_file=configs/gin/t5x/pretrain.gin \\
      --gin.CONFIG=\\"st_moe_tiny\\" --gin.MODEL_DIR=\\"runs/t5x\\" ...

is `python -m t5x.train`, with what T5X lacks on today's packages put in place
first (`import_t5x`), and gin files that find this module. All before `Module`
is for them: each function gives T5X a part of what one of our configs says.

`Module` itself needs no T5X: our `Transformer` as T5X calls a model, with the
parameters, axes and metrics of Flaxformer's MoE models. docs/t5x.md has it all.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import runpy
import sys
import traceback
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core, traverse_util
from flax.linen.partitioning import AxisMetadata
from jax.sharding import Mesh

from st_moe import config_file, paths, schedules, sharding, shipped
from st_moe.config import Config, MoEConfig
from st_moe.data.mixture import Library
from st_moe.data.vocabulary import Vocabulary
from st_moe.data.vocabulary import checked as checked_vocabulary
from st_moe.data.vocabulary import load as load_vocabulary
from st_moe.interop import convert, t5x
from st_moe.model.transformer import Transformer
from st_moe.run.begin import with_vocabulary_size
from st_moe.train.state import abstract_params

# ---- T5X on today's packages ------------------------------------------------


def import_t5x(module: str = ''):
  """`t5x.MODULE`, after what it lacks was put in place; a line each on stderr.

  Raises:
    ValueError: it cannot be imported, and what to do.
  """
  for patch in (_airio, _partition_spec):
    if said := patch():
      print(f'st_moe.t5x_bridge: {said}', file=sys.stderr)
  try:
    return importlib.import_module(f't5x.{module}' if module else 't5x')
  except ImportError as e:
    raise ValueError(
      f'T5X cannot be imported ({e}): `bash scripts/install_t5x.sh` installs'
      ' it, or put a checkout on PYTHONPATH; docs/t5x.md says what it needs.'
    ) from e


def _airio() -> str:
  """T5X asks whether a task is one of AirIO, which no package index has."""
  if 'airio' in sys.modules or importlib.util.find_spec('airio'):
    return ''
  names = 'DatasetProviderBase', 'Task', 'Mixture', 'AirIODatasetIterator'
  airio, stub = types.ModuleType('airio'), types.ModuleType('airio.core')
  for name in names:
    setattr(stub, name, type(name, (), {}))
  stub.dataset_providers = types.SimpleNamespace(get_vocabularies=None)
  airio.core = stub
  sys.modules |= {'airio': airio, 'airio.core': stub}
  return 'airio is not installed: stubs in its place, tasks are those of SeqIO.'


def _partition_spec() -> str:
  """The jestimator of PyPI imports it from where JAX had it until 2023."""
  from jax.experimental import pjit

  if hasattr(pjit, 'PartitionSpec'):
    return ''
  pjit.PartitionSpec = jax.sharding.PartitionSpec
  return 'jax.experimental.pjit.PartitionSpec is there again, for jestimator.'


# ---- A config of ours, in the parts that T5X is made of ---------------------


def load_config(spec: str, overrides: dict | None = None) -> Config:
  """What `st-moe train --config=SPEC --config.FIELD=VALUE ...` would train.

  Raises:
    ValueError: it is wrong, or open in a way that only a run of ours settles.
  """
  config = convert.load_config(spec, overrides)
  return with_vocabulary_size(config, _vocabulary(config))


def value(config: Config, field: str):
  """The value of a field: 'loss.z_loss'."""
  config_file.merge(Config, {}, field, None)  # Raises for one there is not.
  return functools.reduce(getattr, field.split('.'), config)


def module(config: Config) -> 'Module':
  """The model of `config`.

  Raises:
    ValueError: a part of it has no name in Flaxformer's trees.
  """
  if config.optimizer.after:
    raise ValueError(
      'config.optimizer.after: T5X has no rules after the update.'
    )
  model = dataclasses.replace(config.model, scan_layers=False)
  convert.check_export(
    't5x',
    dataclasses.replace(config, model=model),
    abstract_params(Transformer(model)),
  )
  return Module(model)


def vocabulary(config: Config):
  """That of `config`, or of the checkpoint it begins with, as SeqIO's."""
  return _vocabulary(config).to_seqio()


def _vocabulary(config: Config) -> Vocabulary:
  if config.data.vocabulary or not config.init:
    return load_vocabulary(config.data.vocabulary)
  init = convert.open_source(config.init)
  if init.vocabulary is None:
    raise ValueError(
      f'{config.init} comes without a vocabulary: set data.vocabulary to its'
      ' SentencePiece model.'
    )
  return checked_vocabulary(config.init, init.vocabulary)


def tasks(config: Config) -> str:
  """Registers our tasks with SeqIO, to be read with the vocabulary of `config`.

  Its text sources are among them, by their names. Returns the module in which
  T5X then looks for tasks.
  """
  from st_moe.data import tasks

  library = Library(config.data, _vocabulary(config))
  tasks.register(vocabulary(config), config.data.data_dir)
  for name in filter(library.is_text, config.data.drawn):
    tasks.register_text(library, name)
  return tasks.__name__


def feature_lengths(config: Config) -> dict[str, int]:
  data = config.data
  return {'inputs': data.inputs_length, 'targets': data.targets_length}


def loss_factor(config: Config, metric: str) -> float:
  """What T5X multiplies the mean over layers of a router loss with.

  Args:
    metric: 'auxiliary_loss' or 'router_z_loss'.

  Raises:
    ValueError: other losses than these two, or other weights by stack or step.
  """
  plans = {stack: config.model.plan(stack) for stack in config.model.stacks}
  layers = sum(plan.num_sparse for plan in plans.values())
  found = set()
  for stack, plan in plans.items():
    if plan.num_sparse:
      moe = config.model.moe_of(stack)
      of = {name: part for name, part in _losses(moe).items() if part}
      weight = of[metric].kwargs.get('weight', 1.0) if metric in of else 0.0
      found.add(weight)
  if not found:
    return 0.0
  if len(found) > 1 or not isinstance((weight := found.pop()), int | float):
    raise ValueError(
      f'T5X has one factor for the {metric} of all layers and steps: give'
      ' config.model.moe.losses one weight, a number.'
    )
  return weight * (layers if config.loss.layers == 'sum' else 1)


def _losses(moe: MoEConfig) -> dict:
  """Our losses by T5X's names of them."""
  z = [part for part in moe.losses if part.name == 'router_z']
  balance = [part for part in moe.losses if part.name != 'router_z']
  if len(balance) > 1:
    raise ValueError(
      'T5X adds two losses of routers, one of balance and router_z;'
      f' config.model.moe.losses has {", ".join(p.name for p in moe.losses)}.'
    )
  one = lambda parts: parts[0] if parts else None
  return {'auxiliary_loss': one(balance), 'router_z_loss': one(z)}


def learning_rate(config: Config):
  """step -> learning rate, for T5X's trainers."""
  return schedules.learning_rate(config.optimizer)


def optimizer(config: Config):
  """T5X's Adafactor as its MoE models have it, or AdamW; with our numbers.

  It factors the second moments of experts however small they are, where ours
  keeps them whole below `min_dim_to_factor`.
  """
  asked = config.optimizer
  if asked.train != 'all':
    raise ValueError(
      f'config.optimizer.train = {asked.train!r}: T5X cannot go on with a run'
      ' that freezes parameters, so this trains all or nothing.'
    )
  if asked.name == 'adamw':
    return import_t5x('optimizers').adamw(
      schedules.learning_rate(asked),
      b1=asked.b1,
      b2=asked.b2,
      weight_decay=asked.weight_decay,
    )
  decay = dict(
    weight_decay_rate=asked.weight_decay,
    weight_decay_rate_lr_exponent=1.0,  # Times the learning rate, as ours.
  )
  return import_t5x('adafactor').Adafactor(
    decay_rate=asked.decay_exponent,
    clipping_threshold=asked.clip_threshold,
    multiply_by_parameter_scale=asked.parameter_scale,
    min_dim_size_to_factor=asked.min_dim_to_factor,
    logical_factor_rules=import_t5x(
      'contrib.moe.adafactor_utils'
    ).logical_factor_rules(),
    **(decay if asked.weight_decay else {}),
  )


# ---- The model as T5X calls it ----------------------------------------------


class Module(Transformer):
  """`Transformer`, whose layers are unrolled, in the clothes of Flaxformer's.

  `init` returns `params`, a tree as Flaxformer has it, and `params_axes`: T5X's
  names of the axes of each. `apply` takes such parameters, and where
  'intermediates' are mutable returns there what T5X looks for, `METRICS` of
  each sparse layer. Cache, rngs and signatures are those of `Transformer`.
  """

  @nn.nowrap
  def init(self, rngs, *args, **kwargs) -> dict:
    with _on_mesh_of_t5x():
      found = dict(super().init(rngs, *args, **kwargs))
    boxed = found.pop('params')
    values = paths.by_path(sharding.unbox(boxed))
    axes = traverse_util.flatten_dict(sharding.axis_names(boxed), sep='/')
    params, params_axes = {}, {}
    for path, link in self._links().items():
      (name,) = link.names
      params[name] = link.back(values[path])
      params_axes[f'{name}_axes'] = AxisMetadata(_axes(path, axes[path]))
    nested = functools.partial(traverse_util.unflatten_dict, sep='/')
    return {
      **found,
      'params': nested(params),
      'params_axes': nested(params_axes),
    }

  @nn.nowrap
  def apply(self, variables, *args, mutable=False, **kwargs):
    theirs = core.unfreeze(variables['params'])
    theirs = traverse_util.flatten_dict(theirs, sep='/')
    params = {
      path: link.forth(theirs[link.names[0]])
      for path, link in self._links().items()
    }
    params = traverse_util.unflatten_dict(params, sep='/')
    variables = {**variables, 'params': params}
    told = core.scope.in_filter(mutable, 'intermediates')
    if told:
      mutable = core.scope.union_filters(mutable, ['routing'])
    with _on_mesh_of_t5x():
      found = super().apply(variables, *args, mutable=mutable, **kwargs)
    if not told:
      return found
    y, sown = found
    sown = dict(sown)
    routing = sown.pop('routing', {})
    deterministic = not kwargs.get('enable_dropout', True)
    sown['intermediates'] = self._metrics(
      sown.get('intermediates', {}), routing, deterministic
    )
    return y, sown

  @nn.nowrap
  def _links(self):
    return t5x.names(self.config)

  @nn.nowrap
  def _metrics(self, intermediates, routing, deterministic: bool) -> dict:
    """`METRICS` of every sparse layer, under the paths of its parameters."""
    found = {}
    for stack in self.config.stacks:
      for i, sublayers in enumerate(self.config.plan(stack).layers):
        here = stack, f'layers_{i}'
        for name in (s.name for s in sublayers if s.kind == 'moe'):
          at = lambda tree, name=name, here=here: tree[here[0]][here[1]][name]
          moe = self.config.moe_of(stack)
          measured = _measured(
            moe,
            at(intermediates)['record'],
            at(routing)['seats'],
            deterministic,
          )
          for metric in METRICS:
            found[*here, 'mlp', metric] = _sown(measured[metric])
    if not found:  # A dense model: T5X wants each name once.
      return {name: _sown(0.0) for name in METRICS}
    return traverse_util.unflatten_dict(found)


# What `MoeEncoderDecoderModel` looks for, as means over sparse layers.
METRICS = (
  'auxiliary_loss',
  'router_z_loss',
  'fraction_tokens_left_behind',
  'expert_usage',
  'router_confidence',
)


def _sown(value) -> tuple[jax.Array]:
  """A value as Flaxformer sows it."""
  return (jnp.reshape(jnp.asarray(value, jnp.float32), (1, 1)),)


def _measured(moe: MoEConfig, record, seats, deterministic: bool) -> dict:
  """`METRICS` of a sparse layer, by their definitions in Flaxformer."""
  mean = lambda pair: pair[0] / jnp.maximum(pair[1], 1)
  routes = (seats.place >= 0).sum()
  groups = seats.asked.any(axis=1).sum()  # The others fill up the mesh.
  slots = moe.slots(seats.token.shape[1] // seats.k, deterministic)
  places = jnp.maximum(groups, 1) * moe.num_experts * slots
  weights = jnp.where(seats.place < 0, 0, seats.weight).sum()
  losses = {
    name: mean(record['losses'][part.name]) if part else 0.0
    for name, part in _losses(moe).items()
  }
  return {
    **losses,
    # Of tokens, those that no expert answers.
    'fraction_tokens_left_behind': mean(record['gauges']['dropped_tokens']),
    # Of all places, those taken.
    'expert_usage': routes / places,
    # The mean weight of an answer.
    'router_confidence': weights / jnp.maximum(routes, 1),
  }


def _axes(path: str, names: tuple) -> tuple:
  """Flaxformer's names of the axes of our parameter at `path`.

  T5X's rules split `embed` and `mlp` along the same axis of the mesh; that of
  an FFN has a name without a rule, so that `mlp` is split and it is not.
  """
  if 'kv' in names:  # Joined with the heads.
    names = tuple(
      'joined_kv' if n == 'kv' else n for n in names if n != 'heads'
    )
  if paths.role(path) in ('mlp', 'experts'):
    names = tuple('mlp_embed' if n == 'embed' else n for n in names)
  return names


@contextlib.contextmanager
def _on_mesh_of_t5x():
  """Our sharding rules on the mesh of T5X's MoE partitioner, if that is on."""
  mesh = _mesh_of_t5x()
  if mesh is None or not {'data', 'expert', 'model'} <= mesh.shape.keys():
    yield
    return
  rules = nn.logical_axis_rules(sharding.rules(mesh))
  # As a trace may enter it: T5X compiles all that it does on a mesh.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), rules:
    yield


def _mesh_of_t5x() -> Mesh | None:
  partitioning = sys.modules.get('t5x.partitioning')
  if partitioning is None:
    return None
  with warnings.catch_warnings():  # JAX would have T5X set it another way.
    warnings.simplefilter('ignore', DeprecationWarning)
    return partitioning.pxla.thread_resources.env.physical_mesh


# ---- The command ------------------------------------------------------------

VERBS = ('train', 'eval', 'infer')


def main(argv: list[str]) -> int:
  """`python -m t5x.VERB FLAGS`; a user's mistake ends in a sentence."""
  if not argv or argv[0] not in VERBS:
    print(
      f'usage: python -m st_moe.t5x_bridge {{{",".join(VERBS)}}}'
      ' --gin_file=FILE --gin.NAME=VALUE ...\n\nRuns that program of T5X; the'
      ' flags are its own. docs/t5x.md has examples.',
      file=sys.stderr,
    )
    return 2
  verb, *flags = argv
  try:
    import_t5x()
    import gin

    # Where they include one another.
    gin.add_config_file_search_path(str(shipped.folder('configs')))
    sys.argv = [f't5x.{verb}', *map(_found, flags)]
    runpy.run_module(f't5x.{verb}', run_name='__main__', alter_sys=True)
  except ValueError as e:
    if not _is_ours(e):
      raise
    print(f'st_moe.t5x_bridge: {e}', file=sys.stderr)
    return 1
  return 0


def _found(flag: str) -> str:
  """A flag, in which a gin file that comes with the package is where it is."""
  name, _, file = flag.partition('=')
  place = shipped.folder('configs').parent / file
  there = name == '--gin_file' and not os.path.isfile(file) and place.is_file()
  return f'{name}={place}' if there else flag


def _is_ours(e: Exception) -> bool:
  """Whether this package raised it, and so it is a sentence for a user."""
  last = traceback.extract_tb(e.__traceback__)[-1].filename
  return pathlib.Path(__file__).parent in pathlib.Path(last).parents


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
