"""The whole sparse layer against plain loops, and what it promises."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.config import Capacity, MoEConfig, Part
from st_moe.model.dispatch import fitting
from st_moe.model.moe import MoE, into_groups
from st_moe.routing.selectors import dropless
from st_moe.routing.types import RouteContext
from tests.helpers import (
  jit,
  random_params,
  slow_expert,
  slow_moe,
  tiny,
  with_moe,
)

B, L, D = 4, 6, 16  # 24 tokens.


def _x(seed=0, d=D):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((B, L, d)).astype(np.float32)


def _valid():
  """Rows of 6, 6, 4 and 1 tokens."""
  return np.arange(L) < np.array([6, 6, 4, 1])[:, None]


def _ctx(valid, *, train=False):
  return RouteContext(valid=jnp.asarray(valid), deterministic=not train)


@functools.cache
def _compiled(config, group_size, train):
  """(params, x, valid, key) -> (y, what was sown)."""

  def run(params, x, valid, key):
    return MoE(config, config.moe, group_size).apply(
      {'params': params},
      x,
      _ctx(valid, train=train),
      rngs={'dropout': key} if train else None,
      mutable=['intermediates', 'routing'],
    )

  return jit(run)


def _params(config, seed=0, d=D):
  x = jnp.zeros((B, L, d))
  params = random_params(
    MoE(config, config.moe, 8), x, _ctx(_valid()), seed=seed
  )
  params['router']['kernel'] *= 3  # Clear preferences.
  return params


def _run(config, params, x, valid=None, *, group=8, train=False, key=0):
  valid = np.full(x.shape[:2], True) if valid is None else valid
  run = _compiled(config, group, train)
  y, sown = run(params, x, valid, jax.random.key(key))
  return np.asarray(y), sown


def _quiet(config, **changes):
  """`config` routing alike in training and evaluation: no noise."""
  selector = Part.of('top_k', k=2, train_policy='all', eval_policy='all')
  return with_moe(config, **{'selector': selector, **changes})


SMALL = Capacity(1.0, minimum=1)


@pytest.mark.parametrize(
  ('moe', 'activation'),
  [
    ({'selector': Part.of('top_k', k=1)}, 'geglu'),
    ({}, 'geglu'),
    ({'selector': Part.of('top_k', k=3, eval_policy='threshold')}, 'relu'),
    ({'dispatcher': 'mask', 'multiplicative_bias': True}, 'geglu'),
    ({'dispatcher': 'grouped', 'hidden_dim': 8}, 'relu'),
    ({'eval_capacity': Capacity(dropless=True)}, 'geglu'),
  ],
)
def test_equals_the_plain_loops(moe, activation):
  config = tiny(moe={'eval_capacity': SMALL, **moe}, activation=activation)
  params, x, valid = _params(config), _x(), _valid()
  y, sown = _run(config, params, x, valid)
  options = config.moe.selector.kwargs
  capacity = config.moe.slots(8, deterministic=True)
  assert capacity == (8 if config.moe.eval_capacity.dropless else 2)
  want, place = slow_moe(
    params,
    x,
    valid,
    k=options['k'],
    capacity=capacity,
    group_size=8,
    activation=activation,
    threshold=0.2 if 'eval_policy' in options else None,
  )
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-7)
  got = np.asarray(sown['routing']['seats'].place)
  np.testing.assert_array_equal(got.reshape(place.shape), place)
  assert not y[~valid].any()


def test_each_sequence_may_be_a_group():
  moe = {'group_by': 'sequence', 'eval_capacity': Capacity(count=2)}
  config = tiny(moe=moe)
  params, x, valid = _params(config), _x(), _valid()
  y, sown = _run(config, params, x, valid)  # Of 8 tokens it would be else.
  want, place = slow_moe(
    params, x, valid, k=2, capacity=2, group_size=L, activation='geglu'
  )
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-7)
  got = np.asarray(sown['routing']['seats'].place)
  np.testing.assert_array_equal(got.reshape(place.shape), place)
  # So a row says the same whoever its neighbours are.
  alone, _ = _run(config, params, x[1:2], valid[1:2])
  np.testing.assert_allclose(alone[0], y[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('padding', ['routed', 'zeroed'])
def test_padding_may_compete_for_places(padding):
  config = tiny(moe={'padding': padding, 'eval_capacity': SMALL})
  params, x, valid = _params(config), _x(), _valid()
  y, sown = _run(config, params, x, valid)
  seen = np.where(valid[..., None], x, 0) if padding == 'zeroed' else x
  everyone = np.full(valid.shape, True)
  want, _ = slow_moe(
    params, seen, everyone, k=2, capacity=2, group_size=8, activation='geglu'
  )
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-7)
  # It counts in every gauge and loss, and takes places from real tokens.
  record = sown['intermediates']['record']
  assert float(record['losses']['router_z'][1]) == B * L
  _, plain = _run(tiny(moe={'eval_capacity': SMALL}), params, x, valid)
  place = lambda sown: np.asarray(sown['routing']['seats'].place)
  real = valid.reshape(3, 8).repeat(2, axis=1)
  lost = (place(sown) < 0) & (place(plain) >= 0) & real
  assert lost.any()


def test_zeroed_padding_goes_to_the_first_experts():
  # No activation, no preference: a tie, which goes to experts 0 and 1.
  config = tiny(moe={'padding': 'zeroed'})
  _, sown = _run(config, _params(config), _x(), _valid(), group=L)
  expert = np.asarray(sown['routing']['seats'].expert).reshape(B, L, 2)
  np.testing.assert_array_equal(expert[3, 1:], [[0, 1]] * 5)


def test_groups_are_cut_from_the_flattened_batch():
  ids = jnp.arange(24).reshape(4, 6)
  groups = into_groups(ids, 10)
  # Ten tokens each, across rows; zeros fill the last group.
  assert groups.shape == (3, 10)
  np.testing.assert_array_equal(groups[0], np.arange(10))
  np.testing.assert_array_equal(groups[2], [20, 21, 22, 23] + [0] * 6)
  # No larger than the call, one token a row when decoding.
  assert into_groups(ids, 2048).shape == (1, 24)
  assert into_groups(ids[:, :1], 2048).shape == (1, 4)
  assert into_groups(jnp.zeros((4, 6, 3)), 12).shape == (2, 12, 3)
  assert into_groups(jnp.zeros(()), 12).shape == ()


def test_a_last_group_that_is_not_full():
  # 24 tokens in groups of 10: capacity is that of 10 tokens in each, and the
  # six places of padding take none of it.
  config = tiny(moe={'eval_capacity': SMALL})
  params, x = _params(config), _x()
  y, sown = _run(config, params, x, group=10)
  assert sown['routing']['seats'].place.shape == (3, 20)
  want, _ = slow_moe(
    params,
    x,
    np.full((B, L), True),
    k=2,
    capacity=2,
    group_size=10,
    activation='geglu',
  )
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-7)


def test_padding_moves_nobody():
  config = tiny(moe={'eval_capacity': SMALL})
  params, valid = _params(config), _valid()
  x = _x()
  other = np.where(valid[..., None], x, 7 * _x(seed=1))
  a, b = (_run(config, params, v, valid) for v in (x, other))
  np.testing.assert_array_equal(a[0], b[0])
  record = lambda run: run[1]['intermediates']['record']
  jax.tree.map(np.testing.assert_array_equal, record(a), record(b))


def test_empty_groups_move_nobody():
  config = tiny(moe={'eval_capacity': SMALL})
  params, x = _params(config), _x()
  more = np.concatenate([x, np.zeros_like(x)])
  valid = np.arange(2 * B)[:, None] < np.full((1, L), B)
  a, b = _run(config, params, x), _run(config, params, more, valid)
  np.testing.assert_array_equal(a[0], b[0][:B])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    a[1]['intermediates']['record'],
    b[1]['intermediates']['record'],
  )


def test_capacity_of_a_call():
  # Facts 2.3, through the config: 456 tokens and 32 experts are 17 places.
  moe = MoEConfig(num_experts=32)
  slots = functools.partial(moe.slots, deterministic=False)
  assert [slots(2048), slots(456)] == [80, 17]
  assert MoEConfig(num_experts=2048).slots(1024, deterministic=False) == 4
  assert MoEConfig(num_experts=64).slots(4096, deterministic=False) == 80
  assert MoEConfig(num_experts=64).slots(4096, deterministic=True) == 128
  # And through the layer: everyone wants expert 0, so that many sit there.
  for train, places in [(False, 4), (True, 2)]:
    config = _quiet(
      tiny(),
      train_capacity=Capacity(1.0, minimum=1),
      eval_capacity=Capacity(2.0, minimum=1),
      selector=Part.of('top_k', k=1),
    )
    params = _params(config)
    params['router']['kernel'] = np.eye(D, 4, dtype=np.float32)
    x = np.full((B, L, D), 0.1, np.float32)
    x[..., 0] = 5
    _, sown = _run(config, params, x, train=train)
    load = sown['intermediates']['record']['load']
    assert load.tolist() == [3 * places, 0, 0, 0]


def test_dropless_drops_nothing():
  # A router of zeros: every token wants experts 0 and 1.
  config = tiny(moe={'eval_capacity': SMALL})
  params, x = _params(config), _x()
  params['router']['kernel'] = np.zeros((D, 4), np.float32)
  gauge = lambda c: [
    float(v)
    for v in _run(c, params, x)[1]['intermediates']['record']['gauges'][
      'dropped_routes'
    ]
  ]
  # 2 places at either expert in each of 3 groups, for 48 routes.
  assert gauge(config) == [48 - 12, 48]
  assert gauge(dropless(config)) == [0, 48]


def test_auto_takes_the_dispatcher_that_fits():
  expert = np.zeros((1, 4), np.int32)

  def auto(expert=expert, **moe):
    seats = types.SimpleNamespace(expert=expert)
    return fitting(tiny(moe=moe).moe, seats, deterministic=True).name

  dropless = Capacity(dropless=True)
  assert auto() == 'index'
  assert auto(eval_capacity=dropless) == 'index'
  assert auto(np.zeros((2, 65)), eval_capacity=dropless) == 'grouped'
  # Three routes among four experts: as few as in a step of decoding.
  assert auto(expert[:, :3], eval_capacity=dropless) == 'per_token'
  assert auto(train_capacity=Capacity(dropless=True)) == 'index'
  assert auto(dispatcher=Part('mask')) == 'mask'


def test_jitter_is_for_the_router_in_training():
  jitter = lambda j: _quiet(
    tiny(), gate=Part.of('linear', jitter=j), train_capacity=Capacity(4.0)
  )
  params, x = _params(jitter(0.0)), _x()
  run = lambda j, p=params, **kw: _run(jitter(j), p, x, **kw)
  # Not in evaluation.
  np.testing.assert_array_equal(run(0.5)[0], run(0.0)[0])
  # In training it moves the logits, another way with another key.
  logits = [
    run(j, train=True, key=key)[1]['routing']['scores'].logits
    for j, key in [(0.0, 0), (0.5, 0), (0.5, 1)]
  ]
  assert np.abs(logits[1] - logits[0]).max() > 0.1
  assert np.abs(logits[2] - logits[1]).max() > 0.1
  # It touches nothing but the router: with a kernel of zeros it moves
  # nothing at all, so the experts read the tokens as they are.
  blind = {**params, 'router': {'kernel': np.zeros((D, 4), np.float32)}}
  y = [run(j, blind, train=True)[0] for j in (0.0, 0.5)]
  np.testing.assert_array_equal(*y)


def test_jitter_stays_within_its_bounds():
  # x = 1 and a kernel that copies it: the logits are the factors themselves.
  config = tiny(moe={'gate': Part.of('linear', jitter=0.25)})
  params = _params(config)
  params['router']['kernel'] = np.eye(D, 4, dtype=np.float32)
  x = np.ones((B, L, D), np.float32)
  factor = _run(config, params, x, train=True)[1]['routing']['scores'].logits
  assert 0.75 <= factor.min() < 0.8 and 1.2 < factor.max() <= 1.25


def test_expert_dropout_is_not_the_dropout_of_the_model():
  config = lambda model, expert: _quiet(
    tiny(dropout=model),
    expert_dropout=expert,
    train_capacity=Capacity(2.0, minimum=1),
    eval_capacity=Capacity(2.0, minimum=1),
  )
  params, x = _params(config(0.0, None)), _x()
  plain = _run(config(0.0, None), params, x, train=True)[0]
  moved = lambda model, expert: (
    not np.array_equal(
      _run(config(model, expert), params, x, train=True)[0], plain
    )
  )
  assert moved(0.0, 0.5)
  assert not moved(0.5, 0.0)
  # None follows the model; a number stands for itself, zero too.
  rates = [
    (cfg := config(0.5, expert)).expert_dropout(cfg.moe)
    for expert in (None, 0.0, 0.2)
  ]
  assert rates == [0.5, 0.0, 0.2]
  # Never in evaluation.
  quiet = _run(config(0.5, 0.5), params, x)[0]
  np.testing.assert_array_equal(quiet, plain)


def test_multiplicative_bias_starts_as_no_op():
  plain, biased = tiny(), tiny(moe={'multiplicative_bias': True})
  x, ctx = jnp.asarray(_x()), _ctx(_valid())
  init = jit(lambda key: MoE(biased, biased.moe, 8).init(key, x, ctx)['params'])
  boxed = init(jax.random.key(0))['experts']['multiplicative_bias']
  assert boxed.names == ('expert', 'expert_mlp')
  np.testing.assert_array_equal(boxed.value, np.ones((4, 24)))
  params = _params(plain)
  bias = {'multiplicative_bias': np.ones((4, 24), np.float32)}
  more = {**params, 'experts': {**params['experts'], **bias}}
  a, b = _run(plain, params, x)[0], _run(biased, more, x)[0]
  np.testing.assert_array_equal(a, b)


def test_experts_are_drawn_independently():
  # std sqrt(0.1 / fan-in) of one expert, however many the bank holds.
  config = tiny(moe={'num_experts': 8}, init_scale=0.1, mlp_dim=400)
  x, ctx = jnp.asarray(_x()), _ctx(_valid())
  init = jit(lambda key: MoE(config, config.moe, 8).init(key, x, ctx)['params'])
  bank = init(jax.random.key(0))['experts']
  for name, fan_in in [('wi_0', 16), ('wi_1', 16), ('wo', 400)]:
    kernel = np.asarray(bank[name]['kernel'].value)
    assert kernel.shape[0] == 8
    expected = np.sqrt(0.1 / fan_in)
    assert kernel.std() == pytest.approx(expected, rel=0.02)
    for e in range(1, 8):
      assert np.corrcoef(kernel[0].ravel(), kernel[e].ravel())[0, 1] < 0.05


def test_the_record_by_hand():
  """Two groups of four tokens; the router reads the first four of x.

  Token by token the first choice is 0 0 0 1 | 2 2 3 and one of padding, the
  second 1 1 1 0 | 3 3 2, each with probability .6 and .3 of the rest.
  """
  config = tiny(moe={'eval_capacity': Capacity(count=2, minimum=1)})
  params = _params(config)
  params['router']['kernel'] = np.eye(D, 4, dtype=np.float32)
  first = np.array([[0, 0, 0, 1], [2, 2, 3, 2]])
  second = np.array([[1, 1, 1, 0], [3, 3, 2, 3]])
  probs = np.full((2, 4, 4), 0.05)
  np.put_along_axis(probs, first[..., None], 0.6, -1)
  np.put_along_axis(probs, second[..., None], 0.3, -1)
  x = np.zeros((2, 4, D), np.float32)
  x[..., :4] = np.log(probs)
  valid = np.array([[True] * 4, [True, True, True, False]])
  _, sown = _run(config, params, x, valid, group=4)
  record = sown['intermediates']['record']
  # Group 0: tokens 0 and 1 fill expert 0; token 3 sits at expert 1 and token 0
  # behind it. Dropped: the first choice of token 2, the second of 1, 2 and 3.
  # Group 1: the two firsts fill expert 2, so token 2's second is lost; token 2
  # and token 0's second fill expert 3, so token 1's second is lost.
  assert record['load'].tolist() == [2, 2, 2, 2]
  gauges = {k: tuple(map(float, v)) for k, v in record['gauges'].items()}
  assert gauges['dropped_routes'] == (6, 14)
  assert gauges['dropped_tokens'] == (1, 7)  # Token 2 of group 0.
  assert gauges['router_confidence'] == pytest.approx((0.6 * 7, 7))
  losses = {k: tuple(map(float, v)) for k, v in record['losses'].items()}
  # Logits are log-probabilities: their logsumexp is 0.
  assert losses['router_z'] == pytest.approx((0, 7), abs=1e-6)
  # Group 0: f = [3/4, 1/4, 0, 0], p = [.525, .375, .05, .05]: 4 * .4875.
  # Group 1: f = [2/3, 1/3] and p = [.5, .4] of experts 2 and 3: 4 * .46667.
  expected = 4 * 4 * 0.4875 + 3 * 4 * (2 / 3 * 0.5 + 1 / 3 * 0.4)
  assert losses['load_balance'] == pytest.approx((expected, 7), rel=1e-5)


def test_only_who_asks_gets_the_routing():
  config = tiny()
  params, x = _params(config), jnp.asarray(_x())
  sown = lambda *names: jax.eval_shape(
    lambda: MoE(config, config.moe, 8).apply(
      {'params': params}, x, _ctx(_valid()), mutable=list(names)
    )[1]
  )
  assert set(sown('intermediates')) == {'intermediates'}
  assert set(sown('intermediates')['intermediates']) == {'record'}
  assert set(sown('routing')['routing']) == {'scores', 'seats'}
  assert sown() == {}
  # Not at birth: a collection there would become part of the model.
  born = jax.eval_shape(
    lambda: MoE(config, config.moe, 8).init(
      jax.random.key(0), x, _ctx(_valid())
    )
  )
  assert set(born) == {'params'}


@pytest.mark.parametrize('dispatcher', ['index', 'grouped'])
def test_equal_experts_are_the_dense_ffn(dispatcher):
  """Upcycling: with both experts kept, top-2 starts at the dense function.

  A token that lost its second expert says g1 / (g1 + g2) of it (facts 12).
  """
  config = tiny(
    moe={'dispatcher': dispatcher, 'eval_capacity': Capacity(count=8)}
  )
  params, x = _params(config), _x()
  params['experts'] = jax.tree.map(
    lambda w: np.repeat(w[:1], 4, axis=0), params['experts']
  )
  dense = np.array(
    [slow_expert(params['experts'], 0, t, 'geglu') for t in x.reshape(-1, D)]
  )
  y, _ = _run(config, params, x)
  np.testing.assert_allclose(y.reshape(-1, D), dense, rtol=1e-4, atol=1e-5)

  lone = with_moe(config, selector=Part.of('top_k', k=2, eval_policy='none'))
  y, sown = _run(lone, params, x)
  share = sown['routing']['seats'].weight.reshape(-1, 2)[:, :1]
  assert share.min() > 0.5 and share.max() < 1
  np.testing.assert_allclose(
    y.reshape(-1, D), share * dense, rtol=1e-4, atol=1e-5
  )


def test_bfloat16_leaves_the_router_in_float32():
  config = tiny(dtype='bfloat16')
  params, x = _params(config), jnp.asarray(_x(), jnp.bfloat16)
  y, sown = _run(config, params, x)
  assert y.dtype == jnp.bfloat16
  scores = sown['routing']['scores']
  assert {a.dtype.name for a in jax.tree.leaves(scores)} == {'float32'}
  # Not merely cast afterwards: equal to float64 far below bfloat16's 1/256.
  exact = np.asarray(x, np.float64).reshape(3, 8, D) @ params['router'][
    'kernel'
  ].astype(np.float64)
  np.testing.assert_allclose(scores.logits, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'dispatcher': 'indx'}, "dispatcher 'indx'. Did you mean 'index'?"),
    ({'gate': Part('liner')}, "gate 'liner'. Did you mean 'linear'?"),
    ({'selector': Part('topk')}, "selector 'topk'. Did you mean 'top_k'?"),
    ({'gate': Part.of('linear', jiter=1)}, "'jiter'. Did you mean 'jitter'?"),
    ({'selector': Part.of('top_k', k=9)}, 'k=9 experts per token.* 1 to 4'),
  ],
)
def test_names_that_are_not_in_the_tables(changes, message):
  with pytest.raises(ValueError, match=message):
    config = with_moe(tiny(), **changes)
    jax.eval_shape(
      lambda: MoE(config, config.moe, 8).init(
        jax.random.key(0), _x(), _ctx(_valid())
      )
    )
