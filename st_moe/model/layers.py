"""Norm, embedding, feed-forward: T5 1.1's parts, as T5X names them."""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from st_moe import sharding
from st_moe.config import ModelConfig, Part
from st_moe.sharding import annotate, constrain


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), of which the backward pass keeps the value.

  As the product that follows does, too: one array instead of two.
  """
  return jnp.maximum(x, 0)


relu.defvjp(lambda x: (relu(x),) * 2, lambda y, dy: (jnp.where(y > 0, dy, 0),))


def gelu(x: jax.Array) -> jax.Array:
  """GELU by tanh, as T5 has it."""
  return light(jax.nn.gelu)(x)


def geglu(x: jax.Array, linear: jax.Array) -> jax.Array:
  """GELU(x) * linear, of two input matrices (arXiv:2002.05202)."""
  return light(lambda x, linear: jax.nn.gelu(x) * linear)(x, linear)


# f(*outputs of as many input matrices, *, ...) -> hidden units.
ACTIVATIONS = {'relu': relu, 'gelu': gelu, 'geglu': geglu}


def activation(part: Part) -> Callable:
  """Of the outputs of its input matrices, in their order."""
  return part.choose('config.model.activation', ACTIVATIONS)


def inputs_of(part: Part) -> list[str]:
  """The names of its input matrices."""
  found = inspect.signature(activation(part)).parameters.values()
  n = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)
  return ['wi'] if n == 1 else [f'wi_{i}' for i in range(n)]


def activation_dtype(name: str) -> jnp.dtype:
  """'auto': bfloat16 where it is fast, else float32."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def sums_dtype(config: ModelConfig) -> jnp.dtype:
  """In which gradients of weights add up."""
  if config.gradient_sums == 'activations':
    return activation_dtype(config.dtype)
  return jnp.dtype(jnp.float32)


def keep(
  module: nn.Module, name: str, shape, init=nn.initializers.zeros
) -> jax.Array:
  """State across steps: a float32 parameter that no optimizer moves.

  It is `kept_NAME` in the scope of `module`, whole on every device. Small whole
  numbers stand in it as they are, below 2 ** 24.
  """
  born = annotate(init, (None,) * len(shape))
  return jax.lax.stop_gradient(
    module.param(f'kept_{name}', born, shape, jnp.float32)
  )


def by_hand(module: nn.Module, make):
  """An initializer: the array that `make()` of numpy returns.

  It is asked where parameters of `module` are born and nowhere else: what it
  reads need not be there for shapes, or for a checkpoint to be used.
  """

  def init(key, shape, dtype):
    del key
    if sharding.shapes_alone() or not module.is_initializing():
      return jnp.zeros(shape, dtype)
    return jnp.asarray(make(), dtype)

  return init


def light(function):
  """`function`, of which the backward pass keeps the arguments alone.

  For what is cheap to compute again: else every step of it would be kept.
  """
  # A scan keeps the compiler from merging the two passes by itself.
  return jax.checkpoint(function, prevent_cse=False)


PRODUCT = 'product'  # The name by which remat policies know one.


def product(names: str, x: jax.Array, w: jax.Array, sums) -> jax.Array:
  """einsum of `x` and a weight `w` of its dtype.

  The gradient of `w` adds up in the dtype `sums`, over tokens and over devices,
  and is rounded once (float32: arXiv:2202.08906, section 3.4).
  """
  if w.dtype == sums:
    return jnp.einsum(names, x, w)
  y = _product(names, sums, x, w)
  # A policy does not look into it.
  batched = set.intersection(*map(set, _axes(names)))
  return y if batched else checkpoint_name(y, PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(names, sums, x, w):
  return jnp.einsum(names, x, w)


def _product_backward(names, sums, kept, dy):
  x, w = kept
  of_x, of_w, of_y = _axes(names)
  dx = jnp.einsum(f'{of_y},{of_w}->{of_x}', dy, w)
  dw = jnp.einsum(f'{of_x},{of_y}->{of_w}', x, dy, preferred_element_type=sums)
  return dx, dw.astype(w.dtype)


_product.defvjp(
  lambda names, sums, x, w: (_product(names, sums, x, w), (x, w)),
  _product_backward,
)


def _axes(names: str) -> list[str]:
  """'td,df->tf' as ['td', 'df', 'tf']."""
  return names.replace('->', ',').split(',')


def flat(x: jax.Array) -> jax.Array:
  """[..., d] as [tokens, d].

  The backward pass sums over tokens: along one axis, a CPU is far faster.
  """
  return x.reshape(-1, x.shape[-1])


class Kernel(nn.Module):
  """One weight, in `dtype`; its path ends in /kernel, as T5X's do.

  Truncated normal with std sqrt(scale / fan-in) (arXiv:2101.03961, 2.4). Axes
  in `batch` are independent draws, as the experts of a bank.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  scale: float
  dtype: jnp.dtype
  fan_in: tuple[int, ...] = (0,)
  batch: tuple[int, ...] = ()

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.initializers.variance_scaling(
      self.scale,
      'fan_in',
      'truncated_normal',
      in_axis=self.fan_in,
      out_axis=tuple(
        i for i in range(len(self.shape)) if i not in self.fan_in + self.batch
      ),
      batch_axis=self.batch,
    )
    kernel = self.param('kernel', annotate(init, self.axes), self.shape)
    return kernel.astype(self.dtype)


class RMSNorm(nn.Module):
  """x / rms(x) * scale: no mean, no bias; in float32 for stability."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      'scale', annotate(nn.initializers.ones, ('embed',)), (x.shape[-1],)
    )
    return _normed(x, scale, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed(x, scale, dtype):
  return _normed_forward(x, scale, dtype)[0]


def _normed_forward(x, scale, dtype):
  y = x.astype(jnp.float32)
  r = jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
  return (y * r * scale).astype(dtype), (x, scale, r)


def _normed_backward(dtype, kept, dy):
  """Of `x` and 1 / rms alone.

  By hand, since a CPU would merge x / rms with that of the forward pass, and
  keep it as long.
  """
  x, scale, r = kept
  x32, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
  dscale = (x32 * (dy * r)).sum(range(x.ndim - 1))
  dx = dy * scale
  along = jnp.mean(dx * x32, axis=-1, keepdims=True)
  return (r * dx - r**3 * along * x32).astype(x.dtype), dscale


_normed.defvjp(_normed_forward, _normed_backward)


class Embed(nn.Module):
  """Token table, and the output projection where the two are tied."""

  vocab_size: int
  embed_dim: int
  dtype: jnp.dtype

  def setup(self):
    self.embedding = self.param(
      'embedding',
      annotate(nn.initializers.normal(1.0), ('vocab', 'embed')),
      (self.vocab_size, self.embed_dim),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    # T5X initialises with float tokens. Cast after the rows are taken, or the
    # gradients of a token would add up in `dtype`.
    rows = jnp.take(self.embedding, tokens.astype(jnp.int32), axis=0)
    return rows.astype(self.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits of float32 `x`; unit variance in the table needs 1 / sqrt(d)."""
    logits = flat(x) @ self.embedding.T
    return logits.reshape(*x.shape[:-1], -1) / jnp.sqrt(self.embed_dim)


class Mlp(nn.Module):
  """Dense feed-forward network, no biases."""

  hidden_dim: int
  activation: Part
  dropout: float
  init_scale: float
  dtype: jnp.dtype
  sums: jnp.dtype = jnp.float32  # In which gradients of weights add up.

  @nn.compact
  def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
    d, f = x.shape[-1], self.hidden_dim
    kernel = functools.partial(Kernel, scale=self.init_scale, dtype=self.dtype)
    names = inputs_of(self.activation)
    wi = [kernel((d, f), ('embed', 'mlp'), name=name)() for name in names]
    times = lambda x, w: product('td,df->tf', x, w, self.sums)
    tokens = flat(x)  # Once, or the backward pass would keep it twice.
    h = activation(self.activation)(*(times(tokens, w) for w in wi))
    h = h.reshape(*x.shape[:-1], f)
    h = nn.Dropout(self.dropout, broadcast_dims=(-2,))(
      h, deterministic=deterministic
    )
    h = constrain(h, 'batch', 'length', 'activation_mlp')
    wo = kernel((f, d), ('mlp', 'embed'), name='wo')()
    return times(flat(h), wo).reshape(x.shape)
