"""How to decode: what a user may ask, and what it does to scores."""

import dataclasses
import math
import numbers

import flax.struct
import jax
import jax.numpy as jnp


def is_whole(value) -> bool:
  """Whether it is an integer; to Python True is one."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return real and math.isfinite(value)


def _is_count(value) -> bool:
  return is_whole(value) and value < 1 << 31  # All that arrays can hold.


WHOLE = _is_count, 'a whole number below 2 ** 31, '
NUMBER = _is_number, 'a number, '
ANY = lambda value: True, ''
AT_LEAST_1 = WHOLE, 'at least 1', lambda v: v >= 1


def check(options, **rules) -> None:
  """Refuses fields of `options` that break their rule.

  Args:
    rules: field -> what kind of value it takes, its rule in words, and whether
      a value of that kind follows it.

  Raises:
    ValueError: the field, its value and its rule.
  """
  for field, ((is_kind, kind), rule, follows) in rules.items():
    value = getattr(options, field)
    right = is_kind(value)
    if not right or not follows(value):
      rule = rule if right else kind + rule
      raise ValueError(f'{field} {value!r} must be {rule}.')


@dataclasses.dataclass(frozen=True)
class Contrast:
  """Self-contrast (SCMoE, arXiv:2405.14507): strong against weak routing.

  The weak pass asks only the expert at `rank` (1 is the best). Tokens whose
  strong logit is within ln `alpha` of the best are scored by
  (1 + beta) strong - beta weak, the others are out.
  """

  beta: float = 0.5
  alpha: float = 0.1
  rank: int = 2

  def __post_init__(self):
    check(
      self,
      beta=(NUMBER, '0 or more', lambda v: v >= 0),
      alpha=(NUMBER, 'above 0 and at most 1', lambda v: 0 < v <= 1),
      rank=AT_LEAST_1,
    )


@dataclasses.dataclass(frozen=True)
class Method:
  """How to decode. The default is greedy."""

  max_length: int = 64  # Tokens at most, EOS included.
  # Sampling: 0 is greedy. Then of the `top_k` likeliest (0: all), the fewest
  # that hold `top_p` of the probability.
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  # Beam search, if above 1: a text's score is its log-probability over its
  # length ** `length_penalty`. `early_stopping`: a prompt is done at once when
  # it has as many texts as beams (True), when its best beam is no better than
  # the worst of them (False), or when it cannot become so ('never').
  num_beams: int = 1
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  num_return: int = 1  # Texts a prompt: samples, or the best of the beams.
  # Divides positive logits of tokens already said, multiplies negative ones.
  repetition_penalty: float = 1.0
  forbidden: tuple[int, ...] = ()  # Tokens never to be said.
  contrast: Contrast | None = None

  def __post_init__(self):
    check(
      self,
      max_length=AT_LEAST_1,
      temperature=(NUMBER, '0 (greedy) or more', lambda v: v >= 0),
      top_k=(WHOLE, '0 (all) or more', lambda v: v >= 0),
      top_p=(NUMBER, 'above 0 and at most 1', lambda v: 0 < v <= 1),
      num_beams=AT_LEAST_1,
      length_penalty=(NUMBER, 'finite', lambda v: True),
      early_stopping=(
        ANY,
        "true, false or 'never'",
        lambda v: isinstance(v, bool) or v == 'never',
      ),
      num_return=AT_LEAST_1,
      repetition_penalty=(NUMBER, 'above 0', lambda v: v > 0),
      forbidden=(
        ANY,
        'a tuple of token ids',
        lambda v: isinstance(v, tuple) and all(map(is_whole, v)),
      ),
      contrast=(ANY, 'a Contrast', lambda v: isinstance(v, Contrast | None)),
    )
    if not self.temperature and (self.top_k or self.top_p < 1):
      raise ValueError('top_k and top_p are of sampling: set a temperature.')
    if self.num_beams > 1 and self.temperature:
      raise ValueError('Beam search and sampling exclude each other.')
    if self.num_beams > 1 and self.num_return > self.num_beams:
      raise ValueError(
        f'num_return {self.num_return} is more than num_beams {self.num_beams}.'
      )
    if self.num_return > 1 and self.num_beams == 1 and not self.temperature:
      raise ValueError('Greedy decoding has one answer; num_return must be 1.')


@flax.struct.dataclass
class Decoded:
  """Answers to each prompt, the best first where there is an order."""

  tokens: jax.Array  # int32 [b, r, t], 0 after the EOS.
  logprobs: jax.Array  # float32 [b, r, t], of each token, before any option.
  scores: jax.Array  # float32 [b, r]: their sum; of beams over the length.


def adjusted(scores, said, method: Method):
  """Scores [n, v] with what the method says of single tokens."""
  if method.repetition_penalty != 1:
    p = method.repetition_penalty
    scores = jnp.where(
      said, jnp.where(scores > 0, scores / p, scores * p), scores
    )
  return permitted(scores, method)


def permitted(scores, method: Method):
  if not method.forbidden:
    return scores
  return scores.at[:, jnp.array(method.forbidden)].set(-jnp.inf)


def truncated(scores, method: Method):
  """Scores [n, v] at their temperature, -inf where top-k or top-p rules out."""
  scores = scores / method.temperature
  if 0 < method.top_k < scores.shape[-1]:
    kth = jax.lax.top_k(scores, method.top_k)[0][:, -1:]
    scores = jnp.where(scores < kth, -jnp.inf, scores)
  if method.top_p < 1:
    order = jnp.argsort(-scores, axis=-1)
    probs = jnp.take_along_axis(jax.nn.softmax(scores), order, axis=-1)
    # Those before it do not hold `top_p` yet, so it is needed.
    needed = probs.cumsum(-1) - probs < method.top_p
    back = jnp.argsort(order, axis=-1)
    keep = jnp.take_along_axis(needed, back, axis=-1)
    scores = jnp.where(keep, scores, -jnp.inf)
  return scores
