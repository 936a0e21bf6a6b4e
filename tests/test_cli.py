"""The command: quick where it should be, and every mistake one message."""

import errno
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import cli, config_file, methods, verbs
from st_moe.config import Config
from st_moe.data import files
from st_moe.interop import convert, ours
from st_moe.model.transformer import Transformer
from st_moe.train.state import abstract_params
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


def test_every_verb_has_an_example_that_parses():
  _, parsers = verbs.parser()
  assert parsers.keys() == verbs.EXAMPLES.keys() == verbs.VERBS.keys()
  for verb, parser in parsers.items():
    line = re.search(f'example:\n  st-moe {verb} (.*)', parser.epilog)[1]
    parser.read(shlex.split(line))


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


_QUICK = """
import sys
from st_moe import cli
for argv in (['--version'], ['convert', '--help'], ['list', 'configs']):
  try:
    cli.main(argv)
  except SystemExit as e:
    assert not e.code
assert not {'jax', 'flax', 'numpy'} & set(sys.modules), sys.modules
"""


def test_versions_formats_and_configs_need_no_jax():
  found = _python(_QUICK, COLUMNS='80')
  assert found.returncode == 0, found.stderr
  lines = found.stdout.splitlines()
  assert max(map(len, lines)) <= 80
  first = re.fullmatch(r'st_moe (.*), Python (3\S+), jax (.*)', lines[0])
  assert first[2] == platform.python_version()
  assert first[3] == importlib.metadata.version('jax')
  # Of each format its place; and of each config its arguments.
  for name in convert.FORMATS:
    assert f'\n  {name}:PLACE ' in found.stdout
  told = ' '.join(found.stdout.split())
  assert 'configs/switch.py Switch Transformers' in told
  assert "arguments: size='base', experts=0, dense=False, seed=0" in told


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
  assert found.stderr == (
    'st-moe: config.model.moe.selector.k=9 experts per token; it must be 1 to'
    ' 8.\n'
  )
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
  assert _runs(capsys, 'doctor', f'--workdir={tmp_path}/to/be/made')
  nowhere = tmp_path / 'file'
  nowhere.touch()
  with pytest.raises(SystemExit) as e:
    cli.main(['doctor', f'--workdir={nowhere}/below'])
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
  assert ('loss', 'load_balance_all') in named  # As wide as the column was.
  assert {
    ('gate', 'linear'),
    ('selector', 'top_k'),
    ('dispatcher', 'grouped'),
    ('loss', 'router_z'),
  } <= named


def test_the_table_of_methods(capsys):
  lines = _runs(capsys, 'methods').splitlines()
  rows = [line.split() for line in lines]
  assert rows[0] == 'row name paper kind causal noisy config shown'.split()
  named = {' '.join(row[:7]) for row in rows}
  assert 'S1-18 top_k 2006.16668 selector yes yes gshard' in named
  # A row is named once.
  assert sum(row[:1] == ['S2-30'] for row in rows) == 1
  shown = methods.experiments()['loss_free']['shown']
  line = f'rebalanced 2408.15664 after yes no loss_free {shown}'
  assert line.split() in rows
  # At a narrow terminal papers are left to the cards.
  narrow = methods.listed(80).splitlines()
  assert max(map(len, narrow)) <= 80 and '2408.15664' not in narrow


def test_every_card_fits_eighty_columns(capsys):
  for path in config_file.methods():
    said = _runs(capsys, 'methods', path.stem)
    assert max(map(len, said.splitlines())) <= 80, path.stem


@pytest.mark.parametrize(
  'name', ['rebalanced', 'loss_free', 'S2-30', 'configs/methods/loss_free.py']
)
def test_the_card_of_a_method(capsys, name):
  said = _runs(capsys, 'methods', name)
  assert max(map(len, said.splitlines())) <= 80
  assert 'S2-30, arXiv:2408.15664' in said and 'optimizer.after' in said
  assert 'Moves the bias of each expert' in said
  assert '  rate: a float, at least 0, finite, or a Part, one of lin' in said
  assert 'Claim: biases that count in the choice alone' in said
  both = name != 'rebalanced'
  assert ('balanced: S2-30' in said.replace('rebalanced', '')) == both


def test_a_method_that_is_not_there():
  with pytest.raises(ValueError, match="Did you mean 'rebalanced'"):
    cli.run(['methods', 'rebalance'])


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
    ('model.mlp_dim=16777216', 'A device here has'),
    ('data.batch_size=16777216', 'the logits of 16,777,216 rows'),
    ('total_steps=-1', 'config.total_steps = -1 should be a int, at least 0'),
    ('total_steps=0', 'total_steps is 0; set how long to train'),
    (
      'data.batch_size=12',
      'batch_size=12 does not divide into 1 microbatches on 8 devices; the'
      ' nearest that do are 8 and 16',
    ),
    ('microbatches=0', 'config.microbatches = 0 should be a int, at least 1'),
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
    (
      'optimizer.name=adam',
      "config.optimizer.name 'adam'. Did you mean 'adamw",
    ),
    ('optimizer.decay=cosine', "Known: ['none', 'rsqrt']."),
    ('model.moe.losses.load_balanse=1', "Did you mean 'load_balance'?"),
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
  (workdir / 'config.json').write_text(
    config_file.to_json(config_file.to_dict(seeded))
  )
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


@pytest.mark.parametrize('make', [np.zeros, jnp.zeros])
def test_no_memory(capsys, monkeypatch, make):
  # 4 TiB, in earnest.
  monkeypatch.setitem(cli._RUN, 'report', lambda *_: make((2**40,), 'float32'))
  said = _fails(capsys, 'report', 'x')
  assert said.startswith('Out of memory: ') and said.count('\n') == 0
  assert '4.00 TiB' in said or '4398046511104 bytes' in said
  for way in ('batch_size', 'microbatches', 'remat=full', '--max_length'):
    assert way in said


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('{}', 'is a folder, where a file is needed.'),
    ('{}/none', 'no such file or folder.'),
    ('{}/file/none', 'a part of this path is a file, where a folder is'),
    ('{}/' + 'x' * 300, 'this name is too long.'),
  ],
)
def test_what_the_system_says_of_a_file(
  capsys, monkeypatch, tmp_path, path, message
):
  (tmp_path / 'file').touch()
  path = path.format(tmp_path)
  monkeypatch.setitem(cli._RUN, 'report', lambda *_: open(path))
  assert _fails(capsys, 'report', 'x').startswith(f'{path}: {message}')


def test_a_bug_stays_a_trace(monkeypatch):
  monkeypatch.setitem(cli._RUN, 'report', lambda *_: {}['ours'])
  with pytest.raises(KeyError):
    cli.main(['report', 'x'])


def test_a_module_that_breaks(train, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'mine_that_breaks.py').write_text('x = 1\nraise KeyError("x")\n')
  said = train('--module_import=mine_that_breaks')
  assert said == f"{tmp_path}/mine_that_breaks.py, line 2: KeyError: 'x'."


def test_counting_settles_the_vocabulary(capsys):
  # 2,048 ids of 16 numbers, and as many to the logits.
  said = _runs(capsys, 'plan', f'--config={TINY}', '--count')
  assert '65,536' in said and 'forward FLOPs' in said


def test_a_grid_over_a_field_that_is_set(capsys, tmp_path):
  grid = (
    'grid',
    f'--config={TINY}',
    f'--workdir={tmp_path}',
    '--vary=seed=0,1',
  )
  said = _fails(capsys, *grid, '--config.seed=3')
  assert said.startswith('--config.seed is given twice')


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
    (
      ['hi', '--top_p=0'],
      '--top_p = 0.0 should be a float, above 0 and at',
    ),
    (['hi', '--early_stopping=yes'], "Unknown --early_stopping 'yes'. Known:"),
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
  shapes = abstract_params(Transformer(found.config.model))
  bare = tmp_path / 'bare'
  ours.save(str(bare), found.load(shapes), found.config, None)
  for verb in ('generate', 'evaluate'):
    said = _fails(capsys, verb, f'--checkpoint={bare}')
    assert 'bare has no vocabulary: give the SentencePiece model' in said


@pytest.fixture
def measured(tmp_path):
  """A workdir that `st-moe report` can read."""
  workdir = tmp_path / 'measured'
  workdir.mkdir()
  config = config_file.to_json(config_file.to_dict(config_file.load(TINY)))
  (workdir / 'config.json').write_text(config)
  numbers = {'loss': 2.0, 'tokens_per_second': 9.0, 'eval/text/loss': 3.0}
  row = json.dumps({'step': 1, **numbers})
  (workdir / 'metrics.jsonl').write_text(row + '\n')
  return workdir


SHORT = ['--max_length=1', 'hi']
# Every way to write: its flags, and the files under it. What stands below a
# folder of theirs is theirs.
WRITES = {
  'generate': (['--checkpoint={model}', '--output={to}', *SHORT], ['']),
  'generate, a note beside': (
    ['--checkpoint={model}', '--output={to}/out', *SHORT],
    ['out.about.json'],
  ),
  'evaluate': (
    ['--checkpoint={model}', '--mixture=tiny_copa', '--output={to}'],
    ['metrics.json', 'predictions-tiny_copa.jsonl', 'best.json'],
  ),
  'plan': (
    [f'--config={TINY}', '--chip=v5e', '--devices=1', '--output={to}'],
    [''],
  ),
  'report, a picture': (['{measured}', '--curves={to}.png'], ['.png']),
  'report, a drawing': (['{measured}', '--curves={to}.svg'], ['.svg']),
  'prepare': ([f'--config={TINY}', '--vocabulary={to}'], ['']),
  'train': (
    [f'--config={TINY}', '--workdir={to}'],
    ['config.json', 'config.py', 'about.json', 'metrics.jsonl'],
  ),
  'grid': (
    [f'--config={TINY}', '--workdir={to}', '--vary=seed=1'],
    ['grid.json', 'grid.md'],
  ),
  'convert to ours': (['--from={model}', '--to={to}'], ['notes.txt']),
  'convert to theirs': (['--from={model}', '--to=t5x:{to}'], ['notes.txt']),
}
CASES = [(verb, name) for verb, (_, names) in WRITES.items() for name in names]


@pytest.mark.parametrize(('way', 'name'), CASES)
def test_what_is_not_ours_is_never_written_over(
  way, name, capsys, tmp_path, tiny_model, measured
):
  to = tmp_path / 'to'
  path = to / name if name[:1] not in ('', '.') else to.with_suffix(name)
  path.parent.mkdir(exist_ok=True)
  path.write_text('{"precious": "and ended by no line"}')
  before = path.read_bytes(), path.stat().st_mtime_ns
  flags = [
    flag.format(to=to, model=tiny_model, measured=measured)
    for flag in WRITES[way][0]
  ]
  message = _fails(capsys, way.partition(',')[0].split()[0], *flags)
  assert str(path) in message or f'{to} is not empty' in message
  assert before == (path.read_bytes(), path.stat().st_mtime_ns)
  there = {p for p in tmp_path.rglob('*') if p.is_file()}
  assert there == {path, *measured.iterdir()}


@pytest.mark.parametrize(
  'way', ['plan', 'report, a picture', 'report, a drawing']
)
def test_the_same_command_may_be_run_again(way, capsys, tmp_path, measured):
  flags = [
    flag.format(to=tmp_path / 'to', measured=measured)
    for flag in WRITES[way][0]
  ]
  for _ in range(2):
    with pytest.raises(SystemExit) as e:
      cli.main([way.partition(',')[0], *flags])
    assert e.value.code == 0, capsys.readouterr().err


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


@pytest.mark.parametrize(
  ('typed', 'said'),
  [
    ('list ', ['--help', 'configs', 'tasks', 'methods']),
    ('report --cu', ['--curves']),
    ('train --config=st_moe_t', ['--config=st_moe_tiny']),
    ('plan --config.model.moe.n', ['--config.model.moe.num_experts']),
    ('evaluate --gin.EVAL_P', ['--gin.EVAL_PERIOD']),
  ],
)
def test_a_shell_completes(typed, said, tmp_path):
  line = f'st-moe {typed}'
  asked = {
    '_ARGCOMPLETE': '1',
    '_ARGCOMPLETE_IFS': '\n',
    '_ARGCOMPLETE_STDOUT_FILENAME': str(tmp_path / 'said'),
    'COMP_LINE': line,
    'COMP_POINT': str(len(line)),
  }
  command = [sys.executable, '-m', 'st_moe.cli']
  subprocess.run(command, env={**os.environ, **asked}, check=True)
  found = (tmp_path / 'said').read_text().split('\n')
  assert [each.strip() for each in found] == said
