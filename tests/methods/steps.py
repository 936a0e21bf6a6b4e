"""A tiny encoder that reads one batch: what steps of a method do to it."""

import contextlib
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
from st_moe.train.state import init_state, parameter_axes
from tests.helpers import examples, jit, padded_batch, random_params, tiny

LENGTHS = [(8, 0), (5, 0), (8, 0), (1, 0), (7, 0), (8, 0), (3, 0), (8, 0)]
# Of a layer in which nothing is left to chance.
CALM = {
  'selector': Part.of('top_k', k=2, train_policy='all'),
  'train_capacity': Capacity(count=8),
  'extra_ffn': 'none',
}


def encoder(layers: int = 1, group_size: int = 16, **changes) -> ModelConfig:
  """Of sparse layers alone."""
  stack = StackConfig(layers, 1, 0, group_size)
  return tiny(encoder=stack, decoder=None, **changes)


def config_of(model: ModelConfig, rows: int = 8, **changes) -> Config:
  data = DataConfig(batch_size=rows, inputs_length=8)
  # Of the two optimizers the one that compiles sooner.
  adamw = OptimizerConfig('adamw')
  return Config(model=model, data=data, **{'optimizer': adamw, **changes})


def batch(config: Config) -> dict:
  """48 tokens in 8 rows of 8, of two tasks in turn; asked for what it reads.

  As often as there are rows.
  """
  rows, model = config.data.batch_size, config.model
  lengths = LENGTHS * (rows // len(LENGTHS))
  found = padded_batch(model, examples(model, lengths), (8, 1))
  tokens = found['encoder_target_tokens'] = found['encoder_input_tokens']
  found['encoder_loss_weights'] = (tokens > 0).astype(np.float32)
  return {**found, 'task': np.arange(rows, dtype=np.int32) % 2}


def parameters(config: Config) -> dict:
  """Random ones; what is kept is 0, as it is born."""
  inputs = step.inputs_of(batch(config), config.model)
  return paths.map_by_path(
    lambda path, leaf: 0 * leaf if paths.role(path) == 'kept' else leaf,
    random_params(Transformer(config.model), **inputs),
  )


class Run:
  """A jitted step and the state it goes on from."""

  def __init__(self, config: Config, params=None, mesh=None):
    self.model, self.config = Transformer(config.model), config
    made = optimizer.make(config.optimizer, parameter_axes(self.model))
    boxed = jax.eval_shape(
      functools.partial(init_state, self.model, made), jax.random.key(0)
    )
    zeros = lambda a: jnp.zeros(a.shape, a.dtype)
    zeros = jax.tree.map(zeros, sharding.unbox(boxed))
    self.start = params or parameters(config)
    self.state = zeros.replace(params=jax.tree.map(jnp.asarray, self.start))
    self.batch = batch(config)
    self._on = lambda: sharding.use(mesh) if mesh else contextlib.nullcontext()
    if mesh:
      split = sharding.batch_sharding(mesh)
      self.batch = jax.device_put(self.batch, split)
    self.step = jit(step.make_train_step(self.model, made, config))
    self._forward = jit(
      lambda params: step.forward(
        self.model, config.loss, params, self.batch, rng=None
      )[0]
    )

  @property
  def params(self) -> dict:
    return jax.device_get(self.state.params)

  def take(self, steps: int = 1) -> dict:
    """The metrics of the last of so many steps."""
    with self._on():
      for _ in range(steps):
        self.state, metrics = self.step(self.state, self.batch)
    return jax.device_get(metrics)

  def moved(self) -> dict[str, bool]:
    """Path -> whether any number of it is another than at the start."""
    now = paths.by_path(self.params)
    before = paths.by_path(self.start)
    return {path: bool((before[path] != now[path]).any()) for path in before}

  def terms(self, params=None) -> dict:
    """(sum, weight) of each term, without noise."""
    return jax.device_get(self._forward(params or self.state.params))

  def evaluated(self) -> float:
    """Cross-entropy without noise."""
    summed, weight = self.terms()['cross_entropy']
    return float(summed / weight)


def both_ways(model: ModelConfig, *, train: bool = True) -> tuple[dict, dict]:
  """Terms of a pass over the batch: scanned, and unrolled with the same."""
  config = config_of(model)
  read, params = batch(config), parameters(config)
  flat = dataclasses.replace(model, scan_layers=False)

  def terms(model, params):
    key = jax.random.key(0) if train else None
    module = Transformer(model)
    found = jit(functools.partial(step.forward, module, config.loss))
    return jax.device_get(found(params, read, rng=key, step=jnp.int32(1))[0])

  return terms(model, params), terms(flat, paths.unroll(params, model))
