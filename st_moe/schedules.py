"""Numbers that change with the step."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from st_moe.config import From, OptimizerConfig, Part
from st_moe.fields import AtLeast0, Count, CountOr0


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


# Schedules of options: f(step, ...) -> float32 [], `step` a float32 [].


def linear(
  step, *, start: float, end: float, steps: Count, begin: CountOr0 = 0
):
  """From `start` to `end` in `steps` steps, after step `begin`."""
  return start + (end - start) * _progress(step, steps, begin)


def cosine(
  step, *, start: float, end: float, steps: Count, begin: CountOr0 = 0
):
  """As `linear`, slow at both ends."""
  share = (1 - jnp.cos(math.pi * _progress(step, steps, begin))) / 2
  return start + (end - start) * share


def exponential(
  step, *, start: float, end: float, steps: Count, begin: CountOr0 = 0
):
  """As `linear`, by the same factor each step; both ends have one sign."""
  if not start * end > 0:
    raise ValueError(
      f'exponential goes from start = {start} to end = {end}: both should be'
      ' above 0, or both below.'
    )
  return start * (end / start) ** _progress(step, steps, begin)


def steps(step, *, values: tuple, at: tuple):
  """values[0], then values[i + 1] from step at[i] on."""
  if len(values) != len(at) + 1 or list(at) != sorted(set(at)):
    raise ValueError(
      f'steps has values = {values} and at = {at}: one value more than steps'
      ' at which it changes, which rise.'
    )
  now = jnp.sum(step >= jnp.asarray(at, jnp.float32))
  return jnp.asarray(values, jnp.float32)[now]


def _progress(step, steps: int, begin: int) -> jax.Array:
  """From 0 to 1."""
  return jnp.clip((step - begin) / steps, 0, 1)


SCHEDULES = {
  'linear': linear,
  'cosine': cosine,
  'exponential': exponential,
  'steps': steps,
}


def value(spec: float | Part, step: jax.Array | None):
  """A number, or a schedule's at `step`; None (evaluation) is its end."""
  if not isinstance(spec, Part):
    return spec
  step = jnp.inf if step is None else jnp.asarray(step, jnp.float32)
  return spec.choose('schedule', SCHEDULES)(step)


# What an option may be: a number, or one that changes with the step.
Scheduled = Annotated[Part, From(SCHEDULES, lambda part: value(part, None))]
Number = float | Scheduled
Positive = AtLeast0 | Scheduled
