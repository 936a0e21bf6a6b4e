"""Step time of one config under each dispatcher, against its dense twin.

  python benchmarks/step_time.py --config=configs/st_moe_tiny.py

All variants are compiled first and then timed in turn, step by step, so that
whatever else the machine does falls on all of them alike.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from st_moe import config_file, sharding
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer, step
from st_moe.train.state import parameter_axes, starting


def random_batch(config, seed=0):
  """Tokens without padding, as span corruption fills a batch."""
  rng, data = np.random.default_rng(seed), config.data
  ids = lambda n: rng.integers(
    1, config.model.vocab_size, (data.batch_size, n), np.int32
  )
  inputs, targets = ids(data.inputs_length), ids(data.targets_length)
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones(targets.shape, np.float32),
  }


def compiled_step(config, mesh, batch):
  """The train step of `config` and a first state."""
  model = Transformer(config.model)
  tx = optimizer.make(config.optimizer, parameter_axes(model))
  plan = starting(model, tx, mesh)
  state = plan.begin(plan.random_params(jax.random.key(0)))
  train_step = jax.jit(
    step.make_train_step(model, tx, config), donate_argnums=0
  )
  return train_step.lower(state, batch).compile(), state


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', default='configs/st_moe_tiny.py')
  parser.add_argument('--steps', type=int, default=30)
  arguments = parser.parse_args()
  config = config_file.load(arguments.config)
  size = config.model.vocab_size or -(-config.data.vocabulary_size // 128) * 128
  base = dataclasses.replace(config.model, vocab_size=size)

  def variant(**changes):
    moe = dataclasses.replace(base.moe, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(base, moe=moe))

  variants = {
    name: variant(dispatcher=name) for name in ('index', 'mask', 'grouped')
  }
  variants['dense'] = dataclasses.replace(
    config, model=dataclasses.replace(base, dense=True)
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  seconds = {name: [] for name in variants}
  with sharding.use(mesh):
    batch = random_batch(next(iter(variants.values())))
    steps = {n: compiled_step(c, mesh, batch) for n, c in variants.items()}
    for i in range(arguments.steps + 2):
      for name, (train_step, state) in steps.items():
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(train_step(state, batch))
        if i >= 2:
          seconds[name].append(time.perf_counter() - start)
        steps[name] = train_step, state

  dense = statistics.median(seconds['dense'])
  table = Table('step', 'median ms', 'min ms', 'over dense')
  found = {}
  for name, times in seconds.items():
    median = statistics.median(times)
    # Of the ratios of neighbours in time, which noise hits alike.
    pairs = zip(times, seconds['dense'], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    found[name] = {'median_s': median, 'over_dense': ratio}
    table.add_row(
      name, f'{1e3 * median:.1f}', f'{1e3 * min(times):.1f}', f'{ratio:.3f}'
    )
  Console().print(table)
  print(json.dumps({'config': arguments.config, 'dense_s': dense, **found}))


if __name__ == '__main__':
  main()
