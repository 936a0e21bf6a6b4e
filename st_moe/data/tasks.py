"""Our seqio tasks and mixtures. Registrations only.

Importing this module registers them with T5's vocabulary, as T5X users expect
of a `mixture_or_task_module`; `register` does it again with another vocabulary
or other files. Either way nothing is read before a task is used.
"""

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from st_moe.data import metrics, superglue, tiny_world

# TensorFlow only feeds: left alone it takes all memory of the accelerators.
try:
  for _device in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], _device)
except RuntimeError:  # Somebody used TensorFlow before us and settled it.
  pass

T5_VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'

_CB_F1 = metrics.mean_multiclass_f1(superglue.FORMATS['cb'].labels)

# Task -> its format and its metrics.
TASKS = {
  'tiny_boolq': ('boolq', (metrics.accuracy,)),
  'tiny_cb': ('cb', (_CB_F1, metrics.accuracy)),
  'tiny_copa': ('copa', (metrics.accuracy,)),
}

# Task -> every answer it knows: what rank classification chooses from.
LABELS = {
  name: superglue.FORMATS[format].labels for name, (format, _) in TASKS.items()
}

# Name -> rates. COPA is the last of the three to be learnt.
MIXTURES = {'tiny_glue': {'tiny_boolq': 1.0, 'tiny_cb': 1.0, 'tiny_copa': 2.0}}


def register(vocabulary: seqio.Vocabulary, data_dir: str = '') -> None:
  """Registers all tasks with `vocabulary`, in place of any before.

  `data_dir` holds files as `tiny_world.write` lays them; '' generates the same
  rows in memory.
  """
  features = {
    name: seqio.Feature(vocabulary=vocabulary, add_eos=True)
    for name in ('inputs', 'targets')
  }
  for name, (format, metric_fns) in TASKS.items():
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
        functools.partial(_dataset, format=format, data_dir=data_dir),
        splits=('train', 'validation'),
        # Of files it is not known before they are read.
        num_input_examples=None if data_dir else tiny_world.SIZES,
      ),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features=features,
      metric_fns=list(metric_fns),
    )
  for name, rates in MIXTURES.items():
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, list(rates.items()))


def _dataset(
  split: str,
  shuffle_files: bool = False,
  seed: int | None = None,
  *,
  format: str,
  data_dir: str,
) -> tf.data.Dataset:
  """The examples of a split, always in one order: there is one file."""
  del shuffle_files, seed
  # Read here and not in the generator, where TensorFlow would bury the error.
  if data_dir:
    text_format = superglue.FORMATS[format]
    path = superglue.file_of(text_format, split, data_dir)
    examples = list(superglue.read_examples(text_format, path))
  else:
    examples = _generated(format, split)
  return tf.data.Dataset.from_generator(
    lambda: iter(examples),
    output_signature={
      'inputs': tf.TensorSpec((), tf.string),
      'targets': tf.TensorSpec((), tf.string),
      'idx': tf.TensorSpec((), tf.int32),
    },
  )


@functools.cache
def _generated(format: str, split: str) -> Sequence[dict]:
  text_format = superglue.FORMATS[format]
  rows = tiny_world.generate(format, split)
  return [superglue.to_text(text_format, row) for row in rows]


register(seqio.SentencePieceVocabulary(T5_VOCABULARY))
