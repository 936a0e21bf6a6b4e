"""Whether the routers of a model are well, a layer at a time."""

import dataclasses

import numpy as np

from st_moe.analysis import specialization
from st_moe.analysis.trace import Layer, Trace


@dataclasses.dataclass(frozen=True)
class Health:
  """One sparse layer over all tokens of a trace."""

  layer: Layer
  tokens: int
  entropy: float  # Mean of a token's probabilities, nats; ln e: no preference.
  confidence: float  # Mean probability of the likeliest expert.
  log_z: float  # Mean of logsumexp(logits): what the z-loss keeps small.
  largest_logit: float  # In size. bfloat16 rounds 256 to a whole number.
  dropped: float  # Share of the seats asked for that were not to be had.
  busiest: float  # The largest load over an even one.
  dead: tuple[int, ...]  # Experts that no token came to.


def health(trace: Trace) -> list[Health]:
  """Of every sparse layer that the trace has tokens of.

  Raises:
    ValueError: the trace has no probabilities and logits.
  """
  if trace.probs is None or trace.logits is None:
    raise ValueError(
      'This trace has no probabilities: make it by inspect(..., scores=True).'
    )
  loads, found = specialization.load(trace), []
  for number in np.unique(trace.layer):
    here, layer = trace.rows(trace.layer == number), trace.layers[number]
    load = loads[number, : layer.experts]
    asked = max((here.expert >= 0).sum(), 1)
    probs = here.probs[:, : layer.experts]
    logits = here.logits[:, : layer.experts]
    found.append(
      Health(
        layer=layer,
        tokens=len(here),
        entropy=float(specialization.entropy(probs).mean()),
        confidence=float(probs.max(-1).mean()),
        log_z=float(np.logaddexp.reduce(logits, axis=-1).mean()),
        largest_logit=float(np.abs(logits[np.isfinite(logits)]).max(initial=0)),
        dropped=1 - load.sum() / asked,
        busiest=float(load.max() * layer.experts / max(load.sum(), 1)),
        dead=tuple(np.flatnonzero(load == 0).tolist()),
      )
    )
  return found
