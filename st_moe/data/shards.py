"""Tokenised data on disk, read back by index.

One split of one source is a directory `<name>-<split>-<key>` of ArrayRecord
parts. The key is a hash of the recipe: everything that the records depend on.
What the parts are is settled before work starts, by the inputs alone, so the
records do not depend on the number of workers; a part appears whole or not at
all, with a note beside it, so a run that was killed goes on where it was, and
two runs at once write the same bytes twice. `info.json` comes last.

What is in a record only `text_shards` and `task_shards` know.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from st_moe import backend
from st_moe.data import files

# Part of every key: raise it when the meaning of a record changes.
FORMAT_VERSION = 2

# Called with (name of the split, parts done, parts in all).
Progress = Callable[[str, int, int], None]
# Yields records and adds to its counts as it goes: 'documents', 'tokens' and
# 'cut_...' are added up over parts, of 'longest_...' the largest stays.
Job = Callable[[collections.Counter], Iterator[bytes]]


class Shards:
  """The records of one split as a sequence of bytes; safe to pickle."""

  def __init__(self, directory: epath.PathLike):
    directory = epath.Path(directory)
    about = directory / 'info.json'
    try:
      self.info = files.read_json(about)
      parts = [part for part in self.info['parts'] if part['records']]
      for part in parts:
        _check_part(part)
    except FileNotFoundError:
      raise ValueError(
        f'{directory} holds no finished data; run `st-moe prepare` again.'
      ) from None
    except (ValueError, KeyError, TypeError) as e:
      raise _damaged(about, str(e)) from None
    if files.is_remote(directory):
      directory = _download(directory, parts)
    self.directory = os.fspath(directory)
    self._files = [os.path.join(directory, part['file']) for part in parts]
    self._ends = list(itertools.accumulate(part['records'] for part in parts))
    for file, part in zip(self._files, parts, strict=True):
      size = os.path.getsize(file) if os.path.exists(file) else 0
      if size != part['bytes']:
        raise _damaged(file, f'{size} of {part["bytes"]} bytes')

  @functools.cached_property
  def digest(self) -> str:
    """Of the records, wherever they and their sources lie; '' if unknown."""
    parts = [part.get('digest') for part in self.info['parts']]
    if None in parts:  # Older code wrote none.
      return ''
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()

  @property
  def summary(self) -> dict[str, int]:
    """How much there is of what it was made of."""
    keys = 'documents', 'tokens', 'records'
    return {key: self.info[key] for key in keys}

  @property
  def cut(self) -> dict[str, str]:
    """A line for inputs and for targets, where some of them are cut."""
    recipe, lines = self.info['recipe'], {}
    for key, length in recipe.get('lengths', {}).items():
      if count := self.info[f'cut_{key}']:
        lines[key] = (
          f'{recipe["name"]} {recipe["split"]}: {count:,} of'
          f' {self.info["records"]:,} {key}'
          f' ({count / self.info["records"]:.1%}) are longer than'
          f' data.{key}_length={length} and cut at their end; the longest has'
          f' {self.info[f"longest_{key}"]} tokens.'
        )
    return lines

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> bytes:
    error = None
    try:
      record = self._source[index]
      if record:
        return record
    except (RuntimeError, IndexError, ValueError) as e:
      error = e
    if not 0 <= index < len(self):
      raise IndexError(f'{index} is not among {len(self)} records.')
    # Of a file that is cut off under its hands, ArrayRecord reads ''.
    file = self._files[bisect.bisect_right(self._ends, index)]
    raise _damaged(file, str(error or 'an empty record')) from error

  @functools.cached_property
  def _source(self):
    from array_record.python import array_record_data_source

    return array_record_data_source.ArrayRecordDataSource(
      # With the number of records given, no file is opened before it is read.
      [
        f'{file}[0:{end - start}]'
        for file, (start, end) in zip(
          self._files, itertools.pairwise([0, *self._ends]), strict=True
        )
      ]
    )


def cache_root(cache_dir: str) -> epath.Path:
  if not cache_dir:
    return epath.Path(backend.cache_dir())
  root = epath.Path(cache_dir).expanduser()
  if os.fspath(root).startswith('~'):
    raise ValueError(
      f'data.cache_dir {cache_dir}: nobody knows the home directory that ~'
      ' stands for; write the whole path.'
    )
  return root


def write(
  recipe: Mapping,
  jobs: Sequence[Job],
  *,
  cache_dir: str = '',
  workers: int = 1,
  progress: Progress | None = None,
  anew: bool = False,
) -> Shards:
  """Runs the jobs whose parts are not there yet, then writes `info.json`.

  The recipe names `name` and `split` and whatever else the records depend on;
  `anew`: it does not, so what is there is not used. With more workers than one
  the jobs must be picklable.
  """
  recipe = {**recipe, 'format': FORMAT_VERSION}
  recipe = json.loads(files.as_json(recipe))  # As it will be read back.
  label = f'{recipe["name"]}-{recipe["split"]}'
  digest = hashlib.sha256(files.as_json(recipe, sort_keys=True).encode())
  folder = re.sub(r'[^\w.-]', '_', label) + f'-{digest.hexdigest()[:12]}'
  directory = cache_root(cache_dir) / folder
  done = False if anew else _finished(directory, recipe)
  if done:
    return Shards(directory)

  stem = lambda i: f'part-{i:05d}-of-{len(jobs):05d}'
  paths = [directory / f'{stem(i)}.array_record' for i in range(len(jobs))]
  parts = {path: _note(path) for path in paths} if done is None else {}
  todo = [(p, j) for p, j in zip(paths, jobs, strict=True) if not parts.get(p)]
  progress = progress or (lambda *_: None)
  progress(label, len(jobs) - len(todo), len(jobs))
  for count, (path, note) in enumerate(_run(todo, workers), 1):
    parts[path] = note
    progress(label, len(jobs) - len(todo) + count, len(jobs))

  total = collections.Counter({'records': 0, 'documents': 0, 'tokens': 0})
  for note in parts.values():
    for key, value in note.items():
      if key.startswith('longest_'):
        total[key] = max(total[key], value)
      elif key in total or key.startswith('cut_'):
        total[key] += value
  if not total['records']:
    raise ValueError(
      f'{label} gives no training example: {total["documents"]} documents with'
      f' {total["tokens"]} tokens are too little.'
    )
  info = {'recipe': recipe, **total, 'parts': [parts[path] for path in paths]}
  files.write_whole(
    directory / 'info.json', files.as_json(info, indent=1).encode()
  )
  _sweep(directory)
  return Shards(directory)


def _finished(directory: epath.Path, recipe: Mapping) -> bool | None:
  """True: all there; None: something is missing; False: not what was asked."""
  try:
    info = files.read_json(directory / 'info.json')
    if info['recipe'] != recipe:
      raise KeyError
    for part in info['parts']:
      _check_part(part)
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError):
    logging.warning('%s is stale and is written anew.', directory)
    return False
  if files.is_remote(directory):
    return True  # `info.json` came last; asking for each part takes minutes.
  return (
    True if all(_note(directory / p['file']) for p in info['parts']) else None
  )


def _run(todo, workers: int):
  """(path, note) of each part as it is finished."""
  if workers <= 1 or len(todo) <= 1:
    yield from ((path, _write_part(path, job)) for path, job in todo)
    return
  # Not forked: a process with JAX or TensorFlow in it has threads.
  context = multiprocessing.get_context('spawn')
  size = min(workers, len(todo))
  with (
    _safe_path(),
    concurrent.futures.ProcessPoolExecutor(
      size,
      context,
      # Ctrl-C is heard by the whole terminal; who asked for the work ends it.
      initializer=signal.signal,
      initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool,
  ):
    futures = {pool.submit(_write_part, path, job): path for path, job in todo}
    try:
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    except (KeyboardInterrupt, SystemExit):
      for worker in multiprocessing.active_children():
        worker.kill()  # Parts appear whole; nobody waits for half of one.
      raise
    except concurrent.futures.BrokenExecutor:
      raise ValueError(
        f'One of {size} workers died. If memory ran out, try again with fewer'
        ' data.workers (finished parts are kept); if this is a script of your'
        " own, put its work under `if __name__ == '__main__':`."
      ) from None
    finally:
      pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _safe_path():
  """For workers, which begin as `python -c`.

  That would look for modules in the current folder first, and find what came
  with a checkpoint.
  """
  name = 'PYTHONSAFEPATH'
  before = os.environ.get(name)
  os.environ[name] = before or '1'
  try:
    yield
  finally:
    if not before:
      del os.environ[name]


def _write_part(path: epath.Path, job: Job) -> dict:
  """Writes one part, then the note that says so."""
  from array_record.python import array_record_module

  counts, digest = collections.Counter(), hashlib.sha256()
  with files.appearing(path) as temp:
    writer = array_record_module.ArrayRecordWriter(
      os.fspath(temp), 'group_size:1'
    )
    try:
      for record in job(counts):
        writer.write(record)
        digest.update(hashlib.sha256(record).digest())
        counts['records'] += 1
    finally:
      writer.close()
    counts['bytes'] = os.path.getsize(temp)
  note = {'file': path.name, 'digest': digest.hexdigest(), **counts}
  note['records'] = counts['records']
  files.write_whole(path.with_suffix('.json'), files.as_json(note).encode())
  return note


def _note(path: epath.Path) -> dict | None:
  """What is known of a part; None if it is missing or not as it was written."""
  try:
    note = files.read_json(path.with_suffix('.json'))
    _check_part(note)
    right = note['file'] == path.name
    return note if right and files.size(path) == note['bytes'] else None
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None


def _check_part(note: Mapping) -> None:
  """Raises where a note is not as `_write_part` writes it."""
  counts = note['records'], note['bytes']
  if not all(type(n) is int and n >= 0 for n in counts):
    raise ValueError(f'{counts} records and bytes')
  if pathlib.PurePath(note['file']).name != note['file']:
    raise ValueError(f'a part at {note["file"]!r}')


def _download(directory: epath.Path, parts: Sequence[Mapping]) -> epath.Path:
  """Copies the parts of a remote directory that are not here yet."""
  local = cache_root('') / directory.name
  for part in parts:
    path = local / part['file']
    if not path.exists() or files.size(path) != part['bytes']:
      with files.appearing(path) as temp:
        files.copy(directory / part['file'], temp)
  return local


def _sweep(directory: epath.Path) -> None:
  """Removes what killed runs left a day ago or earlier."""
  if not files.is_remote(directory):
    for temp in pathlib.Path(directory).glob('.*.tmp'):
      # One of another run may become its part at this very moment.
      with contextlib.suppress(FileNotFoundError):
        if time.time() - temp.stat().st_mtime > 86_400:
          temp.unlink()


def _damaged(file: epath.PathLike, what: str) -> ValueError:
  return ValueError(
    f'{file} is damaged or cut off ({what}); delete it and start again, and it'
    ' is written anew.'
  )
