"""Checkpoints: every call of Orbax is in this file.

A checkpoint is a directory WORKDIR/checkpoints/STEP with `params`, `rest` (what
training needs besides) and `run`: config, vocabulary, versions, tokens seen. It
needs nothing else. Its files.json (see `listing`) comes last and guards every
byte, so that a damaged one is noticed and the newest intact one used instead.

Several processes write and read the parts of their own devices, on a disk that
all of them see; which checkpoint is intact they find out together.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import math
import platform
import shutil
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from st_moe import hosts, listing
from st_moe.config import CheckpointConfig
from st_moe.data import files

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def versions() -> dict[str, str]:
  """Of Python and of every package that can change a number."""
  found = {p: importlib.metadata.version(p) for p in _PACKAGES}
  return {'python': platform.python_version(), **found}


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, workdir, config: CheckpointConfig, best=(), scores=None):
    """Nothing is read yet; what killed runs left half written goes.

    Args:
      best: names of metrics; the best checkpoint of each stays. '-x': lowest.
      scores: step -> metrics, as far as they were measured.
    """
    self.directory = listing.place(workdir) / 'checkpoints'
    self._config, self._best, self._scores = config, best, dict(scores or {})
    hosts.agreed(lambda: listing.sweep(self.directory))
    # Not the manager of Orbax: it forgets scores that come after their step,
    # and what a list and checksums say.
    self._writer = ocp.AsyncCheckpointer(_handler('params', 'rest'))
    self._background = concurrent.futures.ThreadPoolExecutor(1)
    self._pending: list[concurrent.futures.Future] = []

  def save(self, step: int, state, run: dict):
    """Starts writing; training may go on (and donate `state`) at once.

    Raises:
      ValueError: the disk is full; what was saved before is untouched.
    """
    self._finish()
    final = self.directory / f'{step}'
    hosts.agreed(lambda: _make_room(final, state))
    params, rest = _split(state)
    with _told_if_full(self.directory):
      self._writer.save(
        listing.unfinished(final), _saved(run, params, rest), force=True
      )
    self._pending.append(self._background.submit(self._end, final))
    if not self._config.asynchronous:
      self._finish()

  def _end(self, final: epath.Path):
    self._writer.wait_until_finished()
    listing.finish(final)
    if hosts.first():
      self._thin_out()

  def _thin_out(self):
    for step in set(listing.steps(self.directory)) - self._kept():
      listing.remove(self.directory / f'{step}')

  def _finish(self):
    """Waits for what is being written."""
    pending, self._pending = self._pending, []
    with _told_if_full(self.directory):
      for each in pending:
        each.result()

  def score(self, step: int, measured: dict) -> bool:
    """Notes what was measured at a step; True if it is a record.

    For process 0 alone, which knows the scores.
    """
    self._scores = {**self._scores, step: measured}
    record = step in self._records(self._scores)
    if record:  # Where it is saved already, the best before it may go.
      self._pending.append(self._background.submit(self._thin_out))
    return record

  def _records(self, steps) -> set[int]:
    """Of some steps those with the best scores; of equals the earliest."""
    found = set()
    for name in self._best:
      by_step = {
        s: _score(name, self._scores.get(s, {})) for s in sorted(steps)
      }
      best = max(by_step, key=by_step.get, default=None)
      if best is not None and by_step[best] > -math.inf:
        found.add(best)
    return found

  def _kept(self) -> set[int]:
    steps, config = listing.steps(self.directory), self._config
    kept = {*steps[: config.keep_last or None], *self._records(steps)}
    if config.keep_every:
      kept.update(step for step in steps if step % config.keep_every == 0)
    return kept

  def close(self):
    self._finish()
    self._writer.close()
    self._background.shutdown()

  def leave(self, error, *_):
    """Closes; after an error only alone: others would have to take part."""
    if error is None or hosts.count() == 1:
      self.close()

  def restore(self, abstract, notify: Callable = logging.warning):
    """The newest intact checkpoint as (state, run), or None.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings.
      notify: told about every checkpoint that had to be passed over.

    Raises:
      ValueError: the state has another shape; names the first difference. Or
      there are checkpoints and none can be read.
    """
    params, rest = _split(abstract)
    wrong = {}
    for step in hosts.agreed(lambda: listing.steps(self.directory)):
      directory = self.directory / f'{step}'
      wrong[step] = listing.damage(directory)
      if wrong[step]:
        continue
      try:
        found = _restore(directory, {'params': params, 'rest': rest})
      except OtherModel:
        raise
      except Exception as e:  # Whatever Orbax makes of a broken file.
        if hosts.count() > 1:  # The others may have read their parts of it.
          raise ValueError(
            f'Checkpoint {directory}: {_unreadable(e)}. Move it away, and the'
            ' newest one before it is used.'
          ) from e
        wrong[step] = _unreadable(e)
        continue
      del wrong[step]
      for damaged, what in wrong.items():
        notify(f'Checkpoint {damaged} is damaged: {what}. Using {step}.')
        hosts.agreed(functools.partial(self._set_aside, damaged))
      if text := _unguarded(directory):
        notify(text)
      state = abstract.replace(params=found['params'], **found['rest'])
      return state, found['run']
    if wrong:
      raise _none_left(self.directory, wrong)
    return None

  def _set_aside(self, step: int):
    """Keeps a damaged checkpoint out of the way of its successor."""
    aside = self.directory.parent / 'damaged'
    aside.mkdir(exist_ok=True)
    number = len(list(aside.glob('*')))
    files.move_tree(self.directory / f'{step}', aside / f'{step}-{number}')


def _handler(*items: str, **options) -> ocp.CompositeCheckpointHandler:
  arrays = lambda: ocp.StandardCheckpointHandler(**options)
  return ocp.CompositeCheckpointHandler(
    run=ocp.JsonCheckpointHandler(), **{item: arrays() for item in items}
  )


def _saved(run: dict, params, rest=None) -> ocp.args.Composite:
  items = {'params': params} | ({} if rest is None else {'rest': rest})
  return ocp.args.Composite(
    run=ocp.args.JsonSave(run),
    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
  )


def _score(name: str, metrics: dict) -> float:
  """More is better; -inf where it was not measured or is no number."""
  sign = -1 if name.startswith('-') else 1
  value = sign * float(metrics.get(name.removeprefix('-'), math.nan))
  return value if math.isfinite(value) else -math.inf


def _split(state) -> tuple[dict, dict]:
  rest = {
    f.name: getattr(state, f.name)
    for f in dataclasses.fields(state)
    if f.name != 'params'
  }
  return state.params, rest


_METADATA = 16 << 20  # Bytes; ample.


def _make_room(final: epath.Path, state) -> None:
  """Before writing: nothing is in the way, and the disk has room.

  Orbax would find out half way, and say so in pages of traces.
  """
  listing.clear(final)
  if files.is_remote(final):
    return
  directory = final.parent
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _METADATA
  free = shutil.disk_usage(directory).free
  if free < needed:
    raise _full(
      directory,
      f' ({free >> 20} MiB of the {(needed >> 20) + 1} MiB of a checkpoint are'
      ' free)',
    )


@contextlib.contextmanager
def _told_if_full(directory):
  try:
    yield
  except Exception as e:
    if 'No space left' not in f'{e} {e.__cause__}':
      raise
    raise _full(directory) from None


def _full(directory, detail: str = '') -> ValueError:
  return ValueError(
    f'The disk of {directory} is full{detail}. Older checkpoints there are'
    ' intact: free some space and run the same command again.'
  )


def _unreadable(e: Exception) -> str:
  line = (str(e).strip() or repr(e)).splitlines()[0][:200]
  return f'it cannot be read ({type(e).__name__}: {line})'


def _restore(directory: epath.Path, wanted: dict) -> dict:
  """Items of a checkpoint by name, and its `run`."""
  handlers = {name: ocp.StandardCheckpointHandler() for name in wanted}
  handlers['run'] = ocp.JsonCheckpointHandler()
  args = {k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
  with (
    patient_loops(),
    ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader,
  ):
    for name, abstract in wanted.items():
      saved = handlers[name].metadata(directory / name)
      _check_shapes(directory, getattr(saved, 'tree', saved), abstract)
    found = reader.restore(
      directory, ocp.args.Composite(run=ocp.args.JsonRestore(), **args)
    )
  return {name: found[name] for name in (*wanted, 'run')}


class _PatientLoop(asyncio.SelectorEventLoop):
  def close(self):
    if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


@contextlib.contextmanager
def patient_loops():
  """Lets Orbax end what it began.

  At the first array it cannot read it closes its loop under the reads of the
  others, and each of these prints a page of traces.
  """
  impatient = asyncio.new_event_loop
  asyncio.new_event_loop = _PatientLoop
  try:
    yield
  finally:
    asyncio.new_event_loop = impatient


class OtherModel(ValueError):
  """The checkpoint is intact, and its arrays are not those asked for."""


def _check_shapes(directory, saved, abstract) -> None:
  """Raises a ValueError naming the first leaf that is missing or differs."""
  theirs, ours = _named(saved), _named(abstract)
  for name in sorted(set(ours) | set(theirs)):
    a, b = theirs.get(name, 'absent'), ours.get(name, 'absent')
    # A dtype is changed in reading.
    if a.partition('[')[1:] != b.partition('[')[1:]:
      raise OtherModel(
        f'Another model: {name} is {a} in the checkpoint {directory} and {b} in'
        ' this config. Use the config it was trained with, or another workdir.'
      )


def _named(tree) -> dict[str, str]:
  """Path -> 'float32[3, 4]' of every leaf, whatever container it is in."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda path: '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  )
  return {
    name(path): f'{np.dtype(leaf.dtype).name}{list(leaf.shape)}'
    for path, leaf in flat
  }


def describe_run(config: dict, vocabulary: bytes | None, **rest) -> dict:
  """What a checkpoint says about its run, as JSON."""
  text = vocabulary if vocabulary is None else base64.b64encode(vocabulary)
  return {
    'config': config,
    'vocabulary': text if text is None else text.decode(),
    'versions': versions(),
    **rest,
  }


def find(path) -> epath.Path:
  """The checkpoint meant by a checkpoint's path or a workdir's: its newest.

  All processes call it. Says which damaged ones it passed over.

  Raises:
    ValueError: there is none, or the one meant is damaged.
  """
  path = listing.place(path)
  named = lambda: any(
    (path / item).exists() for item in ('params', 'run', listing.NAME)
  )
  if hosts.agreed(named):
    if wrong := listing.damage(path):
      raise ValueError(f'The checkpoint {path} is damaged: {wrong}.')
    return path
  wrong = {}
  for directory in (path / 'checkpoints', path):
    if found := next(_checked(directory, wrong), None):
      if text := _unguarded(found):
        warn(text)
      return found
    if wrong:
      raise _none_left(directory, wrong)
  raise ValueError(
    f'No checkpoint in {path}: give a workdir of `st-moe train`, or one of its'
    ' checkpoints/STEP.'
  )


def all_steps(path) -> list[epath.Path]:
  """Every intact checkpoint of a workdir, oldest first.

  All processes call it. Says which damaged ones it passed over.

  Raises:
    ValueError: there is none.
  """
  directory, wrong = listing.place(path) / 'checkpoints', {}
  found = [*_checked(directory, wrong)]
  if wrong and not found:
    raise _none_left(directory, wrong)
  if not found:
    raise ValueError(f'No checkpoint in {path}: give a workdir.')
  return found[::-1]


def warn(line: str) -> None:
  """On standard error: the answers of a command stand alone on the other."""
  if hosts.first():
    print(line, file=sys.stderr, flush=True)


def _checked(
  directory: epath.Path, wrong: dict, tell: Callable = warn
) -> Iterator[epath.Path]:
  """The intact checkpoints of a directory, newest first.

  What is `wrong` with those passed over is told where there is another.
  """
  told = 0
  for step in hosts.agreed(lambda: listing.steps(directory)):
    if what := listing.damage(directory / f'{step}'):
      wrong[step] = what
      continue
    for damaged, what in [*wrong.items()][told:]:
      tell(f'{directory}/{damaged} is damaged: {what}. Using {step}.')
    told = len(wrong)
    yield directory / f'{step}'


def _none_left(directory, wrong: dict) -> ValueError:
  listed = '\n  '.join(f'{step}: {what}' for step, what in wrong.items())
  return ValueError(
    f'No checkpoint in {directory} can be used:\n  {listed}\nMove the'
    ' directory away to start over.'
  )


def last_step(workdir) -> int:
  """The newest step of a run whose files all have their sizes; 0 before it."""
  directory = listing.place(workdir) / 'checkpoints'
  found = (directory / f'{step}' for step in listing.steps(directory))
  return next((int(d.name) for d in found if not listing.missing(d)), 0)


def any_steps(workdir) -> bool:
  """Whether a run has saved anything, intact or not, or an empty folder."""
  directory = listing.place(workdir) / 'checkpoints'
  found = (path for path in directory.glob('*') if path.name.isdigit())
  remote = files.is_remote(directory)
  return any(not remote or listing.finished(path) for path in found)


def last_run(workdir) -> dict | None:
  """What the newest checkpoint that can be read says of its run, if any can.

  All processes call it.
  """
  directory = listing.place(workdir) / 'checkpoints'
  for found in _checked(directory, {}, tell=lambda line: None):
    with contextlib.suppress(ValueError):
      return _read(found, {})['run']
  return None


def is_sound(workdir, step: int) -> bool:
  """Whether every byte of a checkpoint is known to be right.

  All processes call it.
  """
  directory = listing.place(workdir) / 'checkpoints' / f'{step}'
  return not listing.damage(directory) and listing.covers(directory)


def _unguarded(directory: epath.Path) -> str:
  """What there is to say of a checkpoint whose bytes nothing vouches for."""
  if (directory / listing.NAME).exists():
    return ''
  return (
    f'Checkpoint {directory} has no {listing.NAME}: it can be read, but nothing'
    ' tells whether its bytes are those that were written.'
  )


def read_run(path) -> dict:
  """What the checkpoint at `path` says about its run."""
  return _read(find(path), {})['run']


def load_params(path, abstract) -> dict:
  """The parameters of the checkpoint at `path`, in the layout of `abstract`."""
  return _read(find(path), {'params': abstract})['params']


def load_rest(path, abstract) -> dict:
  """What the checkpoint at `path` has besides parameters, as in `abstract`.

  Raises:
    ValueError: it was made to start from, and has nothing else.
  """
  directory = find(path)
  if not hosts.agreed((directory / 'rest').exists):
    raise ValueError(
      f"{path} has parameters alone, no optimizer: set init_slots='reset'."
    )
  return _read(directory, {'rest': _split(abstract)[1]})['rest']


def _read(directory: epath.Path, wanted: dict) -> dict:
  try:
    return _restore(directory, wanted)
  except OtherModel:
    raise
  except Exception as e:
    raise ValueError(
      f'The checkpoint {directory} is damaged: {_unreadable(e)}.'
    ) from e


def vocabulary_of(run: dict) -> bytes | None:
  """The SentencePiece model of a run; b'' for bytes, None if it has none."""
  text = run['vocabulary']
  return None if text is None else base64.b64decode(text)


def save_params(directory, params, run: dict) -> None:
  """A checkpoint to start from: parameters and their run, no optimizer.

  Raises:
    ValueError: there is something in `directory` already.
  """
  directory = listing.place(directory)
  if hosts.agreed(lambda: directory.exists() and any(directory.iterdir())):
    raise ValueError(f'{directory} is not empty; name a new directory.')

  def prepare():
    directory.parent.mkdir(parents=True, exist_ok=True)
    _make_room(directory, params)

  hosts.agreed(prepare)
  # By default up to 96 GB are copied before they are written.
  handler = _handler('params', save_concurrent_gb=1)
  with _told_if_full(directory), ocp.Checkpointer(handler) as writer:
    args = _saved(run, params)
    writer.save(listing.unfinished(directory), args, force=True)
    listing.finish(directory)
