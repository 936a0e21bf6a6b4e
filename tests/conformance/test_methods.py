"""Every method's model, tiny: trained, laid out, saved, asked, exported.

One method by turn of the day; all of them with --all-methods.
"""

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import about, checkpoint, counts, paths, sharding
from st_moe.config import CheckpointConfig, Config
from st_moe.interop import convert
from st_moe.model import parts
from st_moe.model.transformer import Transformer
from st_moe.plan import cost, memory
from st_moe.train import after, step, terms
from st_moe.train.state import abstract_params
from tests.conformance import programs, tables

TOLERANCE = 2e-5
every_method = pytest.mark.parametrize('name', tables.METHODS)


def _parts(config: Config):
  """(field, part, what it says of itself), of every sparse layer."""
  for stack in config.model.stacks:
    if config.model.plan(stack).num_sparse:
      for field, part in parts.of(config.model.moe_of(stack)):
        yield field, part, about.of(parts.choose(field, part))


# What needs no program.


@every_method
def test_a_config_is_accepted_whole(name):
  config = tables.config(name)
  parts.check(config.model)
  terms.check(config.model, config.microbatches)
  after.check(config.optimizer, config.model, config.init)


@every_method
def test_four_microbatches_or_the_reason(name):
  config = tables.config(name)
  whole = [p.name for f, p, said in _parts(config) if said.whole or said.joins]
  if whole:
    with pytest.raises(ValueError, match=rf'{whole[0]} is of a whole batch'):
      terms.check(config.model, 4)
  else:
    terms.check(config.model, 4)


# What is traced and not compiled.


def _flops(jaxpr) -> int:
  """Of its products: in a loop by its turns, of branches the largest.

  A weighted sum is none, as losses take them: one side has no axis of its own.
  """
  found = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (into, _), (alike, _) = eqn.params['dimension_numbers']
      sides = [v.aval for v in eqn.invars]
      depth = np.prod([sides[0].shape[i] for i in into], dtype=int)
      own = all(side.ndim > len(into) + len(alike) for side in sides)
      found += 2 * depth * eqn.outvars[0].aval.size * own
    turns = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
    each = [_flops(inner) for inner in _inner(eqn.params.values())]
    one_of_them = eqn.primitive.name == 'cond'
    found += turns * (max if one_of_them else sum)(each or [0])
  return found


def _inner(values):
  """The programs among parameters of an operation."""
  for value in values:
    if isinstance(value, tuple | list):
      yield from _inner(value)
    elif hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
      yield getattr(value, 'jaxpr', value)


def test_parameters_have_roles_and_products_are_counted(method):
  config = tables.config(method)
  model = Transformer(config.model)
  sizes = dict(data=1, fsdp=2, expert=2, model=2)
  # Every axis has its rule.
  shapes = abstract_params(model, sharding.abstract_mesh(sizes))
  by_path = paths.by_path(shapes)
  assert all(paths.role(path) for path in by_path)
  kept = {p.rpartition('kept_')[2] for p in by_path if '/moe/kept_' in p}
  assert kept == {
    n for field, _, said in _parts(config) for n, _ in said.keeps
    if field == 'shaping'
  }  # fmt: skip
  # Of a loop that ends when all are served, no program says the turns.
  places = lambda moe: dataclasses.replace(
    moe,
    dispatcher='index',
    train_capacity=dataclasses.replace(moe.train_capacity, dropless=False),
  )
  config = programs.with_each_moe(config, places)
  model = Transformer(config.model)
  inputs = step.inputs_of(programs.batch(config), config.model)
  traced = jax.make_jaxpr(
    lambda params: model.apply(
      {'params': params}, **inputs, rngs={'dropout': jax.random.key(0)}
    )
  )(abstract_params(model))
  n, m = tables.LENGTHS
  heads, buckets = config.model.num_heads, config.model.relpos_buckets
  squares = {'encoder': n * n, 'decoder': m * m}
  chosen = sum(squares[s] for s in config.model.stacks)
  products = counts.products(config.model, n, m)
  expected = tables.ROWS * sum(p.flops for p in products)
  expected += 2 * heads * buckets * chosen  # Of positions, once for all rows.
  # Hidden units of a token are rounded.
  assert _flops(traced.jaxpr) == pytest.approx(expected, rel=2e-3)


def test_a_plan_is_arithmetic_and_its_state_that_of_the_run(method):
  config = tables.config(method)
  sizes = dict.fromkeys(sharding.AXES, 1)
  assert cost.work(config, sizes).ideal > 0
  found = memory.state(config, sharding.abstract_mesh(sizes))
  state, _ = programs.training(method)
  held = {'parameters': state.params, 'optimizer': state.opt_state}
  for what, tree in held.items():
    assert found[what] == sum(a.nbytes for a in jax.tree.leaves(tree)), what


def test_bfloat16_stays_out_of_routing(method):
  config = tables.config(method)
  model = dataclasses.replace(config.model, dtype='bfloat16')
  model, batch = Transformer(model), programs.batch(config)
  ask = lambda params: model.apply(
    {'params': params},
    **step.inputs_of(batch, config.model),
    project=False,
    enable_dropout=False,
    mutable=['routing', 'intermediates'],
  )
  x, sown = jax.eval_shape(ask, programs.params(method))
  assert x.dtype == jnp.bfloat16
  routed = paths.by_path(sown)
  assert any('scores' in path for path in routed)
  for path, leaf in routed.items():
    assert leaf.dtype != jnp.bfloat16, path


# Trained.


def test_ten_steps_lower_the_loss_and_move_what_they_should(method):
  config = tables.config(method)
  states, metrics = programs.trained(method, 10)
  losses = [float(m['loss']) for m in metrics]
  assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1, losses
  before, end = (paths.by_path(states[i].params) for i in (0, -1))
  train = config.optimizer.train
  for path, leaf in before.items():
    moved = not np.array_equal(leaf, end[path])
    if paths.trains(train, path):
      assert moved, f'{path} is trained and stays'
    elif not config.optimizer.after:
      assert not moved, f'{path} is frozen and moves'


def test_it_is_not_idle(method):
  """Three steps of it, and of the base, from what they have in common."""
  base = f'{method}:base'
  same = tables.config(base).model == tables.config(tables.BASE).model
  base = tables.BASE if same else base
  (_, mine), (_, others) = (programs.trained(n, 10) for n in (method, base))
  differ = [
    a['loss'] != b['loss'] or a['l2_params'] != b['l2_params']
    for a, b in zip(mine[:3], others[:3], strict=True)
  ]
  assert any(differ), 'it trains as its base does'


def test_layers_microbatches_and_recomputing_change_no_number(method):
  """Scanned, whole and kept, as unrolled, in four parts and computed again."""
  config = programs.one_stack(tables.config(method))
  whole = any(said.whole or said.joins for _, _, said in _parts(config))
  scanned = dataclasses.replace(config.model, scan_layers=True, remat='none')
  apart = dataclasses.replace(scanned, scan_layers=False, remat='full')
  one, other = (
    programs.quiet(
      dataclasses.replace(config, model=model, microbatches=n),
      programs.params(method),
    )
    for model, n in ((scanned, 1), (apart, 1 if whole else 4))
  )
  off = programs.differences(other, one)
  worst = max(off, key=off.get)
  assert off[worst] < TOLERANCE, (worst, off[worst])


def test_a_run_that_stops_goes_on_with_the_same_bits(method, tmp_path):
  states, _ = programs.trained(method, 10)
  _, advance = programs.training(method)
  saved = jax.tree.map(jnp.asarray, states[2])
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(2, saved, {})
  checkpoints.close()
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  like = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
    saved,
  )
  state, _ = checkpoints.restore(like)
  checkpoints.close()
  for expected in states[3:5]:
    state, _ = advance(state)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


# Asked.


def _both(method) -> Config:
  config = tables.config(method)
  if config.model.stacks != ('encoder', 'decoder'):
    pytest.skip('it has one stack alone, which answers no prompts')
  return config


def test_no_token_hears_of_a_later_one(method):
  config = tables.config(method)
  if config.model.decoder is None:
    pytest.skip('it has no decoder')
  logits, _ = programs.answering(method)
  batch = programs.batch(config)
  tokens = batch['decoder_input_tokens'].copy()
  tokens[:, 4] = 1 + tokens[:, 4] % 62
  before = np.asarray(logits(batch))
  later = np.asarray(logits({**batch, 'decoder_input_tokens': tokens}))
  np.testing.assert_array_equal(later[:, :4], before[:, :4])
  assert (later[0, 4:] != before[0, 4:]).any()


def test_an_answer_does_not_know_its_neighbours(method):
  config = tables.config(method)
  logits, _ = programs.answering(method)
  batch, other = programs.batch(config), programs.batch(config, seed=1)
  mixed = {k: np.concatenate([v[:2], other[k][2:]]) for k, v in batch.items()}
  real = step.targets_of(batch, config.model)[1][:2] > 0
  before, after = (np.asarray(logits(b))[:2][real] for b in (batch, mixed))
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_one_token_at_a_time_is_all_of_them(method):
  config = _both(method)
  logits, generate = programs.answering(method)
  batch = programs.batch(config)
  prompts = batch['encoder_input_tokens']
  # What it says by itself, and what is put into its mouth.
  said = generate(prompts, np.zeros_like(batch['decoder_target_tokens']))
  forced = np.random.default_rng(5).integers(1, 64, said.tokens[:, 0].shape)
  told = generate(prompts, forced.astype(np.int32))
  for found in (said, told):
    tokens = np.asarray(found.tokens[:, 0])
    shifted = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    whole = np.asarray(
      jax.nn.log_softmax(
        logits(
          {
            **batch,
            'decoder_input_tokens': shifted,
            'decoder_target_tokens': tokens,
          }
        )
      )
    )
    each = np.take_along_axis(whole, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(
      found.logprobs[:, 0], each, rtol=TOLERANCE, atol=TOLERANCE
    )
    if found is said:
      np.testing.assert_array_equal(tokens, 1 + whole[..., 1:].argmax(-1))
  np.testing.assert_array_equal(told.tokens[:, 0], forced)


# Exported.

REFUSED = {
  'hf': 'HuggingFace has ',
  't5x': '(Flaxformer|T5X) has ',
  't5x_orbax': '(Flaxformer|T5X) has ',
  'mtf': 'Mesh-TensorFlow is read here and not written',
}


@pytest.mark.parametrize('format', REFUSED)
def test_an_export_comes_back_or_is_refused_by_name(method, format, tmp_path):
  config = tables.config(method)
  config = dataclasses.replace(
    config, model=dataclasses.replace(config.model, scan_layers=False)
  )
  shapes = abstract_params(Transformer(config.model))
  try:
    convert.check_export(format, config, shapes)
  except ValueError as e:
    unnamed = f'{format} has no name for '
    assert re.match(f'{REFUSED[format]}|{unnamed}', str(e)), e
    assert '\n' not in str(e)
    return
  plain = {'linear', 'top_k', 'ffn', 'nothing', 'auto', 'index', 'grouped'}
  own = {p.name for f, p, _ in _parts(config) if f != 'losses'} - plain
  assert not own, f'{format} has no {own}'
  params = paths.unroll(programs.params(method), config.model)
  module = importlib.import_module(convert.FORMATS[format])
  module.save(str(tmp_path / 'there'), params, config, None)
  source = module.open_source(str(tmp_path / 'there'))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use(mesh):
    model = dataclasses.replace(source.config.model, scan_layers=False)
    loaded = source.load(abstract_params(Transformer(model), mesh))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), params)
