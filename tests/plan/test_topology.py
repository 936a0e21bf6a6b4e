"""The train step through the compiler for TPUs."""

import importlib.util
import json

import pytest

from st_moe import cli

CONFIG = '--config=configs/st_moe_tiny.py'


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    ValueError, match=r'pip install "jax\[tpu\]".*--count instead'
  ):
    cli.run(['plan', CONFIG, '--topology=v5e:2x2'])


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  output = tmp_path_factory.mktemp('plan') / 'plan.json'
  fields = (
    'mesh.expert=8',
    # A group for each device.
    'model.encoder.group_size=256',
    'model.decoder.group_size=58',
  )
  args = ['plan', CONFIG, '--topology=v5e:2x4', f'--output={output}']
  assert cli.run([*args, *(f'--config.{f}' for f in fields)]) == 0
  return json.loads(output.read_text())['compiled']


def test_what_the_compiler_says(compiled):
  memory = compiled['memory']
  assert memory['peak'] == sum(v for k, v in memory.items() if k != 'peak')
  assert 0 < memory['arguments'] < memory['peak'] < 16 * 2**30
  assert compiled['flops'] > 0 and compiled['bytes'] > 0
  assert compiled['warnings'] == []


def test_four_exchanges_a_sparse_layer(compiled):
  # Two there and two back in the one sparse layer of each stack, and beside
  # them nothing but sums of gradients.
  found = {(e['kind'], *e['axes']): e['count'] for e in compiled['exchanges']}
  assert found.pop(('all-to-all', 'expert')) == 8
  assert set(found) == {('all-reduce', 'expert')}


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v5e:3x3x3'], 'topology=v5e:3x3x3.*as v5e:4x4'),
    (
      ['--topology=v5e:2x4', '--config.mesh.model=3'],
      'model 3 = 3 does not divide 8 devices',
    ),
  ],
)
def test_what_cannot_be_compiled(flags, message):
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  with pytest.raises(ValueError, match=message):
    cli.run(['plan', CONFIG, *flags])
