"""The train step through the compiler for TPUs."""

import functools
import importlib.util
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import pytest

from st_moe import cli, sharding
from st_moe.config import Part
from st_moe.model.grouped import BLOCK
from st_moe.model.moe import MoE
from st_moe.plan import plan_flags, topology
from st_moe.routing.types import RouteContext
from tests.helpers import boxed_shapes, tiny

CONFIG = '--config=configs/st_moe_tiny.py'


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    ValueError, match=r'pip install "jax\[tpu\]".*--count instead'
  ):
    cli.run(['plan', CONFIG, '--topology=v5e:2x2'])


# One layer a stack, sparse; a group of either for each of sixteen chips.
FIELDS = (
  *(
    f'model.{stack}.{field}'
    for stack in ('encoder', 'decoder')
    for field in ('num_layers=1', 'sparse_every=1', 'sparse_offset=0')
  ),
  'model.encoder.group_size=128',
  'model.decoder.group_size=29',
)
MESHES = {
  'expert 16': ('mesh.expert=16', 'model.moe.num_experts=16'),
  'data 2 x expert 8': ('mesh.expert=16', 'model.moe.num_experts=8'),
  # Dense weights in whole tiles of 16 rows.
  'fsdp 2 x expert 8': ('mesh.fsdp=2', 'mesh.expert=8', 'model.embed_dim=256'),
}


@functools.cache
def _compiled(mesh, transport):
  """What the plan for v5e:4x4 says, and exchanges as {(kind, *axes): ...}."""
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  fields = *FIELDS, *MESHES[mesh], f'model.moe.transport={transport}'
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'plan.json'
    args = ['plan', CONFIG, '--topology=v5e:4x4', f'--output={output}']
    assert cli.run([*args, *(f'--config.{f}' for f in fields)]) == 0
    compiled = json.loads(output.read_text())['compiled']
  return compiled, {(e['kind'], *e['axes']): e for e in compiled['exchanges']}


def test_what_the_compiler_says():
  compiled, _ = _compiled('data 2 x expert 8', 'gspmd')
  memory = compiled['memory']
  assert memory['peak'] == sum(v for k, v in memory.items() if k != 'peak')
  assert 0 < memory['arguments'] < memory['peak'] < 16 * 2**30
  assert compiled['flops'] > 0 and compiled['bytes'] > 0
  assert compiled['warnings'] == []


@pytest.mark.parametrize(
  ('mesh', 'transport'),
  [('data 2 x expert 8', 'gspmd'), ('expert 16', 'shard_map')],
)
def test_four_exchanges_a_sparse_layer(mesh, transport):
  # Two there and two back in the one sparse layer of each stack, and beside
  # them nothing but sums of gradients: no weights, no tokens are gathered.
  _, found = _compiled(mesh, transport)
  assert found.pop(('all-to-all', 'expert'))['count'] == 8
  assert {kind for kind, *_ in found} == {'all-reduce'}


@pytest.mark.parametrize('transport', ['gspmd', 'shard_map'])
@pytest.mark.parametrize('group_size', [128, 29])
def test_two_there_and_two_back(group_size, transport):
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  plan_flags.prepare()
  moe = {'selector': Part.of('top_k', k=2), 'transport': transport}
  config = tiny(moe={**moe, 'num_experts': 16})
  layer = MoE(config, config.moe, group_size)
  mesh = sharding.make_mesh(expert=16, devices=topology.devices('v5e:4x4'))
  x = jnp.zeros((16, group_size, 16))
  ctx = RouteContext(valid=jnp.ones(x.shape[:2], bool))

  forward = lambda params, x: layer.apply({'params': params}, x, ctx)
  gradient = lambda params, x, dy: jax.vjp(forward, params, x)[1](dy)
  boxed = boxed_shapes(layer, x, ctx)
  with sharding.use(mesh):
    params = sharding.placed(
      sharding.unbox(boxed), sharding.of_boxed(boxed, mesh)
    )
    x = sharding.placed(x, sharding.batch_sharding(mesh))

    def exchanges(run, *args):
      compiled = jax.jit(run).lower(*args).compile()
      found = topology.figures(compiled, mesh)['exchanges']
      return {(e.kind, *e.axes): e.count for e in found}

    assert exchanges(forward, params, x) == {('all-to-all', 'expert'): 2}
    # And the router's gradient, which all devices share.
    both = {('all-to-all', 'expert'): 4, ('all-reduce', 'expert'): 1}
    assert exchanges(gradient, params, x, x) == both


def test_a_loop_counts_the_rows_that_sit_here():
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  plan_flags.prepare()
  calm = Part.of('top_k', k=2, train_policy='all')
  moe = {'selector': calm, 'dispatcher': 'grouped', 'num_experts': 16}
  model = tiny(moe=moe, activation='relu')
  layer = MoE(model, model.moe, 128)
  mesh = sharding.make_mesh(expert=16, devices=topology.devices('v5e:4x4'))
  x = jnp.zeros((128, 128, 16))
  ctx = RouteContext(valid=jnp.ones(x.shape[:2], bool), deterministic=False)
  boxed = boxed_shapes(layer, x, ctx)
  with sharding.use(mesh):
    params = sharding.placed(
      sharding.unbox(boxed), sharding.of_boxed(boxed, mesh)
    )
    x = sharding.placed(x, sharding.batch_sharding(mesh))
    forward = lambda params, x: layer.apply({'params': params}, x, ctx)
    compiled = jax.jit(forward).lower(params, x).compile()
  flops = topology.figures(compiled, mesh)['flops']
  # Ten places for 128 tokens, and one expert here: of 128 groups, 1280 rows in
  # 10 blocks and perhaps one more. The router sees 8 groups of tokens.
  router = 2 * 8 * 128 * 16 * 16
  rows = 1280 + BLOCK
  assert flops == pytest.approx(router + rows * 2 * 2 * 16 * 24, rel=1e-3)


def test_fsdp_gathers_weights_but_no_expert_from_another():
  _, found = _compiled('fsdp 2 x expert 8', 'gspmd')
  assert found['all-to-all', 'expert']['count'] == 8
  gathers = {tuple(axes) for kind, *axes in found if kind == 'all-gather'}
  assert gathers == {('fsdp',), ('fsdp', 'expert')}
  # Of the experts, once each way, what the other chip along fsdp holds: in both
  # stacks one expert, three kernels [256, 256] of bfloat16, half of each.
  banks = found['all-gather', 'fsdp']
  assert banks['count'] == 2 * 2 * 3
  assert banks['sent'] == 2 * 2 * 3 * 256 * 128 * 2


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v5e:3x3x3'], 'topology=v5e:3x3x3.*as v5e:4x4'),
    (
      ['--topology=v5e:2x4', '--config.mesh.model=3'],
      'model 3 = 3 does not divide 8 devices',
    ),
  ],
)
def test_what_cannot_be_compiled(flags, message):
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  with pytest.raises(ValueError, match=message):
    cli.run(['plan', CONFIG, *flags])
