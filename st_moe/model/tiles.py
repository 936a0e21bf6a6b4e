"""What kernels for TPUs share."""

import jax
import jax.numpy as jnp

LANES = 128  # Of a register.
VMEM = 32 << 20  # Bytes that a kernel may ask for.


def tile_product(names: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum inside a kernel, its sums in float32."""
  return jnp.einsum(
    names,
    a,
    b,
    precision='highest' if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )


def like(x: jax.Array, shape, dtype) -> jax.ShapeDtypeStruct:
  """What a kernel returns; it varies along the same mesh axes as `x`."""
  found = jax.eval_shape(lambda a: a, x)
  return found.update(shape=shape, dtype=dtype, sharding=None)
