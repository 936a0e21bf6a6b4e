"""What answers beside the experts: `beside(x, y, ctx) -> (y, aside)`.

x and y are [batch, length, d], what the layer gets and what the experts say;
`aside` is what a loss of its own needs to know.
"""

import flax.linen as nn
import jax

from st_moe.about import about
from st_moe.config import ModelConfig, MoEConfig
from st_moe.fields import Size
from st_moe.model.layers import Mlp, activation_dtype, sums_dtype
from st_moe.routing.types import RouteContext


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


@about(row='S2-30', paper='arXiv:2401.06066')
class Shared(Beside, kw_only=True):
  """y + FFN(x): `count` experts that answer every token, with weight 1.

  They are one FFN as wide as all of them, which is their sum, and queue for no
  place (arXiv:2401.06066, Eq. 9). Padding gets their answer too.
  """

  count: Size = 1

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, ctx: RouteContext):
    return y + self.dense(x, ctx), {}


# module (config, moe, *, ...)(x, y, ctx) -> (y, aside).
BESIDE = {'nothing': Nothing, 'shared': Shared}
