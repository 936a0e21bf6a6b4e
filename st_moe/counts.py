"""What a model computes, by arithmetic alone: FLOPs and what they move."""

import collections
import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping

from st_moe.config import ModelConfig, Part
from st_moe.layer_plan import Sublayer


@dataclasses.dataclass(frozen=True)
class Product:
  """A matrix product of one forward pass over one training sequence."""

  part: str  # 'attention', 'mlp', 'experts', 'router', 'dispatch', 'logits'.
  flops: int
  moved: int  # Numbers of activations read and written, float32 ones twice.
  # Of one weight for all tokens, and not of two activations or of a bank.
  plain: bool = True
  backward: int = 2  # Products of this size in the backward pass.
  # Whether a layer that is computed again computes this again (remat 'full').
  again: bool = True
  # Whether the backward pass computes it again in any case.
  afresh: bool = False


def products(
  model: ModelConfig,
  inputs_length: int,
  targets_length: int,
  padding: tuple[tuple[str, float], ...] = (),
) -> Iterator[Product]:
  """Every product of a forward pass, places left empty included.

  Softmaxes, norms and what moves tokens are left out, but for the dispatcher
  `mask`, whose moves are products.

  Args:
    padding: (stack, how many times its tokens go through a sparse layer), where
      groups are filled up with nothing (`sizes.padding`).
  """
  lengths = {'encoder': inputs_length, 'decoder': targets_length}
  padded = {s: n * dict(padding).get(s, 1) for s, n in lengths.items()}
  for stack in model.stacks:
    for layer in model.plan(stack).layers:
      for sublayer in layer:
        last = sublayer is layer[-1]
        keys = inputs_length
        if sublayer.kind != 'cross_attention':
          keys = lengths[stack]
        n = (padded if sublayer.kind == 'moe' else lengths)[stack]
        found = _SUBLAYERS[sublayer.kind](
          model, stack, sublayer, round(n), keys
        )
        *rest, out = found
        yield from rest
        # The last sum of a layer is kept, and nothing else asks for its parts.
        yield dataclasses.replace(out, again=out.again and not last)
  n, d = lengths[model.stacks[-1]], model.embed_dim
  logits = 2 * n * d * model.vocab_size
  # Written, and read for the loss.
  moved = 2 * (n * d + 2 * n * model.vocab_size)
  yield Product('logits', logits, moved, again=False)


def forward_flops(
  model: ModelConfig, inputs_length: int, targets_length: int
) -> int:
  """Of one forward pass over one training sequence."""
  found = products(model, inputs_length, targets_length)
  return sum(p.flops for p in found if p.part != 'dispatch')


def _matrices(model: ModelConfig) -> int:
  return 3 if model.activation.name == 'geglu' else 2


def _attention(model, stack, sublayer: Sublayer, n: int, keys: int):
  d, joined = model.embed_dim, model.num_heads * model.head_dim
  one, rows = 2 * d * joined, n + 2 * keys
  yield Product('attention', one * rows, rows * joined + n * d)
  # Scores are written in float32, and read; weights likewise as they are.
  pairs = 2 * n * keys * joined
  scores = 4 * n * keys * model.num_heads
  moved = (n + keys) * joined + scores, scores // 2 + (n + keys) * joined
  yield Product('attention', pairs, moved[0], plain=False, afresh=True)
  yield Product('attention', pairs, moved[1], plain=False)
  yield Product('attention', one * n, n * joined + n * d)


def _mlp(model, stack, sublayer: Sublayer, n: int, keys: int):
  d, f, into = model.embed_dim, sublayer.dim, _matrices(model) - 1
  yield Product('mlp', 2 * n * d * f * into, n * d + into * n * f)
  yield Product('mlp', 2 * n * d * f, n * f + n * d)


def _moe(model, stack, sublayer: Sublayer, n: int, keys: int):
  d, moe, into = model.embed_dim, sublayer.moe, _matrices(model) - 1
  size = n if moe.group_by == 'sequence' else model.stack(stack).group_size
  hidden = round(n * moe.executed_experts(size) * sublayer.dim)
  router = n * moe.num_experts * _routers_of(moe.gate)
  if router:
    yield Product('router', 2 * router * d, 2 * (n * d + router))
  places = round(n * moe.executed_experts(size))  # Filled by the n tokens.
  one = 2 * hidden * d
  moved = places * d + into * hidden, hidden + places * d
  yield Product('experts', one * into, moved[0], plain=False)
  # What travelled is kept.
  yield Product('experts', one, moved[1], plain=False, again=False)
  # To the experts and back; `mask` by products with an entry for every place.
  masks = n * moe.num_experts * moe.slots(size, deterministic=False)
  masks *= moe.dispatcher.name == 'mask'
  moved = n * d + places * d + 2 * masks
  kind = dict(flops=2 * masks * d, moved=moved, plain=False)
  # Nobody asks for the slope of who goes where.
  yield Product('dispatch', **kind, backward=1, again=False)
  yield Product('dispatch', **kind)
  if beside := BESIDE.get(moe.beside.name):
    # Of the tokens there are: `keys`, where groups are filled up.
    yield from beside(model, stack, sublayer, keys, keys)


def _mlp_beside(model, stack, sublayer: Sublayer, n: int, keys: int):
  dim = model.beside_dim(sublayer.moe)
  yield from _mlp(model, stack, dataclasses.replace(sublayer, dim=dim), n, keys)


def _conditional(model, stack, sublayer: Sublayer, n: int, keys: int):
  yield from _mlp_beside(model, stack, sublayer, n, keys)
  d = model.embed_dim
  yield Product('router', 2 * n * d, 2 * n * (d + 1))


def _routers_of(gate: Part) -> int:
  """Its products with a column for each expert: one, if it has no line here."""
  tasks = gate.kwargs.get('tasks', 1)
  known = {'noisy': 2, 'per_task': tasks, 'hash': 0, 'skills': 0}
  return known.get(gate.name, 1)


# Products of what stands beside the experts; without a line it has none.
BESIDE = {'conditional': _conditional, 'shared': _mlp_beside}


_SUBLAYERS = {
  'self_attention': _attention,
  'cross_attention': _attention,
  'mlp': _mlp,
  'moe': _moe,
}


@functools.lru_cache
def train_flops(
  model: ModelConfig, inputs_length: int, targets_length: int, padding=()
) -> Mapping[str, int]:
  """Of one training step on one sequence, by part.

  'recomputed' is what the backward pass computes again (`model.remat`).
  """
  found = collections.Counter()
  for p in products(model, inputs_length, targets_length, padding):
    found[p.part] += p.flops * (1 + p.backward)
    found['recomputed'] += p.flops * (_again(model, p) + p.afresh)
  return types.MappingProxyType(found)


@functools.lru_cache
def train_moved(
  model: ModelConfig, inputs_length: int, targets_length: int, padding=()
) -> int:
  """Numbers that the products of one training step read and write.

  Of activations, of one sequence; all that XLA does not fuse with a product
  comes on top.
  """
  return sum(
    p.moved * (1 + p.backward + _again(model, p) + p.afresh)
    for p in products(model, inputs_length, targets_length, padding)
  )


def _again(model: ModelConfig, p: Product) -> bool:
  return {
    'none': False,
    'full': p.again,
    'dots': p.again and not p.plain,
  }[model.remat]
