"""Checkpoints: every call of Orbax is in this file.

A checkpoint is a directory WORKDIR/checkpoints/STEP with `params`, `rest` (what
training needs besides) and `run`: config, vocabulary, versions, tokens seen. It
needs nothing else. Its files.json lists its files and sizes, so that a missing
or truncated one is noticed and the newest intact one used instead.

Several processes write and read the parts of their own devices, on a disk that
all of them see; which checkpoint is intact is for process 0 to decide.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import platform
import shutil
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from st_moe import hosts
from st_moe.config import CheckpointConfig
from st_moe.data import files

_LISTING = 'files.json'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def versions() -> dict[str, str]:
  """Of Python and of every package that can change a number."""
  found = {p: importlib.metadata.version(p) for p in _PACKAGES}
  return {'python': platform.python_version(), **found}


class Checkpoints:
  """The checkpoints of one run."""

  def __init__(self, workdir, config: CheckpointConfig, best=()):
    """`best` names metrics; the best checkpoint of each stays. '-x': lowest."""
    # Orbax wants it absolute.
    self.directory = epath.Path(workdir).resolve() / 'checkpoints'
    self.directory.mkdir(parents=True, exist_ok=True)
    keep = [policies.LatestN(config.keep_last)]
    if config.keep_every:
      keep.append(policies.EveryNSteps(config.keep_every))
    keep += [
      policies.BestN(
        get_metric_fn=functools.partial(_score, name),
        n=1,
        keep_checkpoints_without_metrics=False,
      )
      for name in best
    ]
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(keep),
        # Saves the scores too: a restart still knows the best.
        best_fn=functools.partial(_score, best[0]) if best else None,
        enable_async_checkpointing=config.asynchronous,
        cleanup_tmp_directories=True,
      ),
      item_names=('params', 'rest', 'run'),
    )
    self._unlisted: list[int] = []

  def save(self, step: int, state, run: dict, metrics: dict | None = None):
    """Starts writing; training may go on (and donate `state`) at once.

    Raises:
      ValueError: the disk is full; what was saved before is untouched.
    """
    self._finish()
    hosts.agreed(lambda: _check_room(self.directory, state))
    params, rest = _split(state)
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(params),
      rest=ocp.args.StandardSave(rest),
      run=ocp.args.JsonSave(run),
    )
    with _told_if_full(self.directory):
      self._manager.save(step, args=args, metrics=metrics, force=True)
    self._unlisted.append(step)

  def _finish(self):
    """Waits for what is being written, then lists its files."""
    with _told_if_full(self.directory):
      self._manager.wait_until_finished()
    for step in self._unlisted:
      if hosts.first() and (self.directory / str(step)).exists():
        _list(self.directory / str(step))
    self._unlisted.clear()

  def close(self):
    self._finish()
    self._manager.close()

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
    steps = lambda: sorted(self._manager.all_steps(), reverse=True)
    for step in hosts.agreed(steps):
      directory = self.directory / str(step)
      wrong[step] = hosts.agreed(functools.partial(damage, directory))
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
        self._set_aside(damaged)
      state = abstract.replace(params=found['params'], **found['rest'])
      return state, found['run']
    if wrong:
      listed = '\n  '.join(f'{step}: {what}' for step, what in wrong.items())
      raise ValueError(
        f'No checkpoint in {self.directory} can be used:\n  {listed}\nMove the'
        ' directory away to start over.'
      )
    return None

  def _set_aside(self, step: int):
    """Keeps a damaged checkpoint out of the way of its successor."""
    aside = self.directory.parent / 'damaged'

    def move():
      aside.mkdir(exist_ok=True)
      number = len(list(aside.iterdir()))
      files.move_tree(self.directory / str(step), aside / f'{step}-{number}')

    hosts.agreed(move)
    self._manager.reload()


def _score(name: str, metrics: dict) -> float:
  sign = -1 if name.startswith('-') else 1
  return sign * metrics.get(name.removeprefix('-'), -sign * math.inf)


def _split(state) -> tuple[dict, dict]:
  rest = {
    f.name: getattr(state, f.name)
    for f in dataclasses.fields(state)
    if f.name != 'params'
  }
  return state.params, rest


_METADATA = 16 << 20  # Bytes; ample.


def _check_room(directory, state):
  """Orbax would find out half way, and say so in pages of traces."""
  if files.is_remote(directory):
    return
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


def _sizes(directory: epath.Path) -> dict[str, int]:
  found = {}
  for path in directory.iterdir():
    if path.is_dir():
      nested = _sizes(path).items()
      found.update({f'{path.name}/{name}': size for name, size in nested})
    else:
      found[path.name] = path.stat().length
  return found


def _list(directory: epath.Path) -> None:
  listing = files.as_json(_sizes(directory)).encode()
  files.write_whole(directory / _LISTING, listing)


def damage(directory: epath.Path) -> str:
  """What is wrong with the files of a checkpoint; '' if nothing is."""
  listing = directory / _LISTING
  if not listing.exists():
    return ''  # Killed between writing and listing; reading will tell.
  sizes = _sizes(directory)
  for name, size in json.loads(listing.read_text()).items():
    if name not in sizes:
      return f'its file {name} is missing'
    if sizes[name] != size:
      return f'its file {name} has {sizes[name]} bytes instead of {size}'
  return ''


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

  Raises:
    ValueError: there is none, or the one meant is damaged.
  """
  path = epath.Path(path).expanduser().resolve()  # Orbax wants it absolute.
  if any((path / item).exists() for item in ('params', 'run')):
    if wrong := damage(path):
      raise ValueError(f'The checkpoint {path} is damaged: {wrong}.')
    return path
  for directory in (path / 'checkpoints', path):
    for step in _steps(directory):
      if not damage(directory / str(step)):
        return directory / str(step)
  raise ValueError(
    f'No checkpoint in {path}: give a workdir of `st-moe train`, or one of its'
    ' checkpoints/STEP.'
  )


def all_steps(path) -> list[epath.Path]:
  """Every intact checkpoint of a workdir, oldest first.

  Raises:
    ValueError: there is none.
  """
  directory = epath.Path(path).expanduser().resolve() / 'checkpoints'
  found = [directory / f'{step}' for step in reversed(_steps(directory))]
  found = [each for each in found if not damage(each)]
  if not found:
    raise ValueError(f'No checkpoint in {path}: give a workdir.')
  return found


def last_step(workdir) -> int:
  """The step of the newest intact checkpoint of a run; 0 before the first."""
  directory = epath.Path(workdir) / 'checkpoints'
  intact = (s for s in _steps(directory) if not damage(directory / str(s)))
  return next(intact, 0)


def _steps(directory: epath.Path) -> list[int]:
  """Steps of the finished checkpoints in a directory, newest first."""
  if not directory.exists():
    return []
  names = (path.name for path in directory.iterdir())
  return sorted((int(n) for n in names if n.isdigit()), reverse=True)


def read_run(path) -> dict:
  """What the checkpoint at `path` says about its run."""
  return _read(path, {})['run']


def load_params(path, abstract) -> dict:
  """The parameters of the checkpoint at `path`, in the layout of `abstract`."""
  return _read(path, {'params': abstract})['params']


def load_rest(path, abstract) -> dict:
  """What the checkpoint at `path` has besides parameters, as in `abstract`.

  Raises:
    ValueError: it was made to start from, and has nothing else.
  """
  if not hosts.agreed(lambda: (find(path) / 'rest').exists()):
    raise ValueError(
      f"{path} has parameters alone, no optimizer: set init_slots='reset'."
    )
  return _read(path, {'rest': _split(abstract)[1]})['rest']


def _read(path, wanted: dict) -> dict:
  directory = epath.Path(hosts.agreed(lambda: str(find(path))))
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
  directory = epath.Path(directory).expanduser().resolve()
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f'{directory} is not empty; name a new directory.')
  directory.parent.mkdir(parents=True, exist_ok=True)
  _check_room(directory.parent, params)
  # By default up to 96 GB are copied before they are written.
  handler = ocp.CompositeCheckpointHandler(
    params=ocp.StandardCheckpointHandler(save_concurrent_gb=1),
    run=ocp.JsonCheckpointHandler(),
  )
  args = ocp.args.Composite(
    params=ocp.args.StandardSave(params), run=ocp.args.JsonSave(run)
  )
  # Orbax writes elsewhere and renames: half a checkpoint is none.
  with _told_if_full(directory), ocp.Checkpointer(handler) as writer:
    writer.save(directory, args, force=True)
    if hosts.first():
      _list(directory)
