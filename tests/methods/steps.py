"""A tiny encoder that reads one batch: what steps of a method do to it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import paths, sharding
from st_moe.config import Config, DataConfig, ModelConfig, StackConfig
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer, step
from st_moe.train.state import init_state, parameter_axes
from tests.helpers import examples, jit, padded_batch, random_params, tiny

LENGTHS = [(8, 0), (5, 0), (8, 0), (1, 0), (7, 0), (8, 0), (3, 0), (8, 0)]


def encoder(layers: int = 1, group_size: int = 16, **changes) -> ModelConfig:
  """Of sparse layers alone."""
  stack = StackConfig(layers, 1, 0, group_size)
  return tiny(encoder=stack, decoder=None, **changes)


def config_of(model: ModelConfig, **changes) -> Config:
  data = DataConfig(batch_size=len(LENGTHS), inputs_length=8)
  return Config(model=model, data=data, **changes)


def batch(model: ModelConfig, seed: int = 0) -> dict:
  """48 tokens in 8 rows of 8, asked for what it reads."""
  found = padded_batch(model, examples(model, LENGTHS, seed), (8, 1))
  tokens = found['encoder_target_tokens'] = found['encoder_input_tokens']
  found['encoder_loss_weights'] = (tokens > 0).astype(np.float32)
  return found


class Run:
  """A jitted step and the state it goes on from."""

  def __init__(self, config: Config, params=None):
    self.model, self.config = Transformer(config.model), config
    made = optimizer.make(config.optimizer, parameter_axes(self.model))
    boxed = jax.eval_shape(
      functools.partial(init_state, self.model, made), jax.random.key(0)
    )
    zeros = jax.tree.map(
      lambda a: jnp.zeros(a.shape, a.dtype), sharding.unbox(boxed)
    )
    self.batch = batch(config.model)
    inputs = step.inputs_of(self.batch, config.model)
    params = params or random_params(self.model, **inputs)
    self.state = zeros.replace(params=jax.tree.map(jnp.asarray, params))
    self.step = jit(step.make_train_step(self.model, made, config))
    self._terms = jit(
      lambda params, batch: step.forward(
        self.model, config.loss, params, batch, rng=None
      )[0]
    )

  def take(self, steps: int = 1) -> dict:
    """The metrics of the last of so many steps."""
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch)
    return jax.device_get(metrics)

  def evaluated(self) -> float:
    """Cross-entropy without noise."""
    summed, weight = self._terms(self.state.params, self.batch)['cross_entropy']
    return float(summed / weight)


def both_ways(model: ModelConfig) -> tuple[float, float]:
  """Cross-entropy of a training pass: scanned, and unrolled with the same."""
  read = batch(model)
  inputs = step.inputs_of(read, model)
  params = random_params(Transformer(model), **inputs)
  flat = dataclasses.replace(model, scan_layers=False)

  def loss(model, params):
    config, key = config_of(model), jax.random.key(0)
    found = jit(
      functools.partial(step.forward, Transformer(model), config.loss)
    )
    terms, *_ = found(params, read, rng=key, step=jnp.int32(1))
    return float(terms['cross_entropy'][0])

  return loss(model, params), loss(flat, paths.unroll(params, model))
