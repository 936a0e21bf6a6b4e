"""The bank of experts: feed-forward networks with a leading `expert` axis."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from st_moe.config import ModelConfig, MoEConfig, Part
from st_moe.model import grouped_tpu
from st_moe.model.layers import (
  Kernel,
  activation,
  activation_dtype,
  inputs_of,
  sums_dtype,
)
from st_moe.model.layers import product as weighted
from st_moe.routing.types import RouteContext
from st_moe.sharding import annotate


@flax.struct.dataclass
class Bank:
  """Experts as a function of tokens, and as arrays that may be moved."""

  wi: tuple[jax.Array, ...]  # [e, d, f] each; their outputs are multiplied.
  wo: jax.Array  # [e, f, d].
  bias: jax.Array | None  # [e, f], multiplied with the hidden units.
  key: jax.Array | None  # Of dropout on the hidden units; None: none.
  activation: Part = flax.struct.field(pytree_node=False)
  dropout: float = flax.struct.field(pytree_node=False)
  # In which gradients of weights add up.
  sums: jnp.dtype = flax.struct.field(pytree_node=False, default=jnp.float32)

  @property
  def count(self) -> int:
    """Experts that are here."""
    return len(self.wo)

  def __call__(self, x: jax.Array, expert=None) -> jax.Array:
    """Block b of `x` [b, ..., d] through expert `expert[b]` (None: b)."""
    return self.answers(self.hidden(x, expert), expert).reshape(x.shape)

  @jax.named_scope('experts')
  def hidden(self, x: jax.Array, expert=None) -> tuple[jax.Array, ...]:
    """What the activation is of: [b, ..., f], of each matrix of `wi`."""
    # A CPU would transpose an axis of one.
    tokens = x.squeeze(1) if x.shape[1:-2] == (1,) else x
    return tuple(product(tokens, w, expert, self.sums) for w in self.wi)

  @jax.named_scope('experts')
  def answers(self, hidden, expert=None) -> jax.Array:
    """[b, ..., d], from `hidden`."""
    h = activation(self.activation)(*hidden)
    if self.bias is not None:
      # Its gradients add up in float32.
      bias = self.bias.astype(jnp.float32)
      bias = (bias if expert is None else bias[expert]).astype(h.dtype)
      h *= jnp.expand_dims(bias, range(1, h.ndim - 1))
    if self.key is not None:
      keep = 1 - self.dropout
      stays = jax.random.bernoulli(self.key, keep, h.shape)
      h = jnp.where(stays, h / keep, 0)
    return product(h, self.wo, expert, self.sums)

  def axes(self) -> 'Bank':
    """The logical axes of its arrays, of weights that are whole along d."""
    name = lambda *axes: lambda array: None if array is None else axes
    inward = name('expert', None, 'expert_mlp')
    return self.replace(
      wi=tuple(inward(w) for w in self.wi),
      wo=('expert', 'expert_mlp', None),
      bias=name('expert', 'expert_mlp')(self.bias),
      key=name()(self.key),
    )


def product(x, w, expert=None, sums=jnp.float32) -> jax.Array:
  """x[b] [..., d] by w[expert[b]] [d, f] (None: w[b])."""
  if expert is not None:
    if x.shape[-2] > 1:
      return grouped_tpu.product(x, w, expert)
    w = w[expert]
  rows = 'xyz'[: x.ndim - 2]
  if len(w) == 1:  # As a plain product: else a CPU transposes first.
    return weighted(f'{rows}d,df->{rows}f', x[0], w[0], sums)[None]
  return weighted(f'b{rows}d,bdf->b{rows}f', x, w, sums)


class Experts(nn.Module):
  """Feed-forward networks of the shape of the dense one."""

  config: ModelConfig
  moe: MoEConfig

  @nn.compact
  def __call__(self, ctx: RouteContext) -> Bank:
    """The experts for tokens of the model's width."""
    cfg, dtype = self.config, activation_dtype(self.config.dtype)
    d, e, f = cfg.embed_dim, self.moe.num_experts, cfg.expert_dim(self.moe)
    kernel = functools.partial(
      Kernel, scale=cfg.init_scale, dtype=dtype, fan_in=(1,), batch=(0,)
    )
    names = inputs_of(cfg.activation)
    into, out = (
      ('expert', 'embed', 'expert_mlp'),
      ('expert', 'expert_mlp', 'embed'),
    )
    wi = tuple(kernel((e, d, f), into, name=name)() for name in names)
    bias = None
    if self.moe.multiplicative_bias:  # arXiv:2202.08906, Table 17.
      bias = self.param(
        'multiplicative_bias',
        annotate(nn.initializers.ones, ('expert', 'expert_mlp')),
        (e, f),
      ).astype(dtype)
    wo = kernel((e, f, d), out, name='wo')()
    dropout = cfg.expert_dropout(self.moe)
    drops = dropout and not ctx.deterministic
    key = self.make_rng('dropout') if drops else None
    return Bank(wi, wo, bias, key, cfg.activation, dropout, sums_dtype(cfg))


# module (config, moe, *, ...)(ctx) -> Bank.
EXPERTS = {'ffn': Experts}
