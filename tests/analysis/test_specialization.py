"""Loads, lifts and health of a trace that a person can count."""

import math

import numpy as np
import pytest

from st_moe.analysis import health, specialization
from st_moe.analysis.trace import Layer, Trace

# Token 7 goes to expert 1, token 5 to both, token 9 to 0; nobody to expert 2.
# By token, first and second choice, and whether each was seated.
ROUTES = (
  (7, (1, 0), (True, False)),
  (7, (1, 0), (True, True)),
  (5, (1, 0), (True, True)),
  (9, (0, -1), (True, False)),
  (5, (0, 1), (True, True)),
  (7, (1, -1), (False, False)),
)
LAYERS = Layer('encoder', 1, 3), Layer('decoder', 0, 2)


def _trace(scores=False):
  n = len(ROUTES)
  probs = np.tile(np.array([[0.5, 0.25, 0.25]], np.float32), (n, 1))
  logits = np.tile(np.array([[3.0, -4.0, 0.0]], np.float32), (n, 1))
  kept = np.array([kept for *_, kept in ROUTES])
  return Trace(
    LAYERS,
    layer=np.zeros(n, np.int16),
    example=np.zeros(n, np.int32),
    position=np.arange(n, dtype=np.int32),
    token=np.array([token for token, *_ in ROUTES], np.int32),
    expert=np.array([expert for _, expert, _ in ROUTES], np.int16),
    weight=kept / 2,
    kept=kept,
    probs=probs if scores else None,
    logits=logits if scores else None,
  )


def test_loads_are_tokens_seated():
  assert specialization.load(_trace()).tolist() == [[4, 4, 0], [0, 0, 0]]


def test_what_tells_an_expert_from_the_others():
  first, second, third = specialization.top_tokens(
    _trace(), 'encoder.1', least=1
  )
  # Of 8 seats token 5 has 4, token 7 has 3 and token 9 has 1; of the four of
  # expert 0 one is token 9's: a quarter, where an eighth is chance.
  assert [t.token for t in first] == [9]
  assert (first[0].count, first[0].share, first[0].lift) == (1, 0.25, 2.0)
  # Two of the four of expert 1 are token 7's, of all 3 in 8. Token 5 has half
  # there as everywhere, and tells nothing.
  assert [t.token for t in second] == [7]
  assert second[0].share == 0.5 and second[0].lift == pytest.approx(4 / 3)
  assert third == []
  # What is seen once is chance, whatever its lift.
  assert specialization.top_tokens(_trace(), 'encoder.1')[0] == []
  assert specialization.top_tokens(_trace(), 'decoder.0') == [[], []]


def test_entropy_of_shares():
  even, one, nothing = [2, 2, 2, 2], [0, 5, 0, 0], [0, 0, 0, 0]
  found = specialization.entropy(np.array([even, one, nothing]))
  assert found[0] == pytest.approx(math.log(4)) and found[1] == 0
  assert math.isnan(found[2])


def test_health_of_a_layer():
  (found,) = health.health(_trace(scores=True))
  assert str(found.layer) == 'encoder.1' and found.tokens == 6
  # Half, a quarter and a quarter: ln 2 / 2 + ln 4 / 2.
  assert found.entropy == pytest.approx(1.5 * math.log(2))
  assert found.confidence == 0.5 and found.largest_logit == 4
  log_z = math.log(math.exp(3) + math.exp(-4) + 1)
  assert found.log_z == pytest.approx(log_z)
  # 10 asked, 8 seated; even would be 8 / 3 each.
  assert found.dropped == pytest.approx(0.2)
  assert found.busiest == 1.5 and found.dead == (2,)
  with pytest.raises(ValueError, match='no probabilities: make it by inspect'):
    health.health(_trace())
