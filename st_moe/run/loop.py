"""Training, top to bottom: `train(config, workdir)`."""

import contextlib
import dataclasses
import fnmatch
import itertools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from etils import epath

from st_moe import (
  backend,
  checkpoint,
  config_file,
  counts,
  hosts,
  paths,
  sharding,
  signals,
  stdio,
)
from st_moe.config import Config, unknown
from st_moe.data import files, pipeline, trust, vocabulary
from st_moe.history import read_rows
from st_moe.infer.evaluator import Evaluator
from st_moe.interop import convert, links, rules
from st_moe.model.transformer import Transformer
from st_moe.run import owner
from st_moe.run import profile as profiles
from st_moe.run import workdir as workdirs
from st_moe.run.report import Clock, Report, Silence
from st_moe.train import optimizer, sizes, step, terms
from st_moe.train.state import parameter_axes, starting

# A run may go on with other values of these: they change none of its numbers.
_FREE = (
  'name',
  'paper_params',
  'max_padding',
  'total_steps',
  'checkpoint.',
  'evaluate.',
  'log.',
  'mesh.',
  'model.remat',
  'model.moe.dispatcher',
  'model.moe.transport',
  'loss.positions',
  'microbatches',  # But see `_claim`.
  'data.workers',
  'data.allow_cut',
  'data.cache_dir',
  'data.may_change',
  'data.files.',  # Of these two `_check_data` sees what lies there.
  'data.data_dir',
  'optimizer.max_bad_steps',
)


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
      return _train(config, workdir, config_path, profile, modules, check_owner)


def _train(
  config: Config, workdir, config_path, profile, modules, check_owner
) -> dict:
  # --- What is asked for, and may it be done here? ---------------------------
  if config.total_steps < 1:
    raise ValueError('config.total_steps is 0; set how long to train.')
  if config.model.stacks != ('encoder', 'decoder'):
    raise ValueError(
      'Inputs and targets take an encoder and a decoder to train on, but this'
      f' model has only its {config.model.stacks[0]}.'
    )
  traced = profiles.steps(profile, config.total_steps)
  kept = checkpoint.last_run(workdir)
  done = hosts.agreed(lambda: _claim(workdir, config, kept))
  if done >= config.total_steps and _is_finished(workdir, done):
    return _finished(workdir, config)
  mesh = sharding.make_mesh(
    **dataclasses.asdict(config.mesh), num_experts=config.model.num_experts
  )
  sizes.check(config, mesh)
  sizes.check_padding(config, mesh)
  terms.check_names(config.loss)
  if config.init and config.init_take != 'architecture':
    rules.named(config.init_take, config.init_rules)
  pipeline.check(config.data, ('train', config.evaluate.split))
  asked, vocab = config, find_vocabulary(config, workdir)
  config = with_vocabulary_size(config, vocab)
  model = Transformer(config.model)
  with sharding.use(mesh):
    tx = optimizer.make(config.optimizer, parameter_axes(model))
    plan = starting(model, tx, mesh)  # Shapes, before any memory.
    sizes.check_room(plan, config, mesh)
  if hosts.first():
    workdirs.explain(workdir, asked, config_path)

  # --- Data ------------------------------------------------------------------
  vocab = hosts.in_turn(lambda: _keep_vocabulary(workdir, config, vocab))
  split, size = sharding.batch_sharding(mesh), config.data.batch_size
  rows = hosts.rows(split, size)
  data = hosts.in_turn(
    lambda: pipeline.TrainData(config.data, vocab, rows=rows)
  )
  evaluations = hosts.in_turn(lambda: _open_eval(config, vocab))
  evaluate = Evaluator(model, config, vocab, mesh)
  best = _best(config.checkpoint.keep_best, evaluate.names(evaluations))

  # --- State: where this run was, else a checkpoint, else random -------------
  with sharding.use(mesh):
    checkpoints = checkpoint.Checkpoints(
      workdir, config.checkpoint, best, _measured(workdir)
    )
    abstract = sharding.placed(plan.shapes, plan.shardings)
    found = checkpoints.restore(abstract, notify=hosts.tell)
    if found:
      state, run = found
    else:
      params, lines = _first_params(config, plan, abstract.params)
      state, run = plan.begin(params), {'tokens_seen': {}}
      state = _with_slots(config, state)
      hosts.tell(*lines)
    hosts.agreed(lambda: _check_data(config, data.digests, run))
    start = int(state.step)
    if start and run.get('batches', 1) != pipeline.BATCHES:
      hosts.tell(
        f'{workdir} began when batches were drawn in another order: from step'
        f' {start} on they are not those it would have had.'
      )
    seen = {name: run['tokens_seen'].get(name, 0) for name in data.sources}
    # Killed or told to stop between a checkpoint and its evaluation.
    owed = start >= config.total_steps or _due(start, config.evaluate.every)
    owed &= not hosts.agreed(lambda: start in _measured(workdir))
    if start >= config.total_steps and not owed:
      checkpoints.close()
      return _finished(workdir, config)

    # --- Steps ---------------------------------------------------------------
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    train_step = jax.jit(
      _counting(step.make_train_step(model, tx, config), len(data.sources)),
      donate_argnums=0,
      out_shardings=(plan.shardings, whole, whole),
    )
    report = (
      Report(workdir, config, start=start) if hosts.first() else Silence(start)
    )
    _announce(report, config, workdir, start, mesh, plan.shapes.params)
    for line in [
      *data.notes,
      *(n for each in evaluations for n in each.notes()),
    ]:
      report.note(line)
    row, pending, measured = {}, None, {}
    done, stop = start, False
    clock = Clock()
    traced = traced if hosts.first() else range(0)
    trace = profiles.Profile(traced, workdir, report.note, start=start)

    signature = trust.signature(config.data)

    def describe():
      return checkpoint.describe_run(
        config_file.to_dict(config),
        vocab.model,
        tokens_seen=seen,
        data=data.digests,
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

      found = evaluate(state.params, evaluations, progress=progress)
      report.write(done, found)
      report.note(_line(done, found))
      report.flush()
      clock.read()
      return found, hosts.agreed(lambda: checkpoints.score(done, found))

    spread = lambda batch: hosts.spread(batch, split, rows, size)
    batches = map(spread, data.iterate(start))
    if start < config.total_steps:
      # Before SIGTERM is left to the steps: a compiler does not let go.
      first = next(batches)
      train_step = train_step.lower(state, first).compile()
      batches = itertools.chain([first], batches)
    plan.forget()
    backend.give_back()
    try:
      with contextlib.ExitStack() as ending:
        stops = ending.enter_context(hosts.preemption())
        ending.callback(report.close)
        ending.push(checkpoints.leave)
        ending.callback(trace.close)
        if start and owed:
          try:
            measured, _ = measure(stops)
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
            state, *found = train_step(state, batch)
          # The numbers of the step before are read while this one runs.
          if pending:
            row = _look(pending, seen, config, report, clock)
          done, pending = n + 1, (n + 1, *found)
          last, stop = done == config.total_steps, stops()
          evaluated = last or _due(done, config.evaluate.every)
          saved = last or stop or _due(done, config.checkpoint.every)
          if evaluated or saved:
            row = _look(pending, seen, config, report, clock, force=evaluated)
            pending = None
          # Before the evaluation, which may take longer than there is time.
          if saved:
            save()
          if evaluated and not stop:
            try:
              measured, record = measure(stops)
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
  return {**row, **measured}


class _Stopped(Exception):
  """An evaluation was given up: there is time to save, not to measure."""


def _measured(workdir) -> dict[int, dict]:
  """Step -> what its evaluation found, of those there were."""
  return {r['step']: r for r in read_rows(workdir) if 'loss' not in r}


def _is_finished(workdir, step: int) -> bool:
  """Whether the last step is measured, and no bit of its checkpoint wrong.

  What is only perhaps so is read and gone on from, as after a kill.
  """
  measured = hosts.agreed(lambda: step in _measured(workdir))
  return measured and checkpoint.is_sound(workdir, step)


def _finished(workdir, config: Config) -> dict:
  hosts.tell(f'{workdir} is finished: {config.total_steps} steps.')
  return (read_rows(workdir) or [{}])[-1]


def metric_names(config: Config, workdir) -> list[str]:
  """The metrics that a run of `config` will find, before there is a run."""
  if not config.data.drawn:  # A run refuses that in its own words.
    return []
  vocab = find_vocabulary(config, workdir) or vocabulary.load('bytes')
  opened = hosts.in_turn(lambda: _open_eval(config, vocab))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  evaluate = Evaluator(Transformer(config.model), config, vocab, mesh)
  return evaluate.names(opened)


def _open_eval(config: Config, vocab) -> list[pipeline.EvalData]:
  return [
    pipeline.open_eval(config.data, vocab, name, config.evaluate.split)
    for name in pipeline.source_names(config.data, vocab)
  ]


def _first_params(config: Config, plan, abstract):
  """Where a run begins: at random, at a checkpoint, or at parts of one."""
  random = lambda: plan.random_params(jax.random.key(config.seed))
  if not config.init or config.init_take == 'architecture':
    return random(), []
  source = convert.open_source(config.init)
  asked = rules.named(config.init_take, config.init_rules)
  if not asked:
    return source.load(abstract), []
  return rules.initialize(random(), config.model, links.unrolled(source), asked)


def _with_slots(config: Config, state):
  """A first state, with the optimizer's slots of `init` if they are kept."""
  if not config.init or config.init_slots == 'reset':
    return state
  source = convert.open_source(config.init)
  if not hasattr(source, 'slots'):
    raise ValueError(
      f"{config.init} has no slots of an optimizer: set init_slots='reset'."
    )
  slots, *schedule = state.opt_state
  return state.replace(opt_state=(source.slots(config, slots), *schedule))


def find_vocabulary(config: Config, workdir) -> vocabulary.Vocabulary | None:
  """That of its checkpoints, else of the config, of `init`, or its own file.

  None: a new one.
  """
  if config.data.vocabulary == 'bytes':
    return vocabulary.load('bytes')
  own = epath.Path(workdir) / 'vocabulary.model'
  if run := checkpoint.last_run(workdir):
    return vocabulary.checked(f'{own}', checkpoint.vocabulary_of(run))
  if config.data.vocabulary:
    return vocabulary.load(config.data.vocabulary)
  if config.init:
    model = convert.open_source(config.init).vocabulary
    if model is None:
      raise ValueError(
        f'{config.init} comes without a vocabulary: set data.vocabulary to its'
        ' SentencePiece model.'
      )
    return vocabulary.checked(config.init, model)
  return vocabulary.load(own) if hosts.agreed(own.exists) else None


def with_vocabulary_size(config: Config, vocab) -> Config:
  """`config` with a vocabulary size of 0 settled: a multiple of 128."""
  ids = vocab.size if vocab else config.data.vocabulary_size
  size = config.model.vocab_size or -(-ids // 128) * 128
  if vocab:
    vocab.check_fits(size)
  elif size < ids:
    raise ValueError(
      f'model.vocab_size {size} is smaller than the vocabulary to be trained:'
      f' data.vocabulary_size is {ids}, of which {vocabulary.SENTINELS} are'
      f' sentinels; make one larger or the other smaller.'
    )
  model = dataclasses.replace(config.model, vocab_size=size)
  return dataclasses.replace(config, model=model)


def _keep_vocabulary(workdir, config: Config, vocab) -> vocabulary.Vocabulary:
  """Trains a vocabulary if there is none yet; keeps a copy in the workdir."""
  own = workdir / 'vocabulary.model'
  if vocab is None and own.exists():  # By process 0, a moment ago.
    return vocabulary.load(own)
  if vocab is None:
    size = config.data.vocabulary_size
    return pipeline.train_vocabulary(config.data, own, size)
  if vocab.model:
    planted = own.exists() and own.read_bytes() != vocab.model
    if planted:
      hosts.tell(
        f'{own} is not the vocabulary of this run: it is written anew.'
      )
    if planted or not own.exists():
      files.write_whole(own, vocab.model)
  return vocab


def _claim(workdir: epath.Path, config: Config, run: dict | None = None) -> int:
  """The steps done in a workdir; refuses one where another config trained.

  Args:
    run: what its newest checkpoint says.
  """
  path, done = workdir / 'config.json', checkpoint.last_step(workdir)
  is_ours = lambda p: run or 'total_steps' in files.json_in(p)
  files.check_free(path, is_ours)
  if not path.exists():
    if not done:
      workdirs.check_new(workdir)
    return done
  free = _FREE
  # By way of a Config, which knows the fields that have come since.
  try:
    theirs = config_file.of_run(path)
  except ValueError:
    if not run:
      raise
    hosts.tell(f'{path} is damaged, and written anew.')
    theirs = config_file.from_dict(run['config'], f'a checkpoint of {workdir}')
    free = (*free, 'model.vocab_size')  # Settled there, and not as asked for.
  ours = config_file.to_dict(config)
  changed = config_file.diff(config_file.to_dict(theirs), ours)
  lines = [line for line in changed if not line.startswith(free)]
  if lines and not checkpoint.any_steps(workdir):
    # Nothing is lost, and the advice of an error may be followed on the spot.
    (workdir / 'vocabulary.model').unlink(missing_ok=True)
  elif lines:
    listed = '\n  '.join(lines)
    raise ValueError(
      f'{workdir} belongs to another config:\n  {listed}\nUse another workdir,'
      ' or the config it was started with.'
    )
  for line in changed:
    if line.startswith('microbatches') and done:
      hosts.tell(
        f'{line}: each microbatch draws dropout, jitter and second experts by a'
        ' lot of its own, so a run that has these goes on with other draws.'
      )
  return done


def _check_data(config: Config, digests: dict[str, str], run: dict) -> None:
  """Refuses to go on with other data than a run has seen, unless asked to.

  What was begun by code that kept no digests is held to the names of files.
  """
  theirs, ours = run.get('data', {}), config_file.to_dict(config)
  places = lambda values: [values['data'][k] for k in ('files', 'data_dir')]
  changed = [
    name
    for name, digest in digests.items()
    if digest and (theirs.get(name) or digest) != digest
  ]
  if 'config' in run and not theirs and places(run['config']) != places(ours):
    changed = list(digests)
  if not changed:
    return
  named = ', '.join(map(repr, changed))
  if not config.data.may_change:
    raise ValueError(
      f'The training data of {named} are not known to be what this run began'
      ' with: texts or rows, or the code that makes examples of them, have'
      ' changed. Put back what was there, begin another run with init= this'
      ' one, or go on with other batches by --config.data.may_change=true.'
    )
  hosts.tell(f'Going on with other training data of {named}.')


def _announce(report, config: Config, workdir, start, mesh, shapes):
  roles = paths.count(shapes)
  parts = ', '.join(f'{k} {v:,}' for k, v in roles.items())
  data = config.data
  flops = counts.forward_flops(
    config.model, data.inputs_length, data.targets_length
  )
  report.note(
    f'{workdir}: {config.name}, {start} of {config.total_steps} steps done'
  )
  report.note(f'parameters {sum(roles.values()):,} ({parts})')
  per_step = 3 * flops * config.data.batch_size
  shape = ' x '.join(f'{k} {v}' for k, v in mesh.shape.items())
  report.note(f'{per_step:.3g} FLOPs a step; mesh {shape}')
  for line in sizes.straddling(config, mesh):
    report.note(line)


def _counting(train_step, sources: int):
  """`train_step`, and what it read: of its whole batch no process has more.

  Counts are int32: real tokens, and targets by source [sources].
  """

  def counted(state, batch):
    batch = dict(batch)
    source = batch.pop('source')
    targets = jnp.sum(batch['decoder_loss_weights'] > 0, axis=-1)
    inputs = jnp.count_nonzero(batch['encoder_input_tokens'])
    mine = source[:, None] == jnp.arange(sources)[None]  # [b, source]
    state, metrics = train_step(state, batch)
    counts = inputs + targets.sum(), (mine * targets[:, None]).sum(0)
    return state, metrics, counts

  return counted


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _look(pending, seen, config, report, clock, force=False) -> dict:
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
  if bad >= config.optimizer.max_bad_steps:
    raise ValueError(
      f'{bad} steps in a row were not finite, the last one {n}: lower'
      ' optimizer.learning_rate or look at the data.'
    )
  if not (force or _due(n, config.log.every) or n == report.first):
    return {}
  row = {**jax.device_get(metrics), **clock.read()}
  row.update({f'tokens_seen/{name}': count for name, count in seen.items()})
  report.write(n, row)
  report.progress(n, row)
  return row


def _best(patterns: str, known: list[str]) -> list[str]:
  """The metrics whose best checkpoints are kept, a '-' before the lowest.

  A pattern with a * may find nothing, if others do.
  """
  found = []
  wanted = [p for p in patterns.split(',') if p]
  for pattern in wanted:
    name = _unsigned(pattern)
    names = fnmatch.filter(known, name)
    if not names and ('*' not in name or pattern == wanted[-1] and not found):
      raise unknown('metric in checkpoint.keep_best', name, known)
    found += ['-' * pattern.startswith('-') + name for name in names]
  return found


def _unsigned(name: str) -> str:
  return name.removeprefix('-')


def _line(step: int, measured: dict) -> str:
  """What changes from one evaluation to the next."""
  constant = ('examples', 'majority_')
  found = '  '.join(
    f'{k.removeprefix("eval/")} {v:.4g}'
    for k, v in measured.items()
    if not k.rpartition('/')[2].startswith(constant)
  )
  return f'step {step} evaluated: {found}'
