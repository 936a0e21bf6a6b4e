"""Which of their tensors is which of our parameters, whatever the format.

A format gives one `Link` for each parameter of the unrolled model. The same
links check a checkpoint, read it into the scanned or the unrolled layout, and
write one, a tensor at a time.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from st_moe import paths
from st_moe.config import Config, ModelConfig, Part
from st_moe.model.layers import inputs_of
from st_moe.model.transformer import Transformer
from st_moe.train.state import abstract_params

same = lambda a: a


@dataclasses.dataclass(frozen=True)
class Link:
  """How one of our parameters is made of theirs.

  `forth` makes ours of theirs and `back` theirs of ours, by transposing and
  reshaping. Of a `stacked` one each name is a slice along our first axis, as
  an expert of a bank.
  """

  names: tuple[str, ...]
  forth: Callable = same
  back: Callable = same
  stacked: bool = False

  @classmethod
  def to(cls, name: str, forth=same, back=same) -> 'Link':
    return cls((name,), forth, back)

  @property
  def transposed(self) -> 'Link':
    """The same, of matrices that lie the other way there."""
    return dataclasses.replace(
      self,
      forth=lambda w: self.forth(w.T),
      back=lambda a: self.back(a).T,
    )


def matrices(config: ModelConfig) -> tuple[str, ...]:
  """Names of the kernels of a feed-forward network."""
  return *inputs_of(config.activation), 'wo'


def attention(config: ModelConfig, name: Callable) -> dict[str, Link]:
  """Kernels whose heads are joined there: query, key and value [d, heads * kv].

  Args:
    name: 'query', 'key', 'value' or 'out' -> their name of it.
  """
  joined = config.num_heads, config.head_dim
  split = lambda w: w.reshape(-1, *joined)
  join = lambda a: a.reshape(a.shape[0], -1)
  found = {
    f'{part}/kernel': Link.to(name(part), split, join)
    for part in ('query', 'key', 'value')
  }
  found['out/kernel'] = Link.to(
    name('out'),
    lambda w: w.reshape(*joined, -1),
    lambda a: a.reshape(-1, a.shape[-1]),
  )
  return found


def positions(config: ModelConfig, stack: str) -> list[str]:
  """Paths of a stack's position biases: one for all layers, or one for each."""
  name = 'relpos_bias/rel_embedding'
  if not config.relpos_per_layer:
    return [f'{stack}/{name}']
  count = config.stack(stack).num_layers
  return [f'{stack}/layers_{i}/{name}' for i in range(count)]


def has_extra_ffn(config: ModelConfig) -> bool:
  """Is there a layer with an FFN beside the one that all have?"""
  return any(
    sublayer.name == 'extra_mlp'
    for stack in config.stacks
    for layer in config.plan(stack).layers
    for sublayer in layer
  )


# What formats of other codes have names for: activations, and parts by field of
# `MoEConfig`.
_ACTIVATIONS = 'relu', 'gelu', 'geglu'
_PLAIN = {
  'gate': ('linear',),
  'shaping': (),
  'selector': ('top_k',),
  'weighing': (),
  'experts': ('ffn',),
  'beside': ('nothing',),
}


def unknown_parts(config: ModelConfig) -> list[str]:
  """Parts of layers that no other code has, as "gate 'hash'"."""
  sparse = [s for s in config.stacks if config.plan(s).num_sparse]
  name = config.activation.name
  found = [] if name in _ACTIVATIONS else [f'activation {name!r}']
  for moe in map(config.moe_of, sparse):
    for field, plain in _PLAIN.items():
      parts = getattr(moe, field)
      parts = (parts,) if isinstance(parts, Part) else parts
      found += [f'{field} {p.name!r}' for p in parts if p.name not in plain]
  if len({config.moe_of(stack).num_experts for stack in sparse}) > 1:
    found.append('stacks with other numbers of experts')
  return sorted(set(found))


def stack_of(
  stack: str, count: int, sparse: Collection[int], group_size: int
) -> dict:
  """Fields of a stack of `count` layers, of which those of `sparse` are so.

  Raises:
    ValueError: they are not every n-th.
  """
  fields = {'num_layers': count, 'group_size': group_size}
  if not sparse:
    return {**fields, 'sparse_every': 0, 'sparse_offset': 0}
  offset = min(sparse)
  for every in range(offset + 1, count + 1):
    if set(sparse) == set(range(offset, count, every)):
      return {**fields, 'sparse_every': every, 'sparse_offset': offset}
  raise ValueError(
    f'The {stack} is sparse in layers {sorted(sparse)}, not in every n-th.'
  )


def check_named(
  abstract, config: ModelConfig, links: Mapping[str, Link], format: str
) -> None:
  """Raises a ValueError for a parameter that a format has no name for."""
  for path in paths.by_path(abstract):
    for piece, _ in paths.unrolled_paths(path, config):
      if piece not in links:
        raise ValueError(
          f'{format} has no name for {piece}: a part of this model is unknown'
          ' there.'
        )


def two_sizes(shapes: Mapping, name: str) -> tuple[int, int]:
  """The shape of a matrix; raises a ValueError for what is none."""
  if len(shapes[name]) != 2 or 0 in shapes[name]:
    raise ValueError(
      f'{name} is {list(shapes[name])}; a model has a matrix of that name.'
    )
  return shapes[name]


@dataclasses.dataclass
class Source:
  """A checkpoint of theirs, opened and not yet read."""

  where: str
  config: Config
  vocabulary: bytes | None  # b'': bytes; None: it has none.
  links: Mapping[str, Link]
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]
  read: Callable[[str], np.ndarray]
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # Tied.

  @property
  def unused(self) -> list[str]:
    """Tensors that no parameter is made of, and that are no copies either."""
    used = {name for link in self.links.values() for name in link.names}
    return sorted(set(self.shapes) - used - set(self.copies))

  def check(self, abstract) -> None:
    """Raises a ValueError that names the first tensor missing or misshapen."""
    for path, leaf in paths.by_path(abstract).items():
      for piece, i in paths.unrolled_paths(path, self.config.model):
        shape = leaf.shape if i is None else leaf.shape[1:]
        ours = jax.ShapeDtypeStruct(shape, np.float32)
        self._check_piece(piece, ours)

  def _check_piece(self, path: str, ours) -> None:
    link = self.links[path]
    want = ours.shape[1:] if link.stacked else ours.shape
    if link.stacked and len(link.names) != ours.shape[0]:
      raise ValueError(
        f'{path} {list(ours.shape)} has another first axis than'
        f' the {len(link.names)} tensors {link.names[0]} ...'
      )
    for name in link.names:
      if name not in self.shapes:
        raise ValueError(
          f'{self.where} has no tensor {name}, of which {path} {list(want)} is'
          ' made: another model, or a part of one.'
        )
      kind = self.dtypes[name]
      # Of 8 bits are quantized ones, whose scales lie elsewhere.
      if not jnp.issubdtype(kind, jnp.floating) or kind.itemsize < 2:
        raise ValueError(
          f'{self.where}: {name} is of type {kind}; weights are floating point'
          ' numbers of 16 bits or more.'
        )
      found = jax.ShapeDtypeStruct(self.shapes[name], np.float32)
      try:
        got = jax.eval_shape(link.forth, found).shape
      except TypeError:  # A reshape that cannot be.
        got = None
      if got != want:
        raise ValueError(
          f'{self.where}: {name} is {list(found.shape)}, which does not make'
          f' the {list(want)} of {path}: another model.'
        )

  def load(self, abstract):
    """Parameters in the layout and, where `abstract` has them, shardings.

    No more than one of their tensors is in memory besides ours.
    """
    self.check(abstract)

    def make(path, leaf):
      out = np.empty(leaf.shape, leaf.dtype)
      for piece, i in paths.unrolled_paths(path, self.config.model):
        ours = out if i is None else out[i]
        link = self.links[piece]
        for j, name in enumerate(link.names):
          target = ours[j] if link.stacked else ours
          self._fill(target, name, link)
      sharding = getattr(leaf, 'sharding', None)
      return jax.device_put(out, sharding) if sharding else out

    return paths.map_by_path(make, abstract)

  def _fill(self, target: np.ndarray, name: str, link: Link) -> None:
    """Writes a tensor, which must be numbers, to its place in ours."""
    try:
      found = self.read(name)
    except ValueError as e:
      raise ValueError(f'{self.where}: {e}') from e
    if found.shape != self.shapes[name] or found.dtype != self.dtypes[name]:
      raise ValueError(
        f'{self.where} is damaged: {name} is {found.dtype}{[*found.shape]},'
        f' and is said to be {self.dtypes[name]}{[*self.shapes[name]]}.'
      )
    with np.errstate(over='ignore'):  # Of float64; it is told below.
      target[...] = link.forth(found)
    # Both are NaN if any number is.
    if target.size and not np.isfinite([target.min(), target.max()]).all():
      raise ValueError(
        f'{self.where}: {name} holds NaN or infinite numbers: it is damaged, or'
        ' its training diverged.'
      )


def unrolled(source) -> dict:
  """Every parameter of a source's model, by its path in the unrolled one."""
  model = dataclasses.replace(source.config.model, scan_layers=False)
  config = dataclasses.replace(source.config, model=model)
  source = dataclasses.replace(source, config=config)
  return paths.by_path(source.load(abstract_params(Transformer(model))))


def tensors(params, config: ModelConfig, links: Mapping[str, Link]):
  """(name, shape, dtype, call that makes it) of everything a target holds."""
  for path, leaf in paths.by_path(params).items():
    for piece, i in paths.unrolled_paths(path, config):
      link = links[piece]
      shape = leaf.shape if i is None else leaf.shape[1:]
      shape = shape[1:] if link.stacked else shape
      theirs = jax.eval_shape(
        link.back, jax.ShapeDtypeStruct(shape, leaf.dtype)
      )
      for j, name in enumerate(link.names):

        def make(leaf=leaf, i=i, j=j, link=link):
          ours = np.asarray(leaf)
          ours = ours if i is None else ours[i]
          return link.back(ours[j] if link.stacked else ours)

        yield name, theirs.shape, np.dtype(leaf.dtype), make
