"""The sparse feed-forward layer: gate, selector, dispatcher, experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe import sharding
from st_moe.config import ModelConfig, MoEConfig, Part
from st_moe.model.dispatch import DISPATCHERS
from st_moe.model.experts import Experts
from st_moe.model.gates import GATES
from st_moe.model.grouped import BLOCK
from st_moe.model.layers import activation_dtype, sums_dtype
from st_moe.routing.losses import LOSSES, gauges
from st_moe.routing.selectors import SELECTORS
from st_moe.routing.types import RouteContext

# The fields that choose parts of a layer.
_GATE, _SELECTOR, _DISPATCHER = (
  f'config.model.moe.{name}' for name in ('gate', 'selector', 'dispatcher')
)


def check(moe: MoEConfig) -> None:
  """Raises for a part, or an option of one, that there is not."""
  moe.gate.choose(_GATE, GATES)
  moe.selector.choose(_SELECTOR, SELECTORS)
  if moe.dispatcher != 'auto':
    Part(moe.dispatcher).choose(_DISPATCHER, DISPATCHERS)


class MoE(nn.Module):
  """A feed-forward layer in which each token meets a few of many experts.

  Sows `record` into 'intermediates': each loss and gauge of routing as (sum,
  weight), and the load of every expert. Whoever makes the collection 'routing'
  mutable gets the full `scores` and `seats` too.
  """

  config: ModelConfig
  group_size: int

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext) -> jax.Array:
    """Maps `x` [batch, length, embed] to the same; padding comes back as 0."""
    cfg, moe = self.config, self.config.moe
    if moe.padding == 'zeroed':
      x = jnp.where(ctx.valid[..., None], x, 0)
    if moe.padding != 'ignored':
      ctx = ctx.replace(valid=jnp.full(ctx.valid.shape, True))
    size = x.shape[1] if moe.group_by == 'sequence' else self.group_size
    groups = functools.partial(into_groups, group_size=size)
    xg, ctx = groups(x), jax.tree.map(groups, ctx)  # [g, s, ...]
    xg = sharding.constrain(xg, 'group', 'length', 'activation_embed')
    capacity = moe.slots(xg.shape[1], ctx.deterministic)

    gate = moe.gate.choose(_GATE, GATES)
    scores = gate(moe.num_experts, name='router')(xg, ctx)
    if ctx.override is not None:
      scores = scores.biased(ctx.override.bias)
    rng = self.make_rng('dropout') if self.has_rng('dropout') else None
    select = moe.selector.choose(_SELECTOR, SELECTORS)
    with jax.named_scope('router'):
      seats = select(scores, ctx, rng=rng, capacity=capacity)
    experts = Experts(
      moe.num_experts,
      cfg.expert_dim,
      activation=cfg.activation,
      dropout=cfg.expert_dropout,
      multiplicative_bias=moe.multiplicative_bias,
      init_scale=cfg.init_scale,
      dtype=activation_dtype(cfg.dtype),
      sums=sums_dtype(cfg),
      name='experts',
    )(x.shape[-1], deterministic=ctx.deterministic)
    dispatch = self._dispatcher(seats, ctx).choose(_DISPATCHER, DISPATCHERS)
    y = dispatch(
      xg,
      seats,
      experts,
      capacity=capacity,
      num_experts=moe.num_experts,
      transport=moe.transport,
    )
    y = sharding.constrain(y, 'group', 'length', 'activation_embed')
    self._record(scores, seats, ctx)
    return y.reshape(-1, x.shape[-1])[: x[..., 0].size].reshape(x.shape)

  def _dispatcher(self, seats, ctx) -> Part:
    moe = self.config.moe
    if moe.dispatcher != 'auto':
      return Part(moe.dispatcher)
    if not moe.capacity(ctx.deterministic).dropless:
      return Part('index')
    # Few routes, as in a step of decoding: what counts is to read few weights,
    # and to copy none where every expert is read anyway.
    routes = seats.expert.size
    if routes < moe.num_experts:
      return Part('per_token')
    return Part('index' if routes <= BLOCK else 'grouped')

  def _record(self, scores, seats, ctx):
    replace = lambda _, new: new
    record = {
      'losses': {k: loss(scores, seats, ctx) for k, loss in LOSSES.items()},
      'gauges': gauges(scores, seats, ctx),
      'load': seats.load.sum(0),
    }
    self.sow('intermediates', 'record', record, reduce_fn=replace)
    if not self.is_initializing():  # Or it would be born a variable.
      self.sow('routing', 'scores', scores, reduce_fn=replace)
      self.sow('routing', 'seats', seats, reduce_fn=replace)


def into_groups(a: jax.Array, group_size: int) -> jax.Array:
  """Cuts [batch, length, ...] into [g, s, ...], zeros filling the last group.

  Groups do not depend on the mesh: empty ones are added where the devices are
  more, and they ask for nothing.
  """
  if a.ndim < 2:  # A scalar of the context, as `step`.
    return a
  batch, length, *rest = a.shape
  tokens = batch * length
  size = min(group_size, tokens)
  g = sharding.whole_groups(tokens, size, sharding.shards('group'))
  a = a.reshape(tokens, *rest)
  a = jnp.pad(a, ((0, g * size - tokens), *((0, 0) for _ in rest)))
  return a.reshape(g, size, *rest)
