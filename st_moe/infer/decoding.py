"""From a model and prompts to token ids or scores. Knows a model as `apply`.

The encoder runs once and its keys and values are projected once; then one
`while_loop` takes a token a step, whatever the method. Give a `dropless` model,
or an answer depends on its neighbours.

Axes: b prompt, r row of a prompt (beam or sample), t token, v vocabulary.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from st_moe.routing.types import RouteOverride

_NEVER = -1e9  # Finite: sums of it stay ordered.


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
    if not 0 < self.alpha <= 1 or self.rank < 1:
      raise ValueError(f'{self}: alpha must be in (0, 1] and rank 1 or more.')


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
    wrong = [
      ('max_length', self.max_length >= 1, 'at least 1'),
      ('temperature', self.temperature >= 0, '0 (greedy) or more'),
      ('top_k', self.top_k >= 0, '0 (all) or more'),
      ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
      ('num_beams', self.num_beams >= 1, 'at least 1'),
      ('repetition_penalty', self.repetition_penalty > 0, 'above 0'),
      ('num_return', self.num_return >= 1, 'at least 1'),
      (
        'early_stopping',
        self.early_stopping in (True, False, 'never'),
        "true, false or 'never'",
      ),
    ]
    for field, right, rule in wrong:
      if not right:
        raise ValueError(f'{field} {getattr(self, field)!r} must be {rule}.')
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
  model, params, prompts, contrast: Contrast, *, overrides=None, **sizes
):
  """As `stepper`: two routings of one decoder, each with its own cache.

  The encoder is shared, strong.
  """
  overrides = overrides or {}
  encoded = encode(model, params, prompts, overrides.get('encoder'))
  weak = weakened(model.config, overrides.get('decoder'), contrast.rank)
  build = functools.partial(_decoder, model, params, prompts, encoded, **sizes)
  strong_cache, strong_step = build(overrides=overrides)
  weak_cache, weak_step = build(overrides={'decoder': weak})

  def step(caches, tokens):
    strong, _, a = strong_step(caches[0], tokens)
    faint, _, b = weak_step(caches[1], tokens)
    least = strong.max(-1, keepdims=True) + math.log(contrast.alpha)
    scores = (1 + contrast.beta) * strong - contrast.beta * faint
    return strong, jnp.where(strong >= least, scores, -jnp.inf), (a, b)

  return (strong_cache, weak_cache), step


def weakened(config, override, rank: int) -> RouteOverride:
  """The decoder routed to its rank-th best experts alone (1: the best)."""
  layers, experts = config.plan('decoder').num_sparse, config.moe.num_experts
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
  beams = method.num_beams > 1
  rows = method.num_beams if beams else method.num_return
  sizes = dict(rows=rows, max_length=method.max_length)
  if method.contrast:
    made = contrasted(
      model, params, prompts, method.contrast, overrides=overrides, **sizes
    )
  else:
    made = stepper(model, params, prompts, overrides=overrides, **sizes)
  b, length = prompts.shape[0], method.max_length
  forced = jnp.zeros((b, length), jnp.int32)
  if prefix is not None:
    forced = forced.at[:, : prefix.shape[1]].set(prefix[:, :length])
  if beams:
    return _beams(*made, method, forced, eos)
  return _rows(*made, method, forced, eos, keys)


def _adjusted(scores, said, method: Method):
  """Scores [n, v] with what the method says of single tokens."""
  if method.repetition_penalty != 1:
    p = method.repetition_penalty
    scores = jnp.where(
      said, jnp.where(scores > 0, scores / p, scores * p), scores
    )
  if method.forbidden:
    scores = scores.at[:, jnp.array(method.forbidden)].set(-jnp.inf)
  return scores


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


def _logprob(logits, token):
  """Of `token` [n] under `logits` [n, v]."""
  picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def _rows(state, step, method, forced, eos, keys):
  """Greedy decoding or sampling: rows that know nothing of each other."""
  b, length = forced.shape
  r = method.num_return
  forced = forced.repeat(r, axis=0)
  if method.temperature:
    fold = jax.vmap(jax.random.fold_in)
    keys = fold(keys.repeat(r), jnp.tile(jnp.arange(r), b))
  n = b * r
  shapes = jax.eval_shape(step, state, jnp.zeros(n, jnp.int32))[0]

  def unfinished(carry):
    i, _, _, done, *_ = carry
    return (i < length) & ~done.all()

  def advance(carry):
    i, tokens, logprobs, done, said, state = carry
    # The decoder starts from a 0, as its inputs are targets shifted right.
    last = jnp.where(i == 0, 0, tokens[:, jnp.maximum(i - 1, 0)])
    logits, scores, state = step(state, last)
    scores = _adjusted(scores, said, method)
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

  said = jnp.zeros(shapes.shape, bool).at[:, 0].set(True)
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


def _beams(state, step, method, forced, eos):
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
    scores = _adjusted(jax.nn.log_softmax(scores), said, method)
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

  shapes = jax.eval_shape(step, state, jnp.zeros(b * r, jnp.int32))[0]
  running = _Texts.none(b, r, length)
  start = (
    jnp.zeros((), jnp.int32),
    # The others join once the first has been continued in r ways.
    running.replace(score=running.score.at[:, 0].set(0)),
    _Texts.none(b, r, length),
    jnp.full(b, True),
    jnp.zeros(shapes.shape, bool).at[:, 0].set(True),
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
    jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
    targets,
    enable_dropout=False,
    override=override,
    method='decode',
  )
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  found = picked - jax.nn.logsumexp(logits, axis=-1)
  return jnp.where(targets > 0, found, 0)


def score(model, params, encoder_input_tokens, answers) -> jax.Array:
  """Log-probability of every answer to every prompt, float32 [b, answers].

  Args:
    encoder_input_tokens: int32 [b, length], encoded once.
    answers: int32 [answers, length], each ending in its EOS, then 0.
  """
  prompts = encoder_input_tokens
  encoded = encode(model, params, prompts)

  def one(answer):
    targets = jnp.broadcast_to(answer, (prompts.shape[0], answer.size))
    return _teacher_forced(model, params, encoded, prompts, targets).sum(-1)

  return jax.lax.map(one, answers).T
