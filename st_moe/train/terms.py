"""What is minimised, as sums and weights.

Every term is a pair (sum, weight), a scalar or one entry per sparse layer.
Terms are added over microbatches before anything is divided, so cutting a batch
into microbatches changes neither losses nor gradients.
"""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from st_moe.config import LossConfig, unknown
from st_moe.routing.losses import LOSSES


def cross_entropy(logits, targets, *, label_smoothing: float = 0.0):
  """-log p(target) and logsumexp(logits)^2, both float32 [batch, length]."""
  log_z = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  loss = log_z - picked
  if label_smoothing:
    even = log_z - logits.mean(-1)
    loss = (1 - label_smoothing) * loss + label_smoothing * even
  return loss, log_z**2


def token_terms(logits, targets, weights, *, label_smoothing: float = 0.0):
  """Cross-entropy, output z-loss and accuracy per weighted target token."""
  loss, z = cross_entropy(logits, targets, label_smoothing=label_smoothing)
  hits = (logits.argmax(-1) == targets).astype(jnp.float32)
  count = weights.sum()
  over = lambda value: ((value * weights).sum(), count)
  return {
    'cross_entropy': over(loss),
    'z_loss': over(z),
    'accuracy': over(hits),
  }


def token_terms_of(
  project, x, targets, weights, *, positions: int, label_smoothing: float = 0.0
):
  """`token_terms` of logits `project(x)`, which need not be there at once.

  Args:
    project: [batch, n, embed] -> logits [batch, n, vocab].
    x: [batch, length, embed].
    positions: n, at most; 0: the length. The backward pass projects again.
  """
  terms = functools.partial(token_terms, label_smoothing=label_smoothing)
  batch, length, _ = x.shape
  if not 0 < positions < length:
    return terms(project(x), targets, weights)
  parts = -(-length // positions)

  def cut(a):  # [parts, batch, positions, ...]
    rest = [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, [(0, 0), (0, parts * positions - length), *rest])
    return a.reshape(batch, parts, positions, *a.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def add(total, part):
    x, targets, weights = part
    return jax.tree.map(jnp.add, total, terms(project(x), targets, weights))

  cuts = jax.tree.map(cut, (x, targets, weights))
  names = 'cross_entropy', 'z_loss', 'accuracy'
  zeros = dict.fromkeys(names, (jnp.zeros(()), jnp.zeros(())))
  total, _ = jax.lax.scan(lambda t, part: (add(t, part), None), zeros, cuts)
  return total


def records(intermediates: Mapping) -> dict[str, list]:
  """The `record`s that sparse layers sowed, per stack: leaves [layers, ...].

  A scanned layer comes with a leading axis of its repetitions, an unrolled one
  without; both end as rows, from the first layer to the last.
  """
  found = {}

  def depth(name):  # layers_2 comes before layers_10.
    head, _, number = name.rpartition('_')
    return (head, int(number)) if number.isdigit() else (name, -1)

  def visit(tree, stack):
    for key in sorted(tree, key=depth):
      if key == 'record':
        rows = jax.tree.map(jnp.asarray, tree[key])
        if rows['load'].ndim == 1:
          rows = jax.tree.map(lambda a: a[None], rows)
        found.setdefault(stack, []).append(rows)
      elif isinstance(tree[key], Mapping):
        visit(tree[key], stack)

  for stack in intermediates:
    visit(intermediates[stack], stack)
  join = lambda *rows: jnp.concatenate(rows)
  return {stack: jax.tree.map(join, *rows) for stack, rows in found.items()}


def router_terms(by_stack: dict, names: Iterable[str]) -> dict:
  """Losses of all sparse layers: name -> (sums, weights), each [layers]."""
  stacks = [by_stack[stack]['losses'] for stack in sorted(by_stack)]
  join = lambda *rows: jnp.concatenate(rows)
  return {
    name: jax.tree.map(join, *(losses[name] for losses in stacks))
    for name in names
    if stacks
  }


def check_names(config: LossConfig) -> None:
  """Raises for a router loss that nothing computes: `total` would skip it."""
  for name in config.router:
    if name not in LOSSES:
      raise unknown('router loss', name, LOSSES)


def total(terms: Mapping, weights: Mapping, config: LossConfig) -> jax.Array:
  """The objective: sums of `terms` over the whole batch's `weights`."""
  share = lambda name: terms[name][0] / jnp.maximum(weights[name], 1)
  loss = share('cross_entropy') + config.z_loss * share('z_loss')
  for name, coefficient in config.router.items():
    if name in terms:  # A dense model has no routers.
      layers = share(name)
      loss += coefficient * getattr(layers, config.layers)()
  return loss
