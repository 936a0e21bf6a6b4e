"""Rows of several tasks: a sparse layer that hears of them, and a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import paths, sharding
from st_moe.config import Capacity, Config, MoEConfig, Part, StackConfig
from st_moe.model.moe import MoE
from st_moe.model.transformer import Transformer
from st_moe.routing.types import RouteContext
from st_moe.train import optimizer, step
from st_moe.train.state import init_state, parameter_axes
from tests.helpers import examples, jit, padded_batch, random_params, tiny

ROWS, LENGTH, WIDTH = 4, 6, 16


def moe_of(gate: Part, num_experts=4, k=2, **changes) -> MoEConfig:
  """Nothing is dropped, and nothing left to chance."""
  return MoEConfig(
    num_experts,
    gate=gate,
    selector=Part.of('top_k', k=k, train_policy='all'),
    train_capacity=Capacity(dropless=True),
    eval_capacity=Capacity(dropless=True),
    extra_ffn='none',
    **{'losses': (), **changes},
  )


class SparseLayer:
  """A layer with clear preferences, and tokens for it."""

  def __init__(self, moe: MoEConfig):
    module = MoE(tiny(moe=moe), moe, group_size=8)
    rng = np.random.default_rng(0)
    self.x = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype('f4')

    def apply(params, task, x):
      y, sown = module.apply(
        {'params': params}, x, _ctx(task), mutable=['routing']
      )
      return y, sown.get('routing', {})

    self.params = random_params(module, self.x, _ctx(np.zeros(ROWS, int)))
    if 'router' in self.params:
      self.params['router']['kernel'] *= 5
    self._apply = jit(apply)
    # Of all that is said.
    self._slope = jit(
      jax.grad(lambda p, *more: (apply(p, *more)[0] ** 2).sum())
    )

  def __call__(self, task, params=None) -> np.ndarray:
    y, _ = self._apply(params or self.params, np.array(task), self.x)
    return np.asarray(y)

  def weights(self, task) -> np.ndarray:
    """Of every expert, [rows, length, experts]."""
    _, sown = self._apply(self.params, np.array(task), self.x)
    return np.asarray(sown['seats'].dense(8)).reshape(ROWS, LENGTH, -1)

  def slopes(self, task) -> dict:
    slopes = self._slope(self.params, np.array(task), self.x)
    return paths.by_path(slopes)


def _ctx(task) -> RouteContext:
  shape = ROWS, LENGTH
  return RouteContext(
    valid=jnp.full(shape, True),
    task=jnp.broadcast_to(jnp.asarray(task)[:, None], shape),
  )


def check_steps(moe: MoEConfig):
  """A model with it takes a step, evaluates, and may be scanned or not.

  Returns:
    Paths of what the step did not move.
  """
  model = tiny(encoder=StackConfig(2, 1, 0, 16), decoder=None, moe=moe)
  config, module = Config(model=model), Transformer(model)
  rows = examples(model, [(8, 0), (5, 0), (8, 0), (7, 0)])
  batch = padded_batch(model, rows)
  batch['encoder_target_tokens'] = batch['encoder_input_tokens']
  batch['encoder_loss_weights'] = np.ones((4, 8), 'f4')
  batch['task'] = np.array([0, 1, 1, 0], np.int32)
  made = optimizer.make(config.optimizer, parameter_axes(module))
  shapes = sharding.shapes_of(
    lambda: init_state(module, made, jax.random.key(0))
  )
  zeros = lambda a: jnp.zeros(a.shape, a.dtype)
  params = random_params(module, **step.inputs_of(batch, model))
  params = jax.tree.map(jnp.asarray, params)
  state = jax.tree.map(zeros, sharding.unbox(shapes)).replace(params=params)
  after, metrics = jit(step.make_train_step(module, made, config))(state, batch)
  assert np.isfinite(metrics['loss']) and metrics['bad_steps'] == 0

  def evaluated(model, params):
    made = Transformer(model)
    read = lambda p: step.forward(made, config.loss, p, batch, rng=None)[0]
    return jit(read)(params)['cross_entropy'][0]

  flat = dataclasses.replace(model, scan_layers=False)
  np.testing.assert_allclose(
    evaluated(model, params),
    evaluated(flat, paths.unroll(params, model)),
    rtol=1e-6,
  )
  before, moved = paths.by_path(params), paths.by_path(after.params)
  return [p for p in before if (before[p] == moved[p]).all()]
