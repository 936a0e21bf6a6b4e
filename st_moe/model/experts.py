"""The bank of experts: feed-forward networks with a leading `expert` axis."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from st_moe.model.layers import ACTIVATIONS, Kernel
from st_moe.sharding import annotate


class Experts(nn.Module):
  """`num_experts` feed-forward networks of the shape of the dense one."""

  num_experts: int
  hidden_dim: int
  activation: str
  dropout: float
  multiplicative_bias: bool
  init_scale: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, expert=None, *, deterministic: bool) -> jax.Array:
    """Block b of `x` [b, ..., d] through expert `expert[b]` (None: b)."""
    e, d, f = self.num_experts, x.shape[-1], self.hidden_dim
    of_block = lambda w: w if expert is None else w[expert]
    kernel = functools.partial(
      Kernel, scale=self.init_scale, dtype=self.dtype, fan_in=(1,), batch=(0,)
    )
    functions = ACTIVATIONS[self.activation]
    h = 1
    for i, fn in enumerate(functions):
      name = 'wi' if len(functions) == 1 else f'wi_{i}'
      wi = kernel((e, d, f), ('expert', 'embed', 'expert_mlp'), name=name)()
      h *= fn(jnp.einsum('b...d,bdf->b...f', x, of_block(wi)))
    if self.multiplicative_bias:  # arXiv:2202.08906, Table 17.
      bias = self.param(
        'multiplicative_bias',
        annotate(nn.initializers.ones, ('expert', 'expert_mlp')),
        (e, f),
      )
      bias = of_block(bias.astype(self.dtype))
      h *= bias.reshape(-1, *(1,) * (h.ndim - 2), f)
    h = nn.Dropout(self.dropout)(h, deterministic=deterministic)
    wo = kernel((e, f, d), ('expert', 'expert_mlp', 'embed'), name='wo')()
    return jnp.einsum('b...f,bfd->b...d', h, of_block(wo))
