"""What a token thinks of every expert: `gate(x, ctx) -> Scores`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe.fields import Rate
from st_moe.routing.types import RouteContext, Scores
from st_moe.sharding import annotate


class LinearGate(nn.Module):
  """Logits x W_r and their softmax, in float32 whatever the activations are.

  `jitter` multiplies the router's input by U[1 - jitter, 1 + jitter] in
  training (arXiv:2101.03961); ST-MoE does without it.
  """

  num_experts: int
  jitter: Rate = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, ctx: RouteContext) -> Scores:
    x = x.astype(jnp.float32)
    if self.jitter and not ctx.deterministic:
      low, high = 1 - self.jitter, 1 + self.jitter
      rng = self.make_rng('dropout')
      x *= jax.random.uniform(rng, x.shape, minval=low, maxval=high)
    kernel = self.param(
      'kernel',
      annotate(nn.initializers.normal(0.02), ('embed', 'unmodeled')),
      (x.shape[-1], self.num_experts),
      jnp.float32,
    )
    # TPUs multiply float32 in bfloat16 unless told otherwise.
    logits = jnp.einsum('gsd,de->gse', x, kernel, precision='highest')
    return Scores(logits, logits, jax.nn.softmax(logits))


GATES = {'linear': LinearGate}
