"""Which layers a stack has and what each is made of, as values."""

import dataclasses
import typing

if typing.TYPE_CHECKING:
  from st_moe.config import ModelConfig, MoEConfig


@dataclasses.dataclass(frozen=True)
class Sublayer:
  """One residual step: norm, `kind`, dropout, add."""

  kind: str  # 'self_attention', 'cross_attention', 'mlp' or 'moe'.
  name: str  # Of its module; part of every checkpoint.
  norm: str
  dim: int = 0  # Hidden units, if it has any.
  moe: 'MoEConfig | None' = None  # Of what routes: the plan is complete.


@dataclasses.dataclass(frozen=True)
class LayerPlan:
  """What each layer of a stack is: its sublayers in order."""

  layers: tuple[tuple[Sublayer, ...], ...]

  @property
  def period(self) -> int:
    """The shortest run of layers whose repetition gives the stack."""
    for p in range(1, len(self.layers)):
      if all(
        a == b for a, b in zip(self.layers, self.layers[p:], strict=False)
      ):
        return p
    return max(len(self.layers), 1)

  @property
  def sparse(self) -> tuple[int, ...]:
    """Numbers of the layers that have a sparse sublayer."""
    return tuple(
      i
      for i, layer in enumerate(self.layers)
      if any(s.kind == 'moe' for s in layer)
    )

  @property
  def num_sparse(self) -> int:
    return len(self.sparse)


def of(model: 'ModelConfig', stack: str) -> LayerPlan:
  """The layers of 'encoder' or 'decoder' of `model`."""
  cfg, moe = model.stack(stack), model.moe_of(stack)
  mlp = Sublayer('mlp', 'mlp', 'pre_mlp_layer_norm', model.mlp_dim)
  sparse = dataclasses.replace(
    mlp, kind='moe', name='moe', dim=model.expert_dim(moe), moe=moe
  )
  if model.dense:
    sparse = dataclasses.replace(mlp, dim=model.executed_dim(stack))
  extra = dataclasses.replace(
    mlp, name='extra_mlp', norm='pre_extra_mlp_layer_norm'
  )
  beside = {
    'none': (sparse,),
    'before': (extra, sparse),
    'after': (sparse, extra),
  }[moe.extra_ffn]
  mix = [
    Sublayer('self_attention', 'self_attention', 'pre_attention_layer_norm')
  ]
  if stack == 'decoder' and model.encoder:
    mix.append(
      Sublayer(
        'cross_attention',
        'encoder_decoder_attention',
        'pre_cross_attention_layer_norm',
      )
    )
  every, offset = cfg.sparse_every, cfg.sparse_offset
  return LayerPlan(
    tuple(
      (*mix, *(beside if every and i % every == offset else (mlp,)))
      for i in range(cfg.num_layers)
    )
  )
