"""What the input pipeline makes in a second, and what a train step takes.

  python benchmarks/pipeline.py --config=configs/st_moe_mini.py

Cold: text tokenised into shards by one process. Warm: batches of the config's
mixture from those shards, as training reads them; then of an even mixture with
the embedded tasks. Last the train step alone, on one of these batches. Padding
counts nowhere. Prints a table and, last, one line of JSON.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from st_moe import config_file, sharding
from st_moe.data import pipeline, vocabulary
from st_moe.data.mixture import Library
from st_moe.model.transformer import Transformer
from st_moe.run import begin
from st_moe.train import optimizer, step
from st_moe.train.state import parameter_axes, starting

TASKS = 'tiny_boolq', 'tiny_cb', 'tiny_copa'


def rates(seconds: float, examples: int, tokens: int) -> dict[str, float]:
  return {
    'examples_per_s': examples / seconds,
    'tokens_per_s': tokens / seconds,
  }


def tokens_of(batch) -> int:
  read = batch['encoder_input_tokens'], batch['decoder_target_tokens']
  return sum(np.count_nonzero(a) for a in read)


def read(data: pipeline.TrainData, batches: int) -> dict[str, float]:
  """Rates of batches read in order, once what is made ahead is used up."""
  with contextlib.closing(data.iterate()) as stream:
    for _ in range(10):
      next(stream)
    start = time.perf_counter()
    found = [*itertools.islice(stream, batches)]
    seconds = time.perf_counter() - start
  examples = sum(len(batch['task']) for batch in found)
  return rates(seconds, examples, sum(map(tokens_of, found)))


def trained(config, batch, steps: int) -> dict[str, float]:
  """Rates of the train step of `config` on the same batch again and again."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  model = Transformer(config.model)
  times = []
  with sharding.use(mesh):
    tx = optimizer.make(config.optimizer, parameter_axes(model))
    plan = starting(model, tx, mesh)
    state = plan.begin(plan.random_params(jax.random.key(0)))
    run = jax.jit(step.make_train_step(model, tx, config), donate_argnums=0)
    for _ in range(steps + 2):
      start = time.perf_counter()
      state, _ = jax.block_until_ready(run(state, batch))
      times.append(time.perf_counter() - start)
  seconds = statistics.median(times[2:])
  return rates(seconds, config.data.batch_size, tokens_of(batch))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/st_moe_tiny.py')
  parser.add_argument(
    '--vocabulary_size', type=int, help='where there is too little text'
  )
  parser.add_argument('--batches', type=int, default=500)
  parser.add_argument('--steps', type=int, default=20)
  flags = parser.parse_args()
  config = config_file.load(flags.config)

  with tempfile.TemporaryDirectory() as folder:
    data = dataclasses.replace(config.data, cache_dir=folder, workers=1)
    if data.vocabulary:
      vocab = vocabulary.load(data.vocabulary)
    else:
      path = f'{folder}/vocabulary.model'
      vocab = Library(data).train_vocabulary(path, flags.vocabulary_size)
    start = time.perf_counter()
    stream = pipeline.TrainData(Library(data, vocab))
    seconds = time.perf_counter() - start
    records, tokens = (
      sum(info[key] for info in stream.info.values())
      for key in ('records', 'tokens')
    )
    found = {
      'cold': rates(seconds, records, tokens),
      'warm': read(stream, flags.batches),
    }
    even = dict.fromkeys([*data.mixture, *TASKS], 1.0)
    mixed = dataclasses.replace(data, mixture=even)
    found['mixture'] = read(
      pipeline.TrainData(Library(mixed, vocab)), flags.batches
    )
    config = begin.with_vocabulary_size(config, vocab)
    found['step'] = trained(config, stream.batch(0), flags.steps)

  table = Table('', 'examples/s', 'tokens/s', 'over the step')
  step_rate = found['step']['tokens_per_s']
  for name, row in found.items():
    each, rate = row.values()
    table.add_row(
      name, f'{each:,.0f}', f'{rate:,.0f}', f'{rate / step_rate:.1f}'
    )
  Console().print(table)
  flat = {
    f'{name}_{key}': value
    for name, row in found.items()
    for key, value in row.items()
  }
  pipeline_rate = found['warm']['tokens_per_s']
  line = {
    'config': flags.config,
    'pipeline_tokens_per_s': pipeline_rate,
    'ratio': pipeline_rate / step_rate,
    # A mixture is measured in examples: those of tasks are short.
    'mixture_ratio': flat['mixture_examples_per_s']
    / flat['step_examples_per_s'],
    **flat,
  }
  print(json.dumps(line))


if __name__ == '__main__':
  main()
