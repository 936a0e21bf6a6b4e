"""Compiled programs, read: what they multiply and what they exchange."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import sharding
from st_moe.plan import hlo

MESH = {'data': 1, 'fsdp': 2, 'expert': 4, 'model': 1}


def test_a_loop_counts_as_often_as_it_runs():
  # Five products of [8, 16] by [16, 16], and one of [8, 16] by [16, 4] after.
  def run(x, ws, v):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(body, x, ws)[0] @ v

  shapes = (8, 16), (5, 16, 16), (16, 4)
  compiled = jax.jit(run).lower(*map(jnp.zeros, shapes)).compile()
  program = hlo.Program(compiled.as_text())
  one, last = 2 * 8 * 16 * 16, 2 * 8 * 16 * 4
  assert program.flops() == 5 * one + last
  assert program.flops(once=True) == one + last
  # A TPU's text leaves the count to the condition of the loop.
  silent = re.sub(r'"known_trip_count":\{[^}]*\},?', '', compiled.as_text())
  assert 'known_trip_count' not in silent
  assert hlo.Program(silent).flops() == 5 * one + last
  # Every turn reads its weight and writes its result, at the least.
  more = program.traffic() - program.traffic(once=True)
  assert more >= 4 * 4 * (16 * 16 + 8 * 16)


def test_a_loop_whose_length_the_data_tell():
  def run(x, w, n):
    turn = lambda _, x: jnp.tanh(x @ w)
    with jax.named_scope('about_7_turns'):
      return jax.lax.fori_loop(0, n, turn, x)

  of = jnp.zeros((8, 16)), jnp.zeros((16, 16)), 3
  text = jax.jit(run).lower(*of).compile().as_text()
  assert hlo.Program(text).flops() == 7 * 2 * 8 * 16 * 16
  with pytest.raises(ValueError, match='unknown length'):
    hlo.Program(text.replace('about_7_turns', 'some_turns'))


def test_a_turn_counts_its_own_layer_alone():
  def run(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, ws)

  def per_turn(n):
    compiled = jax.jit(run).lower(jnp.zeros((8, 16)), jnp.zeros((n, 16, 16)))
    return hlo.Program(compiled.compile().as_text()).traffic() / n

  # Not the weights of all layers, nor all that came out before.
  assert per_turn(500) == pytest.approx(per_turn(5), rel=0.1)


def _tpu(line: str) -> hlo.Program:
  """A program of one product, as the compiler for TPUs writes it."""
  return hlo.Program(f"""HloModule jit_f

ENTRY %main.1 (lhs: bf16[64,32,1], rhs: bf16[114,114,32]) -> f32[64,114,114] {{
  %lhs = bf16[64,32,1]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  %rhs = bf16[114,114,32]{{2,1,0}} parameter(1)
  %flat = bf16[6,64]{{1,0}} parameter(2)
  %table = bf16[64,10]{{1,0}} parameter(3)
  {line}
}}
""")


@pytest.mark.parametrize(
  ('line', 'flops'),
  [
    # A plain product.
    (
      'ROOT %c = f32[6,10]{1,0} convolution(%flat, %table), window={},'
      ' dim_labels=bf_io->bf',
      2 * 6 * 64 * 10,
    ),
    # 'hn,qkn->hqk', k as space of which every output sees but one place.
    (
      'ROOT %c = f32[64,114,114]{2,0,1:T(8,128)} convolution(%lhs, %rhs),'
      ' window={size=114 pad=113_113 rhs_reversal=1}, dim_labels=bf0_0oi->b0f',
      2 * 64 * 32 * 114 * 114,
    ),
    (
      'ROOT %c = f32[6,10]{1,0} dot(%flat, %table),'
      ' lhs_contracting_dims={1}, rhs_contracting_dims={0}',
      2 * 6 * 64 * 10,
    ),
    # What a kernel says of itself; others, as of a layout, multiply nothing.
    (
      'ROOT %c = (f32[6,10]{1,0:T(8,128)}, f32[6]{0}) custom-call(%flat,'
      ' /*index=1*/%table), custom_call_target="tpu_custom_call",'
      ' backend_config={"custom_call_config":{"body":"TUz(v=","cost_estimate":'
      '{"flops":"7680","transcendentals":"60"}}}',
      2 * 6 * 64 * 10,
    ),
    (
      'ROOT %c = bf16[6,64]{1,0} custom-call(%flat),'
      ' custom_call_target="ConcatBitcast"',
      0,
    ),
  ],
)
def test_products_as_a_tpu_has_them(line, flops):
  assert _tpu(line).flops() == flops


# Device n of the mesh is (n // 4, n % 4) along fsdp and expert.
@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', ('expert',)),
    ('{{0,4},{1,5},{2,6},{3,7}}', ('fsdp',)),
    ('[2,4]<=[8]', ('expert',)),
    ('[4,2]<=[2,4]T(1,0)', ('fsdp',)),
    ('[1,8]<=[8]', ('fsdp', 'expert')),
    ("mesh['a'=2,'b'=4] {'b'}", ('expert',)),
    ("mesh['a'=2,'b'=4] {'a'}", ('fsdp',)),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ('expert',)),
    ("mesh['a'=2,'b'=1,'c'=4] {'a','c'}", ('fsdp', 'expert')),
    ('{}', ('fsdp', 'expert')),
  ],
)
def test_who_exchanges_with_whom(groups, axes):
  program = _tpu(
    'ROOT %a = bf16[6,64]{1,0} all-reduce(%flat), channel_id=1,'
    f' replica_groups={groups}, to_apply=%add'
  )
  (found,) = program.exchanges(MESH)
  assert (found.kind, found.axes, found.count) == ('all-reduce', axes, 1)
  n = {('expert',): 4, ('fsdp',): 2, ('fsdp', 'expert'): 8}[axes]
  assert found.sent == pytest.approx(2 * (n - 1) / n * 6 * 64 * 2)


def test_a_group_of_one_exchanges_nothing():
  line = 'ROOT %a = bf16[6,64]{1,0} all-reduce(%flat), replica_groups={{0},{1}}'
  assert _tpu(line).exchanges(MESH) == []


def test_what_runs_beside_other_work_is_one():
  # From start to done, every fusion of a TPU names the same exchange.
  chains = {'start': 3, 'beside': 3, 'done': 3, 'another': 4}
  pieces = ''.join(
    f"""
%{name} (given: bf16[6,64]) -> bf16[12,64] {{
  %given = bf16[6,64]{{1,0}} parameter(0)
  ROOT %g = bf16[12,64]{{1,0}} all-gather(%given), channel_id={n},\
 replica_groups=[4,2]<=[2,4]T(1,0), frontend_attributes={{chain_id="{n}"}}
}}
"""
    for name, n in chains.items()
  )
  calls = ''.join(
    f'  %f.{n} = bf16[12,64]{{1,0}} fusion(%flat), kind=kCustom, calls=%{n}\n'
    for n in chains
  )
  program = hlo.Program(f"""HloModule jit_f
{pieces}
ENTRY %main.1 (flat: bf16[6,64]) -> bf16[12,64] {{
  %flat = bf16[6,64]{{1,0}} parameter(0)
{calls}}}
""")
  (found,) = program.exchanges(MESH)
  assert (found.kind, found.axes, found.count) == ('all-gather', ('fsdp',), 2)
  assert found.sent == 2 * 6 * 64 * 2


def _moved(body, x, before, after):
  """Exchanges of a program that turns `x` from one layout into another."""
  mesh = sharding.make_mesh(fsdp=2, expert=4)
  with sharding.use(mesh):
    x = jax.ShapeDtypeStruct(
      x, jnp.float32, sharding=jax.NamedSharding(mesh, before)
    )
    out = jax.NamedSharding(mesh, after)
    compiled = jax.jit(body, out_shardings=out).lower(x).compile()
  return hlo.Program(compiled.as_text()).exchanges(dict(mesh.shape))


P = functools.partial(jax.sharding.PartitionSpec)


@pytest.mark.parametrize(
  ('kind', 'before', 'after', 'sent'),
  [
    # [16, 32] float32, a quarter on each of four devices: 512 bytes, of which
    # three quarters leave.
    ('all-to-all', P('expert'), P(None, 'expert'), 512 * 3 / 4),
    # In a ring each passes on the quarters of three.
    ('all-gather', P('expert'), P(), 512 * 3),
  ],
)
def test_bytes_sent(kind, before, after, sent):
  (found,) = _moved(lambda x: x * 1, (16, 32), before, after)
  assert (found.kind, found.axes) == (kind, ('expert',))
  assert found.sent == sent


def test_a_loop_exchanges_every_time():
  def body(x):
    def turn(x, _):
      x = jax.lax.with_sharding_constraint(x + 1, P(None, 'expert'))
      return jax.lax.with_sharding_constraint(jnp.sin(x), P('expert')), None

    return jax.lax.scan(turn, x, length=7)[0]

  (found,) = _moved(body, (16, 32), P('expert'), P('expert'))
  assert (found.kind, found.count) == ('all-to-all', 14)
  assert found.sent == 14 * 512 * 3 / 4


def test_a_loop_of_unknown_length_is_refused():
  def run(x):
    return jax.lax.while_loop(lambda x: x.sum() < 10, lambda x: x + 1, x)

  compiled = jax.jit(run).lower(np.zeros(3, np.float32)).compile()
  with pytest.raises(ValueError, match='unknown length'):
    hlo.Program(compiled.as_text())
