"""From a model and prompts to token ids or scores. Knows a model as `apply`.

The encoder runs once and its keys and values are projected once; then one
`while_loop` takes a token a step, whatever the method. Give a `dropless` model,
or an answer depends on its neighbours.

Axes: b prompt, r row of a prompt (beam or sample), t token, v vocabulary.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp

from st_moe.decode import beams
from st_moe.decode.methods import (
  Decoded,
  Method,
  adjusted,
  permitted,
  truncated,
)
from st_moe.routing.types import RouteOverride


def of_task(model, task):
  """`model` as all below know it, for prompts of `task` int32 [b]."""
  apply = functools.partial(model.apply, task=task)
  return types.SimpleNamespace(config=model.config, apply=apply)


def encode(model, params, encoder_input_tokens, override=None) -> jax.Array:
  return model.apply(
    {'params': params},
    encoder_input_tokens,
    enable_dropout=False,
    override=override,
    method='encode',
  )


# One step: `step(state, tokens [n]) -> logits, scores [n, v], state`. Scores
# are what the choice is made by.


def stepper(
  model, params, prompts, *, rows: int, max_length: int, overrides=None
):
  """A first state, and the step over `rows` rows of every prompt."""
  overrides = overrides or {}
  encoded = encode(model, params, prompts, overrides.get('encoder'))
  return _decoder(model, params, prompts, encoded, rows, max_length, overrides)


def _decoder(model, params, prompts, encoded, rows, max_length, overrides):
  decode = functools.partial(
    model.apply,
    enable_dropout=False,
    decode=True,
    max_decode_length=max_length,
    override=overrides.get('decoder'),
    method='decode',
  )
  first = jnp.ones((prompts.shape[0] * rows, 1), jnp.int32)
  # Makes room for the decoder's keys and values, and projects the encoder's.
  _, made = decode(
    {'params': params},
    encoded,
    prompts,
    first,
    first,
    mutable=['cache', 'memory'],
  )
  kept = {'params': params, 'memory': made.get('memory', {})}

  def step(cache, tokens):
    tokens = tokens[:, None]
    logits, sown = decode(
      {**kept, 'cache': cache},
      encoded,
      prompts,
      tokens,
      tokens,
      mutable=['cache'],
    )
    return logits[:, 0], logits[:, 0], sown['cache']

  return made['cache'], step


def contrasted(
  model, params, prompts, method: Method, *, overrides=None, **sizes
):
  """As `stepper`: two routings of one decoder, each with its own cache.

  The encoder is shared, strong.
  """
  overrides, contrast = overrides or {}, method.contrast
  encoded = encode(model, params, prompts, overrides.get('encoder'))
  weak = weakened(model.config, overrides.get('decoder'), contrast.rank)
  build = functools.partial(_decoder, model, params, prompts, encoded, **sizes)
  strong_cache, strong_step = build(overrides=overrides)
  weak_cache, weak_step = build(overrides={'decoder': weak})

  def step(caches, tokens):
    strong, _, a = strong_step(caches[0], tokens)
    faint, _, b = weak_step(caches[1], tokens)
    # Plausible is what comes near the best that may be said.
    best = permitted(strong, method).max(-1, keepdims=True)
    plausible = strong >= best + math.log(contrast.alpha)
    scores = (1 + contrast.beta) * strong - contrast.beta * faint
    return strong, jnp.where(plausible, scores, -jnp.inf), (a, b)

  return (strong_cache, weak_cache), step


def weakened(config, override, rank: int) -> RouteOverride:
  """The decoder routed to its rank-th best experts alone (1: the best)."""
  layers = config.plan('decoder').num_sparse
  experts = config.moe_of('decoder').num_experts
  if not layers:
    raise ValueError('Self-contrast needs a sparse layer in the decoder.')
  if rank > experts:
    raise ValueError(f'contrast rank {rank}: there are {experts} experts.')
  if override is None:
    override = RouteOverride(jnp.zeros((layers, experts)))
  return override.replace(k=1, rank=rank - 1)


def generate(
  model,
  params,
  prompts,
  method: Method,
  *,
  eos: int = 1,
  keys=None,
  prefix=None,
  overrides: dict | None = None,
) -> Decoded:
  """Answers to prompts.

  Args:
    prompts: int32 [b, length], 0 is padding.
    keys: a random key for each prompt, where `method` samples: an answer does
      not depend on what else is in the batch.
    prefix: int32 [b, t], what answers begin with, 0 after it.
    overrides: RouteOverride of 'encoder' and 'decoder'.

  Returns:
    Decoded with `method.num_return` rows.
  """
  if method.temperature and keys is None:
    raise ValueError('Sampling needs a random key for every prompt.')
  searches = method.num_beams > 1
  rows = method.num_beams if searches else method.num_return
  sizes = dict(rows=rows, max_length=method.max_length)
  if method.contrast:
    made = contrasted(
      model, params, prompts, method, overrides=overrides, **sizes
    )
  else:
    made = stepper(model, params, prompts, overrides=overrides, **sizes)
  b, length = prompts.shape[0], method.max_length
  forced = jnp.zeros((b, length), jnp.int32)
  if prefix is not None:
    forced = forced.at[:, : prefix.shape[1]].set(prefix[:, :length])
  # Every answer begins behind a 0.
  said = jnp.zeros((b * rows, model.config.vocab_size), bool)
  said = said.at[:, 0].set(True)
  if searches:
    return beams.search(*made, method, forced, said, eos)
  return _rows(*made, method, forced, said, eos, keys)


def _logprob(logits, token):
  """Of `token` [...] under `logits` [..., v]."""
  picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def _rows(state, step, method, forced, said, eos, keys):
  """Greedy decoding or sampling: rows that know nothing of each other."""
  b, length = forced.shape
  r = method.num_return
  forced = forced.repeat(r, axis=0)
  if method.temperature:
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(keys.repeat(r), jnp.tile(jnp.arange(r), b))
  n = b * r

  def unfinished(carry):
    i, _, _, done, *_ = carry
    return (i < length) & ~done.all()

  def advance(carry):
    i, tokens, logprobs, done, said, state = carry
    # The decoder starts from a 0, as its inputs are targets shifted right.
    last = jnp.where(i == 0, 0, tokens[:, jnp.maximum(i - 1, 0)])
    logits, scores, state = step(state, last)
    scores = adjusted(scores, said, method)
    if method.temperature:
      draw = lambda key: jax.random.gumbel(
        jax.random.fold_in(key, i), scores.shape[1:]
      )
      scores = truncated(scores, method) + jax.vmap(draw)(keys)
    token = scores.argmax(-1).astype(jnp.int32)
    token = jnp.where(forced[:, i] > 0, forced[:, i], token)
    token = jnp.where(done, 0, token)
    logprob = jnp.where(done, 0, _logprob(logits, token))
    if method.repetition_penalty != 1:
      said = said.at[jnp.arange(n), token].set(True)
    tokens = tokens.at[:, i].set(token)
    logprobs = logprobs.at[:, i].set(logprob)
    return i + 1, tokens, logprobs, done | (token == eos), said, state

  start = (
    jnp.zeros((), jnp.int32),
    jnp.zeros((n, length), jnp.int32),
    jnp.zeros((n, length)),
    jnp.zeros(n, bool),
    said,
    state,
  )
  _, tokens, logprobs, *_ = jax.lax.while_loop(unfinished, advance, start)
  back = lambda a: a.reshape(b, r, length)
  return Decoded(back(tokens), back(logprobs), back(logprobs).sum(-1))


def greedy(
  model, params, encoder_input_tokens, *, max_length: int, eos: int = 1
) -> jax.Array:
  """The likeliest next token, again and again, until `eos`.

  Returns:
    int32 [b, max_length], 0 after the `eos`.
  """
  method = Method(max_length=max_length)
  found = generate(model, params, encoder_input_tokens, method, eos=eos)
  return found.tokens[:, 0]


# Scores of given answers.


def shifted(targets):
  """What a decoder reads to say `targets` [b, t]: 0, then all but the last."""
  return jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))


def token_logprobs(model, params, prompts, targets, overrides=None):
  """Log-probability of each token of `targets`, float32 [b, t]; 0 of padding.

  Args:
    targets: int32 [b, t], 0 is padding.
  """
  overrides = overrides or {}
  encoded = encode(model, params, prompts, overrides.get('encoder'))
  return _teacher_forced(
    model, params, encoded, prompts, targets, overrides.get('decoder')
  )


def _teacher_forced(model, params, encoded, prompts, targets, override=None):
  logits = model.apply(
    {'params': params},
    encoded,
    prompts,
    shifted(targets),
    targets,
    enable_dropout=False,
    override=override,
    method='decode',
  )
  return jnp.where(targets > 0, _logprob(logits, targets), 0)


def score(model, params, prompts, answers) -> jax.Array:
  """Log-probability of every answer to every prompt, float32 [b, answers].

  Args:
    prompts: int32 [b, length], encoded once.
    answers: int32 [b, answers, t] or, of all prompts alike, [answers, t]; each
      ends in its EOS, then 0. One that is all 0 scores 0.
  """
  if answers.ndim == 2:
    answers = jnp.broadcast_to(answers, (len(prompts), *answers.shape))
  b, r, t = answers.shape
  encoded = encode(model, params, prompts)
  # The answers to a prompt are rows that share its keys and values.
  rows = answers.reshape(b * r, t)
  found = _teacher_forced(model, params, encoded, prompts, rows)
  return found.sum(-1).reshape(b, r)


# What routers decide.


def routes(model, params, prompts, targets=None, overrides=None) -> dict:
  """Scores and seats of prompts and, where given, of targets after them.

  Args:
    prompts: int32 [b, length], 0 is padding.
    targets: int32 [b, t], 0 is padding; None: the encoder alone is asked.

  Returns:
    The collection 'routing' of 'encoder' and 'decoder', as they sow it.
  """
  overrides = overrides or {}
  ask = functools.partial(
    model.apply, {'params': params}, enable_dropout=False, mutable=['routing']
  )
  encoded, found = ask(
    prompts, override=overrides.get('encoder'), method='encode'
  )
  if targets is None:
    return found.get('routing', {})
  _, of_targets = ask(
    encoded,
    prompts,
    shifted(targets),
    targets,
    override=overrides.get('decoder'),
    project=False,
    method='decode',
  )
  return {**found.get('routing', {}), **of_targets.get('routing', {})}
