"""The sparse feed-forward layer: a chain from scores to answers."""

import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe import about, sharding
from st_moe.config import ModelConfig, MoEConfig, Part
from st_moe.model import parts
from st_moe.model.dispatch import fitting
from st_moe.model.layers import keep
from st_moe.model.rows import Room, into_groups
from st_moe.routing.losses import gauges
from st_moe.routing.types import RouteContext, Routed


class MoE(nn.Module):
  """A feed-forward layer in which each token meets a few of many experts.

  Sows `record` into 'intermediates': each loss and gauge of routing as (sum,
  weight), and the load and importance of every expert. Whoever makes the
  collection 'routing' mutable gets the full `scores` and `seats` too.
  """

  config: ModelConfig
  moe: MoEConfig
  group_size: int

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext) -> jax.Array:
    """Maps `x` [batch, length, embed] to the same.

    No expert answers padding: it comes back as 0, or what stands beside says.
    """
    cfg, moe = self.config, self.moe
    if moe.padding == 'zeroed':
      x = jnp.where(ctx.valid[..., None], x, 0)
    if moe.padding != 'ignored':
      ctx = ctx.replace(valid=jnp.full(ctx.valid.shape, True))
    size = x.shape[1] if moe.group_by == 'sequence' else self.group_size
    groups = functools.partial(into_groups, group_size=size)
    xg, here = groups(x), jax.tree.map(groups, ctx)  # [g, s, ...]
    xg = sharding.constrain(xg, 'group', 'length', 'activation_embed')
    room = Room(
      moe.slots(xg.shape[1], here.deterministic), moe.num_experts, moe.transport
    )
    experts = parts.choose('experts', moe.experts)
    bank = experts(cfg, moe, name='experts')(here)
    scores, seats, heard = decide(self, moe, xg, here, bank, room)
    fits = fitting(moe, seats, here.deterministic)
    y = parts.choose('dispatcher', fits)(xg, heard, bank, room)
    y = sharding.constrain(y, 'group', 'length', 'activation_embed')
    y = y.reshape(-1, x.shape[-1])[: x[..., 0].size].reshape(x.shape)
    beside = parts.choose('beside', moe.beside)
    y, aside = beside(cfg, moe, name='shared')(x, y, ctx)
    record(self, moe, Routed(xg, scores, seats, here, bank, aside))
    return y


def decide(module, moe: MoEConfig, x, ctx: RouteContext, experts, room: Room):
  """Scores, seats, and seats as they are heard; in the scope of `module`."""
  rng = module.make_rng('dropout') if module.has_rng('dropout') else None

  def through(field: str, part: Part, value, *more):
    """`value` through a stage, which has a key of its own."""
    # Of its name, so that a stage more changes no draw of the others.
    number = zlib.crc32(f'{field}/{part.name}'.encode())
    key = None if rng is None else jax.random.fold_in(rng, number)
    return parts.choose(field, part, ctx.causal)(value, ctx, key, *more)

  gate = parts.choose('gate', moe.gate, ctx.causal)
  scores = gate(moe.num_experts, name='router')(x, ctx, experts)
  with jax.named_scope('router'):
    for part in moe.shaping:
      keeps = about.of(parts.choose('shaping', part)).keeps
      size = {'e': moe.num_experts}
      kept = {n: keep(module, n, [size[a] for a in axes]) for n, axes in keeps}
      scores = through('shaping', part, scores, kept)
    scores = scores.steered(ctx.override)
    seats = through('selector', moe.selector, scores, room.capacity)
    heard = seats
    for part in moe.weighing:
      heard = through('weighing', part, heard)
  return scores, seats, heard


def record(module: nn.Module, moe: MoEConfig, routed: Routed) -> None:
  """Sows the losses of the config, gauges and loads; in `module`'s scope."""
  replace = lambda _, new: new
  seats = routed.seats
  found = {
    'losses': {p.name: parts.choose('losses', p)(routed) for p in moe.losses},
    'gauges': gauges(routed),
    'load': seats.load.sum(0),
    # Routes that were asked for, by expert: what balance is about.
    'wanted': seats.chosen(routed.ctx.valid.shape[1]).sum((0, 1)),
    'kept': routed.scores.aside.get('kept', {}),
  }
  module.sow('intermediates', 'record', found, reduce_fn=replace)
  if not module.is_initializing():  # Or it would be born a variable.
    module.sow('routing', 'scores', routed.scores, reduce_fn=replace)
    module.sow('routing', 'seats', seats, reduce_fn=replace)
