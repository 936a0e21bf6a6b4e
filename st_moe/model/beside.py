"""What answers beside the experts: `beside(x, y, ctx) -> (y, aside)`.

x and y are [batch, length, d], what the layer gets and what the experts say;
`aside` is what a loss of its own needs to know.
"""

import flax.linen as nn
import jax

from st_moe.config import ModelConfig, MoEConfig
from st_moe.routing.types import RouteContext


class Beside(nn.Module):
  """What all of them are given; options of one are its keywords."""

  config: ModelConfig
  moe: MoEConfig


class Nothing(Beside):
  """The experts alone."""

  def __call__(self, x: jax.Array, y: jax.Array, ctx: RouteContext):
    del x, ctx
    return y, {}


# module (config, moe, *, ...)(x, y, ctx) -> (y, aside).
BESIDE = {'nothing': Nothing}
