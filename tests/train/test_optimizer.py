"""Adafactor by plain loops, expert by expert, layer by layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from st_moe import sharding
from st_moe.config import OptimizerConfig
from st_moe.train import optimizer

# Name -> shape, logical axes, and into which rows and columns it factors: the
# axes that make them, or None where it stays whole.
_PARAMETERS = {
  'mlp': ((4, 6), ('embed', 'mlp'), ([0], [1])),
  'mlp_out': ((6, 4), ('mlp', 'embed'), ([1], [0])),
  'query': ((4, 2, 3), ('embed', 'heads', 'kv'), ([0], [1, 2])),
  'embedding': ((8, 4), ('vocab', 'embed'), ([1], [0])),
  'experts': (
    (2, 3, 4, 5),
    ('layers', 'expert', 'embed', 'expert_mlp'),
    ([2], [3]),
  ),
  'router': ((4, 4), ('embed', 'unmodeled'), None),
  'position': ((4, 4), ('heads', 'relpos_buckets'), None),
  'norm': ((2, 4), ('layers', 'embed'), None),
  'bias': ((3, 5), ('expert', 'expert_mlp'), None),
  'small': ((4, 3), ('embed', 'mlp'), None),
}
_NAMES = {name: axes for name, (_, axes, _) in _PARAMETERS.items()}
_CONFIG = OptimizerConfig(learning_rate=0.1, min_dim_to_factor=4)


def _boxed(arrays):
  return {
    name: nn.LogicallyPartitioned(a, _NAMES[name]) for name, a in arrays.items()
  }


def _draw(seed, names=_PARAMETERS, scale=1.0):
  rng = np.random.default_rng(seed)
  return {
    name: (scale * rng.standard_normal(_PARAMETERS[name][0])).astype('f4')
    for name in names
  }


def _run(params, gradients, config=_CONFIG, axes=None):
  """Parameters after each gradient, starting from `params`."""
  axes = axes or {name: _NAMES[name] for name in params}
  made = optimizer.make(config, axes)
  boxed = {
    name: nn.LogicallyPartitioned(a, axes[name]) for name, a in params.items()
  }
  state = sharding.unbox(made.init(boxed))

  @jax.jit
  def step(params, state, grads):
    updates, state = made.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  found = []
  for grads in gradients:
    params, state = step(params, state, grads)
    found.append(jax.device_get(params))
  return found


def _slow_adafactor(p, gradients, rows_and_columns, *, rate):
  """One parameter of one expert of one layer, weight by weight, in float64."""
  p = np.array(p, np.float64)
  full = np.zeros(p.shape)
  row, column = {}, {}
  for t, g in enumerate(np.asarray(gradients, np.float64)):
    decay = 1 - (t + 1) ** -0.8
    square = g**2 + 1e-30
    u = np.zeros(p.shape)
    if rows_and_columns is None:
      for i in np.ndindex(p.shape):
        full[i] = decay * full[i] + (1 - decay) * square[i]
        u[i] = g[i] / full[i] ** 0.5
    else:
      rows, columns = rows_and_columns
      place = lambda i, axes: tuple(i[a] for a in axes)
      sums, sizes = ({}, {}), ({}, {})
      for i in np.ndindex(p.shape):
        for side, axes in enumerate((rows, columns)):
          key = place(i, axes)
          sums[side][key] = sums[side].get(key, 0) + square[i]
          sizes[side][key] = sizes[side].get(key, 0) + 1
      for side, moments in enumerate((row, column)):
        for key, total in sums[side].items():
          mean = total / sizes[side][key]
          moments[key] = decay * moments.get(key, 0) + (1 - decay) * mean
      middle = sum(row.values()) / len(row)
      for i in np.ndindex(p.shape):
        v = row[place(i, rows)] * column[place(i, columns)] / middle
        u[i] = g[i] / v**0.5
    rms = lambda a: (sum(x * x for x in a.reshape(-1)) / a.size) ** 0.5
    u /= max(1, rms(u))
    p = p - rate * max(rms(p), 1e-3) * u
  return p


def test_three_steps_by_plain_loops():
  params = _draw(0)
  gradients = [_draw(seed, scale=3.0**seed) for seed in (1, 2, 3)]
  found = _run(params, gradients)[-1]
  for name, (shape, axes, split) in _PARAMETERS.items():
    apart = [i for i, a in enumerate(axes) if a in ('layers', 'expert')]
    own = [i for i in range(len(shape)) if i not in apart]
    if split:  # Axis numbers inside one expert of one layer.
      split = tuple([own.index(i) for i in side] for side in split)
    for each in np.ndindex(*(shape[i] for i in apart)):
      expected = _slow_adafactor(
        params[name][each],
        [g[name][each] for g in gradients],
        split,
        rate=0.1,
      )
      np.testing.assert_allclose(
        found[name][each], expected, rtol=2e-5, atol=1e-6, err_msg=name
      )


def test_an_expert_does_not_notice_its_neighbours():
  """Expert 1 moves to the same bits when its neighbours' gradients explode."""
  names = ('experts', 'bias')
  params = _draw(0, names)
  calm = [_draw(seed, names) for seed in (1, 2)]
  # 1-fold, then 1000-fold: the neighbours are clipped in step 2, it is not.
  loud = [
    {k: factor * a for k, a in g.items()}
    for factor, g in zip((1, 1000), calm, strict=True)
  ]
  for quiet, noisy in zip(calm, loud, strict=True):
    noisy['experts'][:, 1] = quiet['experts'][:, 1]
    noisy['bias'][1] = quiet['bias'][1]
  a, b = _run(params, calm)[-1], _run(params, loud)[-1]
  np.testing.assert_array_equal(a['experts'][:, 1], b['experts'][:, 1])
  np.testing.assert_array_equal(a['bias'][1], b['bias'][1])
  assert not np.array_equal(a['experts'][:, 1], params['experts'][:, 1])


def test_stacked_layers_move_as_each_alone():
  # `layers` is the axis that `nn.scan` adds; without it, three parameters.
  rng = np.random.default_rng(0)
  draw = lambda: rng.standard_normal((3, 4, 6)).astype('f4')
  # Three layers of very different size, in weights and gradients.
  sizes = np.array([1e-2, 1, 1e2], 'f4')[:, None, None]
  params, gradients = draw() * sizes, [draw() * sizes, draw() / sizes]
  stacked = _run(
    {'w': params},
    [{'w': g} for g in gradients],
    axes={'w': ('layers', 'embed', 'mlp')},
  )[-1]['w']
  apart = _run(
    {f'{i}': params[i] for i in range(3)},
    [{f'{i}': g[i] for i in range(3)} for g in gradients],
    axes={f'{i}': ('embed', 'mlp') for i in range(3)},
  )[-1]
  for i in range(3):
    np.testing.assert_allclose(stacked[i], apart[f'{i}'], rtol=1e-6)


def test_updates_are_clipped_to_rms_one():
  # Step 1 keeps g^2 of tiny gradients, step 2 mixes in 1 - 2^-0.8 = 0.43 of
  # it: u = 1 / sqrt(0.57) = 1.32 all over, which the clip brings to 1.
  params = {'w': np.ones((4, 4), 'f4')}
  gradients = [{'w': np.full((4, 4), g, 'f4')} for g in (1e-6, 1.0)]
  for threshold, expected in ((1.0, 1.0), (100.0, (2**-0.8) ** -0.5)):
    config = OptimizerConfig(
      learning_rate=0.1, clip_threshold=threshold, parameter_scale=False
    )
    one, two = _run(params, gradients, config, {'w': ('embed', 'mlp')})
    np.testing.assert_allclose(one['w'], 0.9, rtol=1e-6)
    moved = (one['w'] - two['w']) / 0.1
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_the_step_is_a_share_of_the_parameter():
  # RMS 2 and a rate of 0.1: every weight moves by 0.2. One that is zero moves
  # as if its RMS were 0.001.
  params = {'w': np.full((4, 4), 2, 'f4'), 'zero': np.zeros((4, 4), 'f4')}
  gradients = [{'w': np.ones((4, 4), 'f4'), 'zero': np.ones((4, 4), 'f4')}]
  axes = dict.fromkeys(params, ('embed', 'mlp'))
  found = _run(params, gradients, axes=axes)[0]
  np.testing.assert_allclose(found['w'], 1.8, rtol=1e-6)
  np.testing.assert_allclose(found['zero'], -1e-4, rtol=1e-6)


def test_statistics_carry_the_axes_they_lie_along():
  made = optimizer.make(_CONFIG, _NAMES)
  state = jax.eval_shape(lambda: made.init(_boxed(_draw(0))))
  found = {
    name: {
      part: (box.value.shape, box.names)
      for part in ('full', 'row', 'column')
      if (box := getattr(moments, part)) is not None
    }
    for name, moments in state[0].moments.items()
  }
  assert found['experts'] == {
    'row': ((2, 3, 4), ('layers', 'expert', 'embed')),
    'column': ((2, 3, 5), ('layers', 'expert', 'expert_mlp')),
  }
  assert found['query'] == {
    'row': ((4,), ('embed',)),
    'column': ((2, 3), ('heads', 'kv')),
  }
  assert found['embedding'] == {
    'row': ((4,), ('embed',)),
    'column': ((8,), ('vocab',)),
  }
  # The router is not factored, nor what is not worth it.
  assert found['router'] == {'full': ((4, 4), ('embed', 'unmodeled'))}
  for name, (shape, axes, split) in _PARAMETERS.items():
    assert (split is None) == (found[name] == {'full': (shape, axes)})
  mesh = sharding.make_mesh(fsdp=2, expert=3, devices=jax.devices()[:6])
  specs = sharding.of_boxed(state, mesh)
  assert tuple(specs[0].moments['experts'].row.spec) == (None, 'expert', 'fsdp')


@pytest.mark.parametrize('name', ['mlp', 'norm1', 'small'])
def test_a_matrix_without_experts_is_as_in_optax(name):
  # What optax knows too: the two longest sides, or a parameter kept whole.
  shape = {'mlp': (4, 6), 'norm1': (8,), 'small': (4, 3)}[name]
  axes = ('embed', 'mlp')[: len(shape)]
  rng = np.random.default_rng(0)
  params = {'w': rng.standard_normal(shape).astype('f4')}
  gradients = [
    {'w': (3**i * rng.standard_normal(shape)).astype('f4')} for i in range(3)
  ]
  ours = _run(params, gradients, axes={'w': axes})
  theirs = optax.adafactor(0.1, min_dim_size_to_factor=4)
  step = jax.jit(theirs.update)
  state = theirs.init(params)
  for grads, mine in zip(gradients, ours, strict=True):
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(mine['w'], params['w'], rtol=1e-5, atol=1e-6)


def test_adamw_is_that_of_optax():
  config = OptimizerConfig(
    name='adamw', learning_rate=0.01, decay='none', weight_decay=0.1, b2=0.99
  )
  params, grads = _draw(0), _draw(1)
  made = optimizer.make(config, _NAMES)
  theirs = optax.adamw(0.01, b1=0.9, b2=0.99, weight_decay=0.1)
  found, expected = (
    jax.jit(lambda t=t: t.update(grads, t.init(params), params)[0])()
    for t in (made, theirs)
  )
  # They differ in the rate alone, a float32 from the schedule or a Python one.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected
  )
  # Its moments are boxed like the parameters they belong to.
  state = made.init(_boxed(jax.tree.map(jnp.asarray, params)))
  boxes = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )
  named = [b.names for b in boxes if isinstance(b, nn.Partitioned)]
  assert named == 2 * [_NAMES[name] for name in sorted(_NAMES)]


def test_an_unknown_optimizer_is_named():
  message = "Unknown OptimizerConfig.name 'adam'. Did you mean 'adamw'?"
  with pytest.raises(ValueError, match=message):
    optimizer.make(OptimizerConfig(name='adam'), {})
