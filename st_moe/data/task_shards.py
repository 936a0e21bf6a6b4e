"""Tasks of ours as shards: JSON with the token ids of one example.

A record is {'inputs': ids, 'targets': ids, 'inputs_text': str, 'targets_text':
str, 'idx': any, 'fields': whatever else the task hands to its metrics}. It is
to the byte what SeqIO makes of the same task (`tasks.py`, `seqio_shards.py`),
without SeqIO and TensorFlow, which are large and take seconds to import.
"""

import collections
import functools
import json
from collections.abc import Iterator, Mapping

from st_moe.data import fingerprint, shards, sources
from st_moe.data.task import TextTask, tell_once
from st_moe.data.vocabulary import Vocabulary


def write(
  name: str,
  split: str,
  task: TextTask,
  *,
  vocabulary: Vocabulary,
  marked: bool = False,
  inputs_length: int,
  targets_length: int,
  data_dir: str = '',
  cache_dir: str = '',
  progress: shards.Progress | None = None,
) -> shards.Shards:
  """Writes the examples of a split, unless that was done before.

  Args:
    marked: whether a sentinel stands behind inputs and before targets.
  """
  lengths = {'inputs': inputs_length, 'targets': targets_length}
  code, unknown = _code(task)
  recipe = {
    'name': name,
    'split': split,
    'files': [sources.stamp(str(p)) for p in task.paths(split, data_dir)],
    'code': code,
    'lengths': lengths,
    'vocabulary': vocabulary.fingerprint,
  }
  if unknown:
    tell_once(
      f'{name}: whether {", ".join(unknown)} changed cannot be told, so'
      ' its examples are written anew each time.'
    )
  job = functools.partial(
    _records, task, split, lengths, vocabulary, marked, data_dir
  )
  return shards.write(
    recipe,
    [job],
    cache_dir=cache_dir,
    progress=progress,
    anew=bool(unknown),
  )


def _code(task: TextTask) -> tuple[str, list[str]]:
  """A hash of the code that makes a task's examples, and what it leaves out."""
  walk = fingerprint.Walk()
  walk.take([TextTask, task.examples, task.read, task.generate])
  walk.take([sources.read_jsonl, _records])
  return walk.digest, walk.unknown


def _records(
  task: TextTask,
  split: str,
  lengths: Mapping[str, int],
  vocabulary: Vocabulary,
  marked: bool,
  data_dir: str,
  counts: collections.Counter,
) -> Iterator[bytes]:
  mark = [vocabulary.sentinel(0)] if marked else []
  for number, example in enumerate(task.load(split, data_dir)):
    fields = dict(example)
    texts = {key: fields.pop(key) for key in ('inputs', 'targets')}
    ids = {}
    for key, text in texts.items():
      found = vocabulary.encode(text)
      found = found + mark if key == 'inputs' else mark + found
      counts[f'cut_{key}'] += len(found) >= lengths[key]
      longest = f'longest_{key}'
      counts[longest] = max(counts[longest], len(found) + 1)
      if len(found) >= lengths[key]:
        # The last one stays, where it is a mark.
        kept = lengths[key] - 1 - len(mark)
        found = found[:kept] + found[len(found) - len(mark) :]
      ids[key] = [*found, vocabulary.eos]
    counts['documents'] += 1
    counts['tokens'] += sum(map(len, ids.values()))
    record = {
      **ids,
      # What nobody reads in training need not be parsed there.
      'inputs_text': '' if split == 'train' else texts['inputs'],
      'targets_text': texts['targets'],
      'idx': number_of(fields, number),
      'fields': fields,
    }
    yield json.dumps(record).encode()


def number_of(fields: dict, number: int):
  """What `fields` call an example, taken out of them; else its `number`.

  T5 spreads some over 'idx/passage' and so on: these are left there, as a dict.
  """
  parts = {k.partition('/')[2]: v for k, v in fields.items() if k[:4] == 'idx/'}
  return parts or fields.pop('idx', fields.get('id', number))
