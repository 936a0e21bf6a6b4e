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
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast')
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
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str

  @property
  def dims(self) -> list[int]:
    return _dims(_SHAPE.search(self.type)[2])


class Program:
  """A compiled module: its computations, and how often each one runs."""

  def __init__(self, text: str):
    self._computations = dict(_computations(text))
    entry = re.search(r'^ENTRY %(\S+)', text, re.MULTILINE)[1]
    self._runs, self._fused = collections.Counter(), set()
    self._visit(entry, 1)

  def _visit(self, name: str, times: int):
    self._runs[name] += times
    for instruction in self._computations[name].values():
      for callee in _callees(instruction):
        if callee in self._computations:
          more = self._trips(instruction) if instruction.op == 'while' else 1
          if instruction.op == 'fusion':
            self._fused.add(callee)
          self._visit(callee, times * more)

  def _trips(self, loop: Instruction) -> int:
    known = re.search(r'known_trip_count\D*(\d+)', loop.rest)
    if known:
      return int(known[1])
    # `i < constant`, as `scan` has it.
    condition = self._computations[_named('condition', loop.rest)]
    bounds = [
      int(i.operands[0])
      for i in self._reached(condition)
      if i.op == 'constant' and i.type.startswith('s32[]')
    ]
    if len(bounds) != 1:
      raise ValueError(f'A loop of unknown length: {loop.rest[:120]}')
    return bounds[0]

  def _reached(self, computation) -> Iterator[Instruction]:
    for instruction in computation.values():
      yield instruction
      for callee in _callees(instruction):
        yield from self._reached(self._computations.get(callee, {}))

  def _each(self, *, fused: bool = True):
    """(how often it runs, its computation, instruction)."""
    for name, times in self._runs.items():
      if name in self._fused and not fused:
        continue
      computation = self._computations[name]
      for instruction in computation.values():
        yield times, computation, instruction

  def flops(self, *, once: bool = False) -> float:
    """Of matrix products, on one device; `once`: every loop body once."""
    return sum(
      (1 if once else times) * _product_flops(instruction, computation)
      for times, computation, instruction in self._each()
    )

  def traffic(self, *, once: bool = False) -> float:
    """Bytes that instructions read and write, fused ones as one.

    Rougher than XLA's own count: good for the share of loops in it.
    """
    return sum(
      (1 if once else times) * sum(_size(i.type))
      + sum(
        (1 if once else times) * sum(_size(computation[o].type))
        for o in i.operands
        if o in computation
      )
      for times, computation, i in self._each(fused=False)
      if i.op not in _FREE
    )

  def exchanges(self, mesh_shape: dict[str, int]) -> list[Exchange]:
    """Collectives by kind and mesh axes, the most bytes first.

    Args:
      mesh_shape: mesh axis -> size, as the devices are numbered.
    """
    count, sent = collections.Counter(), collections.Counter()
    for times, computation, instruction in self._each():
      kind = instruction.op.removesuffix('-start')
      if kind not in _EXCHANGES:
        continue
      group = _group(instruction.rest, math.prod(mesh_shape.values()))
      if len(group) == 1:
        continue
      key = kind, _axes_of(group, mesh_shape)
      count[key] += times
      sent[key] += times * _sent(kind, instruction, computation, len(group))
    found = [Exchange(*key, n, sent[key]) for key, n in count.items()]
    return sorted(found, key=lambda e: -e.sent)


def _computations(text: str) -> Iterator[tuple[str, dict[str, Instruction]]]:
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
    yield block[1], found


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


def _size(type_text: str) -> list[int]:
  """Bytes of every array of a type."""
  return [
    math.prod(_dims(dims)) * _BYTES.get(kind, 0)
    for kind, dims in _SHAPE.findall(type_text)
  ]


# Products.


def _product_flops(instruction: Instruction, computation) -> float:
  if instruction.op == 'dot':
    lhs = computation[instruction.operands[0]].dims
    contracted = re.search(
      r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest
    )
    depth = math.prod(lhs[i] for i in _dims(contracted[1]))
    return 2 * math.prod(instruction.dims) * depth
  if instruction.op == 'convolution':
    return _convolution_flops(instruction, computation)
  return 0


def _convolution_flops(instruction: Instruction, computation) -> float:
  """A TPU writes products as convolutions, often along padded 'space'."""
  lhs, rhs = (computation[o].dims for o in instruction.operands[:2])
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
  window = re.search(r'window=\{([^}]*)\}', instruction.rest)
  window = dict(p.split('=') for p in window[1].split()) if window else {}
  out = dict(zip(labels[3], instruction.dims, strict=True))
  kernel = dict(zip(labels[2], rhs, strict=True))
  space = dict(zip(labels[1], lhs, strict=True))
  flops = 2 * out['b'] * out['f'] * kernel['i']
  for axis in (label for label in labels[3] if label.isdigit()):
    flops *= _meetings(
      space[axis], kernel[axis], out[axis], _window(window, int(axis))
    )
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
    sizes = [int(n) for n in re.findall(r"'=(\d+)", said.partition(']')[0])]
    names = re.findall(r"'(\w+)'=", said.partition(']')[0])
    along = re.search(r'\] ?\{([^}]*)\}', said)
    along = re.findall(r"'(\w+)'", along[1]) if along else names
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    order = [names.index(n) for n in along]
    rest_of = [i for i in range(len(names)) if i not in order]
    ids = ids.transpose(*rest_of, *order)
    return ids.reshape(-1, math.prod(sizes[i] for i in order))[0]
  if m := re.match(r'\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?', said):
    ids = np.arange(devices).reshape(_dims(m[3]))
    if m[4]:
      ids = ids.transpose(_dims(m[4]))
    return ids.reshape(int(m[1]), int(m[2]))[0]
  return np.arange(devices)  # '{}': all.


def _axes_of(group: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
  places = np.unravel_index(group, tuple(mesh_shape.values()))
  return tuple(
    axis
    for axis, at in zip(mesh_shape, places, strict=True)
    if len(set(at.tolist())) > 1
  )


def _sent(kind: str, instruction: Instruction, computation, n: int) -> float:
  """Bytes each device sends in rings: (n - 1) / n of what it must."""
  operands = [
    sum(_size(computation[o].type))
    for o in instruction.operands
    if o in computation
  ]
  whole = sum(operands)
  share = (n - 1) / n
  return {
    'all-to-all': whole * share,
    'all-gather': whole * (n - 1),
    'all-reduce': 2 * whole * share,
    'reduce-scatter': whole * share,
    'collective-permute': whole,
  }[kind]
