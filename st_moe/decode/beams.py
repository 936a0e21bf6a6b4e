"""Beam search, as HuggingFace's.

Axes: b prompt, r beam, t token, v vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp

from st_moe.decode.methods import Decoded, adjusted

_NEVER = -1e9  # Finite: sums of it stay ordered.


@flax.struct.dataclass
class _Texts:
  """Candidates of each prompt, [b, r, ...]."""

  score: jax.Array  # float32: of running ones their log-probability.
  tokens: jax.Array
  logprobs: jax.Array

  @classmethod
  def none(cls, b, r, length):
    return cls(
      jnp.full((b, r), _NEVER),
      jnp.zeros((b, r, length), jnp.int32),
      jnp.zeros((b, r, length)),
    )

  def take(self, row) -> '_Texts':
    return jax.tree.map(lambda a: _take_rows(a, row), self)

  def best(self, r) -> tuple['_Texts', jax.Array]:
    row = jax.lax.top_k(self.score, r)[1]
    return self.take(row), row


def _take_rows(a, row):
  return jax.vmap(lambda a, row: a[row])(a, row)


def search(state, step, method, forced, said, eos):
  """Beam search as HuggingFace's: 2 r candidates, EOS among the first r ends.

  A candidate that ends among the best r of a step is a finished text; the best
  r that do not end run on.
  """
  b, length = forced.shape
  r = method.num_beams
  given = (forced > 0).sum(-1)  # [b]; no part of a text's length.
  over = lambda score, n: (
    score
    / jnp.maximum(n - given, 1)[:, None].astype(jnp.float32)
    ** method.length_penalty
  )

  def unfinished(carry):
    i, _, _, open_, *_ = carry
    return (i < length) & open_.any()

  def advance(carry):
    i, running, finished, open_, said, state = carry
    last = running.tokens[:, :, jnp.maximum(i - 1, 0)].reshape(-1)
    logits, scores, state = step(state, jnp.where(i == 0, 0, last))
    v = logits.shape[-1]
    scores = adjusted(jax.nn.log_softmax(scores), said, method)
    # What is given costs nothing, and there is nothing else.
    must = forced[:, i].repeat(r)[:, None]
    given_scores = jnp.where(jnp.arange(v) == must, 0.0, _NEVER)
    scores = jnp.where(must > 0, given_scores, scores)
    total = running.score[:, :, None] + scores.reshape(b, r, v)
    total, chosen = jax.lax.top_k(total.reshape(b, -1), 2 * r)
    parent, token = chosen // v, (chosen % v).astype(jnp.int32)

    each = jax.nn.log_softmax(logits).reshape(b, -1)
    logprob = jnp.take_along_axis(each, chosen, axis=1)
    grown = running.take(parent)
    grown = _Texts(
      total,
      grown.tokens.at[:, :, i].set(token),
      grown.logprobs.at[:, :, i].set(logprob),
    )
    ends = (token == eos) | (i + 1 == length)

    full = (finished.score > _NEVER / 2).all(-1)
    counts = open_ & ~(full & (method.early_stopping is True))
    seen = ends & (jnp.arange(2 * r) < r) & counts[:, None]
    seen &= grown.score > _NEVER / 2  # Not made of what may not be said.
    ended = grown.replace(
      score=jnp.where(seen, over(grown.score, i + 1), _NEVER)
    )
    both = lambda a, b: jnp.concatenate([a, b], axis=1)
    finished, _ = jax.tree.map(both, finished, ended).best(r)

    running = grown.replace(score=jnp.where(ends, _NEVER, grown.score))
    running, row = running.best(r)
    parent = _take_rows(parent, row)
    state = _reordered(state, parent)
    if method.repetition_penalty != 1:
      said = _take_rows(said.reshape(b, r, v), parent).reshape(-1, v)
      last = running.tokens[:, :, i].reshape(-1)
      said = said.at[jnp.arange(b * r), last].set(True)

    full = (finished.score > _NEVER / 2).all(-1)
    far = method.early_stopping == 'never' and method.length_penalty > 0
    hope = over(running.score, jnp.int32(length) if far else i + 1).max(-1)
    open_ &= ~full | (hope > finished.score.min(-1))
    open_ &= ~(full & (method.early_stopping is True))
    return i + 1, running, finished, open_, said, state

  running = _Texts.none(b, r, length)
  start = (
    jnp.zeros((), jnp.int32),
    # The others join once the first has been continued in r ways.
    running.replace(score=running.score.at[:, 0].set(0)),
    _Texts.none(b, r, length),
    jnp.full(b, True),
    said,
    state,
  )
  _, _, finished, *_ = jax.lax.while_loop(unfinished, advance, start)
  found = jax.tree.map(lambda a: a[:, : method.num_return], finished)
  return Decoded(found.tokens, found.logprobs, found.score)


def _reordered(state, parent):
  """Caches whose rows continue row `parent` [b, r] of the same prompt."""
  b, r = parent.shape
  row = (jnp.arange(b)[:, None] * r + parent).reshape(-1)

  def move(a):
    if a.ndim < 4:  # The index.
      return a
    return jnp.take(a, row, axis=a.ndim - 4)  # [..., n, heads, t, head_dim]

  return jax.tree.map(move, state)
