"""The learning rate of T5X and schedules of options, number by number."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import schedules
from st_moe.config import ModelConfig, MoEConfig, OptimizerConfig, Part
from st_moe.model import parts
from st_moe.schedules import learning_rate


def _rates(steps, **changes):
  """The rate at each of `steps`, which arrive as int32, as in a state."""
  schedule = jax.vmap(learning_rate(OptimizerConfig(**changes)))
  return np.asarray(schedule(np.asarray(steps, np.int32)))


def test_one_hundredth_for_10000_steps_then_one_over_the_root():
  steps = [0, 1, 9_999, 10_000, 40_000, 250_000, 1_000_000]
  expected = [0.01, 0.01, 0.01, 0.01, 0.005, 0.002, 0.001]
  np.testing.assert_allclose(_rates(steps), expected, rtol=1e-6)
  # T5X's own words: rsqrt_decay = 1 / sqrt(max(step, 10_000)).
  steps = [3, 12_345, 77_777]
  slow = [1 / math.sqrt(max(step, 10_000)) for step in steps]
  np.testing.assert_allclose(_rates(steps), slow, rtol=1e-6)


def test_a_ramp_ends_at_full_rate():
  # Step 0 takes a quarter already: a rate of 0 would waste a batch.
  rates = _rates([0, 1, 2, 3, 4, 99], warmup_steps=4, learning_rate=0.8)
  np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)


def test_a_ramp_longer_than_the_plateau():
  # At step 15: 16 / 20 of the ramp, sqrt(4 / 15) of the decay.
  rate = _rates([15], warmup_steps=20, constant_steps=4, learning_rate=1.0)
  np.testing.assert_allclose(rate, 0.8 * math.sqrt(4 / 15), rtol=1e-6)


def test_no_decay_is_constant_for_ever():
  rates = _rates([0, 10_000, 10**8], decay='none', learning_rate=1e-3)
  np.testing.assert_allclose(rates, 1e-3, rtol=1e-6)


def test_no_plateau_divides_by_no_zero():
  rates = _rates([0, 1, 4], constant_steps=0, learning_rate=1.0)
  np.testing.assert_allclose(rates, [1, 1, 0.5], rtol=1e-6)


def test_an_unknown_decay_is_named():
  with pytest.raises(ValueError, match="decay 'cosine'.*Known: .'none', 'rsq"):
    learning_rate(OptimizerConfig(decay='cosine'))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      dict(name='exponential', start=1.0, end=0.0, steps=4),
      r'losses.router_z.weight: exponential goes from start = 1.0',
    ),
    (
      dict(name='steps', values=[1.0], at=[3]),
      r'losses.router_z.weight: steps has values = \(1.0,\)',
    ),
    (dict(name='linear', start=1.0, end=0.0, steps=0), r'weight.steps = 0'),
    (dict(name='linaer', start=1.0), "Did you mean 'linear'"),
  ],
)
def test_a_schedule_that_cannot_be_is_told_by_its_field(options, message):
  moe = MoEConfig(losses=(Part.of('router_z', weight=options),))
  with pytest.raises(ValueError, match=message):
    parts.check(ModelConfig(moe=moe))


def test_ends_and_middle_by_hand():
  at = lambda step, **options: float(
    schedules.value(Part.of(**options), jnp.int32(step))
  )
  line = dict(name='linear', start=8, end=16, steps=1000)
  assert [at(n, **line) for n in (0, 500, 1000, 9000)] == [8, 12, 16, 16]
  wave = dict(name='cosine', start=2.0, end=0.0, steps=10, begin=5)
  assert [round(at(n, **wave), 6) for n in (0, 10, 99)] == [2, 1, 0]
  fall = dict(name='exponential', start=4.0, end=1.0, steps=2)
  assert [at(n, **fall) for n in (0, 1, 2)] == pytest.approx([4, 2, 1])
  jumps = dict(name='steps', values=[1.0, 3.0, 2.0], at=[2, 4])
  assert [at(n, **jumps) for n in range(6)] == [1, 1, 3, 3, 2, 2]
  # Evaluation has its end; a number is itself.
  assert schedules.value(Part.of(**line), None) == 16
  assert schedules.value(0.5, None) == 0.5
