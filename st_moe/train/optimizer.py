"""Optimizers that know logical axes: Adafactor as T5X sets it for experts."""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from st_moe import paths, schedules
from st_moe.config import OptimizerConfig

# Never averaged over: each expert and each layer is a parameter of its own.
_SEPARATE = ('expert', 'layers')
# The router and the position table keep a second moment per weight.
_WHOLE = ('unmodeled', 'relpos_buckets')


def make(config: OptimizerConfig, axes) -> optax.GradientTransformation:
  """The optimizer of what `config` trains; `axes` of every parameter.

  The first part of its state are the slots: what may be kept when training goes
  on with another schedule.
  """
  axes, _ = paths.split(axes, config.train, lambda x: isinstance(x, tuple))
  decay = optax.add_decayed_weights(config.weight_decay)
  inner = optax.chain(
    _SLOTS[config.name](config, axes),
    *([decay] if config.weight_decay else []),
    optax.scale_by_learning_rate(schedules.learning_rate(config)),
  )
  mine = lambda boxed: paths.split(boxed, config.train, _is_box)[0]
  return optax.GradientTransformation(
    lambda boxed: inner.init(mine(boxed)), inner.update
  )


@flax.struct.dataclass
class Moments:
  """Second moments of one parameter: `full`, or `row` and `column` means."""

  full: jax.Array | None = None
  row: jax.Array | None = None
  column: jax.Array | None = None


@flax.struct.dataclass
class AdafactorState:
  count: jax.Array  # int32 [].
  moments: dict


def factors(names, shape, min_dim: int):
  """The row and column axes of a parameter, or None where it stays whole.

  Rows are its `embed` axis, columns what else is neither `expert` nor `layers`
  (the rules of T5X's MoE Adafactor). Short sides are not worth factoring.
  """
  rest = [i for i, n in enumerate(names) if n not in _SEPARATE]
  rows = tuple(i for i in rest if names[i] == 'embed')
  columns = tuple(i for i in rest if names[i] != 'embed')
  size = lambda axes: math.prod(shape[i] for i in axes)
  if set(names) & set(_WHOLE) or not rows or not columns:
    return None
  return (rows, columns) if min(size(rows), size(columns)) >= min_dim else None


def scale_by_adafactor(
  config: OptimizerConfig, axes
) -> optax.GradientTransformation:
  """Adafactor (arXiv:1804.04235) without momentum, as T5X trains experts.

  Second moments, update clipping and the parameter scale are taken per expert
  and per scanned layer, so a scanned model trains as an unrolled one and no
  expert is measured by its neighbours. `init` takes parameters still boxed
  with their logical axes, and boxes its statistics likewise.
  """
  epsilon, floor = 1e-30, 1e-3

  def init(boxed):
    def moments(box):
      shape, names = box.value.shape, box.names
      plan = factors(names, shape, config.min_dim_to_factor)

      def zeros(without=()):
        keep = [i for i in range(len(shape)) if i not in without]
        value = jnp.zeros([shape[i] for i in keep], jnp.float32)
        return nn.LogicallyPartitioned(value, tuple(names[i] for i in keep))

      if plan is None:
        return Moments(full=zeros())
      rows, columns = plan
      return Moments(row=zeros(columns), column=zeros(rows))

    return AdafactorState(
      jnp.zeros((), jnp.int32), jax.tree.map(moments, boxed, is_leaf=_is_box)
    )

  def update(grads, state, params):
    decay = 1 - (state.count + 1.0) ** -config.decay_exponent

    def one(g, moments, p, names):
      g = g.astype(jnp.float32)
      own = tuple(i for i, n in enumerate(names) if n not in _SEPARATE)
      rms = lambda a: jnp.sqrt(jnp.mean(a**2, axis=own, keepdims=True))
      mix = lambda old, new: decay * old + (1 - decay) * new
      square = g**2 + epsilon
      plan = factors(names, g.shape, config.min_dim_to_factor)
      if plan is None:
        full = mix(moments.full, square)
        u, moments = g * jax.lax.rsqrt(full), Moments(full=full)
      else:
        rows, columns = plan
        row = mix(moments.row, square.mean(columns))
        column = mix(moments.column, square.mean(rows))
        moments = Moments(row=row, column=column)
        row, column = (
          jnp.expand_dims(row, columns),
          jnp.expand_dims(column, rows),
        )
        mean = row.mean(rows, keepdims=True)
        u = g * jax.lax.rsqrt(row / mean) * jax.lax.rsqrt(column)
      u /= jnp.maximum(1, rms(u) / config.clip_threshold)
      scale = jnp.maximum(rms(p), floor) if config.parameter_scale else 1
      return scale * u, moments

    leaves, treedef = jax.tree.flatten(grads)
    rest = (treedef.flatten_up_to(t) for t in (state.moments, params, axes))
    out = [one(*args) for args in zip(leaves, *rest, strict=True)]
    updates, moments = (treedef.unflatten(x) for x in zip(*out, strict=True))
    return updates, AdafactorState(state.count + 1, moments)

  return optax.GradientTransformation(init, update)


def _is_box(x) -> bool:
  return isinstance(x, nn.Partitioned)


_SLOTS = {
  'adafactor': scale_by_adafactor,
  'adamw': lambda config, axes: optax.scale_by_adam(config.b1, config.b2),
}
