"""Loss-free balance: `balanced` reads a bias that `rebalanced` moves."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import config_file
from st_moe.config import Part
from st_moe.routing.selectors import top_k
from st_moe.routing.shaping import balanced
from st_moe.routing.types import RouteContext, Scores
from st_moe.train import after
from st_moe.train.after import rebalanced

CTX = RouteContext(valid=jnp.full((1, 1), True))


def _seats(logits, bias, **changes):
  scores = Scores.of(jnp.array([[logits]])).replace(**changes)
  kept = {'bias': jnp.array(bias)}
  return top_k(balanced(scores, CTX, None, kept), CTX, None, 1, k=1)


def test_a_bias_counts_in_the_choice_and_in_no_weight():
  # Probabilities 3/4 and 1/4: a bias above 1/2 turns the choice, and the
  # weight stays 1/4.
  logits = [np.log(3.0), 0.0]
  cases = (0.0, 0, 0.75), (0.49, 0, 0.75), (0.51, 1, 0.25)
  for bias, expert, weight in cases:
    seats = _seats(logits, [0.0, bias])
    assert seats.expert[0, 0] == expert
    np.testing.assert_allclose(seats.weight[0, 0], weight, rtol=1e-6)


def test_it_calls_nobody_back():
  select = jnp.array([[[0.0, -jnp.inf]]])
  seats = _seats([0.0, 0.0], [0.0, 9.0], select=select)
  assert seats.expert[0, 0] == 0


def test_biases_move_towards_an_even_load():
  # Two layers; four experts that were asked 5, 1, 3 and 3 times: 3 is even.
  asked = {'encoder/layers/layer_0/moe': jnp.array([[5.0, 1, 3, 3], [3] * 4])}
  moe = {'kept_bias': jnp.zeros((2, 4)), 'router': {'kernel': jnp.ones(3)}}
  new = {'encoder': {'layers': {'layer_0': {'moe': moe}}}}
  found = rebalanced(new, new, asked, 0, rate=0.5)
  moved = found['encoder']['layers']['layer_0']['moe']
  np.testing.assert_array_equal(
    moved['kept_bias'], [[-0.5, 0.5, 0, 0], [0] * 4]
  )
  np.testing.assert_array_equal(moved['router']['kernel'], np.ones(3))


def test_a_bias_without_its_rule_is_told_and_a_rule_without_its_bias():
  config = config_file.load('configs/methods/loss_free.py')
  check = lambda c: after.check(c.optimizer, c.model, c.init)
  check(config)
  at = lambda rules: dataclasses.replace(config.optimizer, after=rules)
  still = dataclasses.replace(config, optimizer=at(()))
  message = 'balanced keeps a bias that nothing moves: add rebalanced'
  with pytest.raises(ValueError, match=message):
    check(still)
  # Fine-tuning may leave it as it came.
  check(dataclasses.replace(still, init='runs/base'))
  idle = dataclasses.replace(config, optimizer=at((Part('used'),)))
  with pytest.raises(ValueError, match='after.used has nothing to move'):
    check(idle)
  # Of a dense twin nobody asks.
  check(config_file.load('configs/methods/loss_free.py:dense'))
