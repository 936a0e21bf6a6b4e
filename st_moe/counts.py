"""What a model holds and computes, by arithmetic alone: parameters, FLOPs."""

import collections
import dataclasses
from collections.abc import Iterator

from st_moe.config import ModelConfig, Sublayer


def params(model: ModelConfig) -> dict[str, int]:
  """Parameters by role; `sum(...values())` is the model."""
  d, joined = model.embed_dim, model.num_heads * model.head_dim
  e, f = model.moe.num_experts, model.expert_dim
  matrices = _matrices(model)
  roles = dict.fromkeys(
    ('embedding', 'attention', 'mlp', 'experts', 'router', 'norms'), 0
  )
  roles['embedding'] = model.vocab_size * d * (1 if model.tie_embeddings else 2)
  for stack in model.stacks:
    roles['attention'] += model.relpos_buckets * model.num_heads
    roles['norms'] += d
    for sublayer in (s for layer in model.plan(stack).layers for s in layer):
      roles['norms'] += d
      if sublayer.kind == 'moe':
        bias = e * f if model.moe.multiplicative_bias else 0
        roles['experts'] += e * matrices * d * f + bias
        roles['router'] += d * e
      elif sublayer.kind == 'mlp':
        roles['mlp'] += matrices * d * sublayer.mlp_dim
      else:
        roles['attention'] += 4 * d * joined
  return roles


def active_params(model: ModelConfig) -> int:
  """Parameters that one token meets: all but the experts not chosen."""
  roles = params(model)
  k = model.moe.selector.kwargs.get('k', 1)
  unseen = roles['experts'] * (model.moe.num_experts - k)
  return sum(roles.values()) - unseen // model.moe.num_experts


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product of one forward pass over one training sequence."""

  part: str  # 'attention', 'mlp', 'experts', 'router', 'dispatch', 'logits'.
  flops: int
  # Of one weight for all tokens, and not of two activations or of a bank.
  plain: bool = True
  backward: int = 2  # Products of this size in the backward pass.
  # Whether a layer that is computed again computes this again (remat 'full').
  again: bool = True


def products(
  model: ModelConfig, inputs_length: int, targets_length: int
) -> Iterator[Product]:
  """Every product of a forward pass, places left empty included.

  Softmaxes, norms and what moves tokens are left out, but for the dispatcher
  `mask`, whose moves are products.
  """
  lengths = {'encoder': inputs_length, 'decoder': targets_length}
  for stack in model.stacks:
    for layer in model.plan(stack).layers:
      for sublayer in layer:
        last = sublayer is layer[-1]
        keys = inputs_length
        if sublayer.kind != 'cross_attention':
          keys = lengths[stack]
        found = _SUBLAYERS[sublayer.kind](
          model, stack, sublayer, lengths[stack], keys
        )
        *rest, out = found
        yield from rest
        # The last sum of a layer is kept, and nothing else asks for its parts.
        yield dataclasses.replace(out, again=out.again and not last)
  logits = 2 * lengths[model.stacks[-1]] * model.embed_dim * model.vocab_size
  yield Product('logits', logits, again=False)


def forward_flops(
  model: ModelConfig, inputs_length: int, targets_length: int
) -> int:
  """Of one forward pass over one training sequence."""
  found = products(model, inputs_length, targets_length)
  return sum(p.flops for p in found if p.part != 'dispatch')


def _matrices(model: ModelConfig) -> int:
  return 3 if model.activation == 'geglu' else 2


def _attention(model, stack, sublayer: Sublayer, n: int, keys: int):
  d, joined = model.embed_dim, model.num_heads * model.head_dim
  project = 2 * d * joined
  yield Product('attention', project * (n + 2 * keys))
  yield Product('attention', 4 * n * keys * joined, plain=False)
  yield Product('attention', project * n)


def _mlp(model, stack, sublayer: Sublayer, n: int, keys: int):
  one = 2 * n * model.embed_dim * sublayer.mlp_dim
  yield Product('mlp', one * (_matrices(model) - 1))
  yield Product('mlp', one)


def _moe(model, stack, sublayer: Sublayer, n: int, keys: int):
  d, moe = model.embed_dim, model.moe
  yield Product('router', 2 * n * d * moe.num_experts)
  one = 2 * n * d * model.executed_dim(stack)
  yield Product('experts', one * (_matrices(model) - 1), plain=False)
  # What travelled is kept.
  yield Product('experts', one, plain=False, again=False)
  size = model.stack(stack).group_size
  places = moe.num_experts * moe.slots(size, deterministic=False)
  move = 2 * n * places * d if moe.dispatcher == 'mask' else 0
  # Nobody asks for the slope of who goes where.
  yield Product('dispatch', move, plain=False, backward=1, again=False)
  yield Product('dispatch', move, plain=False)


_SUBLAYERS = {
  'self_attention': _attention,
  'cross_attention': _attention,
  'mlp': _mlp,
  'moe': _moe,
}


def train_flops(
  model: ModelConfig, inputs_length: int, targets_length: int
) -> dict[str, int]:
  """Of one training step on one sequence, by part.

  'recomputed' is what the backward pass computes again (`model.remat`).
  """
  again = {
    'none': lambda p: False,
    'full': lambda p: p.again,
    'dots': lambda p: p.again and not p.plain,
  }[model.remat]
  found = collections.Counter()
  for p in products(model, inputs_length, targets_length):
    found[p.part] += p.flops * (1 + p.backward)
    found['recomputed'] += p.flops * again(p)
  return dict(found)
