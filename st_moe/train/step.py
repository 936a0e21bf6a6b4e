"""One pure step of training: `train_step(state, batch) -> (state, metrics)`."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from st_moe import schedules, sharding
from st_moe.config import Config, ModelConfig
from st_moe.train import loss as losses
from st_moe.train import roles


@flax.struct.dataclass
class TrainState:
  """All that a run is, besides its data order, which follows from `step`."""

  step: jax.Array  # int32 [], steps taken.
  params: dict
  opt_state: tuple
  bad_steps: jax.Array  # int32 [], steps in a row that were not applied.


def inputs_of(batch: dict, config: ModelConfig) -> dict:
  """What the model reads of a batch, by the names of its arguments."""
  read = ('_input_tokens', '_segment_ids', '_positions')
  found = {
    k: v
    for k, v in batch.items()
    if k.startswith(config.stacks) and k.endswith(read)
  }
  if config.decoder:
    found['decoder_target_tokens'] = batch['decoder_target_tokens']
  return found


def targets_of(batch: dict, config: ModelConfig):
  """Targets and weights of the stack that predicts."""
  stack = config.stacks[-1]
  return batch[f'{stack}_target_tokens'], batch[f'{stack}_loss_weights']


def init_params(model, key, batch: dict) -> dict:
  """New parameters, boxed with their logical axes."""
  inputs = jax.tree.map(jnp.ones_like, inputs_of(batch, model.config))
  return model.init(key, **inputs, enable_dropout=False)['params']


def abstract_params(model, mesh=None):
  """Shapes of the parameters; with a mesh also where each array goes."""
  batch = dummy_batch(model.config)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0), batch))
  shapes = sharding.unbox(boxed)
  if mesh is None:
    return shapes
  return sharding.placed(shapes, sharding.of_boxed(boxed, mesh))


def dummy_batch(config: ModelConfig) -> dict:
  """The smallest batch the mesh in force can split: parameters need no more."""
  # Not of jnp: the mesh in force may be of devices that are not there.
  tokens = np.ones((sharding.shards('batch'), 1), np.int32)
  kinds = ('input_tokens', 'target_tokens')
  return {f'{s}_{kind}': tokens for s in config.stacks for kind in kinds}


def init_state(model, optimizer, key) -> TrainState:
  """A new run, its arrays boxed with their logical axes."""
  params = init_params(model, key, dummy_batch(model.config))
  return _first_state(optimizer, params)


def _first_state(optimizer, params) -> TrainState:
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, optimizer.init(params), zero)


def forward(model, config: Config, params, batch, *, rng, step=None):
  """Terms of the loss, and what the routers recorded.

  Args:
    rng: of dropout and routing noise; None evaluates.
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
  by_stack = losses.records(sown.get('intermediates', {}))
  terms = losses.token_terms_of(
    lambda x: model.apply(variables, x, method='project'),
    x,
    *targets_of(batch, model.config),
    positions=config.loss.positions,
    label_smoothing=config.loss.label_smoothing if rng is not None else 0.0,
  )
  return {
    **terms,
    **losses.router_terms(by_stack, config.loss.router),
  }, by_stack


def make_train_step(model, optimizer, config: Config):
  """The step of `config`, ready to be jitted with its state donated.

  What `optimizer.train` does not name is frozen: it has no gradient.
  """
  schedule = schedules.learning_rate(config.optimizer)

  def train_step(state: TrainState, batch: dict):
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    trained, frozen = roles.part(state.params, config.optimizer.train)
    # Cast out here, gradients stay in the dtype in which they arise until the
    # optimizer reads them: the same bits in half of the memory.
    read, read_frozen = roles.part(
      model.as_read(state.params), config.optimizer.train
    )
    of_trained = functools.partial(objective, model, config, read_frozen)
    grads, terms, by_stack = _gradients(
      of_trained, read, state.step, batch, rng, config.microbatches
    )
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    weights = jax.tree.map(lambda t: t[1], terms, is_leaf=_is_pair)
    loss = losses.total(terms, weights, config.loss)
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
    params = roles.join(optax.apply_updates(trained, updates), frozen)
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


def _is_pair(x) -> bool:
  return isinstance(x, tuple)


def objective(model, config, frozen, trained, batch, rng, step, weights=None):
  """The loss of `trained` and `frozen` parameters; its terms, and records.

  Args:
    weights: that the sums of the terms are divided by; None: their own.
  """
  params = roles.join(trained, frozen)
  terms, by_stack = forward(model, config, params, batch, rng=rng, step=step)
  own = jax.tree.map(lambda t: t[1], terms, is_leaf=_is_pair)
  loss = losses.total(terms, own if weights is None else weights, config.loss)
  return loss, (terms, by_stack)


def _gradients(objective, params, step, batch, rng, microbatches):
  """Gradients, terms and records of a whole batch."""
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
    _, (terms, _) = objective(params, *part, step)
    return jax.tree.map(lambda t: t[1], terms, is_leaf=_is_pair)

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
  (grads, terms, by_stack), _ = jax.lax.scan(add, (zeros[0], *zeros[1]), parts)
  return grads, terms, by_stack


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


def check_sizes(config: Config, mesh) -> None:
  """Refuses a batch that does not divide, with the sizes that would.

  Raises:
    ValueError: batch against devices or microbatches, or a microbatch that is
      no whole number of groups.
  """
  batch, parts = config.data.batch_size, config.microbatches
  shards = sharding.batch_shards(mesh)
  measured = config.evaluate.batch_size
  if measured % shards:
    raise ValueError(
      f'evaluate.batch_size={measured} does not divide among {shards} devices;'
      f' the nearest that do are {_nearest(measured, shards)}.'
    )
  if batch % (parts * shards):
    raise ValueError(
      f'data.batch_size={batch} does not divide into {parts} microbatches on'
      f' {shards} devices; the nearest that do are'
      f' {_nearest(batch, parts * shards)}.'
    )
  for stack, size, tokens in groups(config) if parts > 1 else ():
    if tokens % size:
      raise ValueError(
        f'A microbatch of {batch // parts} x {tokens * parts // batch} tokens'
        f' is no whole number of {stack} groups of {size}; the nearest group'
        f' sizes that divide are {sharding.divisors_near(tokens, size)}'
        f' (model.{stack}.group_size).'
      )


def check_padding(config: Config, mesh) -> None:
  """Refuses groups far larger than what a device has, with sizes that fit.

  Raises:
    ValueError: more than `config.max_padding` places for each that is needed.
  """
  shards, factors = sharding.batch_shards(mesh), padding(config, mesh)
  wide = [g for g in groups(config) if factors[g[0]] > config.max_padding > 0]
  if wide:
    each = lambda text: ' and '.join(
      text.format(
        stack=stack, size=size, share=tokens // shards, factor=factors[stack]
      )
      for stack, size, tokens in wide
    )
    raise ValueError(
      f'A device computes whole groups. Of {shards} devices each has'
      f' {each("{share} {stack} tokens for groups of {size}")}, so that sparse'
      f' layers would compute {each("{factor:.1f}")} times the places. Set'
      f' {each("model.{stack}.group_size={share}")}, or, to have it so,'
      f' max_padding={math.ceil(max(factors.values()))}.'
    )


def padding(config: Config, mesh) -> dict[str, float]:
  """Places computed for each that tokens need, by sparse stack; 1: none more.

  A device computes whole groups, so that groups do not depend on the mesh: with
  a tenth of the tokens of one, ten times the places.
  """
  shards, moe = sharding.batch_shards(mesh), config.model.moe
  return {
    stack: sharding.whole_groups(tokens, size, shards) * size / tokens
    if moe.computes_places
    else 1.0
    for stack, size, tokens in groups(config)
  }


def astride(config: Config, mesh) -> list[str]:
  """What to tell where groups lie astride devices: what that costs."""
  shards, factors = sharding.batch_shards(mesh), padding(config, mesh)
  return [
    f'{stack} groups of {size} tokens lie astride devices of {tokens // shards}'
    f' tokens each, which pass them on in every sparse layer'
    f'{_more(factors[stack])}; with'
    f' model.{stack}.group_size={tokens // shards}, or a divisor of it, they'
    ' would not.'
    for stack, size, tokens in groups(config)
    if shards > 1 and tokens // shards % size
  ]


def _more(factor: float) -> str:
  return f' and compute {factor:.2f} times the places' if factor > 1 else ''


def groups(config: Config) -> Iterator[tuple[str, int, int]]:
  """(sparse stack, tokens of a group, tokens of a microbatch)."""
  for stack in config.model.stacks:
    if config.model.plan(stack).num_sparse:
      length = config.data.length(stack)
      whole = config.data.batch_size * length
      size = min(config.model.stack(stack).group_size, whole)
      if config.model.moe.group_by == 'sequence':
        size = length
      yield stack, size, whole // config.microbatches


def _nearest(n: int, factor: int) -> str:
  low = n // factor * factor
  return f'{low} and {low + factor}' if low else f'{factor}'


def parameter_axes(model):
  """The logical axes of every parameter, from shapes alone."""
  batch = dummy_batch(model.config)
  boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0), batch))
  return sharding.axis_names(boxed)


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a run begins, each array in its shards from the first moment."""

  shapes: TrainState
  shardings: TrainState
  random_params: Callable  # key -> params.
  begin: Callable  # params, which it takes over -> TrainState.

  def forget(self) -> None:
    """Drops both programs, of 100 MB and more, that a run needs but once."""
    self.random_params.clear_cache()
    self.begin.clear_cache()


def check_room(plan: Plan, config: Config, mesh) -> None:
  """Refuses what no device here can hold, before it is made.

  Else the system would end the process, without a word. What a step takes
  beside its logits is not counted: what is refused here is hopeless.

  Raises:
    ValueError: with what it takes and what there is.
  """
  leaves = jax.tree.leaves(sharding.placed(plan.shapes, plan.shardings))
  state = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in leaves
  )
  params = jax.tree.leaves(plan.shapes.params)
  count = sum(math.prod(leaf.shape) for leaf in params)
  data, length = config.data, config.data.length(config.model.stacks[-1])
  rows = data.batch_size // config.microbatches
  numbers = rows * min(config.loss.positions or length, length)
  logits = 4 * numbers * config.model.vocab_size // mesh.size
  room = _memory(mesh.local_devices[0])
  if state + logits > room:
    gib = lambda size: f'{size / 2**30:,.1f} GiB'
    raise ValueError(
      f'A device here has {gib(room)}. {count:,} parameters and the optimizer'
      f' take {gib(state)} of each, the logits of {rows:,} rows {gib(logits)}.'
      ' Make the model smaller (config.model.embed_dim, mlp_dim,'
      ' moe.num_experts, encoder.num_layers) or split it over more devices'
      ' (config.mesh.fsdp, expert, model); take fewer rows at a time'
      ' (config.data.batch_size, microbatches) or logits (loss.positions).'
    )


def _memory(device) -> int:
  """Bytes of a device; those of CPUs share the memory of the machine."""
  stats = device.memory_stats() or {}
  whole = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return stats.get('bytes_limit', whole // jax.local_device_count())


def plan_init(model, optimizer, mesh) -> Plan:
  """From shapes alone: no array is made before it is asked for."""
  batch = dummy_batch(model.config)
  boxed = jax.eval_shape(
    lambda: init_state(model, optimizer, jax.random.key(0))
  )
  shardings = sharding.of_boxed(boxed, mesh)

  def random_params(key):
    return sharding.unbox(init_params(model, key, batch))

  def begin(params):
    return sharding.unbox(
      _first_state(optimizer, sharding.rebox(params, boxed.params))
    )

  return Plan(
    sharding.unbox(boxed),
    shardings,
    jax.jit(random_params, out_shardings=shardings.params),
    jax.jit(begin, out_shardings=shardings, donate_argnums=0),
  )
