"""What a compiled program does, read from its text: products and exchanges.

XLA's own cost analysis counts the body of a loop once. Here it counts as often
as it runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
  's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}  # fmt: skip
_EXCHANGES = (
  'all-to-all',
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'collective-permute',
)
_FREE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',  # What its body does counts.
)
# What looks at parts of its first operand; what writes them, and which operand
# is new.
_CUT = ('dynamic-slice', 'gather')
_CHANGED = {'dynamic-update-slice': 1, 'scatter': 2}
_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(
  r'\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\('
  r'(?P<operands>[^)]*)\)(?P<rest>.*)'
)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One kind of collective along some mesh axes, in one step."""

  kind: str
  axes: tuple[str, ...]
  count: int
  sent: float  # Bytes each device sends, all of them together.


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  type: str
  op: str
  operands: tuple[str, ...]
  rest: str  # Behind the operands: attributes, metadata.

  @property
  def dims(self) -> list[int]:
    return _dims(_SHAPE.search(self.type)[2])

  @property
  def size(self) -> int:
    """Bytes."""
    return sum(
      math.prod(_dims(dims)) * _BYTES.get(kind, 0)
      for kind, dims in _SHAPE.findall(self.type)
    )


@dataclasses.dataclass(frozen=True)
class Computation:
  """A function of the program, its instructions by name."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    return list(self.instructions.values())[-1]

  def operands(self, instruction: Instruction) -> list[Instruction]:
    known = self.instructions
    return [known[name] for name in instruction.operands if name in known]


class Program:
  """A compiled module: its computations, and how often each one runs."""

  def __init__(self, text: str):
    self._computations = {c.name: c for c in _computations(text)}
    self._runs, self._fused = collections.Counter(), set()
    self._visit(re.search(r'^ENTRY %(\S+)', text, re.MULTILINE)[1], 1)

  def _visit(self, name: str, times: int):
    self._runs[name] += times
    for instruction in self._computations[name].instructions.values():
      for callee in _callees(instruction):
        if callee in self._computations:
          more = self._trips(instruction) if instruction.op == 'while' else 1
          if instruction.op == 'fusion':
            self._fused.add(callee)
          self._visit(callee, times * more)

  def _trips(self, loop: Instruction) -> int:
    if known := re.search(r'known_trip_count\D*(\d+)', loop.rest):
      return int(known[1])
    # `i < bound` with `i + step`: XLA unrolls some loops in steps of two.
    condition = self._computations[_named('condition', loop.rest)]
    body = self._computations[_named('body', loop.rest)]
    counter, *bound = condition.operands(condition.root)
    if m := re.search(r'index=(\d+)', counter.rest):
      bound += body.operands(body.operands(body.root)[int(m[1])])
    numbers = [int(i.operands[0]) for i in bound if i.op == 'constant']
    if len(numbers) == 2:
      return -(-numbers[0] // numbers[1])
    # The data tell how many; its scope, how many to expect.
    if said := re.search(r'/about_(\d+)_turns/while"', loop.rest):
      return int(said[1])
    raise ValueError(f'A loop of unknown length: {loop.rest[:120]}')

  def _each(self, *, once: bool = False):
    """(how often it runs, its computation, instruction)."""
    for name, times in self._runs.items():
      computation = self._computations[name]
      for instruction in computation.instructions.values():
        yield 1 if once else times, computation, instruction

  def flops(self, *, once: bool = False) -> float:
    """Of matrix products, on one device; `once`: every loop body once."""
    return sum(
      times * _product_flops(instruction, *computation.operands(instruction))
      for times, computation, instruction in self._each(once=once)
      if instruction.op in ('dot', 'convolution', 'custom-call')
    )

  def traffic(self, *, once: bool = False) -> float:
    """Bytes that instructions read and write, fused ones as one.

    Rougher than XLA's own count: good for the share of loops in it.
    """
    return sum(
      times * self._touched(computation, instruction)
      for times, computation, instruction in self._each(once=once)
      if computation.name not in self._fused and instruction.op not in _FREE
    )

  def _touched(self, computation: Computation, instruction) -> int:
    """Bytes; of what is cut or changed in place, those of that part.

    Or each turn of a scan would count the weights of all its layers.
    """
    if instruction.op == 'fusion':
      inside = self._computations[_named('calls', instruction.rest)]
      read = sum(
        _read(inside, name)
        for name, i in inside.instructions.items()
        if i.op == 'parameter'
      )
      return read + _written(inside, inside.root)
    if instruction.op in _CUT:
      return 2 * instruction.size
    if instruction.op in _CHANGED:
      return 2 * _written(computation, instruction)
    return sum(
      i.size for i in [instruction, *computation.operands(instruction)]
    )

  def exchanges(self, mesh_shape: dict[str, int]) -> list[Exchange]:
    """Collectives by kind and mesh axes, the most bytes first.

    Args:
      mesh_shape: mesh axis -> size, as the devices are numbered.
    """
    count, sent = collections.Counter(), collections.Counter()
    for times, computation, instruction in self._exchanges():
      kind = instruction.op.removesuffix('-start')
      if computation.name.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'  # A TPU has it as a fusion.
      group = _group(instruction.rest, math.prod(mesh_shape.values()))
      if len(group) == 1:
        continue
      key = kind, _axes_of(group, mesh_shape)
      given = sum(i.size for i in computation.operands(instruction))
      count[key] += times
      sent[key] += times * given * sent_per_byte(kind, len(group))
    found = [Exchange(*key, n, sent[key]) for key, n in count.items()]
    return sorted(found, key=lambda e: -e.sent)

  def _exchanges(self):
    """As `_each`, of collectives: once for each channel.

    A TPU carries one out in steps, each beside other work and each with the
    whole instruction in it; the first is not in a loop of that work.
    """
    found = {}
    for times, computation, instruction in self._each():
      if instruction.op.removesuffix('-start') in _EXCHANGES:
        m = re.search(r'channel_id=(\d+)', instruction.rest)
        channel = m[1] if m else len(found)
        # Inside `shard_map` many have the same one: by line and size too.
        line = re.search(r'metadata=\{.*?\}', instruction.rest)
        given = sum(i.size for i in computation.operands(instruction))
        key = channel, line and line[0], given
        if key not in found or times < found[key][0]:
          found[key] = times, computation, instruction
    return found.values()


def _computations(text: str) -> Iterator[Computation]:
  for block in re.finditer(
    r'^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL
  ):
    found = {}
    for line in block[2].splitlines():
      if m := _INSTRUCTION.match(line):
        operands = re.findall(r'%([^\s,]+)', m['operands'])
        if m['op'] == 'constant':
          operands = [m['operands']]
        found[m['name']] = Instruction(
          m['type'], m['op'], tuple(operands), m['rest']
        )
    yield Computation(block[1], found)


def _named(attribute: str, rest: str) -> str:
  return re.search(rf'\b{attribute}=%([\w.-]+)', rest)[1]


def _callees(instruction: Instruction) -> list[str]:
  """Computations an instruction runs (not those it applies to numbers)."""
  rest = instruction.rest
  if instruction.op == 'conditional':
    branches = re.search(r'branch_computations=\{([^}]*)\}', rest)
    listed = (
      branches[1]
      if branches
      else ' '.join(re.findall(r'(?:true|false)_computation=(%[\w.-]+)', rest))
    )
    return re.findall(r'%([\w.-]+)', listed)
  if instruction.op == 'while':
    return [_named('body', rest)]
  if instruction.op in ('fusion', 'async-start', 'custom-call'):
    return re.findall(r'\bcalls=%([\w.-]+)', rest)
  if instruction.op == 'call':
    return [_named('to_apply', rest)]
  return []


def _dims(text: str) -> list[int]:
  return [int(d) for d in text.split(',') if d]


# Bytes.


def _read(fused: Computation, name: str) -> int:
  """Bytes of parameter `name` that a fusion looks at."""
  whole, seen = fused.instructions[name].size, 0
  for user in fused.instructions.values():
    if name not in user.operands:
      continue
    in_part = user.op in _CUT or user.op in _CHANGED
    if not in_part or name in user.operands[1:]:
      return whole
    seen += user.size if user.op in _CUT else 0
  return min(whole, seen)


def _written(computation: Computation, result: Instruction) -> int:
  """Bytes of `result` that are new."""
  operands = computation.operands(result)
  if result.op in _CHANGED:
    return operands[_CHANGED[result.op]].size
  if result.op in ('tuple', 'bitcast') and operands:
    return sum(_written(computation, i) for i in operands)
  return result.size


# Products.


def _product_flops(product: Instruction, *operands) -> float:
  if product.op == 'custom-call':  # Only a kernel's author knows.
    said = re.search(r'"cost_estimate":\{"flops":"(\d+)"', product.rest)
    return int(said[1]) if said else 0
  lhs, rhs = operands
  if product.op == 'convolution':
    return _convolution_flops(product, lhs.dims, rhs.dims)
  said = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', product.rest)
  depth = math.prod(lhs.dims[i] for i in _dims(said[1]))
  return 2 * math.prod(product.dims) * depth


def _convolution_flops(product: Instruction, lhs, rhs) -> float:
  """A TPU writes products as convolutions, often along padded 'space'."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', product.rest)
  window = re.search(r'window=\{([^}]*)\}', product.rest)
  window = dict(p.split('=') for p in window[1].split()) if window else {}
  out = dict(zip(labels[3], product.dims, strict=True))
  kernel = dict(zip(labels[2], rhs, strict=True))
  space = dict(zip(labels[1], lhs, strict=True))
  flops = 2 * out['b'] * out['f'] * kernel['i']
  for axis in (label for label in labels[3] if label.isdigit()):
    at = _window(window, int(axis))
    flops *= _meetings(space[axis], kernel[axis], out[axis], at)
  return flops


def _window(window: dict[str, str], axis: int) -> tuple[int, int, int, int]:
  """(stride, padding below, dilation of input, dilation of kernel)."""
  part = lambda name, default: (
    window[name].split('x')[axis] if name in window else default
  )
  low = part('pad', '0_0').split('_')[0]
  return (
    int(part('stride', 1)),
    int(low),
    int(part('lhs_dilate', 1)),
    int(part('rhs_dilate', 1)),
  )


@functools.lru_cache
def _meetings(size: int, kernel: int, out: int, window) -> int:
  """Pairs of a place of the kernel and one of the output with input there."""
  stride, low, dilate, kernel_dilate = window
  at = np.arange(out)[:, None] * stride
  at = at + np.arange(kernel) * kernel_dilate - low
  there = (at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)
  return int(there.sum())


# Exchanges.


def _group(rest: str, devices: int) -> np.ndarray:
  """Numbers of the devices that the first one exchanges with, itself too."""
  if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', rest):
    return np.array([int(pairs[1]), int(pairs[2])])
  said = re.search(r'replica_groups=(.*)', rest)[1]
  if said.startswith('{{'):
    return np.array(_dims(re.match(r'\{\{([\d,]*)\}', said)[1]))
  if said.startswith('mesh['):
    axes = re.findall(r"'(\w+)'=(\d+)", said.partition(']')[0])
    sizes = [int(size) for _, size in axes]
    ids, said = np.arange(math.prod(sizes)), said.partition(']')[2]
    if order := re.match(r', device_ids=\(\[([\d,]*)\](T\([\d,]*\))?\)', said):
      ids, said = _iota(order[1], order[2]), said[order.end() :]
    along = re.findall(r"'(\w+)'", re.match(r' ?\{[^}]*\}', said)[0])
    ids = ids.reshape(sizes)
    for i, (name, _) in enumerate(axes):
      if name not in along:
        ids = ids.take([0], axis=i)
    return ids.reshape(-1)
  if m := re.match(r'\[(\d+),(\d+)\]<=\[([\d,]*)\](T\([\d,]*\))?', said):
    return _iota(m[3], m[4]).reshape(int(m[1]), int(m[2]))[0]
  return np.arange(devices)  # '{}': all.


def _iota(dims: str, transposed: str | None) -> np.ndarray:
  """Numbers from 0 on of shape '2,64', 'T(1,0)' transposed; flat."""
  ids = np.arange(math.prod(_dims(dims))).reshape(_dims(dims))
  if transposed:
    ids = ids.transpose(_dims(transposed[2:-1]))
  return ids.reshape(-1)


def _axes_of(group: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
  places = np.unravel_index(group, tuple(mesh_shape.values()))
  return tuple(
    axis
    for axis, at in zip(mesh_shape, places, strict=True)
    if len(set(at.tolist())) > 1
  )


def sent_per_byte(kind: str, n: int) -> float:
  """Bytes that each of n devices sends in a ring, per byte it is given."""
  share = (n - 1) / n
  return {
    'all-to-all': share,
    'all-gather': n - 1,
    'all-reduce': 2 * share,
    'reduce-scatter': share,
    'collective-permute': 1,
  }[kind]
