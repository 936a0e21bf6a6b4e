"""What is minimised, as sums and weights.

Every term is a pair (sum, weight), a scalar or one entry per sparse layer.
Terms are added over microbatches before anything is divided, so cutting a batch
into microbatches changes neither losses nor gradients.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from st_moe import about, paths, schedules
from st_moe.config import LossConfig, ModelConfig
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
  """What sparse layers sowed as `record`, per stack: leaves [layers, ...].

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


def for_rules(intermediates: Mapping) -> dict:
  """What rules after the update hear of a batch: see `train/after.py`."""
  found = {}
  for path, leaf in paths.by_path(intermediates).items():
    module, _, name = path.partition('/record/')
    if name == 'wanted':
      found[module] = leaf
    elif name.startswith('kept/'):
      kept = f'{module}/kept_{name.split("/")[1]}'
      found[kept] = *found.get(kept, ()), leaf  # The sum, then the weight.
  return found


def router_terms(by_stack: dict) -> dict:
  """Losses of all sparse layers: name -> (sums, weights), each [layers]."""
  found = {}
  for stack in sorted(by_stack):
    for name, term in by_stack[stack]['losses'].items():
      found.setdefault(name, []).append(term)
  join = lambda *rows: jnp.concatenate(rows)
  return {name: jax.tree.map(join, *rows) for name, rows in found.items()}


def coefficients(
  model: ModelConfig, loss: LossConfig, step: jax.Array | None
) -> dict:
  """What each term counts at a step: a number, or of routers one a layer.

  float32 [layers], in the order of `router_terms`.
  """
  found = {}
  for stack in sorted(model.stacks):
    layers = model.plan(stack).num_sparse
    for part in model.moe_of(stack).losses if layers else ():
      weight = schedules.value(part.kwargs.get('weight', 1.0), step)
      rows = jnp.full(layers, weight, jnp.float32)
      found.setdefault(part.name, []).append(rows)
  routers = {name: jnp.concatenate(rows) for name, rows in found.items()}
  return {'cross_entropy': 1.0, 'z_loss': loss.z_loss, **routers}


def weights_of(terms: Mapping) -> dict:
  """What the sums of terms are divided by."""
  return {name: weight for name, (_, weight) in terms.items()}


def total(
  terms: Mapping, weights: Mapping, coefficients: Mapping, layers: str
) -> jax.Array:
  """The objective: sums of `terms` over the whole batch's `weights`.

  Args:
    layers: 'sum' or 'mean', over the layers of a router loss.
  """
  loss = 0.0
  for name, coefficient in coefficients.items():
    if name not in terms:
      continue
    summed, weight = terms[name][0], weights[name]
    joins = about.of(LOSSES.get(name)).joins
    if joins:
      loss += coefficient[0] * joins(summed, weight)
    else:
      each = coefficient * (summed / jnp.maximum(weight, 1))
      loss += getattr(each, layers)()
  return loss


def check(model: ModelConfig, microbatches: int) -> None:
  """Raises for what cannot be added up over microbatches."""
  if microbatches == 1:
    return
  for stack in model.stacks:
    for part in model.moe_of(stack).losses:
      what = f'config.model.moe.losses.{part.name}'
      loss = part.choose(what, LOSSES, also=('weight',))
      if about.of(loss).whole or about.of(loss).joins:
        raise ValueError(
          f'{what} is of a whole batch: it takes config.microbatches = 1, and'
          f' not {microbatches}.'
        )
