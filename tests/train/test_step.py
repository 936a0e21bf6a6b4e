"""One step of training: what it does, counts, refuses and leaves alone."""

import dataclasses
import functools
import math
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths, sharding
from st_moe.config import (
  Capacity,
  Config,
  DataConfig,
  EvalConfig,
  LossConfig,
  OptimizerConfig,
  Part,
  StackConfig,
)
from st_moe.model.layers import Embed
from st_moe.model.moe import into_groups
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer, sizes, step
from st_moe.train.state import (
  Start,
  init_state,
  parameter_axes,
  smallest_inputs,
)
from tests.helpers import (
  assert_trees_close,
  examples,
  padded_batch,
  random_params,
  tiny,
)

# One sparse layer a stack, noise off. 8 rows are 8 groups of 16 encoder tokens
# and 8 of 8 decoder tokens, so a microbatch of 2 rows is 2 whole groups.
MODEL = tiny(
  encoder=StackConfig(1, 1, 0, group_size=16),
  decoder=StackConfig(1, 1, 0, group_size=8),
  moe={
    'selector': Part.of('top_k', k=2, train_policy='all'),
    'train_capacity': Capacity(1.0, minimum=1),
    'extra_ffn': 'none',
  },
)
# (inputs, targets): 56 and 38 tokens, and no two microbatches alike.
LENGTHS = [(16, 8), (3, 2), (1, 1), (1, 7), (16, 1), (5, 8), (9, 6), (5, 5)]


def _config(model=MODEL, microbatches=1):
  return Config(
    model=model,
    microbatches=microbatches,
    data=DataConfig(batch_size=8, inputs_length=16, targets_length=8),
    optimizer=OptimizerConfig(min_dim_to_factor=16),
  )


def _batch(model=MODEL, seed=0):
  """A padded batch; an encoder alone is asked for what it reads."""
  batch = padded_batch(model, examples(model, LENGTHS, seed), (16, 8))
  if not model.decoder:
    batch['encoder_target_tokens'] = batch['encoder_input_tokens']
  targets = batch[f'{model.stacks[-1]}_target_tokens']
  batch[f'{model.stacks[-1]}_loss_weights'] = (targets > 0).astype('f4')
  return batch


def _parts(model=MODEL, microbatches=1):
  """(model, optimizer, config) and a numpy state to start from."""
  module, config = Transformer(model), _config(model, microbatches)
  made = optimizer.make(config.optimizer, parameter_axes(module))
  boxed = jax.eval_shape(
    functools.partial(init_state, module, made), jax.random.key(0)
  )
  zeros = jax.tree.map(
    lambda a: np.zeros(a.shape, a.dtype), sharding.unbox(boxed)
  )
  params = random_params(module, **step.inputs_of(_batch(model), model))
  return (module, made, config), zeros.replace(params=params)


@functools.cache
def _compiled(microbatches):
  parts, state = _parts(microbatches=microbatches)
  jitted = jax.jit(step.make_train_step(*parts), donate_argnums=0)
  return jitted.lower(state, _batch()).compile()


def _run(*batches, microbatches=1):
  """State and metrics after these batches, from the state all tests share."""
  state = jax.tree.map(jnp.asarray, _parts()[1])
  for batch in batches:
    state, metrics = _compiled(microbatches)(state, batch)
  return jax.device_get((state, metrics))


def test_the_objective_is_the_sum_of_its_parts():
  _, found = _run(_batch())
  # Metrics are means over both sparse layers, the loss is the sum over them.
  routers = 2 * (1e-2 * found['load_balance'] + 1e-3 * found['router_z'])
  expected = found['cross_entropy'] + 1e-4 * found['z_loss'] + routers
  assert float(found['loss']) == pytest.approx(float(expected), rel=1e-6)
  assert found['target_tokens'] == 38
  assert found['learning_rate'] == np.float32(0.01)
  assert all(np.isfinite(v).all() for v in jax.tree.leaves(found))


def test_the_rate_is_that_of_the_updates_there_were():
  # All but 5 of 40,000 steps were skipped: the schedule is still at its start.
  state = jax.tree.map(jnp.asarray, _parts()[1])
  slots, schedule = state.opt_state
  state = state.replace(
    step=jnp.int32(40_000),
    opt_state=(slots, schedule._replace(count=jnp.int32(5))),
  )
  _, found = _compiled(1)(state, _batch())
  assert found['learning_rate'] == np.float32(0.01)


def test_cross_entropy_by_a_loop_over_the_tokens():
  batch, (_, found) = _batch(), _run(_batch())
  logits = jax.jit(
    lambda p: Transformer(MODEL).apply(
      {'params': p},
      **step.inputs_of(batch, MODEL),
      rngs={'dropout': jax.random.key(0)},
    )
  )(_parts()[1].params)
  total = hits = 0
  for row, targets in zip(
    np.asarray(logits, float), batch['decoder_target_tokens'], strict=True
  ):
    for z, target in zip(row, targets, strict=True):
      if target > 0:
        total += math.log(sum(math.exp(v) for v in z)) - z[target]
        hits += z.argmax() == target
  assert found['cross_entropy'] == pytest.approx(total / 38, rel=1e-5)
  assert found['accuracy'] == pytest.approx(hits / 38)


def test_every_route_is_seated_or_dropped():
  _, found = _run(_batch())
  for stack, tokens, places in (('encoder', 56, 4), ('decoder', 38, 2)):
    load = found[f'{stack}/load']  # [layers, experts]
    assert load.shape == (1, 4) and load.dtype == np.int32
    routes = 2 * tokens
    dropped = routes * float(found[f'{stack}/dropped_routes'])
    assert dropped == pytest.approx(round(dropped), abs=1e-3)
    assert load.sum() + round(dropped) == routes
    assert 0 < dropped < routes
    assert load.max() <= 8 * places  # In each of 8 groups.


def test_four_microbatches_are_one_batch():
  """Loss, metrics, parameters and moments, over two steps."""
  batches = _batch(seed=0), _batch(seed=1)
  whole, parts = (_run(*batches, microbatches=n) for n in (1, 4))
  assert_trees_close(parts[0].params, whole[0].params, tolerance=1e-6)
  # Squares of gradients, some of them small sums of large numbers.
  assert_trees_close(parts[0].opt_state, whole[0].opt_state, tolerance=2e-5)
  assert_trees_close(parts[1], whole[1], tolerance=2e-6)
  # The routing is equal to the last token.
  for name in ('encoder/load', 'decoder/load'):
    np.testing.assert_array_equal(parts[1][name], whole[1][name])
  start = _parts()[1].params
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[0].params, start)
  assert min(jax.tree.leaves(moved)) > 0


def test_logits_in_parts_change_no_step():
  # On eight devices, two of which share the vocabulary.
  (model, made, config), state = _parts()
  config = dataclasses.replace(config, loss=LossConfig(positions=3))
  whole, metrics = _run(_batch())
  with sharding.use(sharding.make_mesh(data=4, model=2)):
    train_step = jax.jit(step.make_train_step(model, made, config))
    parts = jax.device_get(train_step(state, _batch()))
  assert_trees_close(parts[0].params, whole.params, tolerance=1e-6)
  assert_trees_close(parts[1], metrics, tolerance=2e-6)


def test_gradients_stay_as_they_arise():
  # Layers read their weights in bfloat16, routers and embeddings theirs in
  # float32; to cast before the gradient is taken changes no bit of it.
  model = dataclasses.replace(MODEL, dtype='bfloat16')
  (module, _, config), state = _parts(model)
  batch = _batch(model)

  def grads(params):
    objective = functools.partial(step.objective, module, config.loss)
    frozen = jax.tree.map(lambda _: None, params)
    loss = lambda p: objective(
      frozen, p, batch, jax.random.key(0), jnp.int32(0)
    )[0]
    return jax.grad(loss)(params)

  late, early = jax.jit(lambda p: (grads(p), grads(module.as_read(p))))(
    state.params
  )
  roles = {jnp.dtype(d): set() for d in ('bfloat16', 'float32')}
  for path, leaf in paths.by_path(early).items():
    roles[leaf.dtype].add(paths.role(path))
  assert [*roles.values()] == [
    {'attention', 'experts'},
    {'embedding', 'norms', 'router', 'attention'},  # Its table of positions.
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype('f4')), late, early
  )


def _products(jaxpr):
  """The dtype of the result of every matrix product; loops count once."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield eqn.outvars[0].aval.dtype
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from _products(inner)


def test_gradients_of_weights_add_up_in_float32():
  # For each weight read in bfloat16 one product, that of its gradient, leaves
  # float32 to whatever adds up its parts over devices. The rest are the same.
  wide, count = {}, {}
  for sums in ('float32', 'activations'):
    model = dataclasses.replace(MODEL, dtype='bfloat16', gradient_sums=sums)
    (module, _, config), state = _parts(model)
    read, batch = module.as_read(state.params), _batch(model)
    frozen = jax.tree.map(lambda _: None, read)
    of_read = functools.partial(step.objective, module, config.loss, frozen)
    loss = lambda p, of=of_read, batch=batch: of(
      p, batch, jax.random.key(0), jnp.int32(0)
    )[0]
    grad = jax.make_jaxpr(jax.grad(loss))(read)
    found = list(_products(grad.jaxpr))
    wide[sums], count[sums] = found.count(jnp.float32), len(found)
  weights = [w for w in jax.tree.leaves(read) if w.dtype == jnp.bfloat16]
  # Attention, one of two more in the decoder, and three matrices of a bank.
  assert len(weights) == 4 + 8 + 2 * 3
  assert wide['float32'] == wide['activations'] + len(weights)
  assert count['float32'] == count['activations']


def test_what_a_frequent_token_learns_adds_up_in_float32():
  # 1000 times 1: in bfloat16 it would stop at 256, which 1 more does not move.
  embed = Embed(8, 4, jnp.bfloat16)
  tokens = jnp.full((10, 100), 3)
  params = embed.init(jax.random.key(0), tokens)
  loss = lambda p: embed.apply(p, tokens).astype(jnp.float32).sum()
  found = sharding.unbox(jax.grad(loss)(params))['params']['embedding']
  np.testing.assert_array_equal(found, 1000 * np.eye(8)[:, [3, 3, 3, 3]])


def test_the_weighing_pass_costs_nothing():
  """The weights of microbatches need no matrix product; the compiler knows."""
  products = {
    n: len(re.findall(r' dot\(', _compiled(n).as_text())) for n in (1, 4)
  }
  assert products[4] == products[1] > 20
  # The loop over microbatches counts once, with a quarter of the rows.
  flops = {n: _compiled(n).cost_analysis()['flops'] for n in (1, 4)}
  assert flops[4] < flops[1] / 2


def test_all_seeds_share_a_program():
  model = dataclasses.replace(MODEL, decoder=None, dropout=0.5)
  (module, made, config), state = _parts(model)
  lowered = set()
  for seed in (0, 2**32 - 1):
    own = dataclasses.replace(config, seed=seed)
    run = jax.jit(step.make_train_step(module, made, own))
    lowered.add(run.lower(state, _batch(model), np.uint32(seed)).as_text())
    # The numbers that it would draw by itself.
    data = lambda seed: jax.random.key_data(jax.random.key(seed))
    np.testing.assert_array_equal(jax.jit(data)(np.uint32(seed)), data(seed))
  assert len(lowered) == 1


def test_a_bad_batch_is_not_applied():
  good, bad = _batch(), _batch()
  bad['decoder_loss_weights'][0, 0] = np.inf
  start = _parts()[1]
  state, metrics = _run(bad, bad)
  assert not np.isfinite(metrics['loss'])
  assert state.step == 2 and state.bad_steps == metrics['bad_steps'] == 2
  for kept in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(state, kept), getattr(start, kept)
    )
  # A good one counts from 0 again, and moves as if nothing had been.
  state, metrics = _run(bad, bad, good)
  alone, _ = _run(good)
  assert state.step == 3 and state.bad_steps == metrics['bad_steps'] == 0
  for moved in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(state, moved),
      getattr(alone, moved),
    )


def test_the_old_state_is_given_away():
  """Donated: at no time do two sets of parameters lie in memory."""
  state = jax.tree.map(jnp.array, _parts()[1])
  _compiled(1)(state, _batch())
  heavy = jax.tree.leaves((state.params, state.opt_state))
  assert all(leaf.is_deleted() for leaf in heavy)


@pytest.mark.parametrize('missing', ['encoder', 'decoder'])
def test_one_stack_alone_takes_a_step(missing):
  model = dataclasses.replace(MODEL, **{missing: None})
  parts, state = _parts(model)
  batch = _batch(model)
  after, found = jax.jit(step.make_train_step(*parts))(state, batch)
  assert found['target_tokens'] == {'encoder': 38, 'decoder': 56}[missing]
  assert found[f'{model.stacks[0]}/load'].shape == (1, 4)
  assert f'{missing}/load' not in found
  assert 0 < float(found['loss']) < 100 and after.bad_steps == 0
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), after.params, state.params
  )
  assert min(jax.tree.leaves(moved)) > 0


# Sizes.


def _check(devices=1, model=MODEL, microbatches=1, **data):
  config = _config(model, microbatches)
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, **data)
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  sizes.check(config, mesh)


def test_groups_that_straddle_devices_are_told():
  # 8 x 16 and 8 x 8 tokens in groups of 16 and 8: 16 and 8 a device.
  mesh = sharding.make_mesh()
  assert sizes.check_padding(_config(), mesh) == []
  wider = dataclasses.replace(
    MODEL, encoder=dataclasses.replace(MODEL.encoder, group_size=32)
  )
  (line,) = sizes.check_padding(_config(wider), mesh)
  assert 'encoder groups of 32 tokens straddle devices of 16' in line
  assert 'model.encoder.group_size=16' in line
  one = sharding.make_mesh(devices=jax.devices()[:1])
  assert sizes.check_padding(_config(wider), one) == []


def _paper(**overrides):
  """Fine-tuning ST-MoE-32B with the paper's batch on 128 devices."""
  fields = {k.replace('__', '.'): v for k, v in overrides.items()}
  fields['init'] = 'x'
  whole = config_file.to_dict(config_file.load('configs/st_moe_32b.py'))
  config = config_file.load(
    'configs/finetune_superglue.py', fields, base=lambda init: whole
  )
  sizes = dict(data=1, fsdp=2, expert=64, model=1)
  return config, sharding.abstract_mesh(sizes)


def test_the_fine_tuning_of_the_paper_computes_no_empty_groups():
  config, mesh = _paper()
  assert sizes.check_padding(config, mesh) == []
  assert sizes.padding(config, mesh) == {'encoder': 1, 'decoder': 1}


# With the groups of pre-training: 128 x 512 tokens are 16 groups of 4096 and
# 128 x 62 are 9 of 912, but 128 devices compute 128 of each.
PRETRAINED = dict(
  model__encoder__group_size='4096', model__decoder__group_size='912'
)


def test_groups_far_larger_than_a_device_are_refused():
  config, mesh = _paper(**PRETRAINED)
  factors = sizes.padding(config, mesh)
  assert factors == {'encoder': 8, 'decoder': 128 * 912 / (128 * 62)}
  message = (
    '512 encoder tokens for groups of 4096 and 62 decoder tokens for groups of'
    ' 912, .* 8.0 and 14.7 times the places. Set model.encoder.group_size=512'
    ' and model.decoder.group_size=62, .* max_padding=15'
  )
  with pytest.raises(ValueError, match=message):
    sizes.check_padding(config, mesh)
  # The advice is good, both ways.
  sizes.check_padding(_paper(model__encoder__group_size='512')[0], mesh)
  wide = dataclasses.replace(config, max_padding=15.0)
  told = ' '.join(sizes.check_padding(wide, mesh))
  assert 'compute 8.00 times the places' in told
  assert 'compute 14.71 times the places' in told


@pytest.mark.parametrize(
  'changes',
  [
    dict(model__moe__dispatcher='grouped'),  # Computes what sits, no more.
    dict(model__moe__train_capacity__dropless='true'),
    dict(model__moe__group_by='sequence'),
    dict(model__dense='true'),
  ],
)
def test_groups_that_cost_nothing_are_not_refused(changes):
  config, mesh = _paper(**PRETRAINED, **changes)
  told = sizes.check_padding(config, mesh)
  assert not any('times the places' in line for line in told)


def test_up_to_twice_the_places_is_told_and_not_refused():
  # 128 tokens in groups of 32 are 4, but 8 devices compute 8.
  mesh = sharding.make_mesh()
  wider = lambda n: _config(
    dataclasses.replace(
      MODEL, encoder=dataclasses.replace(MODEL.encoder, group_size=n)
    )
  )
  told = sizes.check_padding(wider(32), mesh)
  assert 'and compute 2.00 times the places' in told[0]
  with pytest.raises(ValueError, match='8 devices each has 16 encoder tokens'):
    sizes.check_padding(wider(40), mesh)
  # As the layer cuts them.
  with sharding.use(mesh):
    for size in (16, 32, 40):
      whole = into_groups(jnp.zeros((8, 16, 1)), size).size
      assert sizes.padding(wider(size), mesh)['encoder'] == whole / 128


def test_sizes_that_fit():
  _check(devices=8)
  _check(microbatches=4)
  _check(devices=2, microbatches=4)
  # Without sparse layers there are no groups to keep whole.
  odd = dataclasses.replace(MODEL, encoder=StackConfig(1, 0, 0, group_size=24))
  _check(microbatches=4, model=odd)
  _check(microbatches=4, model=dataclasses.replace(MODEL, dense=True))


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(devices=8, batch_size=12), '=12 .* 8 devices; .* are 8 and 16'),
    (dict(devices=8, batch_size=3), '=3 does not divide .* do are 8[.]$'),
    (
      dict(devices=2, microbatches=4, batch_size=20),
      'batch_size=20 .* 4 microbatches on 2 devices; .* 16 and 24',
    ),
    (dict(batch_size=0), 'batch_size = 0 .* at least 1'),
    (dict(microbatches=0), 'microbatches = 0 .* at least 1'),
  ],
)
def test_a_batch_that_does_not_divide(sizes, message):
  with pytest.raises(ValueError, match=message):
    _check(**sizes)


@pytest.mark.parametrize(
  ('stack', 'group_size', 'message'),
  [
    # 2 rows of 16 are 32 tokens; of 8, 16.
    ('encoder', 24, '2 x 16 tokens .* encoder groups of 24; .* are 16 and 32'),
    ('decoder', 5, '2 x 8 tokens .* decoder groups of 5; .* are 4 and 8'),
    # A group as large as the whole batch of 128 tokens.
    ('encoder', 1000, 'encoder groups of 128; .* are 32 .model.encoder.group'),
  ],
)
def test_a_microbatch_of_broken_groups(stack, group_size, message):
  model = dataclasses.replace(
    MODEL, **{stack: StackConfig(1, 1, 0, group_size=group_size)}
  )
  with pytest.raises(ValueError, match=message):
    _check(model=model, microbatches=4)
  _check(model=model)  # One batch may leave its last group unfilled.


def test_an_evaluation_batch_that_does_not_divide():
  config = dataclasses.replace(_config(), evaluate=EvalConfig(batch_size=20))
  message = 'evaluate.batch_size=20 .* 8 devices; .* are 16 and 24'
  with pytest.raises(ValueError, match=message):
    sizes.check(config, sharding.make_mesh())
  sizes.check(config, sharding.make_mesh(devices=jax.devices()[:4]))


def test_new_parameters_on_eight_devices():
  """A dummy batch as wide as the mesh: 1 row would not split over it."""
  module = Transformer(MODEL)
  alone = parameter_axes(module)
  with sharding.use(sharding.make_mesh(data=2, expert=4)):
    assert smallest_inputs(MODEL)['encoder_input_tokens'].shape == (8, 1)
    assert parameter_axes(module) == alone
  assert smallest_inputs(MODEL)['encoder_input_tokens'].shape == (1, 1)


def test_a_plan_forgets_its_programs_and_can_make_them_again():
  made = []

  def program(x):
    made.append(x)
    return x + 1

  plan = Start(None, None, jax.jit(program), jax.jit(lambda x: program(x)))
  for times in 2, 4:
    for _ in range(2):  # The second call finds it compiled.
      assert plan.begin(plan.random_params(1.0)) == 3.0
    assert len(made) == times
    plan.forget()
