"""Training, top to bottom: `train(config, workdir)`."""

import contextlib
import functools
import itertools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from st_moe import (
  backend,
  checkpoint,
  counts,
  hosts,
  paths,
  sharding,
  signals,
  stdio,
)
from st_moe.config import Config
from st_moe.data import pipeline, trust
from st_moe.history import measured
from st_moe.run import begin, owner
from st_moe.run import profile as profiles
from st_moe.run import workdir as workdirs
from st_moe.run.report import Clock, Report, Silence
from st_moe.train import step


def train(
  config: Config,
  workdir,
  *,
  config_path: str = '',
  profile: str = '',
  modules: Sequence[str] = (),
) -> dict:
  """Runs `config` in `workdir` to its end, from wherever it had come to.

  The batch of step n follows from the seed and n alone, so a run that was
  killed and started again ends with the bits of one that was not.

  Of several processes each calls this; `workdir` is one that all of them see.
  `profile` names steps to trace, as 'START:STOP', `modules` what was imported
  for its tasks: checkpoints name them to who lacks a task.

  Returns:
    The last row of metrics.

  Raises:
    ValueError: what the user has to change, before any work is done. Or another
      run is at work in `workdir`.
    SystemExit: after SIGTERM, with what was done saved.
  """
  if not os.fspath(workdir):
    raise ValueError('The workdir is empty: name a folder for the run.')
  workdir = epath.Path(workdir).expanduser()
  with stdio.lasting(), signals.orderly():
    hosts.agreed(lambda: workdirs.check(workdir))
    with owner.held(workdir) as check_owner:
      run = begin.settle(config, workdir, config_path, profile)
      if run is None:
        return begin.last_row(workdir, config.total_steps)
      return _train(run, modules, check_owner)


def _train(run: begin.Settled, modules, check_owner) -> dict:
  config, workdir, mesh = run.config, run.workdir, run.mesh
  data = begin.data(run)
  with sharding.use(mesh):
    # --- State: where this run was, else a checkpoint, else random -----------
    checkpoints = checkpoint.Checkpoints(
      workdir, config.checkpoint, data.best, measured(workdir)
    )
    state, seen = begin.state(run, data.train, checkpoints)
    start = int(state.step)
    # Killed or told to stop between a checkpoint and its evaluation.
    owed = start >= config.total_steps or _due(start, config.evaluate.every)
    owed &= not hosts.agreed(lambda: start in measured(workdir))
    if start >= config.total_steps and not owed:
      checkpoints.close()
      return begin.last_row(workdir, config.total_steps)

    # --- Steps ---------------------------------------------------------------
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    train_step = jax.jit(
      _counting(
        step.make_train_step(run.model, run.optimizer, config),
        len(data.train.sources),
      ),
      donate_argnums=0,
      out_shardings=(run.first.shardings, whole, whole),
    )
    report = (
      Report(workdir, config.log, run.said, start=start)
      if hosts.first()
      else Silence(start)
    )
    _announce(report, run, start)
    for line in data.notes():
      report.note(line)
    row, pending, found = {}, None, {}
    done, stop, seed = start, False, np.uint32(config.seed)
    clock = Clock()
    look = functools.partial(
      _look, config.log.every, config.optimizer.max_bad_steps, report, clock
    )
    traced = run.traced if hosts.first() else range(0)
    trace = profiles.Profile(traced, workdir, report.note, start=start)

    signature = trust.signature(config.data)

    def describe():
      return checkpoint.describe_run(
        run.said,
        data.vocabulary.model,
        tokens_seen=seen,
        data=data.train.digests,
        signature=signature,
        modules=list(modules),
        batches=pipeline.BATCHES,
      )

    def save():
      report.flush()
      checkpoints.save(done, state, describe())

    def measure(stops) -> tuple[dict, bool]:
      """What an evaluation finds, and whether that is a record."""

      def progress(_):
        if stops():
          raise _Stopped

      found = data.evaluate(state.params, data.evaluations, progress=progress)
      report.write(done, found)
      report.note(_line(done, found))
      report.flush()
      clock.read()
      return found, hosts.agreed(lambda: checkpoints.score(done, found))

    batches = data.batches(start)
    if start < config.total_steps:
      # Before SIGTERM is left to the steps: a compiler does not let go.
      first = next(batches)
      train_step = train_step.lower(state, first, seed).compile()
      batches = itertools.chain([first], batches)
    run.first.forget()
    backend.give_back()
    try:
      with contextlib.ExitStack() as ending:
        stops = ending.enter_context(hosts.preemption())
        ending.callback(report.close)
        ending.push(checkpoints.leave)
        ending.callback(trace.close)
        if start and owed:
          try:
            found, _ = measure(stops)
          except _Stopped:
            stop = True
        for n, batch in zip(
          range(start, start if stop else config.total_steps),
          batches,
          strict=False,
        ):
          check_owner()
          trace.before(n, state)
          with jax.profiler.StepTraceAnnotation('step', step_num=n + 1):
            state, *numbers = train_step(state, batch, seed)
          # The numbers of the step before are read while this one runs.
          if pending:
            row = look(pending, seen)
          done, pending = n + 1, (n + 1, *numbers)
          last, stop = done == config.total_steps, stops()
          evaluated = last or _due(done, config.evaluate.every)
          saved = last or stop or _due(done, config.checkpoint.every)
          if evaluated or saved:
            row = look(pending, seen, force=evaluated)
            pending = None
          # Before the evaluation, which may take longer than there is time.
          if saved:
            save()
          if evaluated and not stop:
            try:
              found, record = measure(stops)
            except _Stopped:
              stop = record = True
            if record and not saved:
              save()
          if stop:
            break
        trace.before(done, state)
    except KeyboardInterrupt:
      hosts.tell(
        'Interrupted; the same command goes on from the last checkpoint.'
      )
      raise
  if stop:
    hosts.tell(f'Told to stop: step {done} is saved; the same command goes on.')
    raise SystemExit(signals.PREEMPTED)
  return {**row, **found}


class _Stopped(Exception):
  """An evaluation was given up: there is time to save, not to measure."""


def _announce(report, run: begin.Settled, start: int):
  config, shapes = run.config, run.first.shapes.params
  roles, data = paths.count(shapes), config.data
  parts = ', '.join(f'{k} {v:,}' for k, v in roles.items())
  flops = counts.forward_flops(
    config.model, data.inputs_length, data.targets_length
  )
  report.note(
    f'{run.workdir}: {config.name}, {start} of {config.total_steps} steps done'
  )
  report.note(f'parameters {sum(roles.values()):,} ({parts})')
  per_step = 3 * flops * data.batch_size
  shape = ' x '.join(f'{k} {v}' for k, v in run.mesh.shape.items())
  report.note(f'{per_step:.3g} FLOPs a step; mesh {shape}')
  for line in run.notes:
    report.note(line)


def _counting(train_step, sources: int):
  """`train_step`, and what it read: of its whole batch no process has more.

  Counts are int32: real tokens, and targets by source [sources].
  """

  def counted(state, batch, seed):
    targets = jnp.sum(batch['decoder_loss_weights'] > 0, axis=-1)
    inputs = jnp.count_nonzero(batch['encoder_input_tokens'])
    mine = batch['task'][:, None] == jnp.arange(sources)[None]  # [b, source]
    state, metrics = train_step(state, batch, seed)
    counts = inputs + targets.sum(), (mine * targets[:, None]).sum(0)
    return state, metrics, counts

  return counted


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _look(every, max_bad, report, clock, pending, seen, force=False) -> dict:
  """Reads the metrics of a step: stops a broken run, logs now and then.

  Adds what the step read to `seen`, the target tokens by source.
  """
  n, metrics, counts = pending
  bad, (tokens, targets) = jax.device_get((metrics['bad_steps'], counts))
  for name, more in zip(seen, targets, strict=True):
    seen[name] += int(more)
  clock.tick(int(tokens))
  if bad:
    report.note(f'step {n} was not applied: loss {float(metrics["loss"])}')
  if bad >= max_bad:
    raise ValueError(
      f'{bad} steps in a row were not finite, the last one {n}: lower'
      ' optimizer.learning_rate or look at the data.'
    )
  if not (force or _due(n, every) or n == report.first):
    return {}
  row = {**jax.device_get(metrics), **clock.read()}
  row.update({f'tokens_seen/{name}': count for name, count in seen.items()})
  report.write(n, row)
  report.progress(n, row)
  return row


def _line(step: int, measured: dict) -> str:
  """What changes from one evaluation to the next."""
  constant = ('examples', 'majority_')
  found = '  '.join(
    f'{k.removeprefix("eval/")} {v:.4g}'
    for k, v in measured.items()
    if not k.rpartition('/')[2].startswith(constant)
  )
  return f'step {step} evaluated: {found}'
