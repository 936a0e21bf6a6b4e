"""What freezing parameters saves: memory and FLOPs of one compiled step.

  python benchmarks/frozen.py --config=configs/st_moe_mini.py

From the compiler, nothing is run: bytes of the optimizer's state, bytes that
live only within a step (gradients and activations), FLOPs. Prints a table and,
last, one line of JSON.
"""

import argparse
import dataclasses
import json

import jax

from st_moe import config_file, paths, sharding
from st_moe.model.transformer import Transformer
from st_moe.run import begin
from st_moe.train import optimizer, step
from st_moe.train.state import parameter_axes, starting


def measure(config, train: str) -> dict:
  asked = dataclasses.replace(config.optimizer, train=train)
  config = dataclasses.replace(config, optimizer=asked)
  model = Transformer(config.model)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use(mesh):
    tx = optimizer.make(config.optimizer, parameter_axes(model))
    plan = starting(model, tx, mesh)
    size, int32, float32 = config.data.batch_size, 'int32', 'float32'
    lengths = config.data.inputs_length, config.data.targets_length
    shape = lambda kind, n, dtype: {
      kind: jax.ShapeDtypeStruct((size, n), dtype)
    }
    batch = {
      **shape('encoder_input_tokens', lengths[0], int32),
      **shape('decoder_input_tokens', lengths[1], int32),
      **shape('decoder_target_tokens', lengths[1], int32),
      **shape('decoder_loss_weights', lengths[1], float32),
    }
    jitted = jax.jit(step.make_train_step(model, tx, config), donate_argnums=0)
    compiled = jitted.lower(plan.shapes, batch).compile()
  size_of = lambda tree: sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )
  trained, _ = paths.split(plan.shapes.params, train)
  cost = compiled.cost_analysis()
  return {
    'train': train,
    'trained_mb': size_of(trained) / 2**20,
    'slots_mb': size_of(plan.shapes.opt_state) / 2**20,
    'step_mb': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    'gflop': cost.get('flops', 0) / 1e9,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', required=True)
  parser.add_argument('--optimizer', default='adafactor')
  flags = parser.parse_args()
  config = config_file.load(flags.config, {'optimizer.name': flags.optimizer})
  config = begin.with_vocabulary_size(config, None)
  rows = []
  print(f'{"train":12}{"trained":>12}{"slots":>12}{"step":>12}{"GFLOP":>9}')
  for train in paths.TRAINED:
    row = measure(config, train)
    rows.append(row)
    print(
      f'{train:12}'
      + ''.join(
        f'{row[k]:9.1f} MB' for k in ('trained_mb', 'slots_mb', 'step_mb')
      )
      + f'{row["gflop"]:9.1f}',
      flush=True,
    )
  print(json.dumps(rows))


if __name__ == '__main__':
  main()
