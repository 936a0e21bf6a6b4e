"""Small models, batches, and the slow, obvious oracles."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np

from st_moe import config_file, paths, sharding
from st_moe.config import (
  ModelConfig,
  MoEConfig,
  Part,
  StackConfig,
)
from st_moe.model.transformer import Transformer

# Programs this small are compiled once and run once: compile in haste.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def tiny(**changes) -> ModelConfig:
  """Two layers a stack, the second of them sparse, with 4 experts.

  `moe` may be a dict of what to change in its defaults.
  """
  moe = changes.pop('moe', {})
  if isinstance(moe, dict):
    moe = MoEConfig(**{'num_experts': 4, **moe})
  if 'activation' in changes:
    changes['activation'] = Part(changes['activation'])
  defaults = dict(
    vocab_size=32,
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=24,
    encoder=StackConfig(2, 2, 1, group_size=16),
    decoder=StackConfig(2, 2, 1, group_size=8),
    moe=moe,
    dtype='float32',
  )
  return ModelConfig(**{**defaults, **changes})


def boxed_shapes(model: nn.Module, *args, **kwargs):
  """Parameters as boxed shapes; nothing is computed."""
  if isinstance(model, Transformer):
    kwargs['enable_dropout'] = False
  key = jax.random.key(0)
  init = lambda: model.init(key, *args, **kwargs).get('params', {})
  return sharding.shapes_of(init)


def random_params(model: nn.Module, *args, seed: int = 0, **kwargs):
  """Parameters from numpy, larger than real ones: no compile, clear routes."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if 'scale' in name or 'multiplicative_bias' in name:
      values = 1 + 0.1 * rng.standard_normal(leaf.shape)
    else:
      values = 0.3 * rng.standard_normal(leaf.shape)
    return values.astype(leaf.dtype)

  shapes = sharding.unbox(boxed_shapes(model, *args, **kwargs))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def examples(
  config: ModelConfig, lengths=((5, 4), (8, 6), (3, 6), (7, 2)), seed=0
) -> list[dict]:
  """Random (inputs, targets) pairs of these lengths, as int32 arrays."""
  rng = np.random.default_rng(seed)
  draw = lambda n: rng.integers(1, config.vocab_size, n, dtype=np.int32)
  return [{'inputs': draw(n), 'targets': draw(m)} for n, m in lengths]


def _shifted(targets):
  return np.concatenate([[0], targets[:-1]]).astype(np.int32)


def padded_batch(config: ModelConfig, rows: list[dict], length=(8, 6)) -> dict:
  """One example a row, zeros behind it: what `Transformer` is called with."""
  pad = lambda a, n: np.pad(a, (0, n - len(a)))
  each = lambda key, n, f: np.stack([pad(f(r[key]), n) for r in rows])
  batch = {}
  if config.encoder:
    batch['encoder_input_tokens'] = each('inputs', length[0], np.asarray)
  if config.decoder:
    batch['decoder_input_tokens'] = each('targets', length[1], _shifted)
    batch['decoder_target_tokens'] = each('targets', length[1], np.asarray)
  return batch


def packed_batch(config: ModelConfig, rows: list[dict], length=(16, 12)):
  """Two examples a row, told apart by segment ids and positions."""
  batch = {}
  pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]

  def pack(key, n, f):
    out = np.zeros((len(pairs), n), np.int32)
    for i, pair in enumerate(pairs):
      row = np.concatenate([f(r[key]) for r in pair])
      out[i, : len(row)] = row
    return out

  sides = {'encoder': ('inputs', length[0]), 'decoder': ('targets', length[1])}
  for stack in config.stacks:
    key, n = sides[stack]
    segments, positions = np.zeros((2, len(pairs), n), np.int32)
    for i, pair in enumerate(pairs):
      start = 0
      for j, row in enumerate(pair):
        stop = start + len(row[key])
        segments[i, start:stop] = j + 1
        positions[i, start:stop] = np.arange(stop - start)
        start = stop
    batch[f'{stack}_segment_ids'] = segments
    batch[f'{stack}_positions'] = positions
  if config.encoder:
    batch['encoder_input_tokens'] = pack('inputs', length[0], np.asarray)
  if config.decoder:
    batch['decoder_input_tokens'] = pack('targets', length[1], _shifted)
    batch['decoder_target_tokens'] = pack('targets', length[1], np.asarray)
  return batch


def distance(a, b) -> float:
  """||a - b|| / ||b|| in float64."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def assert_trees_close(a, b, tolerance: float = 2e-5):
  """Every leaf of `a` within `tolerance` of `b`, in relative norm."""
  a, b = paths.by_path(a), paths.by_path(b)
  assert a.keys() == b.keys()
  off = {k: distance(a[k], b[k]) for k in a}
  worst = max(off, key=off.get)
  assert off[worst] < tolerance, (worst, off[worst])


def count_params(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Oracles: plain loops over groups, choices, tokens and experts.


def slow_seat(expert, active, *, num_experts, capacity, priority=None):
  """Places [g, s, k] (-1: none) and load [g, e], counted one by one."""
  g, s, k = expert.shape
  place = np.full((g, s, k), -1)
  load = np.zeros((g, num_experts), int)
  for i in range(g):
    for c in range(k):  # All first choices before any second.
      order = range(s)
      if priority is not None:
        order = sorted(order, key=lambda t: priority[i, t, c])  # noqa: B023
      for t in order:
        e = expert[i, t, c]
        if active[i, t, c] and load[i, e] < capacity:
          place[i, t, c] = load[i, e]
          load[i, e] += 1
  return place, load


def slow_softmax(logits):
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def slow_gelu(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def slow_expert(params, e, x, activation):
  """Expert `e` on one token x [d]."""
  kernel = lambda name: np.asarray(params[name]['kernel'][e], np.float64)
  if activation == 'geglu':
    h = slow_gelu(x @ kernel('wi_0')) * (x @ kernel('wi_1'))
  else:
    h = np.maximum(x @ kernel('wi'), 0)
  if 'multiplicative_bias' in params:
    h = h * np.asarray(params['multiplicative_bias'][e], np.float64)
  return h @ kernel('wo')


def slow_moe(
  params, x, valid, *, k, capacity, group_size, activation, threshold=None
):
  """A whole sparse layer, token by token, in float64.

  Args:
    x: [batch, length, d], flattened and cut into groups of `group_size`.
    threshold: choices past the first stay if their weight exceeds it.
  """
  d = x.shape[-1]
  router = np.asarray(params['router']['kernel'], np.float64)
  num_experts = router.shape[1]
  flat = np.asarray(x, np.float64).reshape(-1, d)
  valid = np.asarray(valid).reshape(-1)
  y = np.zeros_like(flat)
  seats = []
  for start in range(0, len(flat), group_size):
    tokens = range(start, min(start + group_size, len(flat)))
    choices, weights, active = [], [], []
    for t in tokens:
      probs = slow_softmax(flat[t] @ router)
      best = np.argsort(-probs, kind='stable')[:k]
      weight = probs[best]
      if k > 1:
        weight = weight / weight.sum()
      asks = np.full(k, valid[t])
      if threshold is not None:
        asks[1:] &= weight[1:] > threshold
      choices.append(best), weights.append(weight), active.append(asks)
    place, _ = slow_seat(
      np.array([choices]),
      np.array([active]),
      num_experts=num_experts,
      capacity=capacity,
    )
    seats.append(place[0])
    for i, t in enumerate(tokens):
      for c in range(k):
        if place[0, i, c] >= 0:
          e = choices[i][c]
          answer = slow_expert(params['experts'], e, flat[t], activation)
          y[t] += weights[i][c] * answer
  return y.reshape(x.shape), np.concatenate(seats)


def with_moe(config: ModelConfig, **changes) -> ModelConfig:
  """`config` with other numbers in its sparse layers."""
  moe = dataclasses.replace(config.moe, **changes)
  return dataclasses.replace(config, moe=moe)


def params_by_hand(model: ModelConfig) -> dict[str, int]:
  """Parameters by role, by the formulas of the papers."""
  d, joined = model.embed_dim, model.num_heads * model.head_dim
  e, f = model.moe.num_experts, model.expert_dim(model.moe)
  matrices = 3 if model.activation.name == 'geglu' else 2
  roles = dict.fromkeys(
    ('embedding', 'attention', 'mlp', 'experts', 'router', 'norms'), 0
  )
  roles['embedding'] = model.vocab_size * d * (1 if model.tie_embeddings else 2)
  for stack in model.stacks:
    tables = model.stack(stack).num_layers if model.relpos_per_layer else 1
    roles['attention'] += tables * model.relpos_buckets * model.num_heads
    roles['norms'] += d
    for sublayer in (s for layer in model.plan(stack).layers for s in layer):
      roles['norms'] += d
      if sublayer.kind == 'moe':
        bias = e * f if model.moe.multiplicative_bias else 0
        roles['experts'] += e * matrices * d * f + bias
        roles['router'] += d * e
      elif sublayer.kind == 'mlp':
        roles['mlp'] += matrices * d * sublayer.dim
      else:
        roles['attention'] += 4 * d * joined
  return {role: n for role, n in roles.items() if n}


def layers(model: ModelConfig, stack: str) -> list:
  """(kind, name, norm, hidden units) of every sublayer: what a file holds."""
  return [
    [(s.kind, s.name, s.norm, s.dim) for s in layer]
    for layer in model.plan(stack).layers
  ]


def method_lines(name: str) -> list[str]:
  """What configs/methods/NAME.py changes in its base, a line a field."""
  read = lambda arg: config_file.to_dict(
    config_file.load(f'configs/methods/{name}.py:{arg}')
  )
  for arg in ('', 'runlocal,'):
    lines = config_file.diff(read(f'{arg}base'), read(arg))
  return lines
