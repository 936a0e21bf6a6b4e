"""A plan in pictures: every device once, and the numbers of the tables."""

import pytest

from st_moe import sharding
from st_moe.config import Config
from st_moe.plan import chips, cost, figures, search


def _texts(picture):
  return [t.get_text() for t in picture.axes[0].texts]


def test_a_mesh_has_every_device_once():
  sizes = {'data': 2, 'fsdp': 2, 'expert': 8, 'model': 2}
  picture = figures.mesh(sizes, 16)
  chips_drawn = [p for p in picture.axes[0].patches if p.get_fill()]
  assert len(chips_drawn) == 64
  said = _texts(picture)
  # Four blocks, each with all 16 experts, two a device.
  assert said.count('data 1, fsdp 0') == 1 and said.count('14-15') == 4
  one = figures.mesh(dict.fromkeys(sizes, 1), 4)
  assert _texts(one) == ['all devices', '0-3']


def test_bars_are_the_numbers_of_the_plan():
  way = dict.fromkeys(sharding.AXES, 1)
  work = cost.Work({'experts': 1e12}, 1e9, [])
  took = cost.Seconds(products=0.3, memory=0.2, weights=0.1, tokens=0.05)
  candidate = search.Candidate(Config(), way, work, took)
  held = cost.Cost(work, {'parameters': 2**31}, {'gradients': 2**30})
  found = [(candidate, held)]
  axes = figures.seconds(found).axes[0]
  widths = [patch.get_width() for patch in axes.patches]
  assert widths == pytest.approx([300, 200, 100, 50])
  # The longest of three, and tokens, for which everything waits.
  assert axes.lines[0].get_xdata() == pytest.approx([350])
  axes = figures.memory(found, chips.named('v5e')).axes[0]
  bars = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
  assert bars == [(0, 2), (2, 1)]  # GiB, one behind the other.
  assert axes.lines[0].get_xdata()[0] == 16
