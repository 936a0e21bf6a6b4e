"""A random router that stays so, and experts that become ever more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file, paths
from st_moe.config import Capacity, OptimizerConfig, Part
from st_moe.model.gates import LinearGate
from st_moe.routing.selectors import top_k
from st_moe.routing.types import RouteContext, RouteOverride, Scores
from st_moe.sharding import unbox
from tests.helpers import assert_trees_close, jit, slow_softmax
from tests.methods import steps

E = 16
MORE = Part.of('linear', start=8, end=16, steps=1000)
LOGITS = np.random.default_rng(0).normal(size=(2, 5, E)).astype(np.float32)
VALID = np.arange(5) < np.array([[5], [3]])


@functools.cache
def _compiled(k, k_at, train, asked):
  def run(step):
    ctx = RouteContext(
      valid=jnp.asarray(VALID), step=step, deterministic=not train
    )
    if asked:
      ctx = ctx.replace(override=RouteOverride(jnp.zeros(E), asked))
    scores = Scores.of(jnp.asarray(LOGITS))
    seats = top_k(scores, ctx, None, 5, k=k, k_at=k_at, train_policy='all')
    return seats, seats.dense(5), seats.chosen(5)

  return jit(run)


def _route(step=None, k=E, k_at=MORE, train=True, asked=None):
  run = _compiled(k, k_at, train, asked)
  return jax.device_get(run(None if step is None else jnp.int32(step)))


@pytest.mark.parametrize(
  ('step', 'k'),
  [(0, 8), (62, 8), (63, 9), (500, 12), (999, 16), (1000, 16), (5000, 16)],
)
def test_experts_by_step(step, k):
  seats, _, chosen = _route(step)
  np.testing.assert_array_equal(chosen.sum(-1), np.where(VALID, k, 0))
  # One route for each expert that could be asked, at every step.
  assert seats.asked.shape == (2, 5 * E)


def test_weights_are_of_those_that_are_asked():
  _, weight, chosen = _route(500)
  for group, token in zip(*np.nonzero(VALID), strict=True):
    logits = LOGITS[group, token].astype(float)
    best = np.argsort(-logits)[:12]
    expected = np.zeros(E)
    expected[best] = slow_softmax(logits[best])
    np.testing.assert_allclose(weight[group, token], expected, atol=1e-6)
    np.testing.assert_array_equal(chosen[group, token], expected > 0)
  np.testing.assert_array_equal(weight[~VALID], 0)


def test_all_experts_are_active_in_the_end():
  _, last, chosen = _route(1000)
  assert chosen[VALID].all()
  np.testing.assert_allclose(
    last[VALID], slow_softmax(LOGITS[VALID]), atol=1e-6
  )
  # As in evaluation, and as without a schedule.
  _, evaluated, _ = _route(train=False)
  _, plain, _ = _route(k_at=None)
  np.testing.assert_array_equal(evaluated, last)
  np.testing.assert_array_equal(plain, last)


@pytest.mark.parametrize('k', [1, 3, 16])
def test_evaluation_asks_as_many_as_it_is_told(k):
  _, weight, chosen = _route(train=False, asked=k)
  np.testing.assert_array_equal(chosen.sum(-1), np.where(VALID, k, 0))
  np.testing.assert_allclose(weight.sum(-1), VALID, atol=1e-6)


def test_a_number_that_stays():
  _, _, chosen = _route(0, k=4, k_at=2.0)
  np.testing.assert_array_equal(chosen.sum(-1), np.where(VALID, 2, 0))
  # An evaluation asks as many as it likes.
  _, _, chosen = _route(k=4, k_at=2.0, train=False, asked=3)
  np.testing.assert_array_equal(chosen.sum(-1), np.where(VALID, 3, 0))
  # At least one, whatever the schedule says.
  none = Part.of('linear', start=0, end=2, steps=10)
  _, _, chosen = _route(0, k=4, k_at=none)
  np.testing.assert_array_equal(chosen.sum(-1), np.where(VALID, 1, 0))
  with pytest.raises(ValueError, match='k_at = 0.5 should be .* at least 1'):
    Part.of('top_k', k=2, k_at=0.5).choose('k', {'top_k': top_k})


def test_the_frozen_router_is_born_as_the_trained_one_and_has_no_slope():
  x, ctx = jnp.asarray(LOGITS), RouteContext(valid=jnp.asarray(VALID))
  born, slope = {}, {}
  for frozen in (False, True):
    gate = LinearGate(4, frozen=frozen)
    params = unbox(gate.init(jax.random.key(3), x, ctx, None))['params']
    told = lambda p, gate=gate: gate.apply({'params': p}, x, ctx, None)
    loss = lambda p, told=told: told(p).probs.std()
    ((name, born[frozen]),) = params.items()
    assert name == ('kept_kernel' if frozen else 'kernel')
    slope[frozen] = np.abs(jax.grad(loss)(params)[name]).max()
  np.testing.assert_array_equal(born[True], born[False])
  assert slope[False] > 0 and slope[True] == 0


def _model(layers=1, **changes):
  moe = {
    'num_experts': 4,
    'hidden_dim': 6,
    'gate': Part.of('linear', frozen=True),
    'selector': Part.of(
      'top_k',
      k=4,
      k_at=Part.of('linear', start=2, end=4, steps=8),
      train_policy='all',
    ),
    'train_capacity': Capacity(dropless=True),
    'eval_capacity': Capacity(dropless=True),
    'losses': (),
    'extra_ffn': 'none',
  }
  return steps.encoder(layers, moe=moe, **changes)


def test_no_step_moves_the_router():
  # Not even weight decay, with the router by name among what is trained; and
  # one program serves every number of experts.
  adamw = OptimizerConfig(
    'adamw', train='router|experts', weight_decay=0.1, learning_rate=0.1
  )
  run = steps.Run(steps.config_of(_model(), optimizer=adamw))
  before = jax.device_get(paths.by_path(run.state.params))
  asked = [run.take()['encoder/active_experts'] for _ in range(10)]
  np.testing.assert_allclose(asked, [2, 2, 2, 3, 3, 3, 4, 4, 4, 4])
  assert run.step._cache_size() == 1
  after = jax.device_get(paths.by_path(run.state.params))
  moved = {p for p in before if not np.array_equal(before[p], after[p])}
  assert {p.rpartition('/moe/')[2] for p in moved} == {
    'experts/wi_0/kernel', 'experts/wi_1/kernel', 'experts/wo/kernel'
  }  # fmt: skip
  kept = [p for p in before if p.endswith('/router/kept_kernel')]
  assert len(kept) == 1 and not any('/router/kernel' in p for p in before)
  assert not any(paths.trains(train, kept[0]) for train in (*paths.TRAINED, ''))
  assert 0 < run.evaluated() < 100


def test_scanned_layers_have_a_router_each():
  assert_trees_close(*steps.both_ways(_model(layers=2)), tolerance=2e-6)


def test_the_config_says_the_method_and_no_more():
  load = lambda arg: config_file.load(f'configs/methods/smoe_dropout.py{arg}')
  config = load('')
  moe = config.model.moe
  assert moe.num_experts * moe.hidden_dim == config.model.mlp_dim
  assert moe.selector.kwargs['k_at'].kwargs['steps'] == config.total_steps
  assert moe.losses == () and moe.train_capacity.dropless
  changed = config_file.diff(
    *(config_file.to_dict(load(a)) for a in (':base,runlocal', ':runlocal'))
  )
  assert all(line.startswith('model.moe.') for line in changed)
