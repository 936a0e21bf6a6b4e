"""Installed, not only cloned: what a wheel holds is enough from any folder."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from st_moe import config_file
from tests import wheel

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The wheel of this tree, unpacked."""
  folder = tmp_path_factory.mktemp('wheel')
  zipfile.ZipFile(wheel.build(folder)).extractall(folder / 'site')
  return folder / 'site'


def _command(site, *words):
  done = subprocess.run(
    [sys.executable, '-P', '-m', 'st_moe.cli', *words],
    capture_output=True,
    text=True,
    cwd=site.parent,
    env={**os.environ, 'PYTHONPATH': str(site)},
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_wheel_trains(site, tmp_path):
  config = ['--config=st_moe_tiny:runlocal', '--config.total_steps=2']
  _command(site, 'train', *config, f'--workdir={tmp_path}')
  held = (tmp_path / 'config.py').read_text()
  assert held == (ROOT / 'configs' / 'st_moe_tiny.py').read_text()


def test_a_wheel_lists_what_a_clone_lists(site):
  shipped = {str(p.relative_to(ROOT)) for p in config_file.shipped()}
  inside = {str(p.relative_to(site / 'st_moe')) for p in site.rglob('*.py')}
  assert shipped <= inside
  gins = lambda root: {str(p.relative_to(root)) for p in root.rglob('*.gin')}
  held = gins(site / 'st_moe' / 'configs')
  assert held == gins(ROOT / 'configs') and 'gin/t5x/model.gin' in held
  rows = [line.split() for line in _command(site, 'methods').splitlines()]
  (row,) = (row for row in rows if 'gumbel_second' in row)
  assert row[-1] == 'yes'  # The experiments came along.


@pytest.mark.parametrize(
  'name',
  [
    'st_moe_tiny',
    'st_moe_tiny.py',
    'configs/st_moe_tiny',
    'configs/st_moe_tiny.py',
  ],
)
def test_a_config_by_its_name(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_file.find(name).name == 'st_moe_tiny.py'
  (tmp_path / 'st_moe_tiny').mkdir()  # Of a run, say.
  assert config_file.find(name).name == 'st_moe_tiny.py'


def test_a_mechanism_by_its_name():
  assert config_file.find('methods/gshard').name == 'gshard.py'
