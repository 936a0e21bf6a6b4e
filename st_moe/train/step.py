"""One pure step of training: `train_step(state, batch) -> (state, metrics)`."""

import functools

import jax
import jax.numpy as jnp
import optax

from st_moe import paths, schedules, sharding
from st_moe.config import Config, LossConfig, ModelConfig
from st_moe.train.after import rules_after
from st_moe.train.state import TrainState
from st_moe.train.terms import (
  coefficients,
  for_rules,
  records,
  router_terms,
  token_terms_of,
  total,
  weights_of,
)


def inputs_of(batch: dict, config: ModelConfig) -> dict:
  """What the model reads of a batch, by the names of its arguments."""
  read = ('_input_tokens', '_segment_ids', '_positions')
  found = {
    k: v
    for k, v in batch.items()
    if k.startswith(config.stacks) and k.endswith(read)
  }
  also = ['task'] * ('task' in batch)
  also += ['decoder_target_tokens'] if config.decoder else []
  return found | {name: batch[name] for name in also}


def targets_of(batch: dict, config: ModelConfig):
  """Targets and weights of the stack that predicts."""
  stack = config.stacks[-1]
  return batch[f'{stack}_target_tokens'], batch[f'{stack}_loss_weights']


def forward(
  model, loss: LossConfig, params, batch, *, rng, step=None, hears=True
):
  """Terms of the loss; what routers recorded, by stack; what rules hear of.

  Args:
    rng: of dropout and routing noise; None evaluates.
    hears: whether there are rules after the update.
  """
  variables = {'params': params}
  x, sown = model.apply(
    variables,
    **inputs_of(batch, model.config),
    enable_dropout=rng is not None,
    step=step,
    project=False,
    rngs=None if rng is None else {'dropout': rng},
    mutable=['intermediates'],
  )
  sown = sown.get('intermediates', {})
  by_stack = records(sown)
  terms = token_terms_of(
    lambda x: model.apply(variables, x, method='project'),
    x,
    *targets_of(batch, model.config),
    positions=loss.positions,
    label_smoothing=loss.label_smoothing if rng is not None else 0.0,
  )
  heard = for_rules(sown) if hears else {}
  return {**terms, **router_terms(by_stack)}, by_stack, heard


def make_train_step(model, optimizer, config: Config):
  """The step of `config`, ready to be jitted with its state donated.

  What `optimizer.train` does not name is frozen: it has no gradient. A seed
  that is handed in is no part of the program: all seeds share one.
  """
  schedule = schedules.learning_rate(config.optimizer)
  after = rules_after(config.optimizer)

  def train_step(state: TrainState, batch: dict, seed=config.seed):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    trained, frozen = paths.split(state.params, config.optimizer.train)
    # Cast out here, gradients stay in the dtype in which they arise until the
    # optimizer reads them: the same bits in half of the memory.
    read, read_frozen = paths.split(
      model.as_read(state.params), config.optimizer.train
    )
    of_trained = functools.partial(
      objective,
      model,
      config.loss,
      read_frozen,
      hears=bool(config.optimizer.after),
    )
    grads, terms, by_stack, heard = _gradients(
      of_trained, read, state.step, batch, rng, config.microbatches
    )
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    counts = coefficients(model.config, config.loss, state.step)
    loss = total(terms, weights_of(terms), counts, config.loss.layers)
    norms = {
      'l2_grads': optax.tree.norm(grads),
      'l2_params': optax.tree.norm(state.params),
    }
    good = jnp.isfinite(loss) & jnp.isfinite(norms['l2_grads'])
    keep = lambda new, old: jax.tree.map(
      lambda a, b: jnp.where(good, a, b), new, old
    )
    # No update before it is known, or they would all wait for it in memory.
    grads = jax.tree.map(lambda g: jnp.where(good, g, 0), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    params = paths.merge(optax.apply_updates(trained, updates), frozen)
    params = after(state.params, params, heard, state.step)
    norms['l2_updates'] = optax.tree.norm(updates)
    # The schedule counts the updates, not the steps that were skipped.
    rate = schedule(state.opt_state[-1].count)
    state = TrainState(
      step=state.step + 1,
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      bad_steps=jnp.where(good, 0, state.bad_steps + 1),
    )
    metrics = {
      'loss': loss,
      'learning_rate': rate,
      'bad_steps': state.bad_steps,
      **norms,
      **summary(terms, by_stack),
    }
    return state, metrics

  return train_step


def objective(
  model, asked, frozen, trained, batch, rng, step, weights=None, *, hears=True
):
  """The loss of `trained` and `frozen` parameters; its terms, and records.

  Args:
    asked: a `LossConfig`.
    weights: that the sums of the terms are divided by; None: their own.
  """
  params = paths.merge(trained, frozen)
  terms, *found = forward(
    model, asked, params, batch, rng=rng, step=step, hears=hears
  )
  weights = weights_of(terms) if weights is None else weights
  counts = coefficients(model.config, asked, step)
  loss = total(terms, weights, counts, asked.layers)
  return loss, (terms, *found)


def _gradients(objective, params, step, batch, rng, microbatches):
  """Gradients of a whole batch, and what `forward` found."""
  grad = jax.grad(objective, has_aux=True)
  if microbatches == 1:
    grads, found = grad(params, batch, rng, step)
    return grads, *found

  def cut(a):
    a = a.reshape(microbatches, -1, *a.shape[1:])
    return sharding.constrain(a, None, 'batch', *(None,) * (a.ndim - 2))

  parts = (jax.tree.map(cut, batch), jax.random.split(rng, microbatches))

  # Weights first: they depend on the tokens alone, so the compiler drops the
  # rest of this forward pass, and every microbatch divides by the same totals.
  def weigh(part):
    _, (terms, *_) = objective(params, *part, step)
    return weights_of(terms)

  weights = jax.tree.map(lambda w: w.sum(0), jax.lax.map(weigh, parts))

  def add(total, part):
    grads, found = grad(params, *part, step, weights)
    return jax.tree.map(jnp.add, total, (grads, *found)), None

  shapes = jax.eval_shape(
    lambda p: grad(params, *p, step),
    jax.tree.map(lambda a: a[0], parts),
  )
  sums = lambda a: jnp.float32 if a.dtype == jnp.bfloat16 else a.dtype
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, sums(a)), shapes)
  found, _ = jax.lax.scan(add, (zeros[0], *zeros[1]), parts)
  return found


def summary(terms: dict, by_stack: dict) -> dict:
  """Terms as means; per stack, the gauges of its routers and expert loads."""
  mean = lambda t: (t[0] / jnp.maximum(t[1], 1)).mean()
  found = {k: mean(t) for k, t in terms.items()}
  found['target_tokens'] = terms['cross_entropy'][1]
  for stack, record in by_stack.items():
    for name, pair in record['gauges'].items():
      found[f'{stack}/{name}'] = mean(pair)
    found[f'{stack}/load'] = record['load']  # int32 [layers, e].
  return found
