"""The table is whole, a difference shows, and a few of its kind in short."""

import numpy as np
import pytest

from tests import covering
from tests.covering import Case

# Fields as in `Case`; one device runs once for all three.
FEW = [
  Case((2, 1, 4, 1), 'equal', True, 'shard_map', 'index', 4, 'packed', 'tight'),
  Case(
    (1, 1, 4, 2), 'equal', True, 'shard_map', 'grouped', 1, 'packed', 'tight'
  ),
  Case((2, 2, 1, 2), 'more', True, 'gspmd', 'index', 1, 'packed', 'tight'),
]


@pytest.mark.parametrize('case', FEW, ids=str)
def test_eight_devices_train_as_one(case):
  found = covering.compare(case)
  assert found['passed'], found['worst']
  one = covering.reference(case)
  assert min(one.route_margin, one.sign_margin) > 1e-4


def test_the_table_covers_every_pair():
  table = covering.table()
  assert 36 <= len(table) <= 44
  assert covering.uncovered(table) == set()
  assert covering.uncovered(table[:-1])
  # 20 meshes with either of two; 4 sizes of an axis with 'equal' and 'more'.
  for factor in ('dispatcher', 'transport', 'scan', 'microbatches', 'rows'):
    assert len({(c.mesh, getattr(c, factor)) for c in table}) == 40
  for axis in range(4):
    met = {(c.mesh[axis], c.experts) for c in table if c.experts != 'fewer'}
    assert len(met) == 8
  longer = {c.mesh[2] for c in table if c.num_experts < c.mesh[2]}
  assert longer == {2, 4, 8}


def _steps():
  """One step of one weight, as a case finds it."""
  kinds = {k: {'w': np.ones(4, np.float32)} for k in covering.KINDS}
  kinds['metrics'] |= {'load': np.array([3, 5])}
  return [kinds]


@pytest.mark.parametrize('kind', covering.KINDS)
def test_a_difference_is_seen(kind):
  found = _steps()
  assert all(off == 0 for off, _ in _worst(found).values())
  found[0][kind]['w'][0] += 1e-4
  off, name = _worst(found)[kind]
  assert off == pytest.approx(5e-5, rel=1e-2) and name == f'0/{kind}/w'
  found[0][kind]['w'][0] = np.nan
  assert _worst(found)[kind][0] == np.inf


def test_a_single_token_elsewhere_is_seen():
  found = _steps()
  found[0]['metrics']['load'] = np.array([4, 4])
  assert _worst(found)['metrics'] == (np.inf, '0/metrics/load')


def _worst(found):
  return covering.differences(found, _steps())


def test_a_broken_run_goes_on_where_it_was(tmp_path, monkeypatch):
  path, ran = tmp_path / 'new' / 'found.jsonl', []
  cases = covering.table()[:3]

  def compare(case):
    ran.append(case)
    if len(ran) == 2:
      raise KeyboardInterrupt
    worst = dict.fromkeys(covering.KINDS, (1e-7, 'w'))
    return {'worst': worst, 'passed': True, 'seed': 0, 'seconds': 1}

  monkeypatch.setattr(covering, 'compare', compare)
  monkeypatch.setattr(covering, 'table', lambda: cases)
  start = lambda: covering.main([f'--output={path}'])
  with pytest.raises(KeyboardInterrupt):
    start()
  with path.open('a') as out:
    out.write('{"mesh": [8, ')
  assert start() == 0
  assert ran == [cases[0], cases[1], cases[1], cases[2]]
  assert start() == 0 and len(ran) == 4


def test_a_case_that_cannot_run_fails_alone(tmp_path, monkeypatch, capsys):
  def compare(case):
    raise ValueError('no such mesh')

  monkeypatch.setattr(covering, 'compare', compare)
  assert covering.main([f'--output={tmp_path / "found.jsonl"}']) == 1
  lines = (tmp_path / 'found.jsonl').read_text().splitlines()
  assert len(lines) == len(covering.table())
  assert 'ValueError: no such mesh' in capsys.readouterr().out
