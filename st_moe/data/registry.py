"""Tasks by name: those of ours, of the user, of SeqIO.

Ours and the user's pairs need no SeqIO. It is looked at for the names that are
left over, where it is installed.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping

from st_moe.data import catalogue, shards, task_shards
from st_moe.data.task import SENTINEL, TextTask
from st_moe.data.vocabulary import Vocabulary

HOW_TO_SEQIO = (
  'SeqIO is not installed, and with it no task of others: pip install'
  " 'st_moe[seqio]'."
)


def names() -> list[str]:
  """Every task and mixture there is: ours, and SeqIO's if it is installed."""
  theirs = _seqio().names() if has_seqio() else ()
  return sorted({*catalogue.names(), *theirs})


def has_seqio() -> bool:
  return importlib.util.find_spec('seqio') is not None


def _seqio():
  from st_moe.data import seqio_shards

  return seqio_shards


class Registry:
  """Tasks, as they read with a vocabulary of ours.

  Args:
    own: tasks of the user, beside those there are.

  Raises:
    ValueError: one of these has the name of another task.
  """

  def __init__(
    self,
    vocabulary: Vocabulary,
    data_dir: str = '',
    own: Mapping[str, TextTask] | None = None,
  ):
    self._vocabulary, self._data_dir = vocabulary, data_dir
    self._own = own or {}
    # Those of SeqIO where somebody asked for it: who did not has none there.
    theirs = _seqio().names() if sys.modules.get('seqio') and own else ()
    for name in self._own:
      if name in catalogue.names() or name in theirs:
        raise ValueError(
          f'data.pairs.{name}: there is a task of this name; take another.'
        )

  @functools.cached_property
  def _theirs(self):
    return _seqio().Tasks(self._vocabulary)

  def _text_task(self, name: str) -> TextTask | None:
    return self._own.get(name) or catalogue.text_task(name)

  def has(self, name: str) -> bool:
    if name in self._own or name in catalogue.names():
      return True
    return has_seqio() and name in _seqio().names()

  def names(self) -> list[str]:
    return sorted({*names(), *self._own})

  def tasks(self, name: str) -> dict[str, float | None]:
    """Tasks behind a name, with their rates if it is a mixture (else 1).

    None where the rate is made of a count that nobody knows yet; 0 where a task
    is only evaluated.
    """
    if self._text_task(name):
      return {name: 1.0}
    if name in catalogue.MIXTURES:
      return dict(catalogue.MIXTURES[name])
    return self._theirs.tasks(name)

  def splits(self, name: str) -> list[str]:
    task = self._text_task(name)
    return list(task.splits) if task else self._theirs.splits(name)

  def check_files(self, name: str, split: str) -> None:
    """Raises where a file of ours is missing; others' tell when they read.

    Of files that nobody has read before, the first row is looked at too.
    """
    if task := self._text_task(name):
      for path in task.paths(split, self._data_dir):
        if name in self._own and not any(task.examples_of(path, split)):
          raise ValueError(f'{path}: no rows; a task needs at least one.')

  def labels(self, name: str) -> tuple[str, ...]:
    """All answers that a task knows; () if they are not always the same."""
    task = self._text_task(name)
    return task.labels if task else ()

  def begins(self, name: str) -> list[int]:
    """The ids that every answer begins with."""
    return [self._vocabulary.sentinel(0)] if _marked(name) else []

  def metric_fns(self, name: str) -> tuple:
    """Functions (targets, predictions) -> {metric: value}, both compared as
    `comparable` makes them."""
    task = self._text_task(name)
    return task.metrics if task else self._theirs.metric_fns(name)

  def other_metric_fns(self, name: str) -> tuple[tuple, tuple]:
    """Functions (targets, scores), scores being log-probabilities of targets,
    and (targets, predictions, aux_values), with their own as 'scores'."""
    if self._text_task(name):
      return (), ()
    return self._theirs.other_metric_fns(name)

  def metric_objects(self, name: str) -> tuple[str, ...]:
    """Names of the metrics that are no functions."""
    return () if self._text_task(name) else self._theirs.metric_objects(name)

  def comparable(self, name: str) -> Callable:
    """(text, example=, is_target=) -> what the metrics of the task compare."""
    task = self._text_task(name)
    if task is None:
      return self._theirs.comparable(name)
    plain = task.comparable() or (lambda text, **_: text)
    if not _marked(name):
      return plain
    mark = self._vocabulary.decode(self.begins(name))
    return lambda text, **kwargs: plain(_without(mark, text), **kwargs)

  def write(
    self,
    name: str,
    split: str,
    *,
    inputs_length: int,
    targets_length: int,
    cache_dir: str = '',
    progress: shards.Progress | None = None,
  ) -> shards.Shards:
    """Writes the examples of a task, unless that was done before."""
    where = dict(
      inputs_length=inputs_length,
      targets_length=targets_length,
      cache_dir=cache_dir,
      progress=progress,
    )
    task = self._text_task(name)
    if task is None:
      return self._theirs.write(name, split, **where)
    return task_shards.write(
      name,
      split,
      task,
      vocabulary=self._vocabulary,
      marked=_marked(name),
      data_dir=self._data_dir,
      **where,
    )


def _marked(name: str) -> bool:
  return name.endswith(SENTINEL)


def _without(mark: str, text: str) -> str:
  return text.removeprefix(mark).strip() if text.startswith(mark) else text
