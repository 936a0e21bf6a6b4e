"""From a model and prompts to token ids or scores. Knows a model as `apply`."""

import functools

import jax
import jax.numpy as jnp


def encode(model, params, encoder_input_tokens) -> jax.Array:
  return model.apply(
    {'params': params},
    encoder_input_tokens,
    enable_dropout=False,
    method='encode',
  )


def greedy(
  model, params, encoder_input_tokens, *, max_length: int, eos: int = 1
) -> jax.Array:
  """The likeliest next token, again and again, until `eos`.

  Each step runs the decoder over one token, its keys and values joining a
  cache. Give a `dropless` model, or an answer depends on its neighbours.

  Args:
    encoder_input_tokens: int32 [batch, length], 0 is padding.
    max_length: tokens to decode at most, `eos` included.

  Returns:
    int32 [batch, max_length], 0 after the `eos`.
  """
  prompts = encoder_input_tokens
  batch = prompts.shape[0]
  encoded = encode(model, params, prompts)
  step = functools.partial(
    model.apply,
    enable_dropout=False,
    decode=True,
    max_decode_length=max_length,
    mutable=['cache'],
    method='decode',
  )
  full = jnp.ones((batch, max_length), jnp.int32)
  _, shapes = jax.eval_shape(
    lambda: step({'params': params}, encoded, prompts, full, full)
  )
  cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes['cache'])

  def unfinished(carry):
    i, _, done, _ = carry
    return (i < max_length) & ~done.all()

  def advance(carry):
    i, tokens, done, cache = carry
    # The decoder starts from a 0, as its inputs are targets shifted right.
    last = jnp.where(i == 0, 0, tokens[:, jnp.maximum(i - 1, 0)])[:, None]
    logits, sown = step(
      {'params': params, 'cache': cache}, encoded, prompts, last, last
    )
    token = jnp.where(done, 0, logits[:, 0].argmax(-1).astype(jnp.int32))
    tokens = tokens.at[:, i].set(token)
    return i + 1, tokens, done | (token == eos), sown['cache']

  start = (
    jnp.zeros((), jnp.int32),
    jnp.zeros((batch, max_length), jnp.int32),
    jnp.zeros((batch,), bool),
    cache,
  )
  return jax.lax.while_loop(unfinished, advance, start)[1]


def score(model, params, encoder_input_tokens, answers) -> jax.Array:
  """Log-probability of every answer to every prompt, float32 [batch, answers].

  Args:
    encoder_input_tokens: int32 [batch, length], encoded once.
    answers: int32 [answers, length], each ending in its EOS, then 0.
  """
  prompts = encoder_input_tokens
  encoded = encode(model, params, prompts)

  def one(answer):
    targets = jnp.broadcast_to(answer, (prompts.shape[0], answer.size))
    inputs = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    logits = model.apply(
      {'params': params},
      encoded,
      prompts,
      inputs,
      targets,
      enable_dropout=False,
      method='decode',
    )
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), targets[..., None], axis=-1
    )[..., 0]
    return (picked * (targets > 0)).sum(-1)

  return jax.lax.map(one, answers).T
