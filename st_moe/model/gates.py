"""What a token thinks of every expert: `gate(x, ctx, experts) -> Scores`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe.about import about
from st_moe.fields import Rate
from st_moe.routing.types import RouteContext, Scores
from st_moe.sharding import annotate


class Gate(nn.Module):
  """What all gates are given; options of one are its keywords."""

  num_experts: int

  def logits(self, x: jax.Array) -> jax.Array:
    """float32 x W_r, [g, s, e], whatever the activations are."""
    kernel = self.param(
      'kernel',
      annotate(nn.initializers.normal(0.02), ('embed', 'unmodeled')),
      (x.shape[-1], self.num_experts),
      jnp.float32,
    )
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
  training (arXiv:2101.03961); ST-MoE does without it.
  """

  jitter: Rate = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext, experts) -> Scores:
    del experts
    if self.jitter and not ctx.deterministic:
      low, high = 1 - self.jitter, 1 + self.jitter
      rng = self.make_rng('dropout')
      x = x.astype(jnp.float32)
      x *= jax.random.uniform(rng, x.shape, minval=low, maxval=high)
    return Scores.of(self.logits(x))


# module (num_experts, *, ...)(x, ctx, experts) -> Scores.
GATES = {'linear': LinearGate}
