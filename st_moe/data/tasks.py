"""Our tasks and mixtures as SeqIO's. Registrations only.

Importing this module registers them with T5's vocabulary, as T5X users expect
of a `mixture_or_task_module`; `register` does it again with another vocabulary
or other files. Either way nothing is read before a task is used. What they are
made of is in `catalogue.py`, which needs no SeqIO.
"""

import functools
import json
from collections.abc import Iterator

import numpy as np

try:
  import seqio
  import tensorflow as tf
except ImportError as error:
  raise ImportError(
    f'st_moe.data.tasks registers tasks with SeqIO ({error}): pip install'
    " 'st_moe[seqio]'. The tasks themselves are in st_moe.data.catalogue."
  ) from None

from st_moe.data.catalogue import (
  MIXTURES,
  TASKS,
  WITH_SENTINEL,
)
from st_moe.data.mixture import Library
from st_moe.data.rows import Convert
from st_moe.data.task import SENTINEL, TextTask

# TensorFlow only feeds: left alone it takes all memory of the accelerators.
try:
  for _device in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], _device)
except RuntimeError:  # Somebody used TensorFlow before us and settled it.
  pass

T5_VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'


def register(vocabulary: seqio.Vocabulary, data_dir: str = '') -> None:
  """Registers all tasks with `vocabulary`, in place of any before.

  Args:
    data_dir: holds their files; '' is $ST_MOE_DATA.
  """
  for name, task in TASKS.items():
    seqio.TaskRegistry.remove(name)
    _add(name, task, vocabulary, data_dir)
  for name in WITH_SENTINEL:
    seqio.TaskRegistry.remove(name + SENTINEL)
    seqio.experimental.add_task_with_sentinels(name, num_sentinels=1)
  for name, rates in MIXTURES.items():
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, list(rates.items()))


def _add(name, task, vocabulary, data_dir):
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      functools.partial(dataset, task=task, data_dir=data_dir),
      splits=task.splits,
      # Of files it is not known before they are read.
      num_input_examples=task.sizes,
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={
      key: seqio.Feature(vocabulary=vocabulary, add_eos=True)
      for key in ('inputs', 'targets')
    },
    postprocess_fn=task.comparable(),
    metric_fns=list(task.metrics),
  )


def dataset(
  split: str,
  shuffle_files: bool = False,
  seed: int | None = None,
  *,
  task: TextTask,
  data_dir: str,
) -> tf.data.Dataset:
  """The examples of a split, always in one order: there is one file."""
  del shuffle_files, seed
  # Read here and not in the generator, where TensorFlow would bury the error.
  examples = task.load(split, data_dir)
  fields = dict.fromkeys(key for example in examples for key in example)
  specs = {key: _spec(key, examples) for key in fields}
  signature = {
    key if spec else key + AS_JSON: spec or tf.TensorSpec((), tf.string)
    for key, spec in specs.items()
  }

  def held(example):
    for key, spec in specs.items():
      if spec:
        yield key, example[key]
      else:
        yield key + AS_JSON, json.dumps(example[key]) if key in example else ''

  return tf.data.Dataset.from_generator(
    lambda: map(dict, map(held, examples)), output_signature=signature
  )


# Ends the name of a field that TensorFlow cannot hold as it is, because some
# examples lack it or have another kind of value: JSON, '' where there is none.
AS_JSON = ':json'
_KINDS = {bool: tf.bool, int: tf.int64, float: tf.float64, str: tf.string}


def _spec(key: str, examples) -> tf.TensorSpec | None:
  """How TensorFlow holds a field: values of one kind, or lists of such."""
  values = [example.get(key) for example in examples]
  lists = all(isinstance(value, list | tuple) for value in values)
  items = [item for value in values for item in value] if lists else values
  kinds = set(map(type, items)) or {str}
  if len(kinds) > 1 or not kinds <= _KINDS.keys():
    return None
  (kind,) = kinds
  if kind is int and not all(-(2**63) <= item < 2**63 for item in items):
    return None
  return tf.TensorSpec((None,) if lists else (), _KINDS[kind])


def register_text(library: Library, name: str) -> None:
  """Registers a text source as a task of span corruption, in place of any.

  Which spans are taken out depends on the seed and the place of a chunk; they
  are the same in each epoch, as they are not in a run of ours.
  """
  vocabulary = library.vocabulary.to_seqio()
  feature = seqio.Feature(vocabulary=vocabulary, add_eos=True)
  seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      functools.partial(corrupted, library=library, name=name),
      splits=library.splits(name),
    ),
    preprocessors=[],
    output_features={'inputs': feature, 'targets': feature},
  )


def corrupted(
  split: str,
  shuffle_files: bool = False,
  seed: int | None = None,
  *,
  library: Library,
  name: str,
) -> tf.data.Dataset:
  """The chunks of a text source as token ids, spans taken out."""
  del shuffle_files, seed
  records = library.open(name, split)
  convert = Convert(library, is_text=True, task=0)
  fields = {'inputs': 'encoder_input', 'targets': 'decoder_target'}

  def examples() -> Iterator[dict]:
    for i in range(len(records)):
      rng = np.random.default_rng([library.config.seed, i])
      row = convert(records[i], rng)
      yield {
        key: np.trim_zeros(row[f'{field}_tokens'], 'b')
        for key, field in fields.items()
      }

  spec = tf.TensorSpec((None,), tf.int32)
  return tf.data.Dataset.from_generator(
    examples, output_signature=dict.fromkeys(fields, spec)
  )


register(seqio.SentencePieceVocabulary(T5_VOCABULARY))
