"""The chain of one sparse layer, a stage at a time, on a few tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import paths, sharding
from st_moe.model import parts
from st_moe.routing.types import RouteContext, Scores
from tests.conformance.tables import Case
from tests.helpers import jit, random_params

GROUPS, TOKENS, WIDTH = 2, 8, 16
KEYS = jax.random.key(0), jax.random.key(1)
# A group with one token of padding, another with four.
VALID = np.arange(TOKENS) < np.array([[7], [4]])


def context(*, train: bool = False, valid=VALID, **more) -> RouteContext:
  """Of tokens of two examples a group, in step 3."""
  g, s = valid.shape
  tokens = np.random.default_rng(1).integers(1, 64, (g, s)).astype(np.int32)
  tokens = np.where(valid, tokens, 0)
  second = np.arange(s) >= s // 2
  return RouteContext(
    valid=jnp.asarray(valid),
    tokens=jnp.asarray(tokens),
    positions=jnp.broadcast_to(jnp.arange(s) % (s // 2), (g, s)),
    segments=jnp.where(valid, 1 + second, 0),
    example=jnp.arange(g)[:, None] * s + second,
    task=jnp.broadcast_to(jnp.arange(g)[:, None], (g, s)),
    before=jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))),
    step=jnp.int32(3),
    deterministic=not train,
    **more,
  )


def inputs(seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((GROUPS, TOKENS, WIDTH), np.float32))


def weights(module, *args, **kwargs) -> dict:
  """Random parameters; what is kept from step to step as it is born."""
  params = random_params(module, *args, **kwargs)
  kept = [path for path in paths.by_path(params) if 'kept_' in path]
  if not kept:
    return params

  @jit
  def born():  # Of the whole model nothing else is computed.
    made = module.init(jax.random.key(0), *args, **kwargs)['params']
    made = paths.by_path(sharding.unbox(made))
    return {path: made[path] for path in kept}

  found = jax.device_get(born())
  return paths.map_by_path(lambda path, leaf: found.get(path, leaf), params)


def _made(case: Case, kind: str):
  """What stands in a field of the layer of `case`: itself, if it does."""
  part = case.part if case.kind == kind else getattr(case.moe, kind)
  return parts.choose(kind, part)


@functools.cache
def bank(case: Case):
  """The experts of its layer."""
  module = _made(case, 'experts')(case.model, case.moe)
  ctx = context()
  return module.apply({'params': weights(module, ctx)}, ctx)


@functools.cache
def gate(case: Case):
  """f(x, ctx, key) -> Scores, of the gate of its layer."""
  module = _made(case, 'gate')(case.moe.num_experts)
  params = weights(module, inputs(), context(), bank(case))

  def score(x, ctx, key=None) -> Scores:
    rngs = None if key is None else {'dropout': key}
    return module.apply({'params': params}, x, ctx, bank(case), rngs=rngs)

  return score


def kept(case: Case, seed: int | None = None) -> dict:
  """What it keeps, as it is born, or at random."""
  e = case.moe.num_experts
  draw = np.random.default_rng(seed).standard_normal
  shape = lambda axes: [{'e': e}[a] for a in axes]
  make = np.zeros if seed is None else draw
  return {
    name: jnp.asarray(make(shape(axes)), jnp.float32)
    for name, axes in case.about.keeps
  }


def scores(case: Case, ctx: RouteContext, seed: int = 0, until=None) -> Scores:
  """What comes to the shaping `until`, or past all, of its layer."""
  found = gate(case)(inputs(seed), ctx, KEYS[0])
  for part in case.moe.shaping:
    if until and part.name == until.name:
      break
    shaping = Case('shaping', part, case.of, case.stack)
    found = shaping.made(found, ctx, KEYS[0], kept(shaping))
  return found


def random_scores(case: Case, kind: str, ctx: RouteContext) -> Scores:
  """Scores of the layer with other logits: 'even' ones tie everywhere.

  'few': half of the experts are ruled out, for one token all of them.
  """
  g, s = ctx.valid.shape
  e = case.moe.num_experts
  logits = np.random.default_rng(3).standard_normal((g, s, e))
  if kind == 'even':
    logits = np.round(logits)
  logits = jnp.asarray(logits, jnp.float32)
  plain = Scores.of(logits)
  found = scores(case, ctx)
  if kind == 'few':
    out = np.random.default_rng(4).random((g, s, e)) < 0.5
    out[0, 0] = True
    plain = plain.replace(select=jnp.where(out, -jnp.inf, logits))
  return plain.replace(aside=found.aside)


def same(a, b) -> bool:
  """Whether two trees have the same bits."""
  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)
