"""Our seqio tasks and mixtures. Registrations only.

Importing this module registers them with T5's vocabulary, as T5X users expect
of a `mixture_or_task_module`; `register` does it again with another vocabulary
or other files. Either way nothing is read before a task is used.
"""

import functools
import json
import types
from collections.abc import Mapping

import seqio
import tensorflow as tf

from st_moe.data import (
  anli,
  arc,
  closed_book,
  glue,
  squad,
  summarization,
  superglue,
  tiny_world,
  winogrande,
)
from st_moe.data.task import SENTINEL, TextTask

# TensorFlow only feeds: left alone it takes all memory of the accelerators.
try:
  for _device in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], _device)
except RuntimeError:  # Somebody used TensorFlow before us and settled it.
  pass

T5_VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'

TASKS: dict[str, TextTask] = {
  **{f'tiny_{name}': task for name, task in tiny_world.TASKS.items()},
  **{f'super_glue_{name}': task for name, task in superglue.TASKS.items()},
  **anli.TASKS,
  **arc.TASKS,
  **winogrande.TASKS,
  **squad.TASKS,
  **closed_book.TASKS,
  **summarization.TASKS,
  **glue.TASKS,
}

# Tasks that exist with a sentinel too (arXiv:2202.08906, section 4.5).
WITH_SENTINEL = tuple(f'super_glue_{name}' for name in superglue.TASKS)

# Name -> rates. Those of T5 are sizes of training sets; `size` as the rate of a
# whole mixture in a config counts anew, with a cap (arXiv:2202.08906, 6.1).
MIXTURES = {
  # COPA is the last of the three to be learnt.
  'tiny_glue': {'tiny_boolq': 1.0, 'tiny_cb': 1.0, 'tiny_copa': 2.0},
  'super_glue': {f'super_glue_{k}': r for k, r in superglue.RATES.items()},
  'super_glue_sentinel': {
    f'super_glue_{k}{SENTINEL}': r for k, r in superglue.RATES.items()
  },
  'glue': {f'glue_{k}': r for k, r in glue.RATES.items()},
}


def text_task(name: str) -> TextTask | None:
  """The task of a name, with a sentinel or without; None: not one of ours."""
  return TASKS.get(name.removesuffix(SENTINEL))


_own: list[str] = []  # Names that the last registration had of its own.


def register(
  vocabulary: seqio.Vocabulary,
  data_dir: str = '',
  own: Mapping[str, TextTask] = types.MappingProxyType({}),
) -> None:
  """Registers all tasks with `vocabulary`, in place of any before.

  Args:
    data_dir: holds their files; '' is $ST_MOE_DATA.
    own: tasks that stay until the next registration.

  Raises:
    ValueError: one of these has the name of another task.
  """
  for name in _own:
    seqio.TaskRegistry.remove(name)
  _own.clear()
  for name, task in own.items():
    if name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()):
      raise ValueError(
        f'data.pairs.{name}: there is a task of this name; take another.'
      )
    _add(name, task, vocabulary, data_dir)
    _own.append(name)
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


register(seqio.SentencePieceVocabulary(T5_VOCABULARY))
