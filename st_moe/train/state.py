"""What a run is from step to step, and how the first of it is made."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from st_moe import sharding
from st_moe.config import ModelConfig


@flax.struct.dataclass
class TrainState:
  """All that a run is, besides its data order, which follows from `step`."""

  step: jax.Array  # int32 [], steps taken.
  params: dict
  opt_state: tuple
  bad_steps: jax.Array  # int32 [], steps in a row that were not applied.


def init_params(model, key) -> dict:
  """New parameters, boxed with their logical axes."""
  inputs = smallest_inputs(model.config)
  return model.init(key, **inputs, enable_dropout=False)['params']


def abstract_params(model, mesh=None):
  """Shapes of the parameters; with a mesh also where each array goes."""
  boxed = sharding.shapes_of(lambda: init_params(model, jax.random.key(0)))
  shapes = sharding.unbox(boxed)
  if mesh is None:
    return shapes
  return sharding.placed(shapes, sharding.of_boxed(boxed, mesh))


def smallest_inputs(config: ModelConfig) -> dict:
  """Of the smallest batch the mesh in force can split: parameters need no more.

  By the names of the model's arguments.
  """
  # Not of jnp: the mesh in force may be of devices that are not there.
  tokens = np.ones((sharding.shards('batch'), 1), np.int32)
  task = np.zeros(len(tokens), np.int32)
  named = [f'{stack}_input_tokens' for stack in config.stacks]
  named += ['decoder_target_tokens'] if config.decoder else []
  return dict.fromkeys(named, tokens) | {'task': task}


def init_state(model, optimizer, key) -> TrainState:
  """A new run, its arrays boxed with their logical axes."""
  return _first_state(optimizer, init_params(model, key))


def _first_state(optimizer, params) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero)


def parameter_axes(model):
  """The logical axes of every parameter, from shapes alone."""
  boxed = sharding.shapes_of(lambda: init_params(model, jax.random.key(0)))
  return sharding.axis_names(boxed)


@dataclasses.dataclass(frozen=True)
class Start:
  """How a run begins, each array in its shards from the first moment."""

  shapes: TrainState
  shardings: TrainState
  random_params: Callable  # key -> params.
  begin: Callable  # params, which it takes over -> TrainState.

  def forget(self) -> None:
    """Drops both programs, of 100 MB and more, that a run needs but once."""
    self.random_params.clear_cache()
    self.begin.clear_cache()


def starting(model, optimizer, mesh) -> Start:
  """From shapes alone: no array is made before it is asked for."""
  boxed = sharding.shapes_of(
    lambda: init_state(model, optimizer, jax.random.key(0))
  )
  shardings = sharding.of_boxed(boxed, mesh)

  def random_params(key):
    return sharding.unbox(init_params(model, key))

  def begin(params):
    return sharding.unbox(
      _first_state(optimizer, sharding.rebox(params, boxed.params))
    )

  return Start(
    sharding.unbox(boxed),
    shardings,
    jax.jit(random_params, out_shardings=shardings.params),
    jax.jit(begin, out_shardings=shardings, donate_argnums=0),
  )
