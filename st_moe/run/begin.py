"""Where a run begins: what it may do, what with, and where it goes on from.

`settle` answers all that can be asked before data is read, once; who comes
after asks what it left, and never the file that the run was asked for with.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator

import jax
from etils import epath

from st_moe import checkpoint, config_file, hosts, sharding
from st_moe.config import Config, unknown
from st_moe.data import files, pipeline, vocabulary
from st_moe.data.eval_data import EvalData
from st_moe.data.mixture import Library
from st_moe.history import measured, read_rows
from st_moe.infer.evaluator import Evaluator
from st_moe.interop import convert, links, rules
from st_moe.model import parts
from st_moe.model.transformer import Transformer
from st_moe.run import profile as profiles
from st_moe.run import workdir as workdirs
from st_moe.train import after, optimizer, sizes, terms
from st_moe.train.state import Start, TrainState, parameter_axes, starting


@dataclasses.dataclass(frozen=True)
class Settled:
  """A run that may begin: all that is known of it before data is read."""

  workdir: epath.Path
  config: Config  # With the size of its vocabulary.
  said: dict  # The same as plain values.
  library: Library  # What its data are called, still without a vocabulary.
  vocabulary: vocabulary.Vocabulary | None  # None: still to be trained.
  init: object | None  # The checkpoint it starts from, opened, if it is new.
  mesh: jax.sharding.Mesh
  model: Transformer
  optimizer: object
  first: Start  # Shapes, and the programs that make the first state.
  traced: range  # Steps whose profile is wanted.
  notes: list[str]  # What a reader should know of them.


def settle(
  config: Config, workdir, config_path: str = '', profile: str = ''
) -> Settled | None:
  """Refuses what cannot be done here, before any work; claims the workdir.

  Returns:
    None if the run is done: its last step measured, and no bit of that
    checkpoint wrong. What is only perhaps so is read and gone on from, as after
    a kill.

  Raises:
    ValueError: what the user has to change.
  """
  if config.total_steps < 1:
    raise ValueError('config.total_steps is 0; set how long to train.')
  if config.model.stacks != ('encoder', 'decoder'):
    raise ValueError(
      'Inputs and targets take an encoder and a decoder to train on, but this'
      f' model has only its {config.model.stacks[0]}.'
    )
  traced = profiles.steps(profile, config.total_steps)
  run = checkpoint.last_run(workdir)
  asked = config_file.to_dict(config)
  done = hosts.agreed(lambda: workdirs.claim(workdir, asked, run))
  if done >= config.total_steps and _is_finished(workdir, done):
    return None
  mesh = sharding.make_mesh(
    **dataclasses.asdict(config.mesh), num_experts=config.model.num_experts
  )
  sizes.check(config, mesh)
  notes = sizes.check_padding(config, mesh)
  terms.check(config.model, config.microbatches)
  after.check(config.optimizer, config.model, config.init)
  if config.init and config.init_take != 'architecture':
    rules.named(config.init_take, config.init_rules)
  library = Library(config.data)
  library.check(('train', config.evaluate.split))
  init = _opened(config.init, run)
  vocab = find_vocabulary(config.data.vocabulary, workdir, run, init)
  sized = with_vocabulary_size(config, vocab)
  parts.check(sized.model)
  model = Transformer(sized.model)
  with sharding.use(mesh):
    tx = optimizer.make(config.optimizer, parameter_axes(model))
    first = starting(model, tx, mesh)  # Shapes, before any memory.
    sizes.check_room(first, sized, mesh)
  if hosts.first():
    workdirs.explain(workdir, asked, config_path)
  return Settled(
    workdir=workdir,
    config=sized,
    said=config_file.to_dict(sized),
    library=library,
    vocabulary=vocab,
    init=init,
    mesh=mesh,
    model=model,
    optimizer=tx,
    first=first,
    traced=traced,
    notes=notes,
  )


def _is_finished(workdir: epath.Path, step: int) -> bool:
  found = hosts.agreed(lambda: step in measured(workdir))
  return found and checkpoint.is_sound(workdir, step)


def last_row(workdir: epath.Path, steps: int) -> dict:
  """The last row of metrics of a run that is done."""
  hosts.tell(f'{workdir} is finished: {steps} steps.')
  return (read_rows(workdir) or [{}])[-1]


def _opened(init: str, run: dict | None):
  """`init`, which a run with a checkpoint of its own needs no more."""
  return convert.open_source(init) if init and not run else None


# Vocabulary.


def find_vocabulary(
  named: str, workdir, run: dict | None, init
) -> vocabulary.Vocabulary | None:
  """That of its checkpoints, else as named, of `init`, or its own file.

  Args:
    named: `data.vocabulary`.
    run: what its newest checkpoint says; None: there is none.
    init: the checkpoint it starts from, opened; None: there is none.

  Returns:
    None: a new one is to be trained.
  """
  if named == 'bytes':
    return vocabulary.load('bytes')
  own = epath.Path(workdir) / 'vocabulary.model'
  if run:
    return vocabulary.checked(f'{own}', checkpoint.vocabulary_of(run))
  if named:
    return vocabulary.load(named)
  if init:
    if init.vocabulary is None:
      raise ValueError(
        f'{init.where} comes without a vocabulary: set data.vocabulary to its'
        ' SentencePiece model.'
      )
    return vocabulary.checked(init.where, init.vocabulary)
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


def _keep_vocabulary(run: Settled) -> vocabulary.Vocabulary:
  """Trains a vocabulary if there is none yet; keeps a copy in the workdir."""
  own, vocab = run.workdir / 'vocabulary.model', run.vocabulary
  if vocab is None and own.exists():  # By process 0, a moment ago.
    return vocabulary.load(own)
  if vocab is None:
    return run.library.train_vocabulary(own)
  if vocab.model:
    planted = own.exists() and own.read_bytes() != vocab.model
    if planted:
      hosts.tell(
        f'{own} is not the vocabulary of this run: it is written anew.'
      )
    if planted or not own.exists():
      files.write_whole(own, vocab.model)
  return vocab


# Data.


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads and how it is measured."""

  vocabulary: vocabulary.Vocabulary
  train: pipeline.TrainData
  evaluations: list[EvalData]
  evaluate: Evaluator
  best: list[str]  # Metrics whose best checkpoints are kept.
  spread: Callable  # This process's rows of a batch -> the batch on the mesh.

  def notes(self) -> list[str]:
    """What a reader should know of them."""
    each = (note for source in self.evaluations for note in source.notes())
    return [*self.train.notes, *each]

  def batches(self, start: int) -> Iterator[dict]:
    """Batch `start` of the run and all after it, on the mesh."""
    return map(self.spread, self.train.iterate(start))


def data(run: Settled) -> Data:
  """Tokenises what is not yet, and opens it; this process's rows of a batch."""
  config = run.config
  vocab = hosts.in_turn(lambda: _keep_vocabulary(run))
  cut, size = sharding.batch_sharding(run.mesh), config.data.batch_size
  rows = hosts.rows(cut, size)
  library = run.library.read_by(vocab)
  train = hosts.in_turn(lambda: pipeline.TrainData(library, rows=rows))
  split = config.evaluate.split
  evaluations = hosts.in_turn(lambda: _evaluations(library, split))
  evaluate = Evaluator(run.model, config, vocab, run.mesh)
  best = _best(config.checkpoint.keep_best, evaluate.names(evaluations))
  spread = lambda batch: hosts.spread(batch, cut, rows, size)
  return Data(vocab, train, evaluations, evaluate, best, spread)


def _evaluations(library: Library, split: str) -> list[EvalData]:
  return [EvalData(library, name, split) for name in library.sources()]


def metric_names(config: Config, workdir) -> list[str]:
  """The metrics that a run of `config` will find, before there is a run."""
  if not config.data.drawn:  # A run refuses that in its own words.
    return []
  run = checkpoint.last_run(workdir)
  init = _opened(config.init, run)
  vocab = find_vocabulary(config.data.vocabulary, workdir, run, init)
  vocab = vocab or vocabulary.load('bytes')
  library, split = Library(config.data, vocab), config.evaluate.split
  opened = hosts.in_turn(lambda: _evaluations(library, split))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  evaluate = Evaluator(Transformer(config.model), config, vocab, mesh)
  return evaluate.names(opened)


def _best(patterns: str, known: list[str]) -> list[str]:
  """The metrics whose best checkpoints are kept, a '-' before the lowest.

  A pattern with a * may find nothing, if others do.
  """
  found = []
  wanted = [p for p in patterns.split(',') if p]
  for pattern in wanted:
    name = pattern.removeprefix('-')
    names = fnmatch.filter(known, name)
    if not names and ('*' not in name or pattern == wanted[-1] and not found):
      raise unknown('metric in checkpoint.keep_best', name, known)
    found += ['-' * pattern.startswith('-') + name for name in names]
  return found


# State.


def state(
  run: Settled, train: pipeline.TrainData, checkpoints: checkpoint.Checkpoints
) -> tuple[TrainState, dict[str, int]]:
  """Where this run was, else a checkpoint, else random; tokens seen by source.

  Raises:
    ValueError: no checkpoint can be read, or its data were others.
  """
  abstract = sharding.placed(run.first.shapes, run.first.shardings)
  found = checkpoints.restore(abstract, notify=hosts.tell)
  if found:
    first, about = found
  else:
    params, lines = _first_params(run, abstract.params)
    first, about = run.first.begin(params), {'tokens_seen': {}}
    if run.init and run.config.init_slots == 'keep':
      first = _with_slots(run, first)
    hosts.tell(*lines)
  hosts.agreed(lambda: _check_data(run.said, train.digests, about))
  if (step := int(first.step)) and about.get('batches', 1) != pipeline.BATCHES:
    hosts.tell(
      f'{run.workdir} began when batches were drawn in another order: from step'
      f' {step} on they are not those it would have had.'
    )
  return first, {n: about['tokens_seen'].get(n, 0) for n in train.sources}


def _first_params(run: Settled, abstract):
  """Where a run begins: at random, at a checkpoint, or at parts of one."""
  config = run.config
  random = lambda: run.first.random_params(jax.random.key(config.seed))
  if not run.init or config.init_take == 'architecture':
    return random(), []
  taken = rules.named(config.init_take, config.init_rules)
  if not taken:
    return run.init.load(abstract), []
  there = links.unrolled(run.init)
  return rules.initialize(random(), config.model, there, taken)


def _with_slots(run: Settled, first: TrainState) -> TrainState:
  """A first state, with the optimizer's slots of `init`."""
  if not hasattr(run.init, 'slots'):
    raise ValueError(
      f"{run.config.init} has no slots of an optimizer: set init_slots='reset'."
    )
  slots, *schedule = first.opt_state
  return first.replace(opt_state=(run.init.slots(run.config, slots), *schedule))


def _check_data(ours: dict, digests: dict[str, str], run: dict) -> None:
  """Refuses to go on with other data than a run has seen, unless asked to.

  What was begun by code that kept no digests is held to the names of files.
  """
  theirs = run.get('data', {})
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
  if not ours['data']['may_change']:
    raise ValueError(
      f'The training data of {named} are not known to be what this run began'
      ' with: texts or rows, or the code that makes examples of them, have'
      ' changed. Put back what was there, begin another run with init= this'
      ' one, or go on with other batches by --config.data.may_change=true.'
    )
  hosts.tell(f'Going on with other training data of {named}.')
