"""Laws of losses, experts, what stands beside them, and rules after a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import paths
from st_moe.model.dispatch import DISPATCHERS
from st_moe.model.moe import MoE
from st_moe.model.rows import Room
from st_moe.model.transformer import Transformer
from st_moe.routing.seating import seat
from st_moe.routing.types import Assignment
from st_moe.train import step
from tests.conformance import chain, programs, tables
from tests.conformance.chain import KEYS, TOKENS, WIDTH
from tests.helpers import assert_trees_close, jit

every = lambda *kinds: pytest.mark.parametrize(
  'case', tables.of(*kinds), ids=str
)

# Losses. Three groups of eight tokens: a full one, a shorter one, an empty one.

FULL, SHORT, EMPTY = (np.arange(TOKENS) < n for n in (TOKENS, 5, 0))
GROUPS = np.random.default_rng(0).standard_normal((3, TOKENS, WIDTH))


@functools.cache
def _layer(case: tables.Case):
  """(sum, weight) of a loss in a layer with it alone, of x [g, s, d].

  One program of an evaluation, and one of training that has slopes, too.
  """
  alone = dataclasses.replace(case.moe, losses=(case.part,))
  moe = MoE(case.model, alone, TOKENS)
  ctx = chain.context(valid=np.stack([FULL, SHORT, EMPTY]))
  params = chain.weights(moe, jnp.zeros((3, TOKENS, WIDTH)), ctx)
  name = case.part.name

  def found(params, x, valid, train):
    valid = jnp.asarray(valid)
    ctx_ = chain.context(train=train, valid=np.full((3, TOKENS), True))
    tokens = jnp.where(valid, ctx_.tokens, 0)
    _, sown = moe.apply(
      {'params': params},
      x,
      # Groups change places, and their tasks would stay behind.
      ctx_.replace(valid=valid, tokens=tokens, task=jnp.zeros_like(tokens)),
      rngs={'dropout': KEYS[0]},
      mutable=['intermediates'],
    )
    return sown['intermediates']['record']['losses'][name]

  def of_sum(params, x, valid):
    both = found(params, x, valid, True)
    return both[0], both

  evaluate = jit(functools.partial(found, params, train=False))
  slope = jit(jax.grad(of_sum, argnums=(0, 1), has_aux=True))
  return evaluate, functools.partial(slope, params)


VALID = np.stack([FULL, SHORT, EMPTY])
GROUPS = GROUPS.astype(np.float32)


@every('losses')
def test_padding_and_empty_groups_move_no_loss(case):
  # In training: some are of its noise.
  _, slope = _layer(case)
  _, before = slope(GROUPS, VALID)
  assert np.isfinite(before).all() and before[1] > 0
  x = GROUPS.copy()
  x[1, 5:] = x[2] = 100 * GROUPS[0, 0]
  np.testing.assert_allclose(slope(x, VALID)[1], before, rtol=1e-6)
  # Of padding alone there is none, nor a slope that is no number.
  slopes, (summed, weight) = slope(GROUPS, VALID[[2, 2, 2]])
  assert summed == weight == 0
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(slopes))


@every('losses')
def test_groups_add_up_in_any_order(case):
  def loss(*order):
    order = [*order]
    return np.array(_layer(case)[0](GROUPS[order], VALID[order]), np.float64)

  whole = loss(0, 1, 2)
  np.testing.assert_allclose(loss(2, 1, 0), whole, rtol=2e-5)
  if not case.about.whole and not case.about.joins:
    np.testing.assert_allclose(loss(0, 2, 2) + loss(2, 1, 2), whole, rtol=2e-5)


@every('losses')
def test_a_loss_reaches_what_it_says_and_no_more(case):
  (slopes, of_x), _ = _layer(case)[1](GROUPS, VALID)
  assert not np.asarray(of_x)[~VALID].any(), 'padding has a slope'
  reached = {
    path.partition('/')[0]
    for path, slope in paths.by_path(slopes).items()
    if np.any(slope) and 'kept_' not in path
  }
  assert reached == {*case.about.moves}


@pytest.mark.parametrize('name', [tables.BASE, *tables.METHODS])
def test_only_losses_that_were_asked_for_are_computed(name):
  config = tables.config(name)
  for stack in config.model.stacks:
    moe = config.model.moe_of(stack)
    module = MoE(config.model, moe, TOKENS)
    x, ctx = chain.inputs(), chain.context()
    apply = functools.partial(module.apply, mutable=['intermediates'])
    params = chain.weights(module, x, ctx)
    _, sown = jax.eval_shape(apply, {'params': params}, x, ctx)
    found = sown['intermediates']['record']['losses']
    assert [*found] == [part.name for part in moe.losses]


# Experts.


@every('experts')
def test_a_bank_is_its_two_steps_and_knows_its_axes(case):
  bank, e = chain.bank(case), case.moe.num_experts
  assert bank.count == e
  x = np.random.default_rng(0).standard_normal((e, 3, WIDTH), np.float32)
  y = bank(x)
  assert y.shape == x.shape and y.dtype == x.dtype
  np.testing.assert_array_equal(
    y, np.reshape(bank.answers(bank.hidden(x)), x.shape)
  )
  # Each block through the expert that is named.
  x, named = x[:, :1], np.arange(e)[::-1]
  expected = np.asarray(bank(x[named]))[named]
  np.testing.assert_allclose(bank(x, named), expected, rtol=1e-5, atol=1e-6)
  is_axes = lambda a: isinstance(a, tuple) and not isinstance(a[0], tuple)
  axes = jax.tree.leaves(bank.axes(), is_leaf=is_axes)
  for array, names in zip(jax.tree.leaves(bank), axes, strict=True):
    assert len(names) == array.ndim, names


@every('experts')
def test_every_dispatcher_is_a_loop_in_values_and_slopes(case):
  """And an expert that nobody asks has a slope of exactly 0."""
  e, x = case.moe.num_experts, chain.inputs()
  bank = chain.bank(case)
  rng = np.random.default_rng(1)
  g, s = x.shape[:2]
  # Nobody asks the last; two experts a token.
  expert = np.argsort(rng.random((g, s, e - 1)))[..., :2]
  asked = Assignment(
    jnp.asarray(expert),
    jnp.asarray(rng.random((g, s, 2)), jnp.float32),
    jnp.asarray(rng.random((g, s, 2)) < 0.9),
  )
  seats = seat(asked, num_experts=e, capacity=3)
  r = rng.standard_normal(x.shape)

  def loop(x, bank):
    """Every expert on every token, and the weights of who sits."""
    flat = jnp.broadcast_to(x.reshape(1, g * s, -1), (e, g * s, WIDTH))
    answers = bank(flat).reshape(e, g, s, WIDTH)
    return jnp.einsum('gse,egsd->gsd', seats.dense(s), answers)

  slope = lambda f: jit(
    jax.value_and_grad(lambda x, bank: (f(x, bank) * r).sum(), argnums=(0, 1))
  )(x, bank)
  value, expected = slope(loop)
  assert not any(np.any(a[-1]) for a in jax.tree.leaves(expected[1]))
  for name, dispatch in DISPATCHERS.items():
    at = lambda x, bank, f=dispatch: f(x, seats, bank, Room(3, e, 'auto'))
    got, slopes = slope(at)
    np.testing.assert_allclose(got, value, rtol=2e-5, err_msg=name)
    assert_trees_close(slopes, expected)
    for a in jax.tree.leaves(slopes[1]):
      assert not np.any(a[-1]), f'{name}: an expert that nobody asked moves'


# Beside.


def _beside(case):
  module = case.made(case.model, case.moe)
  x, y, ctx = chain.inputs(), chain.inputs(1), chain.context()
  params = chain.weights(module, x, y, ctx)

  def answer(x, y, ctx, key=KEYS[0]):
    return module.apply({'params': params}, x, y, ctx, rngs={'dropout': key})

  return answer


@every('beside')
def test_what_stands_beside_answers_token_by_token(case):
  x, y, answer = chain.inputs(), chain.inputs(1), _beside(case)
  for train in (True, False):
    ctx = chain.context(train=train)
    found, _ = answer(x, y, ctx)
    assert found.shape == y.shape and found.dtype == y.dtype
    assert jnp.isfinite(found).all()
    other, _ = answer(x, y, ctx, KEYS[1])
    assert chain.same(found, other) or (train and case.about.noisy)
    moved, _ = answer(x.at[0, 5].add(1), y, ctx)
    np.testing.assert_array_equal(moved[1], found[1])
    if case.about.causal:
      np.testing.assert_array_equal(moved[0, :5], found[0, :5])


@every('beside')
def test_what_stands_beside_is_nothing_at_its_neutral_and_else_is_not(case):
  x, y, ctx = chain.inputs(), chain.inputs(1), chain.context(train=True)
  if isinstance(case.about.neutral, dict):
    found, _ = _beside(case.at(**case.about.neutral))(x, y, ctx)
    np.testing.assert_array_equal(found, y)
  found, _ = _beside(case)(x, y, ctx)
  assert chain.same(found, y) == (not case.about.row)


# Rules after the update.


@functools.cache
def _trees(of: str):
  """Parameters of a config before and after an update, and what rules hear."""
  config, rng = tables.config(of), np.random.default_rng(0)
  draw = lambda a: rng.standard_normal(a.shape, np.float32)
  old = programs.params(of)
  new = jax.tree.map(draw, old)
  hears = jit(
    lambda params: step.forward(
      Transformer(config.model),
      config.loss,
      params,
      programs.batch(config),
      rng=KEYS[0],
      step=jnp.int32(3),
    )
  )
  _, _, heard = jax.device_get(hears(old))
  return config, old, new, heard


@every('after')
def test_a_rule_is_nothing_at_its_neutral_and_else_is_not(case):
  _, old, new, heard = _trees(case.of)
  if isinstance(case.about.neutral, dict):
    neutral = case.at(**case.about.neutral)
    assert chain.same(neutral.made(old, new, heard, jnp.int32(3)), new)
  found = case.made(old, new, heard, jnp.int32(3))
  assert not chain.same(found, new), f'{case.of} has nothing that it moves'
  shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert shapes(found) == shapes(new)


@every('after')
def test_a_rule_does_not_know_how_layers_are_laid_out(case):
  config, old, new, heard = _trees(case.of)
  scanned = case.made(old, new, heard, jnp.int32(3))
  unroll = lambda tree: paths.unroll(tree, config.model)
  apart = {
    where: jax.tree.map(lambda rows, i=i: rows[i], said)
    for path, said in heard.items()
    for where, i in paths.unrolled_paths(f'{path}/x', config.model)
    for where in [where.removesuffix('/x')]
  }
  found = case.made(unroll(old), unroll(new), apart, jnp.int32(3))
  assert_trees_close(found, unroll(scanned), tolerance=1e-6)
