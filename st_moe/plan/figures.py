"""A plan to look at: a mesh, what a step takes, what a device holds."""

from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.patches import Rectangle

from st_moe import sharding
from st_moe.analysis.figures import Picture, colour
from st_moe.plan import cost, search
from st_moe.plan.chips import Chip
from st_moe.plan.tables import mesh_name


def mesh(sizes: Mapping[str, int], num_experts: int) -> Picture:
  """Devices as they lie in the mesh, each with the experts it holds.

  (A dense model counts as one expert.)

  A block is all devices along `expert` and `model`: within it tokens travel to
  their experts, and what a frame holds shares the weights of the same ones.
  Every block has a part of the batch; between them gradients travel, and along
  `fsdp`, where each keeps a part of all weights, the weights too.
  """
  expert, model = sizes['expert'], sizes['model']
  blocks = [(d, f) for d in range(sizes['data']) for f in range(sizes['fsdp'])]
  held = max(num_experts // expert, 1)
  wide = next(n for n in sharding.divisors(expert) if n * n >= expert)
  high = expert // wide
  across = min(len(blocks), max(1, 16 // (wide * model)))
  down = -(-len(blocks) // across)
  step = wide * model + 1.0, high + 1.6
  size = across * step[0] + 0.4, down * step[1] + 0.2
  figure = Picture(*(0.46 * n for n in size), layout='none')
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(-0.7, size[0] - 0.7), ylim=(size[1] - 1.2, -1.2))
  axes.axis('off')
  for n, (d, f) in enumerate(blocks):
    left, top = (n % across) * step[0], (n // across) * step[1]
    of = (
      (axis, i) for axis, i in (('data', d), ('fsdp', f)) if sizes[axis] > 1
    )
    title = ', '.join(f'{axis} {i}' for axis, i in of)
    axes.text(left, top - 0.3, title or 'all devices', size=9, weight='bold')
    for e in range(expert):
      x, y = left + e % wide * model, top + e // wide
      said = '-'.join(f'{n}' for n in sorted({e * held, (e + 1) * held - 1}))
      for m in range(model):
        box = Rectangle(
          (x + m + 0.03, y + 0.03), 0.94, 0.94, lw=0, fc=colour(e, 0.45)
        )
        axes.add_patch(box)
      if model > 1:
        edge = Rectangle((x, y), model, 1, fill=False, ec='black', lw=0.8)
        axes.add_patch(edge)
      axes.text(
        x + model / 2, y + 0.5, said, ha='center', va='center',
        size=8 if len(said) < 4 else 6,
      )  # fmt: skip
  return figure


def seconds(
  found: Iterable[tuple[search.Candidate, cost.Cost]],
) -> Picture:
  """Milliseconds of a step on each mesh, by what takes them, side by side."""
  found = list(found)
  figure = Picture(7.5, 1.1 + 0.75 * len(found))
  axes = figure.add_subplot()
  parts = ('products', 'memory', 'weights', 'tokens')
  for n, part in enumerate(parts):
    took = [1e3 * getattr(c.seconds, part) for c, _ in found]
    at = np.arange(len(found)) + (n - 1.5) * 0.2
    axes.barh(at, took, 0.2, color=colour(n), label=part)
  best = [1e3 * c.seconds.step for c, _ in found]
  at_best = dict(ms=28, mew=2, label='a step at best')
  axes.plot(best, range(len(found)), 'k|', **at_best)
  axes.set_yticks(range(len(found)), [mesh_name(c.sizes) for c, _ in found])
  axes.invert_yaxis()
  axes.set_xlabel('ms')
  axes.grid(axis='x', alpha=0.3)
  axes.set_axisbelow(True)
  figure.legend(
    loc='outside upper center', ncols=5, fontsize=8, markerscale=0.3
  )
  return figure


def memory(
  found: Iterable[tuple[search.Candidate, cost.Cost]], chip: Chip
) -> Picture:
  """GiB that a device holds on each mesh, by what they are for."""
  found, gib = list(found), 2**30
  figure = Picture(7.5, 1.4 + 0.42 * len(found))
  axes = figure.add_subplot()
  left = np.zeros(len(found))
  names = dict.fromkeys(k for _, held in found for k in held.state | held.step)
  for n, name in enumerate(names):
    size = [(h.state | h.step).get(name, 0) / gib for _, h in found]
    if any(size):
      axes.barh(range(len(found)), size, 0.7, left, color=colour(n), label=name)
      left += size
  axes.axvline(chip.memory / gib, color='black', lw=2)
  axes.set_yticks(range(len(found)), [mesh_name(c.sizes) for c, _ in found])
  axes.invert_yaxis()
  axes.set_xlabel('GiB; the line is what a chip has')
  figure.legend(loc='outside upper center', ncols=3, fontsize=8)
  return figure
