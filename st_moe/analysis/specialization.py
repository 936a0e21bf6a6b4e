"""What each expert is for, as its tokens tell (arXiv:2202.08906, section 7)."""

import dataclasses

import numpy as np

from st_moe.analysis.trace import Trace


def load(trace: Trace) -> np.ndarray:
  """Tokens seated at every expert, int64 [layers, e].

  0 past the experts of a layer that has fewer than others.
  """
  most = max(layer.experts for layer in trace.layers)
  layer = np.broadcast_to(trace.layer[:, None], trace.expert.shape)[trace.kept]
  at = layer.astype(np.int64) * most + trace.expert[trace.kept]
  found = np.bincount(at, minlength=len(trace.layers) * most)
  return found.reshape(len(trace.layers), most)


def entropy(counts: np.ndarray) -> np.ndarray:
  """Of shares in proportion to `counts` [..., e], in nats [...].

  0 where one takes all, ln e where all have the same; NaN of nothing. Of the
  load of sentinels alone it is Table 14 of arXiv:2202.08906.
  """
  counts = np.asarray(counts, np.float64)
  with np.errstate(invalid='ignore'):
    shares = counts / counts.sum(-1, keepdims=True)
  return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)


@dataclasses.dataclass(frozen=True)
class Top:
  """What an expert has to do with a token."""

  token: int
  count: int  # Times that it was seated there.
  share: float  # Of the expert's seats.
  lift: float  # P(token | expert) / P(token): 1 is chance.


def top_tokens(
  trace: Trace, layer: str, *, count: int = 5, least: int = 2
) -> list[list[Top]]:
  """Of each expert of a layer the tokens that tell it from the others.

  First those that add most to the divergence of its tokens from those of the
  layer, share * ln(lift): a frequent token counts for more than a rare one with
  the same lift. Those at chance or below are left out.

  Args:
    layer: as 'encoder.3'.
    least: how often a token must be seated at the expert to be named.

  Raises:
    ValueError: there is no such layer, or it is a stack.
  """
  found = trace.at(layer)
  named = {str(each): each for each in trace.layers}
  if layer not in named:
    raise ValueError(f'{layer} is a whole stack: name one layer of it.')
  experts = named[layer].experts
  token = np.broadcast_to(found.token[:, None], found.expert.shape)[found.kept]
  ids, column = np.unique(token, return_inverse=True)
  counts = np.zeros((experts, len(ids)), np.int64)
  np.add.at(counts, (found.expert[found.kept], column), 1)
  expected = counts.sum(0) / max(counts.sum(), 1)  # P(token)
  tops = []
  for of_expert in counts:
    share = of_expert / max(of_expert.sum(), 1)
    lift = share / expected
    telling = share * np.log(np.maximum(lift, 1))
    # Of equals the smaller id.
    best = [
      n
      for n in np.argsort(-telling, kind='stable')[:count]
      if lift[n] > 1 and of_expert[n] >= least
    ]
    tops.append(
      [
        Top(int(ids[n]), int(of_expert[n]), float(share[n]), float(lift[n]))
        for n in best
      ]
    )
  return tops
