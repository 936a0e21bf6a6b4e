"""What a token thinks of every expert: `gate(x, ctx, experts) -> Scores`."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe import schedules
from st_moe.about import about
from st_moe.config import Part
from st_moe.fields import Above0, Rate
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


@about(row='S0-01', paper='arXiv:2202.08906')
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


# module (num_experts, *, ...)(x, ctx, experts) -> Scores.
GATES = {'linear': LinearGate, 'activated': ActivatedGate}
