"""What training keeps between its two passes: traced, and not compiled."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from st_moe import paths
from st_moe.config import Config, ModelConfig
from st_moe.model.transformer import Transformer
from st_moe.train import sizes as sizes_lib
from st_moe.train import step
from st_moe.train.state import abstract_params


def kept(config: Config, sizes: dict[str, int]) -> float:
  """Bytes on one device that wait for the backward pass of a microbatch.

  All that automatic differentiation keeps under `model.remat` and that grows
  with the batch.

  Args:
    sizes: of all mesh axes, which divide what they split.
  """
  shards = math.prod(n for axis, n in sizes.items() if axis != 'model')
  rows = config.data.batch_size / (config.microbatches * shards)
  return rows * _share(config, sizes['model'])


def _share(config: Config, parts: int) -> float:
  """Bytes of a row on one of `parts` devices along `model`.

  Some of it is the same on each, some is split: two traces tell, for any size.
  """
  whole = _per_row(*_part(config, 1))
  if parts == 1:
    return whole
  few = next(n for n in range(2, parts + 1) if parts % n == 0)
  split = (whole - _per_row(*_part(config, few))) * few / (few - 1)
  return whole - split + split / parts


def of_a_layer(config: Config, sizes: dict[str, int]) -> float:
  """Bytes that the largest layer would keep if it kept all.

  So much is there at once where a layer is computed again.
  """
  model = dataclasses.replace(config.model, remat='none')

  def with_periods(**periods):
    stacks = {}
    for name in model.stacks:
      layers = periods.get(name, 1) * model.plan(name).period
      stack = dataclasses.replace(model.stack(name), num_layers=layers)
      stacks[name] = stack
    short = dataclasses.replace(model, **stacks)
    return kept(dataclasses.replace(config, model=short), sizes)

  shortest = with_periods()
  return max(
    (with_periods(**{name: 2}) - shortest) / model.plan(name).period
    for name in model.stacks
  )


def _part(config: Config, parts: int):
  """`config` with what one of `parts` has of heads, units and vocabulary."""
  model = config.model
  share = lambda moe: (
    moe and dataclasses.replace(moe, hidden_dim=model.expert_dim(moe) // parts)
  )
  own = {
    name: dataclasses.replace(stack, moe=share(stack.moe))
    for name in model.stacks
    if (stack := model.stack(name))
  }
  model = dataclasses.replace(
    model,
    **own,
    vocab_size=model.vocab_size // parts,
    num_heads=model.num_heads // parts,
    mlp_dim=model.mlp_dim // parts,
    moe=share(model.moe),
  )
  # The fewest rows that are whole groups: what is kept grows in these.
  whole = [
    size // math.gcd(size, config.data.length(stack))
    for stack, size, _ in sizes_lib.groups(config)
  ]
  lengths = tuple((s, config.data.length(s)) for s in model.stacks)
  return model, config.optimizer.train, lengths, math.lcm(*whole)


@functools.lru_cache(maxsize=1024)
def _per_row(model: ModelConfig, train: str, lengths, rows: int) -> float:
  config = Config(model=model)
  bytes_of = lambda n: sum(
    math.prod(a.shape) * a.dtype.itemsize
    for a in jax.tree.leaves(_residuals(config, train, lengths, n))
  )
  return (bytes_of(2 * rows) - bytes_of(rows)) / rows


def _residuals(config: Config, train: str, lengths, rows: int):
  """Shapes of all that the backward pass closes over, parameters among it."""
  model = Transformer(config.model)
  tokens = lambda n: jax.ShapeDtypeStruct((rows, n), jnp.int32)
  batch = {f'{stack}_input_tokens': tokens(n) for stack, n in lengths}
  stack, n = lengths[-1]
  batch[f'{stack}_target_tokens'] = batch[f'{stack}_loss_weights'] = tokens(n)
  batch['task'] = jax.ShapeDtypeStruct((rows,), jnp.int32)

  def backward(params, batch):
    trained, frozen = paths.split(params, train)
    objective = lambda p: step.objective(
      model,
      config.loss,
      frozen,
      p,
      batch,
      jax.random.key(0),
      jnp.zeros((), jnp.int32),
    )
    return jax.vjp(objective, trained, has_aux=True)[1]

  return jax.eval_shape(backward, abstract_params(model), batch)
