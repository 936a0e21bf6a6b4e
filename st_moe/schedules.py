"""Numbers that change with the step."""

import jax.numpy as jnp

from st_moe.config import OptimizerConfig


def learning_rate(config: OptimizerConfig):
  """step -> learning rate: ramp, plateau, then 1 / sqrt(step).

  With `warmup_steps` 0 this is T5X's `constant * rsqrt_decay`: 0.01 for the
  first 10,000 steps, then 1 / sqrt(step).
  """

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    rate = config.learning_rate * jnp.ones(())
    if config.warmup_steps:
      rate *= jnp.minimum(1, (step + 1) / config.warmup_steps)
    if config.decay == 'rsqrt':
      plateau = max(config.constant_steps, 1)
      rate *= jnp.sqrt(plateau / jnp.maximum(step, plateau))
    return rate

  return schedule
