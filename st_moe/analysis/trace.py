"""What the routers of a model decided, token by token, as columns of numbers.

A model that is applied with the collection 'routing' mutable sows scores and
seats; `read` makes a `Trace` of them, for tables and pictures.

Axes of columns: n row (a token in a sparse layer), k choice (0 = best),
e expert.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from st_moe.config import ModelConfig, unknown
from st_moe.routing.types import Seats


class Layer(NamedTuple):
  """A sparse layer; as text what `steering` calls it: 'encoder.3'."""

  stack: str
  number: int  # As in `layers_NUMBER`.
  experts: int

  def __str__(self) -> str:
    return f'{self.stack}.{self.number}'


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
  """A row for every token in every sparse layer, padding left out.

  Rows are in the order of layers, then examples, then positions. Of tokens that
  asked fewer experts than others the last choices are -1, with weight 0.
  """

  layers: tuple[Layer, ...]
  layer: np.ndarray  # int16 [n], which of `layers`.
  example: np.ndarray  # int32 [n], from 0.
  position: np.ndarray  # int32 [n], in its example, from 0.
  # int32 [n], the id that was routed; a decoder's first is 0.
  token: np.ndarray
  expert: np.ndarray  # int16 [n, k], the experts asked, best first.
  weight: np.ndarray  # float32 [n, k], of their answers.
  kept: np.ndarray  # bool [n, k], whether they had a seat left.
  # float32 [n, e], where they were asked for; 0 and -inf past a layer's own e.
  probs: np.ndarray | None = None
  logits: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.layer)

  def rows(self, which: np.ndarray) -> 'Trace':
    """Those rows alone: a mask, or their numbers."""
    return self._with(lambda column: column[which])

  def at(self, layer: str) -> 'Trace':
    """The rows of 'encoder.3' alone; of 'encoder' those of its layers.

    Raises:
      ValueError: there is no such sparse layer.
    """
    named = [(x.stack, str(x)) for x in self.layers]
    wanted = [n for n, names in enumerate(named) if layer in names]
    if not wanted:
      known = dict.fromkeys(x.stack for x in self.layers)
      raise unknown('layer', layer, [*known, *map(str, self.layers)])
    return self.rows(np.isin(self.layer, wanted))

  def of_example(self, example: int, number: int | None = None) -> 'Trace':
    """The rows of one example, under another `number` if one is given."""
    found = self.rows(self.example == example)
    new = np.full_like(found.example, example if number is None else number)
    return dataclasses.replace(found, example=new)

  def _with(self, change) -> 'Trace':
    columns = {name: getattr(self, name) for name in COLUMNS}
    there = {name: c for name, c in columns.items() if c is not None}
    changed = {name: change(column) for name, column in there.items()}
    return dataclasses.replace(self, **changed)


COLUMNS = tuple(f.name for f in dataclasses.fields(Trace))[1:]


def layers(config: ModelConfig) -> tuple[Layer, ...]:
  """The sparse layers of a model, the encoder's first."""
  return tuple(
    Layer(stack, number, config.moe_of(stack).num_experts)
    for stack in config.stacks
    for number in config.plan(stack).sparse
  )


def read(
  sown: Mapping,
  config: ModelConfig,
  tokens: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  scores: bool = False,
) -> Trace:
  """The decisions of one call of a model.

  Args:
    sown: its collection 'routing', as numpy; layers scanned or not.
    tokens: of each stack that was called, ids that were routed and whether
      they are real, both [batch, length]. Examples are the rows.
    scores: `probs` and `logits` too.
  """
  found = []
  for index, layer in enumerate(layers(config)):
    if layer.stack not in tokens:
      continue
    ids, valid = map(np.asarray, tokens[layer.stack])
    said, seats = _of_layer(sown[layer.stack], config, layer)
    # Groups lie one behind the other, and the last one is filled up.
    flat = lambda a, size=ids.size: a.reshape(-1, *a.shape[2:])[:size]
    choices = _choices(seats, said.probs.shape[1])
    real = valid.reshape(-1)
    example, position = np.divmod(np.arange(ids.size), ids.shape[1])
    columns = dict(
      layer=np.full(ids.size, index, np.int16),
      example=example.astype(np.int32),
      position=position.astype(np.int32),
      token=ids.reshape(-1).astype(np.int32),
      **{name: flat(column) for name, column in choices.items()},
    )
    if scores:
      columns |= dict(probs=flat(said.probs), logits=flat(said.logits))
    columns = {name: column[real] for name, column in columns.items()}
    found.append(Trace(layers(config), **columns))
  return join(found)


def _of_layer(sown: Mapping, config: ModelConfig, layer: Layer):
  """Scores and seats of a layer, of a stack's collection."""
  plan, number = config.plan(layer.stack), layer.number
  scanned = len(plan.layers) // plan.period * plan.period
  if config.scan_layers and number < scanned:
    period, place = divmod(number, plan.period)
    routed = sown['layers'][f'layer_{place}']['moe']
    routed = jax.tree.map(lambda a: a[period], routed)
  else:
    routed = sown[f'layers_{number}']['moe']
  return routed['scores'], routed['seats']


def _choices(seats: Seats, tokens: int) -> dict[str, np.ndarray]:
  """expert, weight and kept, [g, tokens, k], of the routes asked for."""
  g, n = seats.token.shape
  asked = np.asarray(seats.asked)
  token = (np.arange(g)[:, None] * tokens + seats.token)[asked]
  weight = np.asarray(seats.weight)[asked]
  # As they were chosen; where experts chose, the one that is heard most first.
  rank = np.broadcast_to(np.arange(n), (g, n))[asked] if seats.k else -weight
  order = np.lexsort((rank, token))
  token = token[order]
  starts = np.flatnonzero(np.diff(token, prepend=-1))
  counts = np.diff(np.append(starts, len(token)))
  choice = np.arange(len(token)) - np.repeat(starts, counts)
  width = max(int(counts.max(initial=0)), 1)

  def put(values, empty, dtype):
    out = np.full((g * tokens, width), empty, dtype)
    out[token, choice] = values[asked][order]
    return out.reshape(g, tokens, width)

  return dict(
    expert=put(np.asarray(seats.expert), -1, np.int16),
    weight=put(np.asarray(seats.weight), 0, np.float32),
    kept=put(np.asarray(seats.place) >= 0, False, bool),
  )


# What stands where a trace has fewer choices or experts than another.
_EMPTY = {'expert': -1, 'logits': -np.inf}


def join(traces: Sequence[Trace]) -> Trace:
  """Several traces of one model as one.

  Raises:
    ValueError: there is none, or they are of different models.
  """
  if not traces:
    raise ValueError('There is no text to look at: give one at least.')
  if len({t.layers for t in traces}) > 1:
    raise ValueError('These traces are of models with different layers.')

  def joined(name):
    parts = [getattr(t, name) for t in traces]
    if any(part is None for part in parts):
      return None
    width = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    fill = lambda a: np.pad(
      a,
      [(0, 0), (0, width - a.shape[1])],
      constant_values=_EMPTY.get(name, 0),
    )
    return np.concatenate([fill(a) if width else a for a in parts])

  columns = {name: joined(name) for name in COLUMNS}
  order = np.lexsort(
    (columns['position'], columns['example'], columns['layer'])
  )
  return Trace(traces[0].layers, **columns).rows(order)
