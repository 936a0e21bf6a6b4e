"""T5's span corruption: text in, text with holes and the holes' content out.

Tokens `a b c d e f g h` with the spans `c d` and `h` taken out become

  inputs   a b <0> e f g <1> </s>
  targets  <0> c d <1> h </s>

where <k> is sentinel k, counted downwards from the last id of the vocabulary
(arXiv:1910.10683, section 3.1.4). All numpy, one example a call.
"""

import numpy as np


def span_counts(
  length: int, *, density: float, mean_span: float
) -> tuple[int, int]:
  """(noise tokens, noise spans) in `length` tokens.

  At least one of each, and no more spans than there are clean tokens to keep
  them apart.
  """
  if not 0 < density < 1 or mean_span < 1:
    raise ValueError(
      f'Noise density {density} must lie between 0 and 1 and mean span'
      f' {mean_span} must be at least 1.'
    )
  if length < 2:
    raise ValueError(f'{length} token cannot be split into clean and noise.')
  noise = min(max(round(length * density), 1), length - 1)
  spans = max(round(noise / mean_span), 1)
  return noise, min(spans, length - noise)


def chunk_lengths(
  inputs_length: int, *, density: float, mean_span: float
) -> tuple[int, int]:
  """(raw tokens, targets length) of the chunks that fill the inputs.

  The most tokens that corruption shrinks to `inputs_length` at most, and room
  for their targets; both lengths count the EOS. 512 -> (568, 114), as in T5's
  `random_spans_helper`; of half noise one token less, as there, where targets
  would be longer than the inputs: 512 -> (766, 512).
  """

  def lengths(tokens):
    noise, spans = span_counts(tokens, density=density, mean_span=mean_span)
    return tokens - noise + spans + 1, noise + spans + 1

  if inputs_length < lengths(2)[0]:
    raise ValueError(
      f'data.inputs_length {inputs_length} is too short for span corruption,'
      f' which needs {lengths(2)[0]}.'
    )
  tokens = 2
  while lengths(tokens + 1)[0] <= inputs_length:
    tokens += 1
  needed = lengths(tokens)[1]
  longer = density == 0.5 and needed > inputs_length
  return tokens - longer, needed - longer


def noise_mask(
  length: int, rng: np.random.Generator, *, density: float, mean_span: float
) -> np.ndarray:
  """True on noise: as many noise spans as clean ones, a clean one first.

  The lengths of the spans are a random composition, each kind for itself, all
  compositions alike likely.
  """
  noise, spans = span_counts(length, density=density, mean_span=mean_span)
  edges = np.empty(2 * spans, np.int64)
  edges[0::2] = _composition(length - noise, spans, rng)
  edges[1::2] = _composition(noise, spans, rng)
  return np.repeat(np.arange(2 * spans) % 2 == 1, edges)


def corrupt(
  tokens: np.ndarray,
  rng: np.random.Generator,
  *,
  density: float,
  mean_span: float,
  first_sentinel: int,
  num_sentinels: int = 100,
  eos: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """(inputs, targets) of raw `tokens`, both with the EOS at the end.

  Sentinel k is `first_sentinel` - k.
  """
  tokens = np.asarray(tokens, np.int32)
  check_sentinels(
    len(tokens),
    density=density,
    mean_span=mean_span,
    num_sentinels=num_sentinels,
  )
  noise = noise_mask(len(tokens), rng, density=density, mean_span=mean_span)
  starts = noise.copy()
  starts[1:] &= ~noise[:-1]
  sentinels = first_sentinel - np.arange(starts.sum(), dtype=np.int32)

  inputs = tokens.copy()
  inputs[starts] = sentinels
  inputs = inputs[starts | ~noise]
  # Where each span begins among the noise tokens, there its sentinel goes.
  targets = np.insert(tokens[noise], np.flatnonzero(starts[noise]), sentinels)
  return np.append(inputs, np.int32(eos)), np.append(targets, np.int32(eos))


def check_sentinels(
  length: int, *, density: float, mean_span: float, num_sentinels: int = 100
) -> None:
  """Raises if `length` tokens make more spans than there are sentinels."""
  _, spans = span_counts(length, density=density, mean_span=mean_span)
  if spans > num_sentinels:
    raise ValueError(
      f'{length} tokens at noise density {density} and mean span {mean_span}'
      f' make {spans} spans, but there are {num_sentinels} sentinels; raise'
      ' data.mean_span or shorten data.inputs_length.'
    )


def _composition(
  total: int, parts: int, rng: np.random.Generator
) -> np.ndarray:
  """`parts` positive numbers that add up to `total`."""
  ends = np.zeros(parts + 1, np.int64)
  ends[1:-1] = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
  ends[-1] = total
  return ends[1:] - ends[:-1]
