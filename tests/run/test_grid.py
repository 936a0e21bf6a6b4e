"""Grids: which cells there are, what their table says, and going on."""

import dataclasses
import json

import pytest

from st_moe import cli, config_file
from st_moe.config import Config, OptimizerConfig
from st_moe.run import grid, owner


def test_cells_are_all_combinations():
  assert grid.cells(['seed=0,1', 'optimizer.train=moe']) == [
    {'seed': '0', 'optimizer.train': 'moe'},
    {'seed': '1', 'optimizer.train': 'moe'},
  ]
  # The capacities of Table 5 change together.
  train, test = (
    'model.moe.train_capacity.factor',
    'model.moe.eval_capacity.factor',
  )
  assert grid.cells([f'{train}+{test}=0.75+2.0,4.0+5.0']) == [
    {train: '0.75', test: '2.0'},
    {train: '4.0', test: '5.0'},
  ]


def test_values_that_hold_commas():
  part = "{'name': 'top_k', 'k': 2}"
  assert grid.cells([f'model.moe.selector={part},top_p']) == [
    {'model.moe.selector': part},
    {'model.moe.selector': 'top_p'},
  ]


def test_a_cell_has_a_directory_of_its_own():
  cell = {'seed': '1', 'model.moe.train_capacity.factor': '2.0'}
  assert grid.directory(cell) == 'seed=1,train_capacity.factor=2.0'
  # Of a path the end, unless it is one of several values.
  assert grid.directory({'init': 'runs/a/'}) == 'init=a'
  gate = "{'name': 'hash', 'vectors': 'a/b.npy'}"
  assert grid.directory({'moe.gate': gate}) == (
    "moe.gate={'name': 'hash', 'vectors': 'a_b.npy'}"
  )
  with pytest.raises(ValueError, match="two cells 'seed=0'"):
    grid.cells(['seed=0,1,0'])


@pytest.mark.parametrize('vary', ['seed', 'seed+data.seed=0', 'seed=0+1'])
def test_values_that_fit_no_field(vary):
  with pytest.raises(ValueError, match='write FIELD=a,b'):
    grid.cells([vary])


def _rows(scores, loss):
  return [{'step': 2, 'loss': loss, 'encoder/dropped_tokens': 0.1}] + [
    {'step': step, 'eval/a/accuracy': value} for step, value in scores.items()
  ]


def _trains(rows, fails=()):
  """A stand-in for `loop.train` that leaves these rows behind."""
  done = []

  def train(config, workdir, config_path=''):
    name = workdir.name
    if name in fails:
      raise ValueError('3 steps in a row were not finite')
    done.append(name)
    workdir.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(row) + '\n' for row in rows[name])
    (workdir / 'metrics.jsonl').write_text(text)

  return train, done


def _make(cell):
  train = cell.get('optimizer.train', 'all')
  return dataclasses.replace(Config(), optimizer=OptimizerConfig(train=train))


ROWS = {
  'optimizer.train=all,seed=0': _rows({1: 50.0, 2: 60.0}, 1.0),
  'optimizer.train=all,seed=1': _rows({1: 64.0, 2: 62.0}, 2.0),
  'optimizer.train=moe,seed=0': _rows({1: 51.0, 2: 50.0}, 3.0),
  'optimizer.train=moe,seed=1': _rows({1: 53.0, 2: 50.0}, 3.0),
}
VARY = ['optimizer.train=all,moe', 'seed=0,1']


def test_a_config_beside_those_that_vary_is_refused(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(grid.loop, 'train', _trains({})[0])
  path = 'configs/methods/top_p.py'
  flags = [f'--config={path}', f'--vary=config={path}:base,{path}']
  with pytest.raises(SystemExit):
    cli.main(['grid', *flags, f'--workdir={tmp_path}'])
  assert '--config is given twice' in capsys.readouterr().err


def test_configs_side_by_side(tmp_path, monkeypatch):
  ran = {}

  def train(config, workdir, config_path=''):
    ran[workdir.name] = config.model.moe.selector.name, config_path
    _trains({workdir.name: _rows({1: 50.0}, 1.0)})[0](config, workdir)

  monkeypatch.setattr(grid.loop, 'train', train)
  path = 'configs/methods/top_p.py'
  vary = f'--vary=config={path}:base,{path}'
  with pytest.raises(SystemExit, match='0'):
    cli.main(['grid', vary, f'--workdir={tmp_path}'])
  assert ran == {
    'config=top_p.py:base': ('top_k', f'{path}:base'),
    'config=top_p.py': ('top_p', path),
  }


def test_the_table_has_peaks_over_seeds(tmp_path, monkeypatch, capsys):
  train, done = _trains(ROWS)
  monkeypatch.setattr(grid.loop, 'train', train)
  grid.run(_make, VARY, tmp_path)
  assert done == list(ROWS)
  # Peaks 60 and 64: 62 and sqrt((4 + 4) / 1) = 2.83; 51 and 53: 52 and 1.41.
  # Seed by seed -9 and -11.
  table = (
    '| optimizer.train | runs | eval/a/accuracy | eval/a/accuracy, less row 1'
    ' | train loss | dropped |\n'
    '| --- | --- | --- | --- | --- | --- |\n'
    '| all | 2 | 62.00 ± 2.83 |  | 1.500 ± 0.707 | 10.0% |\n'
    '| moe | 2 | 52.00 ± 1.41 | -10.00 ± 1.41 | 3.000 ± 0.000 | 10.0% |\n'
  )
  assert (tmp_path / 'grid.md').read_text() == table
  assert table in capsys.readouterr().out
  cells = json.loads((tmp_path / 'grid.json').read_text())['cells']
  best = cells['optimizer.train=all,seed=1']['best']
  assert best == {'eval/a/accuracy': [1, 64.0]}


def test_a_cell_that_fails_stops_no_other(tmp_path, monkeypatch):
  bad = 'optimizer.train=all,seed=1'
  train, done = _trains(ROWS, fails=[bad])
  monkeypatch.setattr(grid.loop, 'train', train)
  with pytest.raises(ValueError, match=f'1 cells failed: {bad}'):
    grid.run(_make, VARY, tmp_path)
  assert len(done) == 3
  about = json.loads((tmp_path / 'grid.json').read_text())
  assert about['failed'] == {bad: '3 steps in a row were not finite'}
  assert about['table'][0]['runs'] == '1'


def test_a_bad_cell_is_told_before_any_is_trained(tmp_path, monkeypatch):
  train, done = _trains(ROWS)
  monkeypatch.setattr(grid.loop, 'train', train)

  def make(cell):
    if cell['seed'] == '1':
      raise ValueError('config.seed = 1 is taken')
    return Config()

  with pytest.raises(ValueError, match='is taken'):
    grid.run(make, ['seed=0,1'], tmp_path)
  assert not done


def test_a_metric_that_nobody_measured(tmp_path, monkeypatch):
  train, _ = _trains({'seed=0': _rows({1: 50.0}, 1.0)})
  monkeypatch.setattr(grid.loop, 'train', train)
  with pytest.raises(ValueError, match="Did you mean 'eval/a/accuracy'"):
    grid.run(_make, ['seed=0'], tmp_path, metrics=['eval/a/acuracy'])


def test_a_misspelt_metric_is_told_before_any_cell(tmp_path, monkeypatch):
  train, done = _trains({})
  monkeypatch.setattr(grid.loop, 'train', train)
  (tmp_path / 'text.txt').write_text('one two three ' * 40)
  fields = {
    'data.mixture': {'mine': 1.0},
    'data.files.mine.train': str(tmp_path / 'text.txt'),
    'data.files.mine.validation': str(tmp_path / 'text.txt'),
    'data.cache_dir': str(tmp_path),
  }
  config = config_file.load('configs/st_moe_tiny.py:runlocal', fields)
  run = lambda metric: grid.run(
    lambda cell: config, ['seed=0'], tmp_path / 'grid', metrics=[metric]
  )
  with pytest.raises(ValueError, match="Did you mean 'eval/mine/loss'"):
    run('eval/mine/los')
  assert not done and not (tmp_path / 'grid').exists()


def test_two_grids_do_not_meet(tmp_path):
  with owner.held(tmp_path):
    with pytest.raises(ValueError, match='which is at work'):
      grid.run(_make, ['seed=0'], tmp_path)
  with pytest.raises(ValueError, match='workdir is empty: name a folder'):
    grid.run(_make, ['seed=0'], '')


def test_the_verb_sets_the_fields_of_each_cell(tmp_path, monkeypatch):
  seen = []

  def train(config, workdir, config_path=''):
    seen.append((workdir.name, config.seed, config.optimizer.train))

  monkeypatch.setattr(grid.loop, 'train', train)
  monkeypatch.setattr(grid, '_tell', lambda *_: None)
  cli.run([
    'grid', '--config=configs/st_moe_tiny.py:runlocal', '--config.seed=9',
    f'--workdir={tmp_path}', '--vary=optimizer.train=all,router',
  ])  # fmt: skip
  assert seen == [
    ('optimizer.train=all', 9, 'all'),
    ('optimizer.train=router', 9, 'router'),
  ]
