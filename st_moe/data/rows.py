"""Records of shards -> rows of a batch.

A batch has, for batch size B and lengths Li, Lt:

  encoder_input_tokens   int32 [B, Li]   0 pads
  decoder_input_tokens   int32 [B, Lt]   targets shifted right, a 0 in front
  decoder_target_tokens  int32 [B, Lt]
  decoder_loss_weights   float32 [B, Lt] 1 on targets, 0 on padding
  task                   int32 [B]       place of its source in `sources`
"""

import functools
import json
from collections.abc import Sequence

import numpy as np

from st_moe.data import span_corruption, text_shards
from st_moe.data.mixture import Library

Batch = dict[str, np.ndarray]


class Convert:
  """A record and an rng -> one row of a batch."""

  def __init__(self, library: Library, is_text: bool, task: int):
    config, vocabulary = library.config, library.vocabulary
    self._lengths = config.inputs_length, config.targets_length
    self._corrupt = is_text and functools.partial(
      span_corruption.corrupt,
      density=config.noise_density,
      mean_span=config.mean_span,
      first_sentinel=vocabulary.sentinel(0),
      num_sentinels=len(vocabulary.sentinels),
      eos=vocabulary.eos,
    )
    self._eos, self._task = vocabulary.eos, task

  def __call__(self, record: bytes, rng: np.random.Generator) -> Batch:
    if self._corrupt:
      inputs, targets = self._corrupt(text_shards.tokens_of(record), rng)
    else:
      row = json.loads(record)
      inputs, targets = row['inputs'], row['targets']
    inputs = fit(inputs, self._lengths[0], self._eos)
    used = min(len(targets), self._lengths[1])
    targets = fit(targets, self._lengths[1], self._eos)
    shifted = np.zeros_like(targets)
    shifted[1:] = targets[:-1]
    return {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': shifted,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (np.arange(len(targets)) < used).astype('f4'),
      'task': np.int32(self._task),
    }


def fit(ids: Sequence[int], length: int, eos: int) -> np.ndarray:
  """`ids` padded, or cut with the last place left to an EOS."""
  fitted = np.zeros(length, np.int32)
  fitted[: len(ids)] = ids[:length]
  if len(ids) > length and ids[-1] == eos:
    fitted[-1] = eos
  return fitted


def stack(examples: Sequence[Batch]) -> Batch:
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}
