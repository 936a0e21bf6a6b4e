"""Sparse layers on eight devices, by the collectives that were meant.

That whole models train there as on one: `tests/covering.py`.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import re
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from st_moe import paths, sharding
from st_moe.config import Capacity, Part, StackConfig
from st_moe.model.moe import MoE
from st_moe.model.transformer import Transformer
from st_moe.routing.types import RouteContext
from st_moe.train.state import abstract_params
from tests.helpers import (
  assert_trees_close,
  boxed_shapes,
  examples,
  jit,
  padded_batch,
  random_params,
  tiny,
  with_moe,
)

MESHES = {
  'data 8': dict(data=8),
  'data 2 x expert 4': dict(data=2, expert=4),
  'fsdp 2 x expert 2 x model 2': dict(fsdp=2, expert=2, model=2),
}
ALL_MESHES = {**MESHES, 'model 8': dict(model=8)}


def _mesh(name):
  return sharding.make_mesh(**ALL_MESHES[name], num_experts=4)


def _use(name):
  return sharding.use(_mesh(name))


MODEL = tiny(
  encoder=StackConfig(1, 1, 0),
  decoder=StackConfig(1, 1, 0),
  moe={
    'selector': Part.of('top_k', k=2, train_policy='all'),
    'train_capacity': Capacity(1.0, minimum=1),
  },
)


# One sparse layer.

LAYER = with_moe(MODEL, selector=Part.of('top_k', k=2))  # Routes at random.


def _layer_inputs(rows=16, train=True):
  x = np.random.default_rng(0).standard_normal((rows, 4, 16), np.float32)
  valid = np.arange(4) < 1 + np.arange(rows)[:, None] % 4
  ctx = RouteContext(valid=jnp.asarray(valid), deterministic=not train)
  return x, ctx


def _layer_params(config):
  params = random_params(
    MoE(config, config.moe, 8), *_layer_inputs(train=False)
  )
  params['router']['kernel'] *= 3
  return params


def _answer(config, group_size, params, x, ctx):
  return MoE(config, config.moe, group_size).apply(
    {'params': params}, x, ctx, rngs={'dropout': jax.random.key(3)}
  )


def _slope(config, group_size, params, x, ctx):
  loss = lambda p, x: (_answer(config, group_size, p, x, ctx) ** 2).sum()
  return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


@pytest.mark.parametrize(
  ('dispatcher', 'group_size'), [('index', 10), ('grouped', 10)]
)
def test_noise_of_the_router_does_not_know_the_mesh(dispatcher, group_size):
  # 64 tokens: seven groups of 10, one of them not full and, on eight devices,
  # an empty one. Random numbers are a function of their place in the array,
  # so those shift none.
  config = with_moe(LAYER, dispatcher=dispatcher)
  params, (x, ctx) = _layer_params(config), _layer_inputs()
  run = functools.partial(_slope, config, group_size)
  one = jit(run)(params, x, ctx)
  with _use('data 2 x expert 4') as mesh:
    x8 = jax.device_put(x, sharding.batch_sharding(mesh))
    eight = jit(run)(params, x8, ctx)
  np.testing.assert_allclose(eight[0], one[0], rtol=2e-5)
  assert_trees_close(eight[1], one[1])


@pytest.mark.parametrize(
  ('transport', 'name'),
  [
    ('gspmd', 'data 8'),
    ('gspmd', 'fsdp 2 x expert 2 x model 2'),
    ('shard_map', 'data 8'),
    ('shard_map', 'fsdp 2 x expert 2 x model 2'),
    ('two_hop', 'data 2 x expert 4'),
  ],
)
@pytest.mark.parametrize('dispatcher', ['index', 'grouped'])
def test_every_transport_brings_the_same(
  dispatcher, transport, name, monkeypatch
):
  monkeypatch.setattr(sharding, 'neighbours', lambda mesh: 2)
  calm = Part.of('top_k', k=2, train_policy='all')
  config = with_moe(LAYER, selector=calm, dispatcher=dispatcher)
  params, (x, ctx) = _layer_params(config), _layer_inputs()
  one = jit(functools.partial(_slope, config, 8))(params, x, ctx)
  config = with_moe(config, transport=transport)
  with _use(name) as mesh:
    x8 = jax.device_put(x, sharding.batch_sharding(mesh))
    eight = jit(functools.partial(_slope, config, 8))(params, x8, ctx)
  np.testing.assert_allclose(eight[0], one[0], rtol=2e-5)
  assert_trees_close(eight[1], one[1])


@pytest.mark.parametrize('near', [2, 4])
def test_two_hops_are_one_all_to_all(monkeypatch, near):
  """Of eight devices on hosts of two and of four."""
  monkeypatch.setattr(sharding, 'neighbours', lambda mesh: near)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((16, 8, 24), np.float32)
  here, there = ('expert', None, None), (None, None, 'expert')
  with sharding.use(sharding.make_mesh(expert=8, num_experts=8)):
    for layouts, split, join in ((here, there), 2, 0), ((there, here), 0, 2):
      move = lambda by, x, layouts=layouts, split=split, join=join: (
        sharding.move(x, *layouts, split=split, join=join, by=by)
      )
      one, two = (
        jit(functools.partial(move, by)) for by in ('shard_map', 'two_hop')
      )
      np.testing.assert_array_equal(one(x), x)
      np.testing.assert_array_equal(two(x), x)
      assert _all_to_alls(one.lower(x).compile()) == 1
      assert _all_to_alls(two.lower(x).compile()) == 2
      assert str(two(x).sharding.spec) == str(one(x).sharding.spec)


def test_who_is_near():
  Device = collections.namedtuple('Device', 'process_index slice_index')
  lie = lambda devices: sharding.neighbours(
    types.SimpleNamespace(
      devices=np.fromiter(devices, object).reshape(1, 1, 8, 1),
      axis_names=sharding.AXES,
      shape={'expert': 8},
    )
  )
  assert lie(Device(n // 4, 0) for n in range(8)) == 4  # Two hosts.
  assert lie(Device(n // 2, n // 4) for n in range(8)) == 4  # Two slices.
  assert lie(Device(n // 3, 0) for n in range(8)) == 1  # 3, 3 and 2.


@pytest.mark.parametrize('name', [None, *ALL_MESHES])
def test_the_loop_knows_the_slope_of_what_it_drops(name):
  # Against finite differences: the way back drops the same hidden units.
  config = dataclasses.replace(
    _every_option(LAYER, expert_dropout=0.3), activation=Part('gelu')
  )
  params, (x, ctx) = _layer_params(config), _layer_inputs()

  def answer(experts):
    both = {**params, 'experts': experts}
    return _answer(config, 8, both, x, ctx)

  with _use(name) if name else contextlib.nullcontext():
    check_grads(
      jax.jit(answer), (params['experts'],), 1, ['rev'], atol=0.02, rtol=0.02
    )


def _every_option(config, **moe):
  calm = Part.of('top_k', k=2, train_policy='all')
  return with_moe(
    config,
    selector=calm,
    dispatcher='grouped',
    multiplicative_bias=True,
    **moe,
  )


@pytest.mark.parametrize('name', ALL_MESHES)
def test_gradients_of_the_loop_are_summed_where_weights_are_shared(name):
  config = _every_option(LAYER)
  params, (x, ctx) = _layer_params(config), _layer_inputs()
  one = jit(functools.partial(_slope, config, 8))(params, x, ctx)
  with _use(name) as mesh:
    x8 = jax.device_put(x, sharding.batch_sharding(mesh))
    eight = jit(functools.partial(_slope, config, 8))(params, x8, ctx)
  assert_trees_close(eight[1], one[1])
  assert np.abs(one[1][0]['experts']['multiplicative_bias']).min() > 0


def test_each_device_drops_units_of_its_own():
  config = _every_option(LAYER, expert_dropout=0.5)
  params, (x, ctx) = _layer_params(config), _layer_inputs()
  x = jnp.broadcast_to(x[:1, :1], x.shape)
  ctx = ctx.replace(valid=jnp.full(ctx.valid.shape, True))
  with _use('data 8') as mesh:
    x8 = jax.device_put(x, sharding.batch_sharding(mesh))
    y = jit(functools.partial(_answer, config, 8))(params, x8, ctx)
  assert len(np.unique(np.reshape(y, (8, -1)), axis=0)) == 8


def test_noise_of_the_router_is_there():
  # Or the test above would show nothing.
  params, (x, ctx) = _layer_params(LAYER), _layer_inputs()
  all_stay = with_moe(LAYER, selector=Part.of('top_k', k=2, train_policy='all'))
  run = lambda config: jit(functools.partial(_answer, config, 8))
  a, b = (run(config)(params, x, ctx) for config in (LAYER, all_stay))
  assert np.abs(a - b).max() > 0.1


def _lowered(name, function, config=LAYER, rows=16, group_size=8):
  params, (x, ctx) = _layer_params(config), _layer_inputs(rows)
  with _use(name) as mesh:
    x = jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)
    )
    boxed = boxed_shapes(
      MoE(config, config.moe, 8), *_layer_inputs(train=False)
    )
    params = jax.tree.map(
      lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
      params,
      sharding.of_boxed(boxed, mesh),
    )
    run = jit(functools.partial(function, config, group_size))
    return run.lower(params, x, ctx)


def _count(lowered):
  return lowered.as_text().count('sdy.sharding_constraint')


def _all_to_alls(compiled):
  return compiled.as_text().count(' all-to-all(')


def test_constraints_are_in_the_program():
  # Tokens in, tokens to experts (as they lie, as they should), answers back
  # (likewise), tokens out.
  assert _count(_lowered('data 2 x expert 4', _answer)) == 6
  grouped = with_moe(LAYER, dispatcher='grouped', transport='gspmd')
  assert _count(_lowered('data 2 x expert 4', _answer, grouped)) == 2


def test_a_bare_mesh_has_no_constraints():
  """The trap that `sharding.use` is for: right numbers, no parallel experts."""
  params, (x, ctx) = _layer_params(LAYER), _layer_inputs()
  lower = lambda: jit(functools.partial(_answer, LAYER, 8)).lower(
    params, x, ctx
  )
  mesh = _mesh('data 2 x expert 4')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # That jax deprecates it is the point.
    with mesh, nn.logical_axis_rules(sharding.rules(mesh)):
      assert _count(lower()) == 0
  with jax.set_mesh(mesh):  # And without rules nothing has a name.
    assert _count(lower()) == 0
  with sharding.use(mesh):
    assert _count(lower()) == 6


@pytest.mark.parametrize(
  ('dispatcher', 'transport'),
  [('index', 'gspmd'), ('index', 'shard_map'), ('mask', 'gspmd')],
)
def test_two_all_to_alls_there_and_two_back(dispatcher, transport):
  config = with_moe(LAYER, dispatcher=dispatcher, transport=transport)
  both = _lowered('data 2 x expert 4', _slope, config).compile()
  assert _all_to_alls(both) == 4
  if dispatcher == 'index':
    forward = _lowered('data 2 x expert 4', _answer, config).compile()
    assert _all_to_alls(forward) == 2


def test_experts_on_one_device_travel_nowhere():
  assert _all_to_alls(_lowered('data 8', _answer).compile()) == 0


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_replays_no_exchange(remat):
  # Two sparse layers in a scan: the program holds one of them, twice two.
  assert _all_to_alls(_two_layers(MODEL, remat)) == 4


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_gathers_no_tokens_again(remat):
  config = with_moe(MODEL, dispatcher='grouped')
  text = _two_layers(config, remat).as_text()
  # There, and the gradient back; numbers of seats are gathered for less than
  # it would take to keep them.
  assert len(re.findall(r'f32\[4,8,1,16\]\S* all-gather\(', text)) == 2


@functools.cache
def _two_layers(config, remat):
  """The gradient of an encoder, compiled."""
  config = dataclasses.replace(
    config, decoder=None, encoder=StackConfig(2, 1, 0, 8), remat=remat
  )
  batch = padded_batch(config, examples(config, [(8, 0)] * 8))
  model = Transformer(config)

  def loss(params):
    logits = model.apply(
      {'params': params}, **batch, rngs={'dropout': jax.random.key(0)}
    )
    return (logits**2).mean()

  with _use('data 2 x expert 4') as mesh:
    boxed = boxed_shapes(model, **batch)
    params = jax.tree.map(
      lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
      sharding.unbox(boxed),
      sharding.of_boxed(boxed, mesh),
    )
    return jit(jax.grad(loss)).lower(params).compile()


# Rules.


def test_every_axis_has_a_rule_and_a_use():
  config = with_moe(MODEL, multiplicative_bias=True)
  batch = padded_batch(config, examples(config))
  boxed = boxed_shapes(Transformer(config), **batch)
  named = {a for axes in _leaves(sharding.axis_names(boxed)) for a in axes}
  assert named <= {name for name, _ in sharding.RULES}
  assert named == {
    'embed', 'vocab', 'heads', 'kv', 'mlp', 'layers', 'expert', 'expert_mlp',
    'unmodeled', 'relpos_buckets',
  }  # fmt: skip
  # Every leaf is boxed, with a name for every axis.
  shapes = paths.by_path(sharding.unbox(boxed))
  axes = _leaves(sharding.axis_names(boxed))
  assert len(axes) == len(shapes)
  assert [len(a) for a in axes] == [s.ndim for s in shapes.values()]


def _leaves(axes):
  return jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))


def test_weights_and_activations_share_no_name():
  # Splitting `embed` over fsdp must not split what flows between layers.
  table = dict(sharding.RULES)
  assert 'fsdp' in table['embed'] and table['activation_embed'] is None


def test_what_lies_where():
  boxed = boxed_shapes(MoE(LAYER, LAYER.moe, 8), *_layer_inputs(train=False))
  spec = lambda s: tuple(s.spec)

  def specs(name):
    found = jax.tree.map(spec, sharding.of_boxed(boxed, _mesh(name)))
    return found['experts'], found['router']['kernel']

  # Each expert at its place, the rest everywhere.
  experts, router = specs('data 2 x expert 4')
  assert experts['wi_0']['kernel'] == ('expert', None, 'model')
  assert experts['wo']['kernel'] == ('expert', 'model', None)
  assert router == (None, None)
  # FSDP splits experts by its own axis and all else by that of experts too.
  experts, router = specs('fsdp 2 x expert 2 x model 2')
  assert experts['wi_0']['kernel'] == ('expert', 'fsdp', 'model')
  assert experts['wo']['kernel'] == ('expert', 'model', 'fsdp')
  assert router == (('fsdp', 'expert'), None)
  # What has no box lies on every device.
  mesh = _mesh('fsdp 2 x expert 2 x model 2')
  bare = sharding.of_boxed({'step': jnp.zeros(())}, mesh)
  assert spec(bare['step']) == ()


def _place(mesh, **shape):
  box = nn.Partitioned(jnp.zeros(tuple(shape.values())), tuple(shape))
  return sharding.of_boxed(box, mesh).spec


def test_what_cannot_be_split_by_both_is_split_by_one():
  place = functools.partial(_place, sharding.make_mesh(fsdp=2, expert=4))
  assert tuple(place(embed=16, mlp=3)) == (('fsdp', 'expert'), 'model')
  assert tuple(place(embed=6, mlp=3)) == ('fsdp', 'model')
  # Whole tiles of 16 rows before more parts.
  assert tuple(place(embed=128, mlp=3)) == (('fsdp', 'expert'), 'model')
  assert tuple(place(embed=64, mlp=3)) == ('expert', 'model')
  assert tuple(place(embed=8, mlp=3)) == (('fsdp', 'expert'), 'model')
  assert tuple(place(layers=2, embed=16)) == ()  # A vector a layer: whole.
  with pytest.raises(ValueError, match="'embed' of size 5 .* mesh.fsdp"):
    place(embed=5, mlp=3)


def test_fsdp_alone_splits_what_is_less_than_whole_tiles():
  # And does not take `expert`, one device long, for a way to split.
  place = functools.partial(_place, sharding.make_mesh(fsdp=8))
  assert tuple(place(embed=64, mlp=3)) == ('fsdp', 'model')
  assert tuple(place(embed=128, mlp=3)) == ('fsdp', 'model')
  with pytest.raises(ValueError, match="'embed' of size 20 .*mesh.fsdp, only"):
    place(embed=20, mlp=3)


@pytest.mark.parametrize(
  ('sizes', 'change', 'message'),
  [
    (dict(model=4), dict(num_heads=6), "heads' of size 6 .* 4 .*: 3 and 6"),
    (dict(model=8), dict(mlp_dim=20), "mlp' of size 20 .*model,.*: 5 and 10"),
    (dict(model=8), dict(vocab_size=36), "vocab' of size 36 .*: 6 and 9"),
    (
      dict(fsdp=8),
      dict(embed_dim=20),
      "embed' of size 20 .*fsdp,.*: 5 and 10",
    ),
  ],
)
def test_a_dimension_that_does_not_divide(sizes, change, message):
  change = {'num_heads': 8, **change}
  model = Transformer(dataclasses.replace(MODEL, **change))
  mesh = sharding.make_mesh(**sizes)
  with sharding.use(mesh), pytest.raises(ValueError, match=message):
    abstract_params(model, mesh)


def test_shards_counts_the_devices_of_an_axis():
  assert sharding.shards('group') == 1
  with _use('data 2 x expert 4'):
    assert sharding.shards('group') == sharding.shards('batch') == 8
    assert sharding.shards('expert') == 4
    assert sharding.shards('expert_replicas') == 2
    assert sharding.shards('length') == 1
  with _use('fsdp 2 x expert 2 x model 2'):
    assert sharding.shards('group') == 4


@pytest.mark.parametrize(
  ('shape', 'axes', 'message'),
  [
    ((8, 3), ('batch', 'lenght'), "No sharding rule for \\['lenght'\\]"),
    ((8, 3), ('batch',), r"\('batch',\) names 1 axes of a rank-2 array"),
    (
      (9, 3),
      ('batch', 'length'),
      "'batch' of size 9 does not split over the 8",
    ),
    ((6,), ('expert',), "'expert' of size 6 does not split over the 4 devices"),
  ],
)
def test_constrain_refuses_what_jax_would_drop(shape, axes, message):
  with (
    _use('data 2 x expert 4'),
    pytest.raises(ValueError, match=message),
  ):
    jax.eval_shape(lambda: sharding.constrain(jnp.zeros(shape), *axes))


def test_constrain_outside_a_mesh_is_a_no_op():
  x = jnp.zeros((9, 3))
  assert sharding.constrain(x, 'batch', 'length') is x
  with pytest.raises(ValueError, match='names 1 axes'):
    sharding.constrain(x, 'batch')


# Meshes.


def _sizes(mesh):
  return tuple(mesh.shape.values())


def test_data_takes_what_the_others_leave():
  assert _sizes(sharding.make_mesh()) == (8, 1, 1, 1)
  assert _sizes(sharding.make_mesh(expert=4)) == (2, 1, 4, 1)
  assert _sizes(sharding.make_mesh(fsdp=2, model=2)) == (2, 2, 1, 2)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert _sizes(one) == (1, 1, 1, 1) and one.axis_names == sharding.AXES


def test_an_expert_axis_longer_than_the_experts(caplog):
  with caplog.at_level(logging.INFO):
    mesh = sharding.make_mesh(expert=8, num_experts=4)
  assert _sizes(mesh) == (2, 1, 4, 1)
  assert (
    'mesh.expert=8 for 4 experts: 2 copies of each along data' in caplog.text
  )
  four = jax.devices()[:4]
  mesh = sharding.make_mesh(data=2, expert=2, num_experts=1, devices=four)
  assert _sizes(mesh) == (4, 1, 1, 1)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(data=3), 'data 3 x .* needs 3 devices; there are 8'),
    (dict(expert=3), 'expert 3 x model 1 = 3 does .* 8 devices; .* 2 and 4'),
    (dict(expert=16), 'expert 16 x model 1 = 16 does not divide 8 .* are 8'),
    (dict(data=2, expert=8), 'data 2 x .* expert 8 .* 16 devices; there are 8'),
    (dict(expert=8, num_experts=3), 'axis of 8 .* copies of 3 .*expert=3'),
    (
      dict(expert=4, num_experts=6),
      r'6 experts do not split over mesh.expert=4; .* divide are 3 and 6',
    ),
  ],
)
def test_sizes_that_do_not_fit(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)
