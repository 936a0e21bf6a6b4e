"""A plan before the bill: what fits, what is fastest, what the verb says."""

import dataclasses
import json
import math
import re

import pytest

from st_moe import cli
from st_moe.config import Config, DataConfig, StackConfig
from st_moe.plan import chips, cost, search
from tests.helpers import tiny

CONFIG = Config(
  model=tiny(
    encoder=StackConfig(2, 2, 1, group_size=128),
    decoder=StackConfig(2, 2, 1, group_size=128),
    dtype='bfloat16',
  ),
  data=DataConfig(batch_size=64, inputs_length=128, targets_length=64),
)
V5E = chips.named('v5e')


def test_every_mesh_once():
  found = list(search.meshes(CONFIG, 8))
  # Four axes whose sizes multiply to 8: 20 ways, less the one with 8 for 4
  # experts.
  assert len(found) == 20 - 1
  assert len({tuple(sizes.values()) for sizes in found}) == len(found)
  assert all(math.prod(sizes.values()) == 8 for sizes in found)


def test_groups_of_a_variant_lie_within_a_device():
  sizes = dict(data=2, fsdp=1, expert=4, model=1)
  for changed in search.variants(CONFIG, sizes):
    for stack in ('encoder', 'decoder'):
      tokens = 64 * CONFIG.data.length(stack) // changed.microbatches // 8
      assert tokens % changed.model.stack(stack).group_size == 0


def test_the_fastest_first():
  found = search.candidates(CONFIG, 8, V5E)
  times = [round(c.seconds.step, 2) for c in found]
  assert times == sorted(times)
  # To compute layers again is never faster, nor is anything smaller by it.
  best = found[0]
  assert best.config.model.remat == 'none'


def test_what_is_too_large_for_one_is_split():
  # So small a chip that a device cannot hold all that it keeps.
  whole = cost.cost(CONFIG, dict(data=8, fsdp=1, expert=1, model=1))
  small = dataclasses.replace(V5E, memory=whole.peak * 0.6)
  ranked = search.candidates(CONFIG, 8, small)
  fits = list(search.fitting(CONFIG, ranked, small, count=3))
  assert len(fits) == 3
  assert all(held.peak <= small.memory for _, held in fits)
  meshes = [tuple(c.sizes.values()) for c, _ in fits]
  assert len(set(meshes)) == 3
  none = dataclasses.replace(V5E, memory=1000.0)
  assert not list(search.fitting(CONFIG, ranked, none, count=3))


def test_the_network_between_machines_is_slow():
  h100 = chips.named('h100')
  rate = lambda *axes, **sizes: h100.rate(
    axes, dict(data=1, fsdp=1, expert=1, model=1) | sizes
  )
  assert rate('expert', expert=8) == h100.link
  assert rate('expert', expert=16) == h100.network
  assert rate('model', expert=4, model=2) == h100.link
  assert rate('expert', expert=8, model=2) == h100.network
  assert V5E.rate(('expert',), dict(expert=256)) == V5E.link


ARGS = ['plan', '--config=configs/st_moe_tiny.py']


def run(tmp_path, *args):
  output = tmp_path / 'plan.json'
  code = cli.run([*ARGS, f'--output={output}', *args])
  return code, json.loads(output.read_text())


def test_a_plan_of_one_mesh(tmp_path, capsys):
  code, found = run(
    tmp_path, '--chip=v5e', '--devices=8', '--config.mesh.expert=8'
  )
  assert code == 0 and found['fits']
  assert found['sizes'] == dict(data=1, fsdp=1, expert=8, model=1)
  held = found['cost']
  assert found['peak'] == pytest.approx(
    sum(held['state'].values()) + sum(held['step'].values())
  )
  said = capsys.readouterr().out
  assert 'kept for the backward pass' in said
  assert 'all-to-all along expert, 8 times' in said
  assert '% of the peak FLOPs' in said


def test_a_plan_that_does_not_fit(tmp_path, capsys, monkeypatch):
  tight = dataclasses.replace(V5E, memory=2.0**20)
  monkeypatch.setitem(chips.CHIPS, 'v5e', tight)
  code, found = run(tmp_path, '--chip=v5e', '--devices=8')
  assert code == 1 and not found['fits']
  said = ' '.join(capsys.readouterr().out.split())
  assert re.search('does not fit on 8 devices .*float32', said)
  # And one with room for what is split, but not for what is whole.
  tight = dataclasses.replace(V5E, memory=12 * 2.0**20)
  monkeypatch.setitem(chips.CHIPS, 'v5e', tight)
  code, found = run(tmp_path, '--chip=v5e', '--devices=8')
  assert code == 1 and not found['fits']
  said = ' '.join(capsys.readouterr().out.split())
  assert 'The step does not fit: a device would hold' in said
  tight = dataclasses.replace(V5E, memory=2.0**20)
  monkeypatch.setitem(chips.CHIPS, 'v5e', tight)
  code, found = run(tmp_path, '--chip=v5e', '--devices=8', '--search')
  assert code == 1 and found['ranked'] == [] and found['tried'] > 0
  assert 'Nothing fits on 8 v5e' in capsys.readouterr().out


def test_a_search(tmp_path, capsys):
  code, found = run(tmp_path, '--chip=v5e', '--devices=4', '--search')
  assert code == 0 and 0 < len(found['ranked']) <= 10
  steps = [round(row['seconds']['step'], 2) for row in found['ranked']]
  assert steps == sorted(steps)
  assert 'ms at best' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'One of --count'),
    (['--count', '--chip=v5e', '--devices=8'], 'One of --count'),
    (['--chip=v5e'], '--devices=0: of how many chips'),
    (['--chip=v5x', '--devices=8'], "'v5x'"),
    (['--topology=v5e:2x4', '--search'], '--search needs --chip'),
    (
      ['--chip=v5e', '--devices=8', '--config.mesh.model=3'],
      'model 3 = 3 does not divide 8 devices',
    ),
    (
      ['--chip=v5e', '--devices=7', '--search'],
      'does not divide',
    ),
    (
      ['--chip=v5e', '--devices=8', '--output=nowhere/plan.json'],
      'there is no nowhere',
    ),
  ],
)
def test_what_cannot_be_planned(flags, message):
  with pytest.raises(ValueError, match=message):
    cli.run([*ARGS, *flags])
