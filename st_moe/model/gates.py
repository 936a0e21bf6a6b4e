"""What a token thinks of every expert: `gate(x, ctx, experts) -> Scores`."""

import math
import pathlib
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from st_moe import schedules
from st_moe.about import about
from st_moe.config import Part
from st_moe.fields import Above0, Count, CountOr0, Rate, Seed, Size, SizeOr0
from st_moe.model.layers import by_hand, keep
from st_moe.routing import tables
from st_moe.routing.types import RouteContext, Scores
from st_moe.sharding import annotate


class Gate(nn.Module):
  """What all gates are given; options of one are its keywords."""

  num_experts: int

  def logits(
    self,
    x: jax.Array,
    name: str = 'kernel',
    scale: float = 0.02,
    frozen: bool = False,
  ) -> jax.Array:
    """float32 x W_r, [g, s, e], whatever the activations are.

    `frozen`: by a W_r that stays as it was born.
    """
    born = nn.initializers.normal(scale)
    shape = x.shape[-1], self.num_experts
    if frozen:
      kernel = keep(self, name, shape, born)
    else:
      born = annotate(born, ('embed', 'unmodeled'))
      kernel = self.param(name, born, shape, jnp.float32)
    # TPUs multiply float32 in bfloat16 unless told otherwise.
    x = x.astype(jnp.float32)
    return jnp.einsum('gsd,de->gse', x, kernel, precision='highest')


@about(
  row='S0-01',
  paper='arXiv:2202.08906',
  noisy=lambda jitter=0.0, **_: jitter > 0,
)
class LinearGate(Gate, kw_only=True):
  """Logits x W_r and their softmax.

  `jitter` multiplies the router's input by U[1 - jitter, 1 + jitter] in
  training (arXiv:2101.03961); ST-MoE does without it. `frozen` keeps the
  random router a run begins with (SMoE-dropout, arXiv:2303.01610).
  """

  jitter: Rate = 0.0
  frozen: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del experts
    if self.jitter and not ctx.deterministic:
      low, high = 1 - self.jitter, 1 + self.jitter
      rng = self.make_rng('dropout')
      x = x.astype(jnp.float32)
      x *= jax.random.uniform(rng, x.shape, minval=low, maxval=high)
    return Scores.of(self.logits(x, frozen=self.frozen))


_ACTS = {
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'gelu': jax.nn.gelu,
  'identity': lambda h: h,
}


def _fits_activated(model, moe, *, temperature=1.0, learned=False, **_):
  del model, moe
  if learned and isinstance(temperature, Part):
    raise ValueError(
      'config.model.moe.gate.temperature is a schedule, and learned = True: a'
      ' temperature that is learned starts at a number.'
    )


@about(row='S2-17', paper='arXiv:2401.13875', fits=_fits_activated)
class ActivatedGate(Gate, kw_only=True):
  """softmax(act(x W_r + b) / temperature) (arXiv:2401.13875).

  With 'identity' it is the dense-to-sparse gate. A temperature that is
  `learned` starts at `temperature`. The z-loss is of act(x W_r + b).
  """

  act: Literal[tuple(_ACTS)]
  temperature: Above0 | schedules.Scheduled = 1.0
  learned: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del experts
    number = lambda name, init, size: self.param(
      name, annotate(init, ('unmodeled',)), (size,), jnp.float32
    )
    bias = number('bias', nn.initializers.zeros, self.num_experts)
    logits = _ACTS[self.act](self.logits(x) + bias)
    if self.learned:
      # A factor's log, so that none is below 0; born 1 and not 0, because
      # Adafactor's steps are as large as the weights are.
      log = number('temperature', nn.initializers.ones, 1)
      temperature = self.temperature / math.e * jnp.exp(log)
    else:
      temperature = schedules.value(self.temperature, ctx.step)
    tempered = logits / temperature
    return Scores(logits, tempered, jax.nn.softmax(tempered))


@about(row='S1-01', paper='arXiv:1701.06538', noisy=True)
class NoisyGate(Gate, kw_only=True):
  """Logits x W_g; in training with noise, as much as the token says.

  Choice and weights are of h = x W_g + N(0, 1) * softplus(x W_n), of which the
  deviation is left for the loss `load` (arXiv:1701.06538, Eq. 3-5). Both
  matrices are born 0: no expert is ahead, and noise alone decides (App. A).
  """

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del experts
    logits = self.logits(x, scale=0.0)
    std = jax.nn.softplus(self.logits(x, 'noise_kernel', scale=0.0))
    if ctx.deterministic:
      return Scores.of(logits)
    noise = jax.random.normal(self.make_rng('dropout'), logits.shape)
    return Scores.of(logits, std=std).plus(std * noise)


_STORED = ('balanced', 'clustered', 'dispersed')
_TABLES = ('random', *_STORED, 'bigram', 'previous', 'position')


def _hash_fits(
  model,
  moe,
  *,
  table='random',
  hashes=1,
  vocab=0,
  vectors='',
  per_layer=False,
  **_,
):
  """Raises where a hash and its model know different ids, or experts."""
  what, stored = f'config.model.moe.gate = hash of {table!r}', table in _STORED
  if moe.num_experts % hashes or hashes > moe.k:
    raise ValueError(
      f'{what} with hashes = {hashes} takes num_experts that divide by it and a'
      f' selector of as many: here are {moe.num_experts} experts, k = {moe.k}.'
    )
  if stored and (not vocab or model.vocab_size not in (0, vocab)):
    raise ValueError(
      f'{what} is a table of vocab = {vocab} ids: set it to the vocabulary of'
      f' the model, {model.vocab_size or "which is not known yet"}.'
    )
  if stored and per_layer:
    raise ValueError(
      f'{what} is the same table in all layers: per_layer is of those that are'
      ' computed.'
    )
  if table in ('clustered', 'dispersed') and not vectors:
    raise ValueError(f'{what} needs vectors: a .npy file of [vocab, d].')


def _hashed(ctx: RouteContext, table: str) -> tuple:
  """What a table that is computed looks at."""
  return {
    'random': (ctx.tokens,),
    'bigram': (ctx.before, ctx.tokens),
    'previous': (ctx.before,),
    'position': (ctx.positions,),
  }[table]


@about(
  row='S0-03',
  paper='arXiv:2106.04426',
  needs=lambda *, table='random', **_: (
    ('before',) if table in ('bigram', 'previous') else ()
  ),
  fits=_hash_fits,
)
class HashGate(Gate, kw_only=True):
  """The expert of a token is looked up: no parameter, no loss, no doubt.

    random      a mix of its id
    balanced    by falling frequency, each id to the lightest expert so far
    clustered   ids whose vectors are near share an expert (k-means)
    dispersed   the ids of each such cluster are dealt to all experts
    bigram      a mix of the id before and its own
    previous    a mix of the id before
    position    a mix of the position

  With `hashes` above 1 experts are slices, in as many equal groups, and each
  hash finds one in its own: MultiHash, of the selector `group_top_1` with as
  many k. In a decoder all of them see inputs and no target.

  Args:
    salt: another one is another hash.
    per_layer: each layer draws a salt of its own; of those that are computed.
    vocab: ids of a table that is stored: balanced, clustered, dispersed.
    frequencies: of `balanced`, a .npy file of counts [vocab]; '': those of
      a vocabulary in order, 1 / (id - 2) from id 3 on.
    vectors: of `clustered` and `dispersed`, a .npy file of [vocab, d].
  """

  table: Literal[_TABLES] = 'random'
  hashes: Count = 1
  salt: Seed = 0
  per_layer: bool = False
  vocab: SizeOr0 = 0
  frequencies: str = ''
  vectors: str = ''

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del x, experts
    hashes, size = jnp.arange(self.hashes), self.num_experts // self.hashes
    if self.table in _STORED:
      init = by_hand(self, lambda: self._stored(size))
      table = keep(self, 'table', (self.hashes, self.vocab), init)
      found = jnp.moveaxis(table[:, ctx.tokens], 0, -1)  # [g, s, hashes]
    else:
      salts = [self.salt]
      if self.per_layer:
        salts.append(keep(self, 'salt', (), _any_salt))
      looked_at = (a[..., None] for a in _hashed(ctx, self.table))
      found = tables.mixed(*salts, hashes, *looked_at) % size
    expert = hashes * size + found.astype(jnp.int32)
    each = expert[..., None] == jnp.arange(self.num_experts)
    return Scores.certain(each.any(-2))

  def _stored(self, size: int):
    """A table for each hash."""
    draws = [np.random.default_rng([self.salt, i]) for i in range(self.hashes)]
    if self.table == 'balanced':
      counts = tables.zipf(self.vocab)
      if self.frequencies:
        counts = _read('frequencies', self.frequencies, (self.vocab,))
      # The first is the plain one.
      draws[0] = None
      return np.stack([tables.balanced(counts, size, rng) for rng in draws])
    make = getattr(tables, self.table)
    vectors = _read('vectors', self.vectors, (self.vocab, None))
    return np.stack([make(vectors, size, rng) for rng in draws])


def _any_salt(key, shape, dtype):
  """A whole number that float32 holds."""
  return jax.random.randint(key, shape, 0, 2**24).astype(dtype)


def _read(option: str, path: str, shape):
  """The numbers of a .npy file; None in `shape` is any."""
  what = f'config.model.moe.gate.{option} = {path!r}'
  try:
    found = np.load(pathlib.Path(path).expanduser(), allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise ValueError(f'{what} should be a .npy file of numbers: {e}') from None
  wanted = tuple('d' if n is None else n for n in shape)
  fits = isinstance(found, np.ndarray) and found.ndim == len(shape)
  if not fits or any(
    n not in (None, m) for n, m in zip(shape, found.shape, strict=True)
  ):
    shown = list(getattr(found, 'shape', ()))
    raise ValueError(f'{what} has shape {shown}: it should be {wanted}.')
  if found.dtype.kind not in 'iuf' or not np.isfinite(found).all():
    raise ValueError(f'{what} should hold finite numbers and nothing else.')
  return found.astype(np.float32)


def _skills_fit(model, moe, *, table, **_):
  """Raises where a task has no experts, or others than there are."""
  what = 'config.model.moe.gate.table'
  for task, experts in enumerate(table or ((),)):
    if not experts or len(set(experts)) < len(experts):
      raise ValueError(
        f'{what}[{task}] = {experts}: it should be experts, each of them once.'
      )
    if max(experts) >= moe.num_experts:
      raise ValueError(
        f'{what}[{task}] = {experts}: the experts are 0 to'
        f' {moe.num_experts - 1}.'
      )
    if len(experts) > moe.k:
      raise ValueError(
        f'{what}[{task}] = {experts} are {len(experts)} experts, and a token'
        f' asks {moe.k} at most: set the k of config.model.moe.selector.'
      )


@about(row='S2-26', paper='arXiv:2203.03312', needs=('task',), fits=_skills_fit)
class SkillsGate(Gate, kw_only=True):
  """Experts are skills, and a task lists those it takes: all, evenly.

  `table` has the experts of each task, by its number; the last are those of
  any task past it, which may be made of skills that others have taught. k of
  the selector is the longest list, `train_policy` 'all'.
  """

  table: tuple[tuple[CountOr0, ...], ...]

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del x, experts
    each = jnp.arange(self.num_experts)
    takes = jnp.stack([jnp.isin(each, jnp.array(row)) for row in self.table])
    return Scores.certain(takes[ctx.told_task(len(self.table))])


@about(row='S2-12', paper='arXiv:2210.14793', needs=('task',))
class TaskGate(Gate, kw_only=True):
  """A router for each of `tasks`: logits x W_task and their softmax.

  A task past the last has that of the last.
  """

  tasks: Size

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del experts
    kernel = self.param(
      'kernel',
      annotate(nn.initializers.normal(0.02), ('unmodeled', 'embed', None)),
      (self.tasks, x.shape[-1], self.num_experts),
      jnp.float32,
    )
    x = x.astype(jnp.float32)
    every = jnp.einsum('gsd,tde->gste', x, kernel, precision='highest')
    task = ctx.told_task(self.tasks)[..., None, None]
    mine = task == jnp.arange(self.tasks)[:, None]
    return Scores.of(jnp.where(mine, every, 0).sum(-2))


# module (num_experts, *, ...)(x, ctx, experts) -> Scores.
GATES = {
  'activated': ActivatedGate,
  'linear': LinearGate,
  'noisy': NoisyGate,
  'hash': HashGate,
  'skills': SkillsGate,
  'per_task': TaskGate,
}
