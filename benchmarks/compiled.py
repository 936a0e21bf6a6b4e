"""One sparse layer as the compiler for TPUs sees it, by dispatcher.

  python benchmarks/compiled.py --topology=v5e:4x4 --experts=32,128

Takes jax[tpu] and no TPU. Of the forward pass and of the gradient (by weights
and tokens), for each chip: matrix products, bytes read and written (XLA's
count, loops in full), temporaries, the time that products or bytes take at
least, and collectives with the megabytes they send. Prints a table and, last,
one line of JSON.

As many chips share the experts as both numbers allow, the others are copies
along `data`. `per_token` has weights of its own for each route, good for a few
tokens of a decode step: ask for it with those.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from st_moe import sharding
from st_moe.config import ModelConfig, MoEConfig, Part
from st_moe.model.moe import MoE
from st_moe.plan import chips, plan_flags, topology
from st_moe.routing.types import RouteContext


def layer(
  num_experts: int, dispatcher: str, transport: str, tokens: int
) -> MoE:
  # 'all': no random numbers, whose bytes are none of dispatch.
  moe = MoEConfig(
    num_experts,
    selector=Part.of('top_k', k=2, train_policy='all'),
    dispatcher=dispatcher,
    transport=transport,
  )
  config = ModelConfig(
    embed_dim=1024,
    mlp_dim=2816,
    activation=Part('gelu'),
    dtype='bfloat16',
    moe=moe,
  )
  return MoE(config, config.moe, tokens)


def lowered(moe: MoE, groups: int, mesh):
  """(name, lowered program) of the forward pass and of the gradient."""
  split = sharding.batch_sharding(mesh)
  shape = groups, moe.group_size, moe.config.embed_dim
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)
  valid = jax.ShapeDtypeStruct(shape[:2], jnp.bool_, sharding=split)

  def forward(params, x, valid):
    ctx = RouteContext(valid=valid, deterministic=False)
    return moe.apply({'params': params}, x, ctx)

  def gradient(params, x, valid, dy):
    _, back = jax.vjp(lambda *of: forward(*of, valid), params, x)
    return back(dy)

  init = lambda x, valid: moe.init(
    jax.random.key(0), x, RouteContext(valid=valid, deterministic=True)
  )
  boxed = jax.eval_shape(init, x, valid)['params']
  params = sharding.placed(
    sharding.unbox(boxed), sharding.of_boxed(boxed, mesh)
  )
  yield 'forward', jax.jit(forward).lower(params, x, valid)
  yield 'gradient', jax.jit(gradient).lower(params, x, valid, x)


def measured(program, mesh, chip) -> dict:
  """Figures of a device; {'needs': '40.1G of 15.75G'} where it has no room."""
  try:
    found = topology.figures(program.compile(), mesh)
  except jax.errors.JaxRuntimeError as e:
    sizes = re.findall(r'\b[\d.]+[KMGTPE]\b', str(e))
    if 'RESOURCE_EXHAUSTED' not in str(e) or len(sizes) < 2:
      raise
    return {'needs': f'{sizes[0]} of {sizes[1]}'}
  found['exchanges'] = [dataclasses.asdict(e) for e in found['exchanges']]
  found['seconds'] = max(
    found['flops'] / chip.flops, found['bytes'] / chip.bandwidth
  )
  return found


def row(found: dict) -> list[str]:
  if 'needs' in found:
    return [*[''] * 4, f'no room: {found["needs"]}']
  sent = (
    f'{e["count"]} {e["kind"]} {e["sent"] / 1e6:.1f}'
    for e in found['exchanges']
  )
  return [
    f'{found["flops"] / 1e9:.1f}',
    f'{found["bytes"] / 1e9:.2f}',
    f'{found["memory"]["temporaries"] / 2**20:,.0f}',
    f'{found["seconds"] * 1e3:.2f}',
    '\n'.join(sent),
  ]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  words, numbers = lambda s: s.split(','), lambda s: [*map(int, s.split(','))]
  parser.add_argument('--topology', default='v5e:4x4')
  parser.add_argument('--experts', type=numbers, default=[32])
  parser.add_argument(
    '--dispatchers', type=words, default=['mask', 'index', 'grouped']
  )
  parser.add_argument(
    '--transports', type=words, default=['gspmd', 'shard_map']
  )
  parser.add_argument('--groups', type=int, default=64)
  parser.add_argument('--tokens', type=int, default=2048, help='in a group')
  flags = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  plan_flags.prepare()
  devices = topology.devices(flags.topology)
  chip = chips.named(flags.topology.partition(':')[0])

  heads = '', '', 'GFLOP', 'GB', 'MiB', 'ms', 'collectives, MB'
  found, tables = (
    [],
    {
      e: Table(*heads, title=f'{e} experts, {flags.topology}, a device')
      for e in flags.experts
    },
  )
  for experts, dispatcher, transport in itertools.product(
    flags.experts, flags.dispatchers, flags.transports
  ):
    mesh = sharding.make_mesh(
      expert=math.gcd(experts, len(devices)), devices=devices
    )
    moe = layer(experts, dispatcher, transport, flags.tokens)
    with sharding.use(mesh):
      for name, program in lowered(moe, flags.groups, mesh):
        what = dict(experts=experts, dispatcher=dispatcher, transport=transport)
        found.append({**what, 'pass': name, **measured(program, mesh, chip)})
        tables[experts].add_row(
          f'{dispatcher}\n{transport}', name, *row(found[-1])
        )
  Console().print(*tables.values())
  print(json.dumps({**vars(flags), 'found': found}))


if __name__ == '__main__':
  main()
