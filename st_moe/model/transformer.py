"""The model: stacks of layers between an embedding and logits.

`encode`, `decode` and `__call__` have T5X's signatures, submodules its names.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from st_moe import paths
from st_moe.config import ModelConfig
from st_moe.layer_plan import LayerPlan, Sublayer
from st_moe.model import parts
from st_moe.model.attend import Sight
from st_moe.model.attention import Attention, RelativePositionBias
from st_moe.model.dispatch import SAVED_NAMES
from st_moe.model.layers import (
  PRODUCT,
  Embed,
  Kernel,
  Mlp,
  RMSNorm,
  activation_dtype,
  flat,
  sums_dtype,
)
from st_moe.model.moe import MoE
from st_moe.routing.types import RouteContext, RouteOverride
from st_moe.sharding import constrain

_policies = jax.checkpoint_policies
_exchange = _policies.save_only_these_names(*SAVED_NAMES)
REMAT = {
  'none': None,
  # Both keep what travelled to and from the experts.
  'full': _exchange,
  'dots': _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable,
    _policies.save_only_these_names(*SAVED_NAMES, PRODUCT),
  ),
}


@flax.struct.dataclass
class Surroundings:
  """What every layer of a stack sees besides the residual stream."""

  ctx: RouteContext
  bias: jax.Array | None  # float32 [1, heads, q, k]; None: each layer's own.
  positions: tuple[jax.Array, jax.Array]  # int32 [q] and [k].
  sight: Sight
  encoded: jax.Array | None = None  # [batch, k, embed].
  encoded_sight: Sight | None = None
  index: jax.Array | None = None  # int32 [], the step when decoding.
  room: int = flax.struct.field(pytree_node=False, default=0)  # Of a cache.
  causal: bool = flax.struct.field(pytree_node=False, default=False)

  def at_layer(self, n: int) -> 'Surroundings':
    """What the n-th sparse layer sees, where a caller overrides routes."""
    if self.ctx.override is None:
      return self
    # A dense layer behind the last sparse one reads no row.
    row = jax.tree.map(lambda a: a[min(n, len(a) - 1)], self.ctx.override)
    return self.replace(ctx=self.ctx.replace(override=row))


class Layer(nn.Module):
  """Residual sublayers: norm, mix or feed forward, dropout, add."""

  config: ModelConfig
  sublayers: tuple[Sublayer, ...]
  group_size: int

  @nn.compact
  def __call__(self, x: jax.Array, around: Surroundings) -> jax.Array:
    cfg, dtype = self.config, activation_dtype(self.config.dtype)
    deterministic = around.ctx.deterministic
    for sublayer in self.sublayers:
      y = RMSNorm(dtype, name=sublayer.norm)(x)
      y = SUBLAYERS[sublayer.kind](self, sublayer, y, around)
      y = nn.Dropout(cfg.dropout, broadcast_dims=(-2,))(
        y, deterministic=deterministic
      )
      x = constrain(x + y, 'batch', 'length', 'activation_embed')
    return x


def _attention(layer: Layer, sublayer: Sublayer):
  cfg = layer.config
  return Attention(
    cfg.num_heads,
    cfg.head_dim,
    cfg.dropout,
    cfg.init_scale,
    activation_dtype(cfg.dtype),
    sums_dtype(cfg),
    name=sublayer.name,
  )


def _position_bias(config: ModelConfig, causal: bool):
  return RelativePositionBias(
    config.num_heads,
    config.relpos_buckets,
    config.relpos_max_distance,
    bidirectional=not causal,
    init_scale=config.position_init_scale,
    name='relpos_bias',
  )


def _self_attention(layer, sublayer, x, around):
  bias = around.bias
  if bias is None:
    bias = _position_bias(layer.config, around.causal)(*around.positions)
  return _attention(layer, sublayer)(
    x,
    None,
    bias,
    around.sight,
    deterministic=around.ctx.deterministic,
    index=around.index,
    room=around.room,
  )


def _cross_attention(layer, sublayer, x, around):
  return _attention(layer, sublayer)(
    x,
    around.encoded,
    None,
    around.encoded_sight,
    deterministic=around.ctx.deterministic,
  )


def _mlp(layer, sublayer, x, around):
  cfg = layer.config
  return Mlp(
    sublayer.dim,
    cfg.activation,
    cfg.dropout,
    cfg.init_scale,
    activation_dtype(cfg.dtype),
    sums_dtype(cfg),
    name=sublayer.name,
  )(x, deterministic=around.ctx.deterministic)


def _moe(layer, sublayer, x, around):
  cfg, size = layer.config, layer.group_size
  return MoE(cfg, sublayer.moe, size, name=sublayer.name)(x, around.ctx)


SUBLAYERS = {
  'self_attention': _self_attention,
  'cross_attention': _cross_attention,
  'mlp': _mlp,
  'moe': _moe,
}


class Period(nn.Module):
  """The layers that repeat; one of these is compiled, whatever the depth."""

  config: ModelConfig
  layers: tuple[tuple[Sublayer, ...], ...]
  group_size: int

  @nn.compact
  def __call__(self, x: jax.Array, around: Surroundings, override=None):
    around = around.replace(ctx=around.ctx.replace(override=override))
    for i, sublayers in enumerate(self.layers):
      layer = _layer(self.config, sublayers, self.group_size, f'layer_{i}')
      x = layer(x, around.at_layer(LayerPlan(self.layers[:i]).num_sparse))
    return x, None


def _layer(config, sublayers, group_size, name) -> Layer:
  cls = Layer
  if config.remat != 'none':
    # With its barrier in a scan too, or all layers of a period are computed
    # again at once.
    cls = nn.remat(Layer, policy=REMAT[config.remat])
  return cls(config, sublayers, group_size, name=name)


class Stack(nn.Module):
  """An encoder or decoder: its layers, position biases and final norm."""

  config: ModelConfig
  kind: str  # 'encoder' or 'decoder'.

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    ctx: RouteContext,
    *,
    encoded=None,
    encoded_ctx: RouteContext | None = None,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> jax.Array:
    """Maps `x` [batch, length, embed] to the same.

    When decoding, a first call makes a cache for `max_decode_length` tokens
    (its own, if None); each call after it takes one token.
    """
    cfg, dtype = self.config, activation_dtype(self.config.dtype)
    causal = self.kind == 'decoder'
    ctx = ctx.replace(causal=causal)
    positions = keys = jnp.arange(x.shape[1])
    sight = _sight(ctx, ctx, causal)
    encoded_sight = None
    if encoded is not None:
      encoded_sight = _sight(ctx, encoded_ctx)
      if decode or len(x) != len(encoded):  # Several rows may share what is.
        encoded_sight = _of_all(encoded_ctx.valid)
    index, room = None, max_decode_length or x.shape[1]
    if decode:
      ready = self.has_variable('cache', 'cache_index')
      if ready and max_decode_length is None:
        raise ValueError('decode=True needs max_decode_length: the cache size.')
      step = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
      index = step.value
      if ready:
        step.value = index + 1
        positions, keys = index[None], jnp.arange(room)
        sight = _of_all((keys <= index)[None])
      ctx = self._as_decoded(ctx, index, ready)
    around = Surroundings(
      ctx=ctx,
      bias=None
      if cfg.relpos_per_layer
      else _position_bias(cfg, causal)(positions, keys),
      positions=(positions, keys),
      sight=sight,
      encoded=encoded,
      encoded_sight=encoded_sight,
      index=index,
      room=room,
      causal=causal,
    )
    drop = nn.Dropout(cfg.dropout, broadcast_dims=(-2,))
    x = drop(x.astype(dtype), deterministic=ctx.deterministic)
    x = self._layers(x, around)
    x = RMSNorm(dtype, name=f'{self.kind}_norm')(x)
    return drop(x, deterministic=ctx.deterministic)

  def _as_decoded(self, ctx: RouteContext, index, ready: bool):
    """What routers hear of the token at hand, as if all had come at once."""
    ctx = ctx.replace(positions=jnp.broadcast_to(index, ctx.tokens.shape))
    if 'before' not in parts.needs(self.config.moe_of(self.kind)):
      return ctx
    # Shaped as keys are: beams move it as they move these.
    shape = *ctx.tokens.shape, 1, 1
    last = self.variable('cache', 'before', jnp.zeros, shape, jnp.int32)
    before = last.value.reshape(ctx.tokens.shape)
    if ready:
      last.value = ctx.tokens.reshape(shape)
    return ctx.replace(before=before)

  def _layers(self, x, around):
    cfg = self.config
    plan, group_size = cfg.plan(self.kind), cfg.stack(self.kind).group_size
    scanned = 0
    if cfg.scan_layers:
      periods = len(plan.layers) // plan.period
      scanned = periods * plan.period
      sparse = LayerPlan(plan.layers[:scanned]).num_sparse
      rows = jax.tree.map(  # [periods, sparse layers in each, e]
        lambda a: a[:sparse].reshape(periods, -1, *a.shape[1:]),
        around.ctx.override,
      )
      x, _ = nn.scan(
        Period,
        variable_axes={
          'params': 0,
          'cache': 0,
          'memory': 0,
          'intermediates': 0,
          'routing': 0,
        },
        split_rngs={'params': True, 'dropout': True},
        in_axes=(nn.broadcast, 0),
        length=periods,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(
        cfg, plan.layers[: plan.period], group_size, name='layers'
      )(x, around.replace(ctx=around.ctx.replace(override=None)), rows)
    for i, sublayers in list(enumerate(plan.layers))[scanned:]:
      layer = _layer(cfg, sublayers, group_size, f'layers_{i}')
      x = layer(x, around.at_layer(LayerPlan(plan.layers[:i]).num_sparse))
    return x


def _sight(query: RouteContext, key: RouteContext, causal=False) -> Sight:
  """Real tokens of the same packed example see one another."""
  packed = query.segments is not None and key.segments is not None
  number = lambda of, no: jnp.where(
    of.valid, of.segments + 1 if packed else 1, no
  )
  return Sight(number(query, -1), number(key, 0), causal)


def _of_all(keys: jax.Array) -> Sight:
  """Of any query, on the `keys` [batch or 1, k] that are there."""
  return Sight(jnp.ones((1, 1), jnp.int32), keys.astype(jnp.int32))


class Transformer(nn.Module):
  """Encoder-decoder, encoder-only or decoder-only, as its config says."""

  config: ModelConfig

  def setup(self):
    cfg, dtype = self.config, activation_dtype(self.config.dtype)
    self.token_embedder = Embed(cfg.vocab_size, cfg.embed_dim, dtype)
    for kind in cfg.stacks:
      setattr(self, kind, Stack(cfg, kind))
    if not cfg.tie_embeddings:
      self.logits_dense = Kernel(
        (cfg.embed_dim, cfg.vocab_size),
        ('embed', 'vocab'),
        cfg.init_scale,
        jnp.float32,
      )

  @nn.nowrap
  def as_read(self, params):
    """`params` in the dtypes in which the layers read them: the same bits."""
    return paths.as_read(params, activation_dtype(self.config.dtype))

  def _context(
    self, tokens, valid, segments, positions, *, dropout, task, **rest
  ):
    tokens, (rows, length) = tokens.astype(jnp.int32), tokens.shape
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    before = lambda a: jnp.pad(a[:, :-1], ((0, 0), (1, 0)))
    segment = jnp.zeros_like(tokens) if segments is None else segments
    if task is not None:  # Several rows may share one.
      task = task.reshape(len(task), -1).repeat(rows // len(task), axis=0)
      task = jnp.broadcast_to(task, tokens.shape)
    return RouteContext(
      valid=valid,
      tokens=tokens,
      positions=positions,
      segments=segments,
      example=jnp.arange(rows)[:, None] * (length + 1) + segment,
      before=jnp.where(segment == before(segment), before(tokens), 0),
      task=task,
      deterministic=not dropout,
      **rest,
    )

  def encode(
    self,
    encoder_input_tokens,
    encoder_segment_ids=None,
    encoder_positions=None,
    *,
    enable_dropout: bool = True,
    step=None,
    override: RouteOverride | None = None,
    task=None,
  ) -> jax.Array:
    """Token ids [batch, length], 0 is padding, to [batch, length, embed].

    `task` is the source of each row, int32 [batch], or of each token.
    """
    tokens = encoder_input_tokens
    told = dict(dropout=enable_dropout, step=step, override=override, task=task)
    ctx = self._context(
      tokens, tokens > 0, encoder_segment_ids, encoder_positions, **told
    )
    return self.encoder(self.token_embedder(tokens), ctx)

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    decoder_positions=None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
    max_decode_length: int | None = None,
    step=None,
    override: RouteOverride | None = None,
    task=None,
    project: bool = True,
  ) -> jax.Array:
    """Logits float32 [batch, length, vocab] of the token after each input.

    `encoded` [batch / r, ...] and `task` are shared by each r rows of the
    decoder. Without `project`, what logits are made of: [batch, length, embed].
    """
    tokens = decoder_input_tokens
    # Inputs begin with a 0 that is no padding; targets say what is.
    valid = (decoder_target_tokens > 0) | decode
    told = dict(dropout=enable_dropout, step=step, override=override, task=task)
    ctx = self._context(
      tokens, valid, decoder_segment_ids, decoder_positions, **told
    )
    encoded_ctx = None
    if encoded is not None:
      encoded_ctx = RouteContext(
        valid=encoder_input_tokens > 0, segments=encoder_segment_ids
      )
    x = self.decoder(
      self.token_embedder(tokens),
      ctx,
      encoded=encoded,
      encoded_ctx=encoded_ctx,
      decode=decode,
      max_decode_length=max_decode_length,
    )
    return self.project(x) if project else x

  def project(self, x: jax.Array) -> jax.Array:
    """Logits float32 [batch, length, vocab] of the last stack's output."""
    # Before the product: logits rounded to bfloat16 would lose near ties.
    x = x.astype(jnp.float32)
    if self.config.tie_embeddings:
      logits = self.token_embedder.attend(x)
    else:
      logits = flat(x) @ self.logits_dense()
      logits = logits.reshape(*x.shape[:-1], -1)
    return constrain(logits, 'batch', 'length', 'activation_vocab')

  def __call__(
    self,
    encoder_input_tokens=None,
    decoder_input_tokens=None,
    decoder_target_tokens=None,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    enable_dropout: bool = True,
    decode: bool = False,
    step=None,
    task=None,
    project: bool = True,
  ) -> jax.Array:
    """Logits of the last stack, for teacher forcing; or their input."""
    told = dict(enable_dropout=enable_dropout, step=step, task=task)
    encoded = None
    if self.config.encoder:
      encoded = self.encode(
        encoder_input_tokens, encoder_segment_ids, encoder_positions, **told
      )
    if not self.config.decoder:
      return self.project(encoded) if project else encoded
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      decoder_positions,
      decode=decode,
      project=project,
      **told,
    )
