"""The machines a plan may be for."""

import dataclasses
import math

from st_moe.config import unknown


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of one device, per second; sizes in bytes.

  `link` is what it sends to its neighbours, in one direction, all links
  together; `network` what reaches other slices or machines of `machine` chips
  (0: there are none).
  """

  flops: float  # bfloat16, dense.
  memory: float
  bandwidth: float
  link: float
  network: float
  machine: int = 0

  def rate(self, axes: tuple[str, ...], sizes: dict[str, int]) -> float:
    """What a chip sends along mesh axes: past its machine, by the network.

    Args:
      sizes: of all mesh axes, neighbours along the last.
    """
    order = list(sizes)
    first = min(order.index(axis) for axis in axes)
    reach = math.prod(sizes[axis] for axis in order[first:])
    return self.network if 0 < self.machine < reach else self.link


_G = 1e9
_GIB = 2**30

# TPUs: cloud.google.com/tpu/docs, one page a generation ('bidirectional
# inter-chip bandwidth per chip' is twice `link`). GPUs: NVIDIA's data sheets of
# the SXM modules; NVLink counts both directions; one 400 Gb/s port per GPU (200
# for A100) between machines.
CHIPS = {
  'v4': Chip(275e12, 32 * _GIB, 1228 * _G, 300 * _G, 6.25 * _G),
  'v5e': Chip(197e12, 16 * _GIB, 819 * _G, 200 * _G, 6.25 * _G),
  'v5p': Chip(459e12, 95 * _GIB, 2765 * _G, 600 * _G, 6.25 * _G),
  'v6e': Chip(918e12, 32 * _GIB, 1640 * _G, 400 * _G, 12.5 * _G),
  'a100': Chip(312e12, 80e9, 2039 * _G, 300 * _G, 25 * _G, 8),
  'h100': Chip(989e12, 80e9, 3350 * _G, 450 * _G, 50 * _G, 8),
  'h200': Chip(989e12, 141e9, 4800 * _G, 450 * _G, 50 * _G, 8),
}


def named(name: str) -> Chip:
  """The chip called `name`.

  Raises:
    ValueError: there is none in the table.
  """
  if name.lower() not in CHIPS:
    raise unknown('chip', name, CHIPS)
  return CHIPS[name.lower()]
