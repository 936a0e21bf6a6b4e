"""Logical axes: the only module that knows the mesh.

Models name what an axis is (`'batch'`, `'expert'`); the rules below say along
which mesh axes it is split. Weights and activations use different names, so
sharding a weight never shards an activation by accident.
"""

import contextlib
import contextvars
import functools
import itertools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

AXES = ('data', 'fsdp', 'expert', 'model')
_BATCH = ('data', 'fsdp', 'expert')
# Rows of bfloat16 in a tile of a TPU. Parts of less than whole tiles are not
# gathered there but summed up, each with zeros around it: twice the bytes.
_TILE = 16

RULES = (
  # Parameters: the names T5X uses.
  ('embed', ('fsdp', 'expert')),  # See `rules`.
  ('vocab', 'model'),
  ('heads', 'model'),
  ('kv', None),
  ('mlp', 'model'),
  ('layers', None),
  ('expert', 'expert'),
  ('expert_mlp', 'model'),
  ('relpos_buckets', None),
  ('unmodeled', None),
  # Activations.
  ('batch', _BATCH),
  ('length', None),
  ('group', _BATCH),
  ('slot', None),
  ('expert_replicas', ('data', 'fsdp')),
  ('activation_embed', None),
  ('activation_heads', 'model'),
  ('activation_kv', None),
  ('activation_mlp', 'model'),
  ('activation_vocab', 'model'),
)


def rules(mesh: Mesh | AbstractMesh):
  """`RULES`, with `embed` split where `mesh` asks for FSDP.

  Dense weights then lie along `expert` too: to gather them from more devices
  moves no more bytes, and each holds less. Along an axis that `mesh` lacks, as
  that of another code may lack `fsdp`, nothing is split.
  """
  whole = () if mesh.shape.get('fsdp', 1) > 1 else ('embed',)
  there = lambda axes: (
    axes
    if axes is None or isinstance(axes, str)
    else tuple(axis for axis in axes if axis in mesh.shape)
  )
  return tuple((n, None if n in whole else there(axes)) for n, axes in RULES)


annotate = nn.with_logical_partitioning


def make_mesh(
  *,
  data: int = 0,
  fsdp: int = 1,
  expert: int = 1,
  model: int = 1,
  across_slices: bool = False,
  num_experts: int = 0,
  devices=None,
) -> Mesh:
  """A mesh with the axes `AXES`, of the sizes that `mesh_sizes` settles.

  Raises:
    ValueError: also where an axis other than `data` would cross from slice to
      slice.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(
    len(devices), num_experts, data=data, fsdp=fsdp, expert=expert, model=model
  )
  arranged = _arrange(tuple(sizes.values()), devices, across_slices)
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(
  devices: int,
  num_experts: int = 0,
  *,
  data: int = 0,
  fsdp: int = 1,
  expert: int = 1,
  model: int = 1,
) -> dict[str, int]:
  """The size of every axis; `data` 0 takes what the others leave.

  An expert axis longer than the experts there are becomes data x experts.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  if num_experts and expert > num_experts:
    if expert % num_experts:
      raise ValueError(
        f'An expert axis of {expert} does not divide into copies of'
        f' {num_experts} experts; use mesh.expert={num_experts}.'
      )
    copies = expert // num_experts
    logging.info(
      'mesh.expert=%d for %d experts: %d copies of each along data.',
      expert,
      num_experts,
      copies,
    )
    expert, data = num_experts, data * copies
  if num_experts and num_experts % expert:
    raise ValueError(
      f'{num_experts} experts do not split over mesh.expert={expert}; the'
      f' nearest sizes that divide are {divisors_near(num_experts, expert)}.'
    )
  rest = fsdp * expert * model
  if not data and devices % rest:
    raise ValueError(
      f'A mesh of fsdp {fsdp} x expert {expert} x model {model} = {rest} does'
      f' not divide {devices} devices; the nearest products that do are'
      f' {divisors_near(devices, rest)}.'
    )
  data = data or devices // rest
  if data * rest != devices:
    raise ValueError(
      f'A mesh of data {data} x fsdp {fsdp} x expert {expert} x model {model}'
      f' needs {data * rest} devices; there are {devices}.'
    )
  return {'data': data, 'fsdp': fsdp, 'expert': expert, 'model': model}


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
  """A mesh of no devices, for arithmetic; `sizes` of all `AXES`."""
  return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _arrange(sizes: tuple[int, ...], devices, across_slices: bool):
  """Devices so that neighbours in the mesh are neighbours in the machine.

  Between slices there is a slow network: only `data` crosses it.
  """
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if devices[0].platform != 'tpu' or slices == 1 or across_slices:
    return mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  data, *rest = sizes
  if data % slices:
    raise ValueError(
      f'{slices} slices and mesh.data={data}: only `data` may cross the network'
      f' between slices, so it must be a multiple of {slices}; or allow it'
      ' to the others, at its speed, with mesh.across_slices=True.'
    )
  return mesh_utils.create_hybrid_device_mesh(
    (data // slices, *rest),
    (slices, 1, 1, 1),
    devices,
    allow_split_physical_axes=True,
  )


@contextlib.contextmanager
def use(mesh: Mesh):
  """Makes `constrain` effective. A bare `with mesh:` would drop it silently."""
  token = _NEIGHBOURS.set(neighbours(mesh))
  try:
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh)):
      yield mesh
  finally:
    _NEIGHBOURS.reset(token)


_NEIGHBOURS = contextvars.ContextVar('neighbours', default=1)


def neighbours(mesh: Mesh | AbstractMesh) -> int:
  """Devices in a row along `expert` that are near: of a slice, else of a host.

  1 where there are not equally many of each.
  """
  if isinstance(mesh, AbstractMesh):
    return 1
  slices = {getattr(d, 'slice_index', 0) for d in mesh.devices.flat}
  home = 'slice_index' if len(slices) > 1 else 'process_index'
  axis = mesh.axis_names.index('expert')
  rows = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.shape['expert'])
  near = {
    len([*devices])
    for row in rows
    for _, devices in itertools.groupby(row, lambda d: getattr(d, home))
  }
  return near.pop() if len(near) == 1 else 1


def _spec(axes, rules) -> PartitionSpec:
  table = dict(rules)
  missing = {a for a in axes if a is not None} - set(table)
  if missing:
    raise ValueError(f'No sharding rule for {sorted(missing)} in {axes}.')
  return PartitionSpec(*(table[a] if a else None for a in axes))


def _parts(mesh, entry) -> int:
  names = (entry,) if isinstance(entry, str) else entry or ()
  return math.prod(mesh.shape[n] for n in names)


def axes_of(axis: str) -> tuple[str, ...]:
  """The axes of the mesh along which the rules in force cut the logical one."""
  (entry,) = _spec((axis,), nn.get_logical_axis_rules())
  return (entry,) if isinstance(entry, str) else entry or ()


def shards(axis: str) -> int:
  """Into how many parts the rules in force cut the logical `axis`."""
  rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
  if not rules or mesh.empty:
    return 1
  return _parts(mesh, _spec((axis,), rules)[0])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks for `x` laid out by logical `axes`; a no-op outside `use`.

  Raises:
    ValueError: an axis without a rule, or one that does not divide (JAX would
      drop both without a word).
  """
  if len(axes) != x.ndim:
    raise ValueError(f'{axes} names {len(axes)} axes of a rank-{x.ndim} array.')
  rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
  if not rules or mesh.empty:
    return x
  spec = _spec(axes, rules)
  for size, axis, entry in zip(x.shape, axes, spec, strict=True):
    if size % _parts(mesh, entry):
      raise _undivided(axis, size, mesh, entry)
  return jax.lax.with_sharding_constraint(x, spec)


def move(
  x: jax.Array, before: tuple, after: tuple, *, split: int, join: int, by: str
) -> jax.Array:
  """`x` from one layout into another, by an all-to-all along `expert`.

  Args:
    before, after: logical axes of x.
    split, join: the dimension that is cut among the devices of the mesh axis
      `expert`, and the one whose parts come together there.
    by: 'shard_map' says it to the letter, 'two_hop' in two, among `neighbours`
      first (arXiv:2203.14685); else it is left to the compiler.
  """
  x, count = constrain(x, *before), shards('expert')
  if by not in ('shard_map', 'two_hop') or count == 1:
    return constrain(x, *after)
  near = _NEIGHBOURS.get() if by == 'two_hop' else 1
  if 1 < near < count:
    swap = functools.partial(_two_hops, count=count, near=near)
  else:
    swap = functools.partial(jax.lax.all_to_all, axis_name='expert', tiled=True)
  swap = functools.partial(swap, split_axis=split, concat_axis=join)
  return on_shards(swap, (before,), after)(x)


def _two_hops(x, *, split_axis: int, concat_axis: int, count: int, near: int):
  """An all-to-all of `count` devices: few large messages between hosts.

  What goes to the device j of any host is brought to the j of the own one,
  and from there all of it at once to the j of each.
  """
  hosts = range(count // near)
  among = lambda axis, groups: functools.partial(
    jax.lax.all_to_all,
    axis_name='expert',
    split_axis=axis,
    concat_axis=axis,
    axis_index_groups=groups,
    tiled=True,
  )
  inside = [[n * near + j for j in range(near)] for n in hosts]
  across = [[n * near + j for n in hosts] for j in range(near)]
  before, after = x.shape[:split_axis], x.shape[split_axis + 1 :]
  size = x.shape[split_axis] // count
  x = x.reshape(*before, len(hosts), near, size, *after)
  x = among(split_axis, across)(among(split_axis + 1, inside)(x))
  # Now by where it comes from.
  x = x.reshape(*before, count, size, *after)
  x = jnp.moveaxis(x, split_axis, concat_axis)
  joined = count * x.shape[concat_axis + 1]
  return x.reshape(*x.shape[:concat_axis], joined, *x.shape[concat_axis + 2 :])


def on_shards(f, axes, out):
  """`f`, run by each device on its own parts of its arguments.

  Args:
    axes: logical axes of every argument, a tuple for each of its arrays.
    out: those of what `f` returns.
  """
  rules = nn.get_logical_axis_rules()
  is_names = lambda x: (
    isinstance(x, tuple) and not any(isinstance(part, tuple) for part in x)
  )
  specs = lambda tree: jax.tree.map(
    lambda names: _spec(names, rules), tree, is_leaf=is_names
  )
  return jax.shard_map(f, in_specs=specs(axes), out_specs=specs(out))


def of_boxed(abstract, mesh: Mesh):
  """Shardings for a tree whose leaves are boxed by `annotate` or bare.

  Raises:
    ValueError: a mesh axis does not divide what it should split.
  """
  table = rules(mesh)

  def sharding(leaf):
    if not isinstance(leaf, nn.Partitioned):
      return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(
      mesh, _fitting(leaf.names, leaf.value.shape, mesh, table)
    )

  return jax.tree.map(sharding, abstract, is_leaf=_is_box)


def _fitting(names, shape, mesh, table) -> PartitionSpec:
  """How a parameter is split: no mesh axis twice, and none that cannot be."""
  if len([n for n in names if n != 'layers']) == 1:
    return PartitionSpec()  # A vector: to gather it costs more than it saves.
  taken, parts = set(), []
  for name, size, entry in zip(names, shape, _spec(names, table), strict=True):
    axes = [entry] if isinstance(entry, str) else list(entry or ())
    axes = [a for a in axes if a not in taken]
    # An axis of one device is no way to split, though whole tiles come of it.
    axes = [a for a in axes if mesh.shape[a] > 1] or axes
    ways = [tuple(axes), *((a,) for a in axes)] if axes else [()]
    ways = [w for w in ways if size % _parts(mesh, w) == 0]
    if not ways:
      raise _undivided(name, size, mesh, axes)
    whole = [w for w in ways if size // _parts(mesh, w) % _TILE == 0]
    best = max(whole or ways, key=functools.partial(_parts, mesh))
    taken.update(best)
    parts.append(best if len(best) > 1 else best[0] if best else None)
  return PartitionSpec(*parts)


def _undivided(name: str, size: int, mesh, entry) -> ValueError:
  axes = [entry] if isinstance(entry, str) else entry
  parts = _parts(mesh, entry)
  return ValueError(
    f'Axis {name!r} of size {size} does not split over the {parts} devices of'
    f' mesh.{" x mesh.".join(axes)}, only over sizes that divide it, the'
    f' nearest: {divisors_near(size, parts)}.'
  )


def divisors(n: int) -> list[int]:
  """All of them, the smallest first."""
  low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
  return sorted({*low, *(n // i for i in low)})


def divisors_near(n: int, near: int) -> str:
  """'4 and 8': the divisors of `n` around `near`, for messages."""
  every = divisors(n)
  low = max(d for d in every if d <= near)
  above = [d for d in every if d > near]
  return f'{low} and {min(above)}' if above else f'{low}'


def whole_groups(tokens: int, size: int, parts: int) -> int:
  """Groups of `size` that hold `tokens`, as many on each of `parts` devices."""
  groups = -(-tokens // size)
  return -(-groups // parts) * parts


_SHAPES_ALONE = contextvars.ContextVar('shapes_alone', default=False)


def shapes_of(init):
  """What `init()` makes, as shapes: no initializer has to read its files."""
  token = _SHAPES_ALONE.set(True)
  try:
    # A function of its own: JAX remembers what it has traced.
    return jax.eval_shape(lambda: init())
  finally:
    _SHAPES_ALONE.reset(token)


def shapes_alone() -> bool:
  """Whether nobody will see more than a shape of what is made."""
  return _SHAPES_ALONE.get()


def placed(shapes, shardings):
  """Shapes that say where their arrays go."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    shardings,
  )


def axis_names(boxed):
  """The logical axes of every boxed parameter, as a tree of tuples."""
  return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_box)


def unbox(boxed):
  """The bare arrays; flax's own `unbox` would constrain them on the way."""
  return jax.tree.map(
    lambda leaf: leaf.value if _is_box(leaf) else leaf, boxed, is_leaf=_is_box
  )


def rebox(bare, like):
  """`bare` arrays in the boxes of `like`."""
  return jax.tree.map(
    lambda box, value: box.replace(value=value), like, bare, is_leaf=_is_box
  )


def _is_box(x) -> bool:
  return isinstance(x, nn.Partitioned)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """How a batch lies: its first axis over everything but `model`."""
  return NamedSharding(mesh, PartitionSpec(_BATCH))


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch is cut."""
  return _parts(mesh, _BATCH)
