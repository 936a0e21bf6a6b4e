"""What time grows with: experts, depth, length, size of groups.

  python benchmarks/scaling.py

experts  a sparse layer, forward and backward, on the same tokens in as many
         places. What grows is the bank. `at least` reads its weights forward
         and backward and writes their gradient, at the rate at which this
         machine copies a bank. `by copy` also packs them both times, as a
         CPU's products do: to write and to read once more. `by products` is
         what products of a single row an expert take, which do nothing else.
         Each beside its share of what was added to the first row.
groups   the same layer by tokens to a group.
depth    a train step and its compilation by layers of each stack, scanned.
length   a train step by the length of inputs, tokens of a batch being the same.

Times are medians of rounds in which everything of a part is run once, in turn.
Prints a table for each part and, last, one line of JSON.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import moe_layer  # noqa: E402
import step_time  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from st_moe import config as c  # noqa: E402
from st_moe import sharding  # noqa: E402

# Of weights: read forward and backward, gradient written; and packed twice.
_LEAST, _PACKED = 3, 3 + 2 * 2


def experts(flags) -> list[dict]:
  """Time by number of experts, and what bytes of weights explain."""
  layers = {
    e: moe_layer.passes(
      moe_layer.layer(flags, e, 'index', flags.group), flags.tokens
    )
    for e in flags.experts
  }
  bank = layers[max(flags.experts)][1][0]['experts']
  copy = jax.jit(lambda bank: jax.tree.map(lambda w: w + 1, bank)), (bank,)
  few = {
    f'one row of {e}': moe_layer.products(e, 1, flags.width, flags.hidden)
    for e in flags.experts
  }
  seconds = moe_layer.timed({'copy': copy, **few, **layers}, flags.rounds)
  median = {name: statistics.median(s) for name, s in seconds.items()}
  size = lambda e: 4 * 2 * e * flags.width * flags.hidden
  rate = 2 * size(max(flags.experts)) / median['copy']
  first = flags.experts[0]
  found = []
  for e in flags.experts:
    more = statistics.median(
      a - b for a, b in zip(seconds[e], seconds[first], strict=True)
    )
    at_least = _LEAST * (size(e) - size(first)) / rate
    by_copy = _PACKED / _LEAST * at_least
    by_products = median[f'one row of {e}'] - median[f'one row of {first}']
    found.append(
      dict(
        experts=e,
        rows=e * moe_layer.rows(flags, e, 'index', flags.group, flags.tokens),
        ms=1e3 * median[e],
        more_ms=1e3 * more,
        at_least_ms=1e3 * at_least,
        by_copy_ms=1e3 * by_copy,
        copy_share=by_copy / more if e != first else None,
        by_products_ms=1e3 * by_products,
        products_share=by_products / more if e != first else None,
        copy_gb_per_s=rate / 1e9,
      )
    )
  return found


def groups(flags) -> list[dict]:
  """Time of a place by tokens to a group."""
  few = flags.experts[0]
  layers = {
    n: moe_layer.passes(moe_layer.layer(flags, few, 'index', n), flags.tokens)
    for n in flags.groups
  }
  seconds = moe_layer.timed(layers, flags.rounds)
  found = []
  for n, taken in seconds.items():
    rows = few * moe_layer.rows(flags, few, 'index', n, flags.tokens)
    ms = 1e3 * statistics.median(taken)
    found.append(dict(group=n, rows=rows, ms=ms, ns_per_row=1e6 * ms / rows))
  return found


def depth(flags) -> list[dict]:
  return steps(flags, 'layers', {n: (n, 128) for n in flags.layers})


def length(flags) -> list[dict]:
  return steps(flags, 'length', {n: (2, n) for n in flags.lengths})


def steps(flags, what: str, shapes: dict) -> list[dict]:
  """Train steps of stacks of some layers on inputs of some length."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  runs, compiling, first = {}, {}, None
  with sharding.use(mesh):
    for name, (layers, inputs) in shapes.items():
      config = model(layers, inputs, flags.batch_tokens)
      batch = step_time.random_batch(config)
      began = time.perf_counter()
      step, state = step_time.compiled_step(config, mesh, batch)
      compiling[name] = time.perf_counter() - began
      runs[name] = (Trained(step, state), (batch,))
    seconds = moe_layer.timed(runs, flags.rounds)
  found = []
  for name, taken in seconds.items():
    ms = 1e3 * statistics.median(taken)
    first = first or ms
    found.append(
      {what: name, 'ms': ms, 'over_first': ms / first}
      | {'compiling_s': compiling[name]}
    )
  return found


class Trained:
  """A step that keeps its state, which each call gives away."""

  def __init__(self, step, state):
    self.step, self.state = step, state

  def __call__(self, batch):
    self.state, metrics = self.step(self.state, batch)
    return metrics


def model(layers: int, inputs: int, tokens: int) -> c.Config:
  stack = c.StackConfig(num_layers=layers, sparse_every=2, sparse_offset=1)
  return c.Config(
    model=c.ModelConfig(
      vocab_size=1024,
      embed_dim=128,
      num_heads=4,
      head_dim=32,
      mlp_dim=512,
      encoder=stack,
      decoder=stack,
      moe=c.MoEConfig(num_experts=8),
      dtype='float32',
    ),
    data=c.DataConfig(
      batch_size=max(1, tokens // inputs),
      inputs_length=inputs,
      targets_length=inputs // 4,
    ),
  )


PARTS = {'experts': experts, 'groups': groups, 'depth': depth, 'length': length}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  words, numbers = lambda s: s.split(','), lambda s: [*map(int, s.split(','))]
  parser.add_argument('--parts', type=words, default=[*PARTS])
  parser.add_argument('--experts', type=numbers, default=[8, 32, 64, 128, 256])
  parser.add_argument('--layers', type=numbers, default=[2, 4, 8])
  parser.add_argument('--lengths', type=numbers, default=[64, 128, 256, 512])
  parser.add_argument('--groups', type=numbers, default=[256, 1024, 4096])
  parser.add_argument('--tokens', type=int, default=4096)
  parser.add_argument('--batch_tokens', type=int, default=2048)
  parser.add_argument('--group', type=int, default=1024)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--hidden', type=int, default=2048)
  parser.add_argument('--k', type=int, default=2)
  parser.add_argument('--capacity_factor', type=float, default=1.25)
  parser.add_argument('--rounds', type=int, default=5)
  flags = parser.parse_args()
  moe_layer.allocate(M_ARENA_MAX=1)
  found = {name: PARTS[name](flags) for name in flags.parts}
  for name, rows in found.items():
    table = Table(*(head.replace('_', ' ') for head in rows[0]), title=name)
    for row in rows:
      table.add_row(*map(shown, row.values()))
    Console().print(table)
  print(json.dumps({**vars(flags), 'found': found}))


def shown(value) -> str:
  if value is None:
    return ''
  return str(value) if isinstance(value, int) else f'{value:,.2f}'


if __name__ == '__main__':
  main()
