"""The command: quick where it should be, and every mistake one message."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from st_moe import cli, config_file
from st_moe.config import Config
from st_moe.data import files
from st_moe.interop import ours
from st_moe.model.transformer import Transformer
from st_moe.train import step
from tests.helpers import random_params, tiny

ROOT = pathlib.Path(__file__).parents[1]
TINY = 'configs/st_moe_tiny.py:runlocal'


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
  """What the command does to its process stays in its test."""
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.setitem(os.environ, 'TF_CPP_MIN_LOG_LEVEL', '3')
  level = logging.getLogger('absl').level
  yield
  logging.getLogger('absl').setLevel(level)


def _python(code, **environment):
  """Runs Python in a process of its own."""
  return subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    capture_output=True,
    text=True,
  )


def _fails(capsys, *argv) -> str:
  """The message of a command that must end with 1 and nothing but it."""
  with pytest.raises(SystemExit) as e:
    cli.main([str(a) for a in argv])
  said = capsys.readouterr()
  assert e.value.code == 1
  assert said.err.startswith('st-moe: ') and said.err.endswith('\n')
  assert 'Traceback' not in said.out + said.err
  return said.err.removeprefix('st-moe: ').removesuffix('\n')


def _runs(capsys, *argv) -> str:
  with pytest.raises(SystemExit) as e:
    cli.main([str(a) for a in argv])
  said = capsys.readouterr()
  assert e.value.code == 0 and said.err == ''
  return said.out


# Processes of their own.

_HELP = """
import sys, time
from st_moe import cli
try:
  cli.main(['--help'])
finally:
  print(time.process_time(), *{name.split('.')[0] for name in sys.modules})
"""


def test_help_is_quick_and_needs_nothing():
  found = _python(_HELP)
  assert found.returncode == 0 and found.stderr == ''
  text, last = found.stdout.rsplit('\n', 2)[:2]
  seconds, *modules = last.split()
  assert float(seconds) < 0.5
  heavy = {'jax', 'jaxlib', 'flax', 'numpy', 'tensorflow', 'seqio', 'orbax'}
  assert not heavy & set(modules)
  for verb in ('train', 'evaluate', 'prepare', 'report', 'doctor', 'list'):
    assert f'\n    {verb} ' in text


def test_a_mistake_is_one_line_of_a_real_process(tmp_path):
  arguments = ['train', f'--config={TINY}', f'--workdir={tmp_path / "w"}']
  mistake = '--config.model.moe.selector.k=9'
  (tmp_path / 'jax.py').write_text('raise SystemExit("ran what lies here")')
  found = subprocess.run(
    [sys.executable, '-m', 'st_moe.cli', *arguments, mistake],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    cwd=tmp_path,  # Configs that are shipped are found from anywhere.
    capture_output=True,
    text=True,
  )
  assert found.returncode == 1 and found.stdout == ''
  assert found.stderr == 'st-moe: k=9 experts per token; it must be 1 to 8.\n'
  assert not (tmp_path / 'w').exists()


_DOCTOR = """
import sys, time
from st_moe import cli
try:
  cli.main(['doctor', '--workdir', sys.argv[-1]])
finally:
  print(time.process_time())
"""


def test_doctor_answers_in_seconds(tmp_path):
  found = _python(_DOCTOR.replace('sys.argv[-1]', repr(str(tmp_path))))
  assert found.returncode == 0, found.stderr
  *lines, seconds = found.stdout.splitlines()
  assert float(seconds) < 10
  assert all(line.startswith('ok ') for line in lines)
  asked = [line.split()[1] for line in lines]
  for question in ('versions', 'devices', 'memory', 'writing', 'corpus'):
    assert question in asked
  assert 'GiB free' in found.stdout and 'cpu:0' in found.stdout


def test_doctor_says_what_stands_in_the_way(tmp_path, capsys):
  nowhere = tmp_path / 'nowhere'
  with pytest.raises(SystemExit) as e:
    cli.main(['doctor', f'--workdir={nowhere}'])
  said = capsys.readouterr().out
  assert e.value.code == 1
  (bad,) = (line for line in said.splitlines() if line.startswith('no '))
  assert 'writing' in bad and str(nowhere) in bad


# What is asked, and answered at once.


def test_lists(capsys):
  configs = _runs(capsys, 'list', 'configs')
  assert 'configs/st_moe_tiny.py ' in configs
  assert 'Pre-trains a very small ST-MoE' in configs
  methods = [
    line.split() for line in _runs(capsys, 'list', 'methods').split('\n')
  ]
  named = {tuple(line[:2]) for line in methods if line}
  assert {
    ('gate', 'linear'),
    ('selector', 'top_k'),
    ('dispatcher', 'grouped'),
    ('loss', 'router_z'),
  } <= named


def test_a_resolved_config(capsys):
  text = _runs(
    capsys, 'config', f'--config={TINY}', '--config.model.moe.num_experts=2'
  )
  resolved = json.loads(text)
  assert resolved['model']['moe']['num_experts'] == 2
  assert resolved['total_steps'] == 8 and resolved['name'] == 'st_moe_tiny'


def test_two_configs_side_by_side(capsys, tmp_path):
  dense = 'configs/st_moe_tiny.py:dense,seed=3'
  lines = _runs(capsys, 'config', 'diff', 'configs/st_moe_tiny.py', dense)
  assert lines.splitlines() == [
    'data.seed: 0 -> 3',
    'model.dense: False -> True',
    'seed: 0 -> 3',
  ]
  # A workdir is what its run was started with.
  text = _runs(capsys, 'config', f'--config={dense}')
  (tmp_path / 'config.json').write_text(text)
  assert _runs(capsys, 'config', 'diff', tmp_path, dense) == ''


# Mistakes. None of them may leave anything behind.


@pytest.fixture
def train(tmp_path, capsys):
  """Fails to train a tiny config on eight devices; returns the message."""
  workdir = tmp_path / 'run'

  def fail(*flags, config=TINY):
    message = _fails(
      capsys,
      'train',
      f'--config={config}',
      f'--workdir={workdir}',
      f'--config.data.cache_dir={tmp_path / "cache"}',
      *flags,
    )
    assert not workdir.exists() and not (tmp_path / 'cache').exists()
    return message

  return fail


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      'model.embed_dimm=3',
      "field of config.model 'embed_dimm'. Did you mean 'em",
    ),
    ('modle.embed_dim=3', "field of config 'modle'. Did you mean 'model'?"),
    ('total_steps=many', "config.total_steps = 'many' should be a int"),
    ('model.dense=3', 'config.model.dense = 3 should be a bool'),
    ('total_steps=0', 'total_steps is 0; set how long to train'),
    (
      'data.batch_size=12',
      'batch_size=12 does not divide into 1 microbatches on 8 devices; the'
      ' nearest that do are 8 and 16',
    ),
    ('microbatches=0', 'microbatches=0 must both be at least 1'),
    (
      'evaluate.batch_size=12',
      'evaluate.batch_size=12 does not divide among 8',
    ),
    (
      'mesh.data=3',
      'A mesh of data 3 x fsdp 1 x expert 1 x model 1 needs 3 devices; there',
    ),
    (
      'mesh.expert=3',
      '8 experts do not split over mesh.expert=3; the nearest sizes',
    ),
    ('model.vocab_size=300', 'model.vocab_size 300 is smaller than the vocab'),
    ('data.vocabulary=no.model', 'data.vocabulary no.model: no such file'),
    (
      'init=nowhere',
      '/nowhere: give a workdir of `st-moe train`, or one of',
    ),
    ('optimizer.name=adam', "'adam' is none of adafactor, adamw"),
    ('optimizer.decay=cosine', "decay 'cosine' is no rsqrt and no none"),
    ('loss.router.load_balanse=1', "Did you mean 'load_balance'?"),
    ('model.moe.selector=top_kk', "selector 'top_kk'. Did you mean 'top_k'?"),
    ('model.moe.selector.kk=2', "option of selector 'top_k' 'kk'"),
    ('model.moe.dispatcher=indexx', "Did you mean 'index'?"),
    ('model.encoder.sparse_offset=5', 'sparse_offset 5 is never reached'),
  ],
)
def test_a_field_that_cannot_be(train, flag, message):
  assert message in train(f'--config.{flag}')


def test_modules_of_the_current_folder_are_for_module_import_alone(
  train, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  here = str(tmp_path)
  train('--config.total_steps=0')
  assert here not in sys.path
  (tmp_path / 'jax.py').write_text('raise SystemExit("ran what lies here")')
  (tmp_path / 'my_tasks.py').write_text('import jax.numpy')
  train('--config.total_steps=0', '--module_import=my_tasks')
  assert sys.path.index(here) == len(sys.path) - 1
  del sys.modules['my_tasks']


def test_microbatches_of_broken_groups(train):
  message = train(
    '--config.data.batch_size=32',
    '--config.microbatches=4',
    '--config.model.encoder.group_size=100',
  )
  assert message == (
    'A microbatch of 8 x 32 tokens is no whole number of encoder groups of 100;'
    ' the nearest group sizes that divide are 64 and 128'
    ' (model.encoder.group_size).'
  )


def test_a_config_that_is_not_there(train):
  message = train(config='configs/st_moe_tinny.py')
  assert "config file 'configs/st_moe_tinny.py'. Did you mean" in message
  assert "'configs/st_moe_tiny.py'?" in message
  message = train(config='configs/st_moe_tiny.py:runlocall')
  assert "argument 'runlocall'. Did you mean 'runlocal'?" in message
  message = train(config='configs/st_moe_tiny.py:seed=one')
  assert "argument seed='one' should be a int" in message
  assert 'Pass --config=configs/NAME.py' in train(config='')


def test_flags_that_are_none(train, capsys):
  assert "Unknown flag '--stepz'" in train('--stepz=3')
  assert "Unknown flag 'total_steps'" in train('total_steps=3')
  assert '--config.seed needs a value' in train('--config.seed')
  assert '--module_import=no_such_module' in train(
    '--module_import=no_such_module'
  )
  message = _fails(capsys, 'doctor', '--config.seed=3')
  assert message == '`st-moe doctor` has no config to set fields of.'
  assert 'only `config diff A B`' in _fails(capsys, 'config', 'dif', 'a', 'b')


@pytest.mark.parametrize(
  ('name', 'data', 'message'),
  [
    ('none.txt', None, '{}: no such file.'),
    ('empty.jsonl', b'', '{} is empty: it holds no document.'),
    ('latin.txt', b'one\ncaf\xe9\n', '{}, line 2 is not UTF-8'),
    (
      'broken.jsonl',
      b'{"text": "a"}\n{"text": "b"\n',
      '{}, line 2: broken JSON',
    ),
    ('field.jsonl', b'{"body": "a"}\n', "{}, line 1 has no field 'text'"),
  ],
)
def test_text_that_cannot_be_read(train, tmp_path, name, data, message):
  path = tmp_path / name
  if data is not None:
    path.write_bytes(data)
  found = train(
    f'--config.data.files.mine.train={path}', '--config.data.mixture.mine=1'
  )
  assert message.format(path) in found


def test_a_workdir_of_another_config(tmp_path, capsys):
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints' / '4').mkdir(parents=True)
  seeded = config_file.load(f'{TINY},seed=1')
  (workdir / 'config.json').write_text(config_file.to_json(seeded))
  before = sorted(workdir.rglob('*'))
  message = _fails(
    capsys,
    'train',
    f'--config={TINY}',
    f'--workdir={workdir}',
    '--config.total_steps=99',  # This may change.
  )
  assert message == (
    f'{workdir} belongs to another config:\n  data.seed: 1 -> 0\n  seed: 1 -> 0'
    '\nUse another workdir, or the config it was started with.'
  )
  assert sorted(workdir.rglob('*')) == before


def test_a_full_disk(tmp_path, capsys, monkeypatch):
  def full(path, data):
    raise OSError(errno.ENOSPC, 'No space left on device', str(path))

  monkeypatch.setattr(files, 'write_whole', full)
  workdir = tmp_path / 'run'
  arguments = f'--config={TINY}', f'--workdir={workdir}'
  assert _fails(capsys, 'train', *arguments) == (
    f'The disk of {workdir / "config.json"} is full. What was saved before is'
    ' intact: free some space and run the same command again.'
  )


def test_an_error_with_its_trace(capsys, monkeypatch):
  monkeypatch.setenv('ST_MOE_TRACEBACK', '1')
  with pytest.raises(ValueError, match='Which config'):
    cli.main(['config'])


def test_checkpoints_that_are_none(tmp_path, capsys):
  message = _fails(capsys, 'evaluate', f'--checkpoint={tmp_path}')
  assert message == (
    f'No checkpoint in {tmp_path}: give a workdir of `st-moe train`, or one of'
    ' its checkpoints/STEP.'
  )
  message = _fails(capsys, 'report', tmp_path)
  assert message == f'{tmp_path} is no workdir of `st-moe train`.'


@pytest.fixture(scope='session')
def tiny_model(tmp_path_factory):
  """A checkpoint of a random model that reads bytes."""
  config = Config(model=tiny(vocab_size=360))
  one = np.ones((1, 1), np.int32)
  params = random_params(Transformer(config.model), one, one, one)
  path = tmp_path_factory.mktemp('answers') / 'model'
  ours.save(str(path), params, config, b'')
  return path


def test_generate(capsys, tiny_model, tmp_path):
  ask = ('generate', f'--checkpoint={tiny_model}', '--max_length=4')
  said = _runs(capsys, *ask, '--jsonl', '--field=q', '{"q": "hi", "id": 1}')
  row = json.loads(said)
  assert row['id'] == 1 and len(row['outputs'][0]['tokens']) == 4
  (tmp_path / 'in').write_text('hi\n\nthere\n')
  with pytest.raises(SystemExit) as e:
    cli.main([*ask, f'--input={tmp_path}/in', f'--output={tmp_path}/out'])
  assert e.value.code == 0
  first, empty, last = (tmp_path / 'out').read_text().splitlines()
  assert first == row['outputs'][0]['text'] and empty == '' and last
  assert 'wrote' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--input=no.txt'], 'no.txt: no such file.'),
    (['--targets=t'], '--targets names a field of JSON objects: add --jsonl.'),
    (['hi', '--input=x'], 'Prompts as arguments or in --input, not both.'),
    (['hi', '--off=decoder.1.9'], 'decoder.1.9: the experts are 0, 1, 2, 3.'),
    (['hi', '--top_p=0'], 'top_p 0.0 must be above 0 and at most 1.'),
    (['hi', '--early_stopping=yes'], "must be true, false or 'never'."),
    (['hi', '--long=trim'], "long 'trim'"),
    (['x' * 600, '--long=refuse'], 'Prompt 1 has 600 tokens, of 511 that'),
    (['hi', '--vocabulary=no.model'], 'no.model: no such file'),
    (['hi', '--contrast=0.5', '--contrast_rank=9'], 'there are 4 experts.'),
  ],
)
def test_what_generate_refuses(capsys, tiny_model, flags, message):
  ask = ('generate', f'--checkpoint={tiny_model}', *flags)
  assert message in _fails(capsys, *ask)


def test_a_model_without_a_vocabulary(capsys, tiny_model, tmp_path):
  found = ours.open_source(str(tiny_model))
  shapes = step.abstract_params(Transformer(found.config.model))
  bare = tmp_path / 'bare'
  ours.save(str(bare), found.load(shapes), found.config, None)
  for verb in ('generate', 'evaluate'):
    said = _fails(capsys, verb, f'--checkpoint={bare}')
    assert 'bare has no vocabulary: give the SentencePiece model' in said


def test_what_argparse_refuses(capsys):
  # Two, as everywhere; with the usage.
  for argv in (['trane'], ['train', f'--config={TINY}'], ['list', 'tusks']):
    with pytest.raises(SystemExit) as e:
      cli.main(argv)
    assert e.value.code == 2
    assert 'usage: st-moe' in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch):
  def stop(flags, overrides):
    raise KeyboardInterrupt

  monkeypatch.setitem(cli._RUN, 'report', stop)
  with pytest.raises(SystemExit) as e:
    cli.main(['report', 'x'])
  assert e.value.code == 130
