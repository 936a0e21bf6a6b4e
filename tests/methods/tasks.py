"""Rows of several tasks: a sparse layer that hears of them, and a model."""

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import paths
from st_moe.config import Capacity, MoEConfig, Part
from st_moe.model.moe import MoE
from st_moe.routing.types import RouteContext
from tests.helpers import jit, random_params, tiny

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
