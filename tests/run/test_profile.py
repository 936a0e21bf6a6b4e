"""A trace of the steps that were asked for, and no work for a wrong wish."""

import gzip
import json
import pathlib
import re

import jax
import pytest

from st_moe import cli
from st_moe.run import profile

TINY = '--config=configs/st_moe_tiny.py:runlocal'


@pytest.fixture(autouse=True)
def _untouched():
  name = 'jax_compilation_cache_include_metadata_in_key'
  before = getattr(jax.config, name)
  yield
  jax.config.update(name, before)


def test_which_steps():
  assert profile.steps('', 8) == range(0)
  assert profile.steps('3:5', 8) == range(3, 5)
  assert profile.steps('0:8', 8) == range(8)


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    ('20:10', '--profile=20:10: STOP has to be more than START'),
    ('5:5', 'STOP has to be more than START'),
    ('a:b', '--profile=a:b: write START:STOP, as 10:13'),
    ('7', 'write START:STOP'),
    ('-1:3', 'write START:STOP'),
    ('8:9', '--profile=8:9: the last step is 8'),
    ('6:20', 'the last step is 8'),
  ],
)
def test_what_cannot_be_traced(tmp_path, asked, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    cli.run(['train', TINY, f'--workdir={tmp_path}/w', f'--profile={asked}'])
  assert not (tmp_path / 'w').exists()


def test_the_trace_of_two_steps(tmp_path, capsys):
  steps = ['--profile=3:5', '--config.total_steps=5']
  cli.run(['train', TINY, f'--workdir={tmp_path}', *steps])
  assert f'The trace is in {tmp_path}/profile' in capsys.readouterr().out
  [found] = pathlib.Path(tmp_path, 'profile').rglob('perfetto_trace.json.gz')
  assert [*found.parent.glob('*.xplane.pb')]
  events = json.loads(gzip.decompress(found.read_bytes()))['traceEvents']
  numbers = {e['args']['step_num'] for e in events if e.get('name') == 'step'}
  assert numbers == {'4', '5'}


def test_a_run_started_again_may_have_them_behind_it(tmp_path):
  said = []
  profile.Profile(range(3, 5), tmp_path, said.append, start=5)
  assert said == ['No trace: steps 3:5 are done already.']


def test_an_error_ends_the_trace(tmp_path):
  said = []
  trace = profile.Profile(range(1, 9), tmp_path, said.append, start=0)
  trace.before(0, None)
  assert not said
  trace.before(1, None)
  trace.close()
  trace.close()
  assert len(said) == 1 and (tmp_path / 'profile' / 'plugins').is_dir()
