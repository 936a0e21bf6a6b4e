"""A plan before the bill: what fits, what is fastest, what the verb says."""

import dataclasses
import json
import math
import re

import pytest

from st_moe import cli
from st_moe.config import Config, DataConfig, StackConfig
from st_moe.plan import chips, cost, hlo, search, tables, topology
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


def test_more_devices_than_a_search_can_try():
  # 720720 has 240 divisors.
  with pytest.raises(ValueError, match='720720 devices make more than 1,000'):
    search.candidates(CONFIG, 720_720, V5E)
  # A prime makes three, found at once: all along one axis, but not `expert`.
  assert len(list(search.meshes(CONFIG, 1_000_000_007))) == 3
  with pytest.raises(ValueError, match='None of the 3 meshes of 1000000007'):
    search.candidates(CONFIG, 1_000_000_007, V5E)


def test_the_largest_groups_that_lie_within_a_device():
  # Of 62 tokens: not 2, as the greatest common divisor with 128 would have it.
  odd = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, targets_length=62)
  )
  sizes = dict(data=64, fsdp=1, expert=1, model=1)
  first = next(search.variants(odd, sizes))
  assert first.model.encoder.group_size == 128
  assert first.model.decoder.group_size == 62


def test_a_search_is_watched():
  seen = []
  watch = lambda meshes: (seen.append(sizes) or sizes for sizes in meshes)
  search.candidates(CONFIG, 2, V5E, watch=watch)
  assert seen == list(search.meshes(CONFIG, 2))


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


@pytest.mark.parametrize(
  'flags', [['--count'], ['--chip=v5e', '--devices=1']], ids=' '.join
)
def test_nothing_is_written_unasked(tmp_path, monkeypatch, capsys, flags):
  monkeypatch.chdir(tmp_path)
  assert cli.run([*ARGS, *flags]) == 0
  assert list(tmp_path.iterdir()) == []


def test_a_count_is_written_where_asked(tmp_path, capsys):
  code, found = run(tmp_path, '--count')
  assert code == 0 and found['all'] == sum(found['parameters'].values())
  assert f'{found["all"]:,}' in capsys.readouterr().out


def test_groups_that_straddle_devices_are_told(tmp_path, capsys):
  # Two groups of 1024 tokens on eight devices.
  _, found = run(tmp_path, '--chip=v5e', '--devices=8')
  said = ' '.join(capsys.readouterr().out.split())
  assert 'padded groups' in said and 'compute 4.00 times the places' in said
  assert len(found['notes']) == 2
  with pytest.raises(ValueError, match='4.0 times the places. Set model.enc'):
    run(tmp_path, '--chip=v5e', '--devices=8', '--config.max_padding=2')


def test_tables_fit_eighty_columns(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  # As large as they come: 4096 chips, seconds a step.
  sizes = dict(data=16, fsdp=2, expert=64, model=2)
  many = 'data', 'fsdp', 'expert'
  sent = [
    hlo.Exchange(kind, many, 480, 1.2e12)
    for kind in ('all-to-all', 'reduce-scatter')
  ]
  parts = 'attention', 'recomputed', 'padded groups'
  work = cost.Work(dict.fromkeys(parts, 3e15), 9e12, sent)
  held = cost.Cost(work, {'parameters': 9e10}, {'gradients': 9e9})
  v5p = chips.named('v5p')
  way = search.Candidate(
    dataclasses.replace(
      CONFIG,
      microbatches=16,
      model=tiny(
        encoder=StackConfig(group_size=4096),
        decoder=StackConfig(group_size=912),
        moe={'dispatcher': 'index'},
        remat='full',
      ),
    ),
    sizes,
    work,
    cost.seconds(work, v5p, sizes),
  )
  tables.ranked([(way, held)] * 10, v5p)
  tables.estimated(held, v5p, sizes, 'a title', ['a note ' * 30])
  memory = dict(arguments=9e10, peak=9.9e10)
  tables.compiled(
    topology.Compiled(memory, 9e15, 9e12, sent, held, ['a word ' * 30], 300.0),
    v5p,
    'train step on v5p:16x16x16, a device',
  )
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 80 and '…' not in ''.join(lines)
  # What belongs together stands in one line.
  rows = [' '.join(line.split()) for line in lines]
  mesh = 'data=16 fsdp=2 expert=64 model=2'
  assert f'10 {mesh} index 4096 912 16 full' in rows
  numbers = '21,607.8 19,607.8 3,255.0 2,000.0 2,000.0 26,862.8 30% 92.20'
  assert f'10 {numbers}' in rows
  assert 'products, GFLOP 9,000,000.00 9,000,000.00 +0.0% 19,607.8' in rows


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
    (['--count', '--output=.'], 'is a directory'),
  ],
)
def test_what_cannot_be_planned(flags, message):
  with pytest.raises(ValueError, match=message):
    cli.run([*ARGS, *flags])
