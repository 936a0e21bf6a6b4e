"""What the checks of a method run: each program is compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from st_moe import paths, sharding
from st_moe.config import Config, MoEConfig
from st_moe.decode import decoding
from st_moe.decode.methods import Method
from st_moe.model.transformer import Transformer
from st_moe.routing.selectors import dropless
from st_moe.train import optimizer, step
from st_moe.train.state import (
  TrainState,
  abstract_params,
  init_state,
  parameter_axes,
)
from tests.conformance import chain, tables
from tests.helpers import distance, examples, jit, padded_batch

SHAPES = [(8, 6), (3, 2), (6, 1), (1, 6), (8, 3), (5, 5), (7, 6), (2, 4)]


def batch(config: Config, seed: int = 0) -> dict:
  """Eight rows of three sources, no two microbatches alike."""
  model = config.model
  found = padded_batch(model, examples(model, SHAPES, seed), tables.LENGTHS)
  if not model.decoder:
    found['encoder_target_tokens'] = found['encoder_input_tokens']
  last = model.stacks[-1]
  real = found[f'{last}_target_tokens'] > 0
  return {
    **found,
    f'{last}_loss_weights': real.astype(np.float32),
    'task': np.arange(len(SHAPES), dtype=np.int32) % 3,
  }


@functools.cache
def params(name: str) -> dict:
  """Weights as an untrained model has them, and routers that are sure."""
  config = tables.config(name)
  inputs = step.inputs_of(batch(config), config.model)
  found = chain.weights(
    Transformer(config.model), **inputs, enable_dropout=False
  )

  def calm(path, leaf):
    if path.endswith('scale') or 'kept_' in path:
      return leaf
    bold = {'token_embedder': 3, 'router': 2}
    return leaf * next((n for part, n in bold.items() if part in path), 0.5)

  return paths.map_by_path(calm, found)


# As it is trained.


@functools.cache
def training(name: str):
  """A first state, and `state -> state, metrics` on one batch."""
  config = tables.config(name)
  model = Transformer(config.model)
  made = optimizer.make(config.optimizer, parameter_axes(model))
  init = functools.partial(init_state, model, made)
  boxed = jax.eval_shape(init, jax.random.key(0))
  zeros = lambda a: np.zeros(a.shape, a.dtype)
  state = jax.tree.map(zeros, sharding.unbox(boxed))
  start = state.replace(params=params(name))
  train_step = jit(step.make_train_step(model, made, config))
  train_step = train_step.lower(start, batch(config)).compile()
  return start, lambda state: train_step(state, batch(config))


@functools.cache
def trained(name: str, steps: int):
  """(states, metrics) before, between and after so many steps."""
  state, advance = training(name)
  states, metrics = [state], []
  for _ in range(steps):
    state, found = advance(state)
    states.append(state), metrics.append(found)
  return jax.device_get((states, metrics))


# As it is trained without noise, by steps of SGD that keep their gradients.


@dataclasses.dataclass
class Quiet:
  """A model that draws no numbers, seats as in training, and trains."""

  config: object

  def __post_init__(self):
    self.model = Transformer(self.config)
    self.as_read = self.model.as_read

  def apply(self, *args, rngs=None, **kwargs):
    if 'enable_dropout' in kwargs:
      kwargs['enable_dropout'] = False
    return self.model.apply(*args, **kwargs)


def _sgd(rate: float = 0.5) -> optax.GradientTransformation:
  def update(gradients, state, params):
    steps = jax.tree.map(lambda g: -rate * g, gradients)
    return steps, (gradients, state[-1])

  return optax.GradientTransformation(None, update)


def one_stack(config: Config) -> Config:
  """Its first stack alone: half of a program says as much of a layer."""
  if not config.model.encoder:
    return config
  model = dataclasses.replace(config.model, decoder=None)
  return dataclasses.replace(config, model=model)


def with_each_moe(config: Config, change) -> Config:
  """`config` with the sparse layers of each stack changed."""
  stack = lambda of, moe: dataclasses.replace(of, moe=change(moe))
  model = config.model
  changed = {s: stack(model.stack(s), model.moe_of(s)) for s in model.stacks}
  model = dataclasses.replace(model, **changed)
  return dataclasses.replace(config, model=model)


def _seats_as_in_training(moe: MoEConfig) -> MoEConfig:
  """Quiet models are evaluated."""
  return dataclasses.replace(moe, eval_capacity=moe.train_capacity)


def quiet(config: Config, params: dict, mesh=None, steps: int = 2) -> list:
  """What `steps` of it find: metrics, gradients, parameters, unrolled.

  Args:
    params: in a scan; of more stacks than `config` has, perhaps.
  """
  config = with_each_moe(config, _seats_as_in_training)
  model, scanned = config.model, config.model.scan_layers
  module = Quiet(model)
  with sharding.use(
    mesh or sharding.make_mesh(devices=jax.devices()[:1])
  ) as on:
    shapes = abstract_params(module.model, on)
    params = {k: v for k, v in params.items() if k in shapes}
    params = params if scanned else paths.unroll(params, model)
    placed = jax.tree.map(lambda a: a.sharding, shapes)
    params = jax.device_put(params, placed)
    mine, _ = paths.split(params, config.optimizer.train)
    zero = jnp.zeros((), jnp.int32)
    slots = jax.tree.map(jnp.zeros_like, mine), optax.ScaleByScheduleState(zero)
    state, found = TrainState(zero, params, slots, zero), []
    train_step = jit(
      step.make_train_step(module, _sgd(), config),
      out_shardings=(jax.tree.map(lambda a: a.sharding, state), None),
    )
    for seed in range(steps):
      rows = batch(config, seed)
      state, metrics = train_step(
        state, jax.device_put(rows, sharding.batch_sharding(on))
      )
      trees = jax.device_get((state.opt_state[0], state.params))
      if scanned:
        trees = [paths.unroll(tree, model) for tree in trees]
      found.append((jax.device_get(metrics), *trees))
  return found


def differences(found: list, expected: list) -> dict[str, float]:
  """How two runs of `quiet` differ: ||a - b|| / ||b||, of loads 0 or infinite.

  By step and path.
  """
  found, expected = paths.by_path(found), paths.by_path(expected)
  assert found.keys() == expected.keys()
  off = {name: distance(found[name], b) for name, b in expected.items()}
  whole = {n for n, b in expected.items() if np.issubdtype(b.dtype, np.integer)}
  return {
    name: float('inf') if name in whole and value else value
    for name, value in off.items()
  }


# As it answers.


@functools.cache
def answering(name: str):
  """(logits of a batch, answers to prompts): nobody is dropped."""
  config = tables.config(name)
  model = Transformer(dropless(config.model))
  mine = params(name)

  @jit
  def logits(batch):
    inputs = step.inputs_of(batch, config.model)
    task = np.zeros(len(batch['task']), np.int32)
    return model.apply(
      {'params': mine}, **{**inputs, 'task': task}, enable_dropout=False
    )

  # A 0 would be padding to the other way.
  method = Method(max_length=tables.LENGTHS[1], forbidden=(0,))

  @jit
  def generate(prompts, prefix):
    # No token is 99: nothing ends early.
    asked = decoding.of_task(model, jnp.zeros(len(prompts), jnp.int32))
    return decoding.generate(
      asked, mine, prompts, method, eos=99, prefix=prefix
    )

  return logits, generate
