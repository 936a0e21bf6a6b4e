"""What the pages under docs say works."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import pytest

from st_moe import config_file, verbs
from st_moe.config import DataConfig, OptimizerConfig, Part
from st_moe.data import pipeline, vocabulary
from st_moe.data.eval_data import EvalData
from st_moe.data.mixture import Library
from st_moe.model import parts
from st_moe.routing import shaping
from st_moe.run import grid
from tests import (
  experiments,
  fields_page,
  gin_page,
  methods_page,
  names_page,
)
from tests.methods import steps

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / 'docs' / 'tasks.md').read_text()


def test_the_task_of_the_page_is_trained_and_scored(tmp_path, monkeypatch):
  (code,) = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
  assert len([line for line in code.splitlines() if line]) <= 15
  (tmp_path / 'my_tasks.py').write_text(code)
  (tmp_path / 'mood').mkdir()
  rows = [
    {'text': 'so sunny', 'mood': 'happy'},
    {'text': 'rain', 'mood': 'sad'},
  ]
  for name in ('train', 'val'):
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (tmp_path / 'mood' / f'{name}.jsonl').write_text(lines)

  from st_moe.data import catalogue

  monkeypatch.setattr(catalogue, 'TASKS', dict(catalogue.TASKS))
  monkeypatch.syspath_prepend(tmp_path)
  importlib.import_module('my_tasks')
  config = DataConfig(
    mixture={'mood': 1.0},
    data_dir=str(tmp_path),
    cache_dir=str(tmp_path / 'cache'),
    inputs_length=32,
    targets_length=8,
    batch_size=2,
  )
  vocab = vocabulary.load('bytes')
  Library(config).check()
  batch = pipeline.TrainData(Library(config, vocab)).batch(0)
  told = {vocab.decode(row) for row in batch['encoder_input_tokens']}
  assert told == {'mood text: so sunny', 'mood text: rain'}
  source = EvalData(Library(config, vocab), 'mood')
  assert source.choices(source.examples[0]) == ('sad', 'happy')
  scores = source.scores(source.examples, ['happy', 'happy'])
  assert scores == {'accuracy': 50.0}
  sys.modules.pop('my_tasks')


def test_the_mechanism_of_the_page_takes_a_step(tmp_path, monkeypatch):
  page = (ROOT / 'CONTRIBUTING.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  lines = [line for line in code.splitlines() if line]
  assert sum('import ' not in line for line in lines) < 30
  assert 'tempered' not in shaping.SHAPING
  table = dict(shaping.SHAPING)
  monkeypatch.setattr(shaping, 'SHAPING', table)
  monkeypatch.setitem(parts.TABLES, 'shaping', table)
  path = tmp_path / 'tempered.py'
  path.write_text(code)
  # As a file of configs it enters itself into the table.
  base, config = (
    config_file.load(f'{path}:{arg}runlocal') for arg in ('base,', '')
  )
  changed = config_file.diff(*map(config_file.to_dict, (base, config)))
  assert len(changed) == 1 and changed[0].startswith('model.moe.shaping.')
  parts.check(config.model)
  named = {'__name__': 'tempered'}
  exec(code, named)
  named['test_twice_as_warm_is_the_root']()

  with pytest.raises(ValueError, match='shaping.at = 0 should be .* above 0'):
    parts.choose('shaping', Part.of('tempered', at=0))
  # Where nothing learns routers cool down nevertheless.
  model = steps.encoder(moe={'shaping': config.model.moe.shaping})
  still = OptimizerConfig(learning_rate=0.0)
  run = steps.Run(steps.config_of(model, optimizer=still))
  entropy = [run.take()['encoder/router_entropy'] for _ in range(10)]
  assert entropy[:9] == sorted(entropy[:9], reverse=True)
  assert entropy[0] > entropy[8] == entropy[9]
  assert 0 < run.evaluated() < 100


def _commands(verb):
  text = PAGE.replace('\\\n', ' ')
  lines = re.findall(rf'^st-moe {verb} .*$', text, re.MULTILINE)
  return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize('number', range(3))
def test_the_grids_of_the_page_are_those_of_the_paper(number):
  _, parsers = verbs.parser()
  flags, overrides = parsers['grid'].read(_commands('grid')[number][1:])
  cells = grid.cells(flags.vary)
  # Figure 5 over three seeds, Table 5, Table 20 of sparse models.
  assert len(cells) == (15, 8, 18)[number]
  del overrides['init']
  for cell in cells:
    config_file.load(flags.config, {**overrides, **cell})


def test_every_experiment_has_its_verdict_in_the_table():
  assert len(experiments.entries()) > 40
  assert [e for e in experiments.entries() if not e[3]] == []
  said = experiments.PAGE.read_text()
  assert said == experiments.page(), 'python -m tests.experiments writes it'
  # A link leads to a heading that there is.
  assert experiments.anchor("2026-11-22 `a_b` of c's: 0.5, d") == (
    '2026-11-22-a_b-of-cs-05-d'
  )


@pytest.mark.parametrize(
  'made', [methods_page, gin_page, fields_page, names_page]
)
def test_a_page_of_tables_is_that_of_the_code(made):
  said = made.PAGE.read_text()
  assert said == made.page(), f'python -m {made.__name__} writes it'
