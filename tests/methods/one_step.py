"""A train step of a tiny sparse encoder, on one device or eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import paths, sharding
from st_moe.config import (
  Capacity,
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  Part,
  StackConfig,
)
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer, step
from st_moe.train.state import TrainState, init_state, parameter_axes
from tests.helpers import examples, jit, padded_batch, random_params, tiny

# 16 rows of 8 tokens, each a group: 88 tokens, the rest is padding.
LENGTHS = [(8, 1), (5, 1), (8, 1), (1, 1)] * 4


def config_of(moe: dict, after=(), **changes) -> Config:
  """Two sparse layers and nothing random, unless `moe` says so."""
  calm = {
    'selector': Part.of('top_k', k=2, train_policy='all'),
    'train_capacity': Capacity(count=8),
    'extra_ffn': 'none',
  }
  model = tiny(
    decoder=None,
    encoder=StackConfig(2, 1, 0, group_size=8),
    activation='relu',
    moe={**calm, **moe},
  )
  return Config(
    model=model,
    data=DataConfig(batch_size=16, inputs_length=8, targets_length=1),
    # Of the two the one that compiles sooner.
    optimizer=OptimizerConfig('adamw', after=after, **changes),
  )


def batch_of(model: ModelConfig) -> dict:
  batch = padded_batch(model, examples(model, LENGTHS), (8, 1))
  tokens = batch['encoder_target_tokens'] = batch['encoder_input_tokens']
  return {**batch, 'encoder_loss_weights': (tokens > 0).astype('f4')}


def begun(config: Config) -> TrainState:
  """What a run starts from: arrays of numpy, kept ones 0."""
  model = Transformer(config.model)
  made = optimizer.make(config.optimizer, parameter_axes(model))
  init = functools.partial(init_state, model, made)
  boxed = jax.eval_shape(init, jax.random.key(0))
  zeros = jax.tree.map(
    lambda a: np.zeros(a.shape, a.dtype), sharding.unbox(boxed)
  )
  inputs = step.inputs_of(batch_of(config.model), config.model)
  params = paths.map_by_path(
    lambda path, leaf: 0 * leaf if paths.role(path) == 'kept' else leaf,
    random_params(model, **inputs),
  )
  return zeros.replace(params=params)


def trained(config: Config, state: TrainState, steps: int = 1, mesh=None):
  """State after so many steps on one batch, and the metrics of each."""
  model, batch = Transformer(config.model), batch_of(config.model)
  made = optimizer.make(config.optimizer, parameter_axes(model))
  run = jit(step.make_train_step(model, made, config))
  if mesh is not None:
    with sharding.use(mesh):
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
      return _steps(run, state, batch, steps)
  return _steps(run, state, batch, steps)


def _steps(run, state, batch, steps):
  found, state = [], jax.tree.map(jnp.asarray, state)
  for _ in range(steps):
    state, metrics = run(state, batch)
    found.append(metrics)
  return jax.device_get((state, found))


def unrolled(config: Config, **changes) -> tuple[Config, TrainState]:
  """The same run with each layer by itself, and what it starts from."""
  model = dataclasses.replace(config.model, scan_layers=False)
  other = dataclasses.replace(config, model=model, **changes)
  params = paths.unroll(begun(config).params, config.model)
  return other, begun(other).replace(params=params)


def evaluated(config: Config, params):
  """Mean terms of the batch, as in evaluation."""
  model, batch = Transformer(config.model), batch_of(config.model)
  run = lambda p: step.forward(model, config.loss, p, batch, rng=None)[0]
  return jax.device_get(jit(run)(params))
