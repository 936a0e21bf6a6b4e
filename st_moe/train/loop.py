"""Training, top to bottom: `train(config, workdir)`."""

import dataclasses
import json
import pathlib
import subprocess

import jax
import numpy as np
from etils import epath

from st_moe import config_file, sharding
from st_moe.config import Config
from st_moe.data import pipeline, vocabulary
from st_moe.infer.evaluate import Evaluator
from st_moe.model.transformer import Transformer
from st_moe.train import checkpoint, optimizer, step
from st_moe.train.report import Clock, Report

# A run may go on with other values of these: they change none of its numbers.
_FREE = (
  'name',
  'total_steps',
  'checkpoint.',
  'evaluate.',
  'log.',
  'mesh.',
  'data.workers',
  'data.cache_dir',
  'optimizer.max_bad_steps',
)


def train(config: Config, workdir, *, config_path: str = '') -> dict:
  """Runs `config` in `workdir` to its end, from wherever it had come to.

  The batch of step n follows from the seed and n alone, so a run that was killed
  and started again ends with the bits of one that was not.

  Returns:
    The last row of metrics.

  Raises:
    ValueError: what the user has to change, before any work is done.
  """
  workdir = epath.Path(workdir).expanduser()

  # --- What is asked for, and may it be done here? ---------------------------
  if config.total_steps < 1:
    raise ValueError('config.total_steps is 0; set how long to train.')
  _claim(workdir, config)
  mesh = sharding.make_mesh(
    **dataclasses.asdict(config.mesh), num_experts=_num_experts(config)
  )
  step.check_sizes(config, mesh)
  pipeline.check(config.data)
  _keep_config(workdir, config, config_path)

  # --- Data ------------------------------------------------------------------
  vocab = find_vocabulary(config, workdir)
  config = with_vocabulary(config, vocab)
  data = pipeline.TrainData(
    config.data,
    vocab,
    host_index=jax.process_index(),
    host_count=jax.process_count(),
  )
  evaluations = [
    pipeline.open_eval(config.data, vocab, name, config.evaluate.split)
    for name in data.sources
  ]

  # --- Shapes, before any memory ---------------------------------------------
  model = Transformer(config.model)
  with sharding.use(mesh):
    tx = optimizer.make(config.optimizer, step.parameter_axes(model))
    init, shardings, abstract = step.plan_init(model, tx, mesh)

    # --- State: where this run was, else a checkpoint, else random ------------
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint)
    abstract = checkpoint.with_shardings(abstract, shardings)
    found = checkpoints.restore(abstract, notify=print)
    if found:
      state, run = found
    else:
      state, run = init(jax.random.key(config.seed)), {'tokens_seen': {}}
      if config.init and config.init_take == 'params':
        params = checkpoint.load_params(config.init, abstract.params)
        state = state.replace(params=params)
    start = int(state.step)
    seen = {name: run['tokens_seen'].get(name, 0) for name in data.sources}

    # --- Steps ------------------------------------------------------------------
    train_step = jax.jit(
      step.make_train_step(model, tx, config),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )
    evaluate = Evaluator(model, config, vocab, mesh)
    report = Report(workdir, config, start=start)
    _announce(report, config, workdir, start, mesh)
    row, pending, measured = {}, None, {}
    clock = Clock()

    def describe():
      return checkpoint.describe_run(
        config_file.to_dict(config), vocab.model, tokens_seen=seen
      )

    try:
      for n, batch in zip(
        range(start, config.total_steps), data.iterate(start), strict=False
      ):
        for i, name in enumerate(data.sources):
          mine = batch['source'] == i
          seen[name] += int(batch['decoder_loss_weights'][mine].sum())
        state, metrics = train_step(state, _on_devices(batch, mesh))
        clock.tick(_tokens(batch))
        # The numbers of the step before are read while this one runs.
        if pending:
          row = _look(pending, config, report, clock)
        pending = n + 1, metrics, dict(seen)
        done = n + 1
        last = done == config.total_steps
        if last or _due(done, config.evaluate.every):
          row = _look(pending, config, report, clock, force=True)
          pending, measured = None, evaluate(state.params, evaluations)
          report.write(done, measured)
          report.note(_line(done, measured))
          clock.read()
        if last or _due(done, config.checkpoint.every):
          checkpoints.save(done, state, describe(), _scores(measured, config))
    except KeyboardInterrupt:
      report.note('Interrupted; the same command goes on from the last checkpoint.')
      raise
    finally:
      report.close()
      checkpoints.close()
  return {**row, **measured}


def find_vocabulary(config: Config, workdir) -> vocabulary.Vocabulary:
  """The run's own, else the one given, else that of `init`, else a new one."""
  own = epath.Path(workdir) / 'vocabulary.model'
  if config.data.vocabulary == 'bytes':
    return vocabulary.load('bytes')
  if own.exists():
    return vocabulary.load(own)
  if config.data.vocabulary:
    own.write_bytes(vocabulary.load(config.data.vocabulary).model)
  elif config.init:
    model = checkpoint.vocabulary_of(checkpoint.read_run(config.init))
    if not model:
      return vocabulary.load('bytes')
    own.write_bytes(model)
  else:
    pipeline.train_vocabulary(config.data, own, config.data.vocabulary_size)
  return vocabulary.load(own)


def with_vocabulary(config: Config, vocab) -> Config:
  """`config` with a vocabulary size of 0 settled: a multiple of 128."""
  size = config.model.vocab_size or -(-vocab.size // 128) * 128
  vocab.check_fits(size)
  model = dataclasses.replace(config.model, vocab_size=size)
  return dataclasses.replace(config, model=model)


def _num_experts(config: Config) -> int:
  sparse = any(config.model.plan(s).num_sparse for s in config.model.stacks)
  return config.model.moe.num_experts if sparse else 0


def _claim(workdir: epath.Path, config: Config):
  """Refuses a workdir that belongs to another config."""
  path = workdir / 'config.json'
  if not path.exists():
    return
  theirs = json.loads(path.read_text())
  lines = config_file.diff(theirs, config_file.to_dict(config))
  lines = [line for line in lines if not line.startswith(_FREE)]
  if lines:
    listed = '\n  '.join(lines)
    raise ValueError(
      f'{workdir} belongs to another config:\n  {listed}\nUse another workdir,'
      ' or the config it was started with.'
    )


def _keep_config(workdir: epath.Path, config: Config, path: str):
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(config_file.to_json(config))
  if path:
    source = config_file.find(path.partition(':')[0])
    (workdir / 'config.py').write_text(source.read_text())
  about = {'commit': _commit(), 'versions': checkpoint.versions()}
  (workdir / 'about.json').write_text(json.dumps(about, indent=2))


def _commit() -> str:
  """The commit of this code, '+' where files differ from it; '' if unknown."""
  here = pathlib.Path(__file__).parent
  git = lambda *args: subprocess.run(
    ['git', '-C', here, *args], capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return ''


def _announce(report, config: Config, workdir, start, mesh):
  roles = config.model.num_params()
  parts = ', '.join(f'{k} {v:,}' for k, v in roles.items())
  flops = config.model.forward_flops(
    config.data.inputs_length, config.data.targets_length
  )
  report.note(f'{workdir}: {config.name}, {start} of {config.total_steps} steps done')
  report.note(f'parameters {sum(roles.values()):,} ({parts})')
  per_step = 3 * flops * config.data.batch_size
  shape = ' x '.join(f'{k} {v}' for k, v in mesh.shape.items())
  report.note(f'{per_step:.3g} FLOPs a step; mesh {shape}')


def _on_devices(batch: dict, mesh) -> dict:
  arrays = {k: v for k, v in batch.items() if k != 'source'}
  return jax.tree.map(
    lambda a: jax.make_array_from_process_local_data(
      sharding.batch_sharding(mesh), a
    ),
    arrays,
  )


def _tokens(batch: dict) -> int:
  """Real tokens, inputs and targets."""
  inputs = np.count_nonzero(batch['encoder_input_tokens'])
  return int(inputs + batch['decoder_loss_weights'].sum())


def _due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _look(pending, config, report, clock, force=False) -> dict:
  """Reads the metrics of a step: stops a broken run, logs now and then."""
  n, metrics, seen = pending
  bad = int(metrics['bad_steps'])
  if bad:
    report.note(f'step {n} was not applied: loss {float(metrics["loss"])}')
  if bad >= config.optimizer.max_bad_steps:
    raise ValueError(
      f'{bad} steps in a row were not finite, the last one {n}: lower'
      ' optimizer.learning_rate or look at the data.'
    )
  if not (force or _due(n, config.log.every) or n == 1):
    return {}
  row = {**jax.device_get(metrics), **clock.read()}
  row.update({f'tokens_seen/{name}': count for name, count in seen.items()})
  report.write(n, row)
  report.progress(n, row)
  return row


def _scores(measured: dict, config: Config) -> dict | None:
  name = config.checkpoint.keep_best.removeprefix('-')
  if not name:
    return None
  if measured and name not in measured:
    raise ValueError(
      f'checkpoint.keep_best={name!r} is not measured; there are'
      f' {sorted(measured)}.'
    )
  return {name: float(measured[name])} if measured else None


def _line(step: int, measured: dict) -> str:
  found = '  '.join(f'{k.removeprefix("eval/")} {v:.4g}' for k, v in measured.items())
  return f'step {step} evaluated: {found}'
