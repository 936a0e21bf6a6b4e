"""A train step against HuggingFace's Switch Transformers, on this CPU.

  python benchmarks/train_step.py --experts=8,32

Takes st_moe[hf]. Both sides train the same parameters (ours, saved as theirs)
on the same random tokens, in float32, by AdamW, with the same places for every
expert, on as many threads; ours has the logits of half the targets at a time
(`loss.positions`), for less memory; `dense` is our model with one expert's
layer in place of each bank, by itself. A process each; a step of one side is
followed by one of the other, so that whatever else the machine does falls on
both. Peak memory is that of other processes, which do nothing else, less what
they held after their imports; ours finds its step compiled, as every start does
but the first.

Prints a table and, last, one line of JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from st_moe import backend
from st_moe.train.state import parameter_axes, starting

VOCABULARY, BATCH, LENGTHS = 4096, 16, (256, 64)
RATE, WEIGHTS = 1e-3, {'router_z': 1e-3, 'load_balance': 1e-2}


def tokens():
  """Inputs [batch, 256] and targets [batch, 64], without padding."""
  import numpy as np

  rng = np.random.default_rng(0)
  return [rng.integers(2, VOCABULARY, (BATCH, n), np.int32) for n in LENGTHS]


def our_config(experts: int):
  """4 + 4 layers of width 256, every second one sparse, top-1; 0: dense."""
  from st_moe import config as c

  stack = c.StackConfig(num_layers=4, sparse_every=2, sparse_offset=1)
  places = c.Capacity(1.25, minimum=1)
  model = c.ModelConfig(
    vocab_size=VOCABULARY,
    embed_dim=256,
    num_heads=8,
    head_dim=32,
    mlp_dim=1024,
    activation=c.Part('relu'),
    encoder=stack,
    decoder=stack,
    moe=c.MoEConfig(
      num_experts=experts or 1,
      train_capacity=places,
      eval_capacity=places,
      selector=c.Part.of('top_k', k=1),
      group_by='sequence',
      padding='routed',
      extra_ffn='none',
      # Their two stacks have losses of their own, the means over their layers.
      losses=tuple(
        c.Part.of(name, weight=2 * weight) for name, weight in WEIGHTS.items()
      ),
    ),
    dense=not experts,
    dtype='float32',
  )
  return c.Config(
    model=model,
    data=c.DataConfig(batch_size=BATCH),
    loss=c.LossConfig(z_loss=0.0, layers='mean', positions=32),
    optimizer=c.OptimizerConfig(
      name='adamw', learning_rate=RATE, decay='none', weight_decay=0.0
    ),
  )


def our_steps(flags):
  """Takes a step whenever asked, and says what came of it."""
  import jax
  import numpy as np

  from st_moe import sharding
  from st_moe.interop import huggingface
  from st_moe.model.transformer import Transformer
  from st_moe.train import optimizer, step

  yield
  experts = flags.experts[0]
  config = our_config(experts)
  model = dataclasses.replace(
    config.model, scan_layers=flags.scanned, remat=flags.remat
  )
  config = dataclasses.replace(config, model=model)
  inputs, targets = tokens()
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones(targets.shape, np.float32),
  }
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use(mesh):
    model = Transformer(config.model)
    tx = optimizer.make(config.optimizer, parameter_axes(model))
    plan = starting(model, tx, mesh)
    params = plan.random_params(jax.random.key(0))
    if flags.parameters:
      huggingface.save(flags.parameters, params, config, None)
    state = plan.begin(params)
    train_step = jax.jit(
      step.make_train_step(model, tx, config), donate_argnums=0
    )
    train_step = train_step.lower(state, batch).compile()
    plan.forget()
    backend.give_back()
    while True:
      state, metrics = jax.block_until_ready(train_step(state, batch))
      dropped = [
        float(metrics[f'{s}/dropped_tokens'])
        for s in config.model.stacks
        if experts
      ]
      yield {'loss': float(metrics['cross_entropy']), 'dropped': dropped}


def their_steps(flags):
  import torch
  import transformers

  yield
  experts = flags.experts[0]
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = transformers.SwitchTransformersForConditionalGeneration
  model = model.from_pretrained(flags.parameters, dropout_rate=0.0).train()
  config = our_config(experts).model
  dropped = {}

  def count(stack):
    def hook(router, _, found):
      seats = found[0]
      total = dropped.setdefault(stack, [0, 0])
      total[0] += int((seats.sum(-1) == 0).sum())
      total[1] += seats[..., 0].numel()

    return hook

  hooks = []
  for stack, length in zip(config.stacks, LENGTHS, strict=True):
    # One number of places serves both of their stacks; here each has its own.
    places = config.moe.train_capacity.slots(length, experts)
    for block in getattr(model, stack).block:
      router = getattr(block.layer[-1].mlp, 'router', None)
      if router is not None:
        router.expert_capacity = places
        hooks.append(router.register_forward_hook(count(stack)))
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=RATE, weight_decay=0.0, fused=True
  )
  inputs, targets = (torch.tensor(a, dtype=torch.long) for a in tokens())
  model.router_z_loss_coef = WEIGHTS['router_z']
  model.router_aux_loss_coef = WEIGHTS['load_balance']
  while True:
    out = model(input_ids=inputs, labels=targets, output_router_logits=True)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    while hooks:  # The first step is not timed.
      hooks.pop().remove()
    z = out.encoder_z_loss + out.decoder_z_loss
    balance = out.encoder_aux_loss + out.decoder_aux_loss
    router = WEIGHTS['router_z'] * z + WEIGHTS['load_balance'] * balance
    yield {
      'loss': float((out.loss - router).detach()),
      'dropped': [seats[0] / seats[1] for seats in dropped.values()],
    }


SIDES = {'ours': our_steps, 'dense': our_steps, 'hf': their_steps}


def work(flags) -> None:
  """A process of one side: a step for each line it reads."""
  said, sys.stdout = sys.stdout, sys.stderr
  steps = SIDES[flags.side](flags)
  next(steps)
  before = resident('VmRSS')
  for _ in sys.stdin:
    began = time.perf_counter()
    found = next(steps)
    found['seconds'] = time.perf_counter() - began
    found['peak_mb'] = resident('VmHWM') - before
    print(json.dumps(found), file=said, flush=True)


def resident(which: str) -> float:
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.split(f'{which}:')[1].split()[0]) / 1024


class Side:
  """A process that takes a step when asked."""

  def __init__(self, side: str, experts: int, parameters: str, flags):
    command = [sys.executable, __file__, f'--side={side}']
    command += [f'--experts={experts}', f'--parameters={parameters}']
    command += [f'--remat={flags.remat}', *['--scanned'] * flags.scanned]
    cores = sorted(os.sched_getaffinity(0))[: flags.threads]
    env = dict(os.environ)
    if side != 'hf':
      backend.prepare(env)  # As `st-moe train` does.
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
      preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )

  def step(self) -> dict:
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.write('\n')
      self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      sys.exit(f'A process ended early, with status {self.process.wait()}.')
    return json.loads(line)

  def end(self):
    self.process.stdin.close()
    self.process.wait()


def measure(experts: int, flags) -> dict:
  with tempfile.TemporaryDirectory() as where:
    begin = lambda side, of, write: Side(
      side, of, f'{where}/switch' if write else '', flags
    )
    ours = begin('ours', experts, True)
    first = {'ours': ours.step()}
    sides = {
      'ours': ours,
      'dense': begin('dense', 0, False),
      'hf': begin('hf', experts, True),
    }
    first |= {name: sides[name].step() for name in ('dense', 'hf')}
    rounds = [{} for _ in range(flags.steps + 1)]
    # Not by threes: some machines take away what is free for two seconds.
    for turns in ('ours', 'hf'), ('dense',):
      for found in rounds:
        found |= {name: sides[name].step() for name in turns}
    del rounds[0]  # Allocators settle in the second step.
    for side in sides.values():
      side.end()

    def peak(name, write):
      side = begin(name, experts, write)
      found = [side.step() for _ in range(3)]
      side.end()
      return found[-1]['peak_mb']

    peaks = {'ours': peak('ours', False), 'hf': peak('hf', True)}
  median = lambda name: statistics.median(r[name]['seconds'] for r in rounds)
  return {
    'experts': experts,
    'ours_s': median('ours'),
    'hf_s': median('hf'),
    # Of neighbours in time, whom noise hits alike.
    'ratio': statistics.median(
      r['hf']['seconds'] / r['ours']['seconds'] for r in rounds
    ),
    'dense_s': median('dense'),
    'ours_peak_mb': peaks['ours'],
    'hf_peak_mb': peaks['hf'],
    'ours_first_start_peak_mb': first['ours']['peak_mb'],
    'memory_ratio': peaks['ours'] / peaks['hf'],
    **{
      f'{name}_{key}': first[name][key]
      for name in ('ours', 'hf')
      for key in ('loss', 'dropped')
    },
    **{f'{n}_last_loss': rounds[-1][n]['loss'] for n in ('ours', 'hf')},
  }


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  numbers = lambda s: [*map(int, s.split(','))]
  parser.add_argument('--experts', type=numbers, default=[8, 32])
  parser.add_argument('--steps', type=int, default=9)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument(
    '--remat',
    default='none',
    help="what our backward pass computes again: 'full', 'dots' or 'none'",
  )
  parser.add_argument(
    '--scanned', action='store_true', help='our layers, instead of unrolled'
  )
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  parser.add_argument('--parameters', default='', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', os.path.expanduser('~/.cache/st_moe/compiled')
  )
  if flags.side:
    work(flags)
    return
  import importlib.util

  from rich.console import Console
  from rich.table import Table

  for name in ('torch', 'transformers'):
    if importlib.util.find_spec(name) is None:
      sys.exit(f"This takes {name}: pip install 'st_moe[hf]'.")
  table = Table('experts', 'side', 's', 'faster', 'peak MB', 'dropped', 'loss')
  found = [measure(e, flags) for e in flags.experts]
  share = lambda parts: ', '.join(f'{p:.1%}' for p in parts)
  for f in found:
    for side in ('ours', 'hf'):
      table.add_row(
        str(f['experts']),
        side,
        f'{f[f"{side}_s"]:.3f}',
        f'{f["ratio"]:.2f}' if side == 'ours' else '',
        f'{f[f"{side}_peak_mb"]:,.0f}',
        share(f[f'{side}_dropped']),
        f'{f[f"{side}_loss"]:.5f} to {f[f"{side}_last_loss"]:.5f}',
      )
    table.add_row('', 'dense', f'{f["dense_s"]:.3f}')
  Console().print(table)
  print(json.dumps({**vars(flags), 'found': found}))


if __name__ == '__main__':
  main()
