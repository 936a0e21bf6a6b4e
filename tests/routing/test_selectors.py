"""Every trap of the top-k rule, in numbers that can be checked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe.routing.selectors import SELECTORS, top_k
from st_moe.routing.types import RouteContext, Scores
from tests.helpers import jit


def _scores(probs):
  """Scores of a plain gate with these probabilities, [tokens, e]."""
  probs = np.asarray(probs, np.float32)[None]
  logits = np.log(np.maximum(probs, 1e-30))
  return Scores(logits, logits, probs)


def _ctx(tokens, *, train=False, valid=None):
  valid = np.full((1, tokens), True) if valid is None else np.array([valid])
  return RouteContext(valid=valid, deterministic=not train)


def _pick(probs, *, train=False, valid=None, key=None, capacity=99, **options):
  ctx = _ctx(len(probs), train=train, valid=valid)
  rng = None if key is None else jax.random.key(key)
  pick = _compiled(capacity=capacity, **options)
  return jax.device_get(pick(_scores(probs), ctx, rng=rng))


@functools.cache
def _compiled(**options):
  return jit(functools.partial(top_k, **options))


def _by_token(values, k):
  return np.asarray(values)[0].reshape(-1, k)


def test_switch_weighs_by_the_full_softmax():
  # Not 1: a renormalised top-1 would leave the router without a gradient.
  seats = _pick([[0.2, 0.5, 0.3]], k=1)
  np.testing.assert_array_equal(seats.expert, [[1]])
  np.testing.assert_allclose(seats.weight, [[0.5]], rtol=1e-6)

  def weight(logits):
    scores = Scores(logits, logits, jax.nn.softmax(logits))
    return top_k(scores, _ctx(1), None, 1, k=1).weight.sum()

  slope = jit(jax.grad(weight))(jnp.log(jnp.array([[[0.2, 0.5, 0.3]]])))
  # d p_1 / d logits = p_1 (delta - p).
  np.testing.assert_allclose(slope[0, 0], [-0.1, 0.25, -0.15], atol=1e-6)


def test_top_2_weights_are_renormalised_over_the_pair():
  seats = _pick([[0.1, 0.6, 0.3], [0.5, 0.25, 0.25]], k=2)
  np.testing.assert_array_equal(_by_token(seats.expert, 2), [[1, 2], [0, 1]])
  weight = _by_token(seats.weight, 2)
  np.testing.assert_allclose(weight, [[2 / 3, 1 / 3]] * 2, rtol=1e-6)
  np.testing.assert_allclose(weight.sum(-1), 1, rtol=1e-6)


def test_weights_are_not_renormalised_after_a_drop():
  # One place each. Token 1 loses its first choice to token 0 and keeps the
  # 0.4 of its second; token 0's second choice was taken by token 2.
  probs = [[0.6, 0.2, 0.2], [0.6, 0.0, 0.4], [0.2, 0.6, 0.2]]
  seats = _pick(probs, k=2, capacity=1)
  np.testing.assert_array_equal(
    _by_token(seats.place, 2), [[0, -1], [-1, 0], [0, -1]]
  )
  np.testing.assert_allclose(
    _by_token(seats.weight, 2), [[0.75, 0.25], [0.6, 0.4], [0.75, 0.25]], 1e-6
  )


def test_a_choice_the_policy_removed_leaves_the_other_its_weight():
  seats = _pick([[0.6, 0.4]], k=2, eval_policy='none')
  np.testing.assert_array_equal(seats.place, [[0, -1]])
  np.testing.assert_allclose(seats.weight, [[0.6, 0.4]], rtol=1e-6)


def test_a_later_first_choice_displaces_an_earlier_second_choice():
  # Why limited capacity is not causal (facts 13.8): token 0 loses its second
  # expert to token 1, which comes after it.
  alone = _pick([[0.6, 0.4]], k=2, capacity=1)
  np.testing.assert_array_equal(alone.place, [[0, 0]])
  both = _pick([[0.6, 0.4], [0.4, 0.6]], k=2, capacity=1)
  np.testing.assert_array_equal(_by_token(both.place, 2), [[0, -1], [0, -1]])


def test_weights_as_they_are():
  # Flaxformer's. The policy still looks at shares: .04 of .2 is a fifth.
  seats = _pick([[0.6, 0.3, 0.1]], k=2, normalize=False)
  np.testing.assert_allclose(seats.weight, [[0.6, 0.3]], rtol=1e-6)
  seats = _pick([[0.6, 0.3, 0.1]], k=2)
  np.testing.assert_allclose(seats.weight, [[2 / 3, 1 / 3]], rtol=1e-6)
  small = [[0.16, 0.05] + [0.79 / 100] * 100]
  seats = _pick(small, k=2, normalize=False, eval_policy='threshold')
  assert seats.asked.all()


def test_threshold_is_a_share_of_the_pair():
  # .19 of the pair is more than a fifth of .81, but less than a fifth of 1:
  # App. G and the code, not the paraphrase of section 3.4. And it is the
  # renormalised share that counts: of [.16, .04] the second has 1/5.
  probs = [[0.81, 0.19], [0.79, 0.21], [0.2, 0.8]]
  seats = _pick(probs, k=2, eval_policy='threshold', threshold=0.2)
  np.testing.assert_array_equal(
    _by_token(seats.asked, 2), [[True, False], [True, True], [True, False]]
  )
  small = [[0.16, 0.05] + [0.79 / 100] * 100]
  seats = _pick(small, k=2, eval_policy='threshold', threshold=0.2)
  assert seats.asked.all()


@pytest.mark.parametrize(
  ('second', 'kept'), [(0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (0.4, 1.0)]
)
def test_random_policy_keeps_min_1_weight_over_threshold(second, kept):
  n = 4000
  seats = _pick([[1 - second, second]] * n, k=2, train=True, key=0, capacity=n)
  asked = _by_token(seats.asked, 2)
  assert asked[:, 0].all()
  # Four standard deviations of a mean of 4000 coins: 0.032.
  assert asked[:, 1].mean() == pytest.approx(kept, abs=0.032 * (kept < 1))


def test_each_policy_by_its_name():
  probs = [[0.9, 0.1], [0.6, 0.4]]
  second = lambda **kw: _by_token(_pick(probs, k=2, **kw).asked, 2)[
    :, 1
  ].tolist()
  for train, name in [(True, 'train_policy'), (False, 'eval_policy')]:
    kinds = {p: second(train=train, **{name: p}) for p in ('all', 'none')}
    assert kinds == {'all': [True, True], 'none': [False, False]}
    got = second(train=train, **{name: 'threshold'})
    assert got == [False, True]


def test_training_and_evaluation_have_policies_of_their_own():
  probs = [[0.6, 0.4]]
  options = dict(k=2, train_policy='none', eval_policy='all')
  assert _pick(probs, train=True, **options).asked.tolist() == [[True, False]]
  assert _pick(probs, train=False, **options).asked.tolist() == [[True, True]]


def test_policies_do_not_touch_top_1():
  seats = _pick([[0.9, 0.1]] * 3, k=1, train=True, train_policy='none')
  assert seats.asked.all()


def test_top_3_shares_one_threshold():
  # Weights .6, .3, .1: the third is under the threshold.
  seats = _pick([[0.1, 0.6, 0.3]], k=3, eval_policy='threshold')
  np.testing.assert_array_equal(seats.expert, [[1, 2, 0]])
  np.testing.assert_allclose(seats.weight, [[0.6, 0.3, 0.1]], rtol=1e-6)
  np.testing.assert_array_equal(seats.asked, [[True, True, False]])


def test_noise_only_in_training():
  probs = np.random.default_rng(0).dirichlet([0.3] * 4, 64)
  train = [_pick(probs, k=2, train=True, key=i).asked for i in (0, 1)]
  assert (train[0] != train[1]).any()
  quiet = [_pick(probs, k=2, key=i) for i in (0, 1, None)]
  for seats in quiet[1:]:
    jax.tree.map(np.testing.assert_array_equal, seats, quiet[0])


def test_random_without_a_key_says_what_to_do():
  with pytest.raises(ValueError, match=r"rngs=\{'dropout': key\}.*'threshold'"):
    _pick([[0.6, 0.4]], k=2, eval_policy='random')
  with pytest.raises(ValueError, match='rngs='):
    _pick([[0.6, 0.4]], k=2, train=True)


@pytest.mark.parametrize('field', ['train_policy', 'eval_policy'])
def test_an_unknown_policy_names_the_known_ones(field):
  # Both are checked at once: a typo must not wait for the first evaluation.
  with pytest.raises(ValueError, match="'often'.*all, none, threshold, random"):
    _pick([[0.6, 0.4]], k=2, **{field: 'often'})


@pytest.mark.parametrize('k', [0, 3])
def test_k_out_of_range(k):
  with pytest.raises(ValueError, match=f'k={k} experts per token.* 1 to 2'):
    _pick([[0.6, 0.4]], k=k)


def test_padding_asks_for_nothing():
  probs = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]
  seats = _pick(probs, k=2, capacity=1, valid=[False, True, True])
  np.testing.assert_array_equal(
    _by_token(seats.place, 2), [[-1, -1], [0, -1], [0, -1]]
  )
  assert not _by_token(seats.asked, 2)[0].any()


def test_choice_follows_select_and_weight_follows_probs():
  # A biased gate: expert 2 is chosen although its probability is least.
  scores = _scores([[0.5, 0.3, 0.2]])
  scores = scores.replace(select=jnp.array([[[0.0, 1.0, 9.0]]]))
  seats = top_k(scores, _ctx(1), None, 1, k=2)
  np.testing.assert_array_equal(seats.expert, [[2, 1]])
  np.testing.assert_allclose(seats.weight, [[0.4, 0.6]], rtol=1e-6)


def test_a_shift_of_all_logits_moves_no_route():
  logits = jax.random.normal(jax.random.key(0), (1, 32, 4))
  pick = jit(functools.partial(top_k, rng=None, capacity=9, k=2))
  ctx = _ctx(32)
  a = pick(Scores(logits, logits, jax.nn.softmax(logits)), ctx)
  b = pick(Scores(logits + 8, logits + 8, jax.nn.softmax(logits + 8)), ctx)
  np.testing.assert_array_equal(a.expert, b.expert)
  np.testing.assert_array_equal(a.place, b.place)
  np.testing.assert_allclose(a.weight, b.weight, rtol=1e-5)


def test_the_table():
  assert SELECTORS['top_k'] is top_k
