"""One sparse layer against plain matrix products of the same size.

  python benchmarks/moe_layer.py --experts=8,32,128

The layer, forward and backward, by dispatcher, number of experts and size of
its groups; beside it, in the same rounds, products of each expert's rows with
its weights, forward and backward, as many as the layer executes (`grouped`: as
if no block were rounded up). Last come the rates at which this machine
multiplies and copies. Prints a table and, last, one line of JSON.

Times are medians of rounds in which everything is run once, in turn, and ratios
are medians of the ratios inside a round, whom noise hits alike.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from st_moe.config import Capacity, ModelConfig, MoEConfig, Part  # noqa: E402
from st_moe.model.moe import MoE  # noqa: E402
from st_moe.routing.types import RouteContext  # noqa: E402


def layer(flags, experts: int, dispatcher: str, group: int) -> MoE:
  moe = MoEConfig(
    experts,
    selector=Part.of('top_k', k=flags.k, train_policy='all'),
    train_capacity=places(flags, dispatcher),
    dispatcher=dispatcher,
  )
  model = ModelConfig(
    embed_dim=flags.width,
    mlp_dim=flags.hidden,
    activation=Part('relu'),
    dtype='float32',
    moe=moe,
  )
  return MoE(model, model.moe, group)


def places(flags, dispatcher: str) -> Capacity:
  if dispatcher == 'grouped':
    return Capacity(dropless=True)
  return Capacity(flags.capacity_factor, times_k=True, minimum=1)


def rows(flags, experts, dispatcher, group, tokens) -> int:
  """Of each expert, that products are made of."""
  if dispatcher == 'grouped':
    return tokens * flags.k // experts
  slots = places(flags, dispatcher).slots(group, experts, flags.k)
  return slots * (tokens // group)


def passes(moe: MoE, tokens: int):
  """The layer forward and backward, and its arguments."""
  shape = 1, tokens, moe.config.embed_dim
  ctx = RouteContext(valid=jnp.ones(shape[:2], bool), deterministic=False)
  x, dy = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
  params = moe.init(jax.random.key(2), x, ctx)['params']

  def run(params, x, dy):
    y, back = jax.vjp(lambda p, x: moe.apply({'params': p}, x, ctx), params, x)
    return y, back(dy)

  return jax.jit(run), (params, x, dy)


def products(experts: int, rows: int, width: int, hidden: int):
  """What no layer can do without, and its arguments."""
  shapes = (
    (experts, rows, width),
    (experts, width, hidden),
    (experts, hidden, width),
    (experts, rows, width),
  )

  def run(x, wi, wo, dy):
    y, back = jax.vjp(lambda x, wi, wo: jax.nn.relu(x @ wi) @ wo, x, wi, wo)
    return y, back(dy)

  keys = jax.random.split(jax.random.key(0), len(shapes))
  return jax.jit(run), [
    jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)
  ]


def allocate(**settings: int):
  """What is freed stays, so that nobody is timed while waiting for pages.

  In one heap from the start, and once all is compiled.
  """
  numbers = {'M_ARENA_MAX': -8, 'M_MMAP_MAX': -4, 'M_TRIM_THRESHOLD': -1}
  if platform.libc_ver()[0] == 'glibc':
    for name, value in settings.items():
      ctypes.CDLL(None).mallopt(numbers[name], value)


def timed(runs: dict, rounds: int) -> dict[object, list[float]]:
  """Seconds of every round, the compiling one left out."""
  seconds = {name: [] for name in runs}
  for i in range(rounds + 1):
    for name, (f, args) in runs.items():
      began = time.perf_counter()
      jax.block_until_ready(f(*args))
      if i:
        seconds[name].append(time.perf_counter() - began)
    if not i:
      allocate(M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)
  return seconds


def rates() -> dict[str, float]:
  """How fast this machine multiplies [2048, 2048] and copies 256 MB."""
  a, many = jnp.ones((2048, 2048)), jnp.ones((64, 1024, 1024))
  copied = jax.jit(lambda a: a + 1, donate_argnums=0)
  product, seconds = jax.jit(jnp.matmul), {'product': [], 'copy': []}
  for i in range(6):
    for name in seconds:
      began = time.perf_counter()
      if name == 'copy':
        many = jax.block_until_ready(copied(many))
      else:
        jax.block_until_ready(product(a, a))
      if i:
        seconds[name].append(time.perf_counter() - began)
  median = {name: statistics.median(s) for name, s in seconds.items()}
  return {
    'gflops': 2 * 2048**3 / median['product'] / 1e9,
    'gb_per_s': 2 * many.nbytes / median['copy'] / 1e9,
  }


def measure(flags, experts: int):
  """Rows of the table for a number of experts."""
  runs, about = {}, {}
  for tokens in flags.tokens:
    for dispatcher in flags.dispatchers:
      for group in flags.groups:
        moe = layer(flags, experts, dispatcher, group)
        n = rows(flags, experts, dispatcher, group, tokens)
        plain = f'products {n}'
        name = f'{dispatcher} {tokens} {group}'
        about[name] = dict(
          experts=experts,
          dispatcher=dispatcher,
          tokens=tokens,
          group=group,
          rows=experts * n,
          plain=plain,
        )
        runs[plain] = products(experts, n, flags.width, flags.hidden)
        runs[name] = passes(moe, tokens)
  seconds = timed(runs, flags.rounds)
  for name, row in about.items():
    plain = row.pop('plain')
    pairs = zip(seconds[name], seconds[plain], strict=True)
    flops = 12 * row['rows'] * flags.width * flags.hidden
    row['seconds'] = statistics.median(seconds[name])
    row['products_s'] = statistics.median(seconds[plain])
    row['over_products'] = statistics.median(a / b for a, b in pairs)
    row['ns_per_row'] = 1e9 * row['seconds'] / row['rows']
    row['products_gflops'] = flops / row['products_s'] / 1e9
    yield row


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  words, numbers = lambda s: s.split(','), lambda s: [*map(int, s.split(','))]
  parser.add_argument('--experts', type=numbers, default=[8, 32, 128])
  parser.add_argument('--dispatchers', type=words, default=['index', 'grouped'])
  parser.add_argument('--tokens', type=numbers, default=[4096])
  parser.add_argument('--groups', type=numbers, default=[256, 1024, 4096])
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--hidden', type=int, default=2048)
  parser.add_argument('--k', type=int, default=2)
  parser.add_argument('--capacity_factor', type=float, default=1.25)
  parser.add_argument('--rounds', type=int, default=7)
  flags = parser.parse_args()
  allocate(M_ARENA_MAX=1)
  heads = 'experts', 'dispatcher', 'tokens', 'group', 'rows', 'ms'
  heads += 'products, ms', 'over products', 'ns a row'
  table = Table(*heads)
  found = [row for e in flags.experts for row in measure(flags, e)]
  for r in found:
    table.add_row(
      *(
        str(r[k]) for k in ('experts', 'dispatcher', 'tokens', 'group', 'rows')
      ),
      f'{1e3 * r["seconds"]:.0f}',
      f'{1e3 * r["products_s"]:.0f}',
      f'{r["over_products"]:.2f}',
      f'{r["ns_per_row"]:.0f}',
    )
  Console().print(table)
  print(json.dumps({**vars(flags), **rates(), 'found': found}))


if __name__ == '__main__':
  main()
