"""What answers beside the experts: `beside(x, y, ctx) -> (y, aside)`.

x and y are [batch, length, d], what the layer gets and what the experts say;
`aside` is what a loss of its own needs to know.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.config import ModelConfig, MoEConfig
from st_moe.fields import Rate, Size
from st_moe.model.layers import Mlp, activation_dtype, sums_dtype
from st_moe.routing.types import RouteContext
from st_moe.sharding import annotate


class Beside(nn.Module):
  """What all of them are given; options of one are its keywords."""

  config: ModelConfig
  moe: MoEConfig

  def dense(self, x: jax.Array, ctx: RouteContext) -> jax.Array:
    """A dense FFN of `ModelConfig.beside_dim` hidden units, of every token."""
    cfg = self.config
    return Mlp(
      cfg.beside_dim(self.moe),
      cfg.activation,
      cfg.dropout,
      cfg.init_scale,
      activation_dtype(cfg.dtype),
      sums_dtype(cfg),
      name='mlp',
    )(x, deterministic=ctx.deterministic)


class Nothing(Beside):
  """The experts alone."""

  def __call__(self, x: jax.Array, y: jax.Array, ctx: RouteContext):
    del x, ctx
    return y, {}


@about(
  row='S2-30', paper='arXiv:2401.06066', neutral='one at least always answers'
)
class Shared(Beside, kw_only=True):
  """y + FFN(x): `count` experts that answer every token, with weight 1.

  They are one FFN as wide as all of them, which is their sum, and queue for no
  place (arXiv:2401.06066, Eq. 9). Padding gets their answer too.
  """

  count: Size = 1

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, ctx: RouteContext):
    return y + self.dense(x, ctx), {}


@about(
  row='S1-14',
  paper='arXiv:2212.07571',
  noisy=True,
  neutral='a gate is never quite open',
)
class Conditional(Beside, kw_only=True):
  """(1 - u) FFN(x) + u y, u = sigmoid(x w + b): not all tokens need experts.

  Training drops u with rate `dropout`, which leaves a token the dense FFN, and
  scales up what stays. u of padding is 0. For the loss `budget`, `aside` has
  `used`, the sum of u, and `there`, the number of tokens (CMR of
  arXiv:2212.07571; its code drops u so).
  """

  dropout: Rate = 0.2

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, ctx: RouteContext):
    gate = nn.Dense(
      1,
      precision='highest',
      kernel_init=annotate(
        nn.initializers.normal(0.02), ('embed', 'unmodeled')
      ),
      bias_init=annotate(nn.initializers.zeros, ('unmodeled',)),
      name='router',
    )
    u = nn.sigmoid(gate(x.astype(jnp.float32)))  # [batch, length, 1].
    u = nn.Dropout(self.dropout)(u, deterministic=ctx.deterministic)
    u = jnp.where(ctx.valid[..., None], u, 0)
    mixed = (1 - u) * self.dense(x, ctx) + u * y
    there = ctx.valid.astype(jnp.float32).sum()
    return mixed.astype(y.dtype), {'used': u.sum(), 'there': there}


@about(
  row='S0-12', paper='arXiv:2310.00811', neutral='born neutral, and trained'
)
class Scaled(Beside):
  """y * omega, omega [d] trained and born 1 (arXiv:2310.00811)."""

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, ctx: RouteContext):
    del x, ctx
    born = annotate(nn.initializers.ones, ('embed',))
    scale = self.param('scale', born, y.shape[-1:])
    return (y * scale).astype(y.dtype), {}


# module (config, moe, *, ...)(x, y, ctx) -> (y, aside).
BESIDE = {
  'nothing': Nothing,
  'conditional': Conditional,
  'scaled': Scaled,
  'shared': Shared,
}
