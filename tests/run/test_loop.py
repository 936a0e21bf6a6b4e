"""Whole runs of a tiny model: what they leave behind, and going on."""

import dataclasses
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

import st_moe
from st_moe import checkpoint, config_file, paths, sharding
from st_moe.data import pipeline, vocabulary
from st_moe.data.mixture import Library
from st_moe.history import read_rows
from st_moe.infer import evaluate
from st_moe.interop import convert
from st_moe.model.transformer import Transformer
from st_moe.run import begin, loop, owner, workdir
from st_moe.run import workdir as workdirs
from st_moe.run.report import Clock
from st_moe.train import optimizer
from st_moe.train.state import init_state, parameter_axes
from tests.store import Store

_WORDS = {
  'reds': 'ruby rose rust brick wine cherry fire clay plum fox'.split(),
  'blues': 'sky sea ink ice steel navy lake dusk jay whale'.split(),
}

# 8 devices: 2 x 4 experts. Every second route is drawn by lot, so a run that
# goes on must draw the same lots.
_CONFIG = """
from ml_collections import config_dict

def get_config(arg=None):
  c = config_dict.ConfigDict()
  c.total_steps = 6
  c.model = dict(
      vocab_size=0, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
      moe=dict(num_experts=4, extra_ffn='none'))
  sparse = dict(num_layers=1, sparse_every=1, sparse_offset=0)
  c.model.encoder = dict(group_size=16, **sparse)
  c.model.decoder = dict(group_size=8, **sparse)
  c.data = dict(
      mixture=dict(reds=2.0, blues=1.0), vocabulary_size=205,
      inputs_length=16, targets_length=8, batch_size=8,
      files={{name: dict(train=f'{texts}/{{name}}.txt',
                         validation=f'{texts}/{{name}}.txt')
              for name in ('reds', 'blues')}},
      cache_dir='{texts}/cache')
  c.mesh = dict(expert=4)
  c.checkpoint = dict(every=2, keep_last=4)
  c.evaluate = dict(every=2, batches=1)
  c.log = dict(every=1)
  if arg == 'tuned':  # Model and vocabulary are those of `init`.
    c.total_steps = 1
    c.model = dict()
    c.data.vocabulary_size = 190
  return c
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch):
  """Nobody waits for the owner that a killed run leaves in a store."""
  monkeypatch.setattr(owner, 'SILENCE', 0.5)
  monkeypatch.setattr(owner, '_POLL', 0.1)


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  """Every start compiles the same programs; all but the first read them."""
  options = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The path of the config, its texts beside it."""
  texts, rng = tmp_path_factory.mktemp('texts'), random.Random(0)
  for name, words in _WORDS.items():
    lines = (' '.join(rng.choices(words, k=40)) for _ in range(40))
    (texts / f'{name}.txt').write_text('\n\n'.join(lines))
  path = texts / 'reds_and_blues.py'
  path.write_text(_CONFIG.format(texts=texts))
  return str(path)


def _load(written, arg='', **overrides):
  fields = {k.replace('__', '.'): v for k, v in overrides.items()}
  base = lambda init: checkpoint.read_run(init)['config']
  return config_file.load(f'{written}:{arg}', fields, base=base)


@pytest.fixture(scope='module')
def run(written, tmp_path_factory):
  """The workdir of an unbroken run of 6 steps."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  loop.train(_load(written), workdir, config_path=written, modules=['my_tasks'])
  return workdir


@pytest.fixture
def copy(run, tmp_path):
  """The same run, to be changed."""
  return shutil.copytree(run, tmp_path / 'copy')


def _checkpoints(workdir):
  there = (workdir / 'checkpoints').iterdir()
  return sorted(int(p.name) for p in there if p.is_dir())


def _params(path):
  return jax.device_get(st_moe.load(path).params)


def _norm(params):
  leaves = jax.tree.leaves(params)
  return math.sqrt(sum((np.float64(a) ** 2).sum() for a in leaves))


def _steps(workdir):
  """Rows of training steps, without what depends on the clock."""
  clock = ('tokens_per_second', 'seconds_per_step')
  rows = [r for r in read_rows(workdir) if 'loss' in r]
  return [{k: v for k, v in row.items() if k not in clock} for row in rows]


# What a run leaves behind.


def test_a_workdir_explains_itself(run, written):
  names = {p.name for p in run.iterdir()}
  assert names == {
    'config.py', 'config.json', 'about.json', 'vocabulary.model',
    'metrics.jsonl', 'tensorboard', 'checkpoints',
  }  # fmt: skip
  assert (run / 'config.py').read_text() == epath.Path(written).read_text()
  kept = json.loads((run / 'config.json').read_text())
  assert config_file.from_dict(kept) == _load(written)
  about = json.loads((run / 'about.json').read_text())
  assert about['versions'] == checkpoint.versions()
  assert 'commit' in about
  assert vocabulary.load(run / 'vocabulary.model').size == 205
  (events,) = (run / 'tensorboard').iterdir()
  assert b'loss' in events.read_bytes()
  assert _checkpoints(run) == [2, 4, 6]


def test_every_step_has_a_row(run):
  rows = read_rows(run)
  assert [r['step'] for r in rows] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
  measured = [r for r in rows if 'loss' not in r]
  assert [r['step'] for r in measured] == [2, 4, 6]
  for row in measured:
    assert set(row) == {'step', 'eval/reds/loss', 'eval/blues/loss'}
  for row in _steps(run):
    assert np.shape(row['encoder/load']) == (1, 4)
    assert 0 < row['loss'] < 10 and row['bad_steps'] == 0
  # No step takes no time, whatever is read and measured around it.
  rates = [r['tokens_per_second'] for r in rows if 'loss' in r]
  assert min(rates) > 0


def test_tokens_are_counted_by_source(run, written):
  """By a loop over the same batches, which follow from the seed alone."""
  config = _load(written)
  data = pipeline.TrainData(
    Library(config.data, vocabulary.load(run / 'vocabulary.model'))
  )
  seen, rows = {'reds': 0, 'blues': 0}, _steps(run)
  assert set(data.sources) == set(seen)
  for n, row in enumerate(rows):
    batch = data.batch(n)
    for i in range(8):
      source = data.sources[batch['task'][i]]
      seen[source] += np.count_nonzero(batch['decoder_target_tokens'][i])
    assert {k: row[f'tokens_seen/{k}'] for k in seen} == seen
  assert min(seen.values()) > 0
  assert checkpoint.read_run(run)['tokens_seen'] == seen


def test_a_checkpoint_answers_for_itself(run, written):
  loaded = st_moe.load(run)
  assert loaded.step == 6
  assert loaded.config.data == _load(written).data
  assert loaded.config.model.vocab_size == 256  # 205 in whole 128s.
  assert loaded.vocabulary.model == (run / 'vocabulary.model').read_bytes()


# Going on.


def test_a_broken_run_ends_as_an_unbroken_one(copy, run, written, capsys):
  """Killed in step 5, its last checkpoint damaged; two steps longer, too."""
  shutil.rmtree(copy / 'checkpoints' / '6')
  shutil.rmtree(copy / 'checkpoints' / '4' / 'rest')
  loop.train(_load(written, total_steps='8'), copy, config_path=written)
  said = capsys.readouterr().out
  assert 'Checkpoint 4 is damaged: its file rest/' in said
  assert '2 of 8 steps done' in said
  assert _checkpoints(copy) == [2, 4, 6, 8]
  jax.tree.map(
    np.testing.assert_array_equal,
    _params(copy / 'checkpoints' / '6'),
    _params(run),
  )
  # Nor do the numbers on the way differ, each written once.
  rows = _steps(copy)
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
  assert rows[:6] == _steps(run)
  assert len([r for r in read_rows(copy) if 'loss' not in r]) == 4


def test_a_run_of_older_batches_is_told(copy, written, capsys, monkeypatch):
  shutil.rmtree(copy / 'checkpoints' / '6')
  monkeypatch.setattr(pipeline, 'BATCHES', pipeline.BATCHES + 1)
  loop.train(_load(written), copy)
  told = 'batches were drawn in another order: from step 4 on they are not'
  assert capsys.readouterr().out.count(told) == 1
  # It says so once more only if it goes on once more; and what it imported.
  run = checkpoint.read_run(copy)
  assert run['batches'] == pipeline.BATCHES
  assert st_moe.load(copy / 'checkpoints' / '4').modules == ('my_tasks',)


def test_a_run_that_is_told_to_stop_saves_and_goes_on(
  run, written, tmp_path, monkeypatch, capsys
):
  """SIGTERM while step 3 is written down: step 4 is in flight, and the last."""
  write = loop.Report.write

  def told(self, number, row):
    write(self, number, row)
    if number == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  default = signal.getsignal(signal.SIGTERM)
  config = _load(written, checkpoint__every='5')
  with monkeypatch.context() as patch:
    patch.setattr(loop.Report, 'write', told)
    with pytest.raises(SystemExit) as stopped:
      loop.train(config, tmp_path)
  assert stopped.value.code == 75
  said = 'Told to stop: step 4 is saved; the same command goes on.'
  assert capsys.readouterr().out.splitlines()[-1] == said
  assert _checkpoints(tmp_path) == [4]
  assert [row['step'] for row in _steps(tmp_path)] == [1, 2, 3, 4]
  assert signal.getsignal(signal.SIGTERM) is default
  # It ends with the bits and the rows of a run that was never told.
  loop.train(config, tmp_path)
  assert _checkpoints(tmp_path) == [4, 5, 6]
  jax.tree.map(np.testing.assert_array_equal, _params(tmp_path), _params(run))
  assert _steps(tmp_path) == _steps(run)
  measured = [r['step'] for r in read_rows(tmp_path) if 'loss' not in r]
  assert measured == [2, 4, 6]


def test_a_finished_run_is_left_alone(run, written, capsys):
  before = {p: p.stat().st_mtime_ns for p in run.rglob('*')}
  row = loop.train(_load(written), run)
  assert capsys.readouterr().out == f'{run} is finished: 6 steps.\n'
  assert row == read_rows(run)[-1]
  assert {p: p.stat().st_mtime_ns for p in run.rglob('*')} == before


def test_a_config_without_the_fields_of_today(run, written, tmp_path, capsys):
  # A run of older code goes on: what it did not know has its default.
  older = shutil.copytree(run, tmp_path / 'older')
  config = json.loads((older / 'config.json').read_text())
  del config['model']['moe']['transport']
  (older / 'config.json').write_text(json.dumps(config))
  loop.train(_load(written), older)
  assert 'is finished: 6 steps.' in capsys.readouterr().out


def test_another_config_is_refused_by_its_fields(run, written):
  other = _load(written, seed='1', model__embed_dim='32', checkpoint__every='5')
  with pytest.raises(ValueError) as e:
    loop.train(other, run)
  assert str(e.value) == (
    f'{run} belongs to another config:\n  model.embed_dim: 16 -> 32\n'
    '  seed: 0 -> 1\nUse another workdir, or the config it was started with.'
  )


def test_two_runs_do_not_meet_in_a_workdir(copy, written):
  before = {p: p.stat().st_mtime_ns for p in copy.rglob('*') if p.is_file()}
  longer = _load(written, total_steps='8')
  with owner.held(copy):
    with pytest.raises(ValueError, match=r'belongs to process \d+ on .*since'):
      loop.train(longer, copy)
    (copy / 'owner.json').unlink()
  after = {p: p.stat().st_mtime_ns for p in copy.rglob('*') if p.is_file()}
  assert after == before


def _claim(workdir, config):
  return workdirs.claim(epath.Path(workdir), config_file.to_dict(config))


def test_a_smaller_machine_may_go_on(run, written, capsys):
  # How a number is computed is free; which microbatch it is drawn in, told.
  fields = {
    'model__remat': 'full',
    'model__moe__dispatcher': 'mask',
    'model__moe__transport': 'gspmd',
    'loss__positions': '4',
    'mesh__expert': '1',
  }
  assert _claim(run, _load(written, **fields)) == 6
  assert capsys.readouterr().out == ''
  assert _claim(run, _load(written, microbatches='2')) == 6
  assert capsys.readouterr().out == (
    'microbatches: 1 -> 2: each microbatch draws dropout, jitter and second'
    ' experts by a lot of its own, so a run that has these goes on with other'
    ' draws.\n'
  )
  for other in ({'model__scan_layers': 'false'}, {'model__dtype': 'bfloat16'}):
    with pytest.raises(ValueError, match='belongs to another config'):
      _claim(run, _load(written, **other))


class _Gone:
  """A standard output whose reader has left."""

  encoding = 'utf-8'

  def write(self, *text):
    raise BrokenPipeError(32, 'Broken pipe')

  flush = write


def test_other_data_are_refused_unless_they_may_change(
  copy, written, tmp_path, monkeypatch
):
  """One more text in a file that was moved; and nobody reads what is said."""
  texts = tmp_path / 'elsewhere.txt'
  text = (pathlib.Path(written).parent / 'reds.txt').read_text()
  texts.write_text(text)
  moved = {'total_steps': '7', 'data.files.reds.train': str(texts)}
  config = _load(written, **moved)
  known = checkpoint.read_run(copy)['data']
  vocab = vocabulary.load(copy / 'vocabulary.model')
  assert pipeline.TrainData(Library(config.data, vocab)).digests == known
  assert _claim(copy, config) == 6
  texts.write_text(f'{text}\n\n{text[:200]}')
  with pytest.raises(ValueError, match="data of 'reds' are not known to be wh"):
    loop.train(config, copy)
  assert _checkpoints(copy)[-1] == 6
  changed = dataclasses.replace(config.data, may_change=True)
  monkeypatch.setattr(sys, 'stdout', _Gone())
  loop.train(dataclasses.replace(config, data=changed), copy)
  assert _checkpoints(copy)[-1] == 7
  now = checkpoint.read_run(copy)['data']
  assert now['blues'] == known['blues'] and now['reds'] != known['reds']


def test_data_of_runs_without_digests(run, written, capsys):
  # Of older code: it goes on, with the files it was started with.
  config = _load(written)
  begun = {'config': config_file.to_dict(config), 'tokens_seen': {}}
  digests = {'reds': 'a', 'blues': ''}
  check = lambda config, *more: begin._check_data(
    config_file.to_dict(config), *more
  )
  check(config, digests, begun)
  check(config, digests, {'tokens_seen': {}})
  check(config, digests, {**begun, 'data': {'reds': '', 'blues': 'b'}})
  moved = _load(written, data__files__reds__train='elsewhere.txt')
  with pytest.raises(ValueError, match='--config.data.may_change=true'):
    check(moved, digests, begun)
  allowed = dataclasses.replace(moved.data, may_change=True)
  check(dataclasses.replace(moved, data=allowed), digests, begun)
  said = 'Going on with other training data of '
  assert capsys.readouterr().out == f"{said}'reds', 'blues'.\n"


@pytest.mark.parametrize(
  ('name', 'made', 'message'),
  [
    ('', 'file', 'copy is a file; a workdir is a folder.'),
    ('config.json', 'folder', 'config.json is a folder, where a run keeps a f'),
    ('about.json', 'folder', 'about.json is a folder, where a run keeps a fil'),
    ('vocabulary.model', 'folder', 'vocabulary.model is a folder, where a run'),
    ('metrics.jsonl', 'folder', 'metrics.jsonl is a folder, where a run keeps'),
    ('checkpoints', 'file', 'checkpoints is a file, where a run keeps a folde'),
    ('tensorboard', 'file', 'tensorboard is a file, where a run keeps a folde'),
  ],
)
def test_what_stands_where_a_run_keeps_its_own(
  copy, written, name, made, message
):
  path = copy / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  path.mkdir() if made == 'folder' else path.write_bytes(b'\xff{')
  with pytest.raises(ValueError) as e:
    loop.train(_load(written, total_steps='8'), copy)
  said = str(e.value)
  assert message in said and str(path) in said
  for word in ('Errno', 'codec', 'JSON', 'line 1', 'sentencepiece'):
    assert word not in said


def test_a_vocabulary_that_was_lost_is_in_the_checkpoint(copy, written):
  kept = (copy / 'vocabulary.model').read_bytes()
  (copy / 'vocabulary.model').unlink()
  run = checkpoint.last_run(copy)
  found = begin.find_vocabulary(_load(written), copy, run, None)
  assert found.model == kept


def test_a_workdir_has_a_name(written):
  with pytest.raises(ValueError, match='workdir is empty: name a folder'):
    loop.train(_load(written), '')


def test_a_commit_is_of_this_code_alone(tmp_path, monkeypatch):
  """Installed in somebody's project, it has no part in the history of that."""
  git = lambda *args: subprocess.run(
    ['git', '-C', tmp_path, *args], check=True, capture_output=True
  )
  git('init')
  git(
    *('-c', 'user.name=a', '-c', 'user.email=a@b.c'),
    *('commit', '--allow-empty', '-m', 'theirs'),
  )
  own = tmp_path / 'st_moe' / 'train' / 'workdir.py'
  monkeypatch.setattr(workdir, '__file__', str(own))
  assert re.fullmatch('[0-9a-f]{40}', workdir.commit())
  own = tmp_path / '.venv' / 'lib' / 'st_moe' / 'train' / 'workdir.py'
  own.parent.mkdir(parents=True)
  monkeypatch.setattr(workdir, '__file__', str(own))
  assert workdir.commit() == ''


def test_a_workdir_where_nothing_was_trained_takes_any_config(
  written, tmp_path
):
  # The advice of an error may be followed in the same workdir.
  wrong = _load(written, data__vocabulary_size='2000')
  with pytest.raises(ValueError, match='the largest that works is'):
    loop.train(wrong, tmp_path)
  assert not (tmp_path / 'checkpoints').exists()
  # A vocabulary made for the old config does not stay for the new one.
  own = tmp_path / 'vocabulary.model'
  own.write_bytes(b'old')
  _claim(tmp_path, wrong)
  assert own.exists()
  _claim(tmp_path, _load(written))
  assert not own.exists()


# From another run.


def _tune(run, written, workdir, **overrides):
  """One step of fine-tuning on one source."""
  config = _load(written, 'tuned', init=str(run), **overrides)
  loop.train(config, workdir)
  (row,) = _steps(workdir)
  return config, row


def test_fine_tuning_takes_parameters_and_vocabulary(run, written, tmp_path):
  config, row = _tune(run, written, tmp_path / 'tuned')
  assert config.model == st_moe.load(run).config.model
  name = 'vocabulary.model'
  kept = (tmp_path / 'tuned' / name).read_bytes()
  assert kept == (run / name).read_bytes()
  # The norm before its first step is that of the parameters it took.
  assert row['l2_params'] == pytest.approx(_norm(_params(run)), rel=1e-5)
  assert st_moe.load(tmp_path / 'tuned').step == 1


def test_fine_tuning_in_python(run, written, tmp_path):
  fields = {'init': str(run), 'total_steps': 1}
  config = st_moe.load_config(f'{written}:tuned', fields)
  assert config.model == st_moe.load(run).config.model
  st_moe.train(config, tmp_path / 'tuned')
  (row,) = _steps(tmp_path / 'tuned')
  assert row['l2_params'] == pytest.approx(_norm(_params(run)), rel=1e-5)
  metrics = st_moe.evaluate(tmp_path / 'tuned')
  assert set(metrics) == {'eval/reds/loss', 'eval/blues/loss'}
  assert st_moe.load(tmp_path / 'tuned').step == 1


def test_train_is_a_function_and_a_package_at_once(monkeypatch):
  monkeypatch.setattr(loop, 'train', lambda *args, **more: (args, more))
  for _ in range(2):
    assert st_moe.train(1, 'w', profile='') == ((1, 'w'), {'profile': ''})
    from st_moe.train import step

    assert st_moe.train.step is step


def test_only_the_architecture_is_taken(run, written, tmp_path):
  config, row = _tune(
    run, written, tmp_path / 'scratch', init_take='architecture'
  )
  assert config.model == st_moe.load(run).config.model
  # With the same seed, it starts where the run itself once started.
  assert row['l2_params'] == _steps(run)[0]['l2_params']
  assert row['l2_params'] != pytest.approx(_norm(_params(run)), rel=1e-5)


def test_a_sparse_run_begins_with_a_dense_one(written, tmp_path, capsys):
  flags = lambda every: {
    'model__encoder__sparse_every': every,
    'model__decoder__sparse_every': every,
    'total_steps': '1',
    'evaluate__every': '0',
  }
  loop.train(_load(written, **flags('0')), tmp_path / 'dense')
  config = _load(
    written,
    init=str(tmp_path / 'dense'),
    init_take='upcycle',
    optimizer__learning_rate='0.0',
    **flags('1'),
  )
  loop.train(config, tmp_path / 'sparse')
  said = capsys.readouterr().out
  assert 'copied to every expert: 6 arrays, as decoder/layers_0/moe/ex' in said
  assert 'new: 2 arrays, as decoder/layers_0/moe/router/kernel' in said
  dense, sparse = _params(tmp_path / 'dense'), _params(tmp_path / 'sparse')
  bank = sparse['encoder']['layers']['layer_0']['moe']['experts']
  kernel = dense['encoder']['layers']['layer_0']['mlp']['wi_0']['kernel']
  for e in range(4):
    np.testing.assert_array_equal(bank['wi_0']['kernel'][:, e], kernel)
  # A word that is none is refused before any work.
  with pytest.raises(ValueError, match="init_take 'upcicle'. Did you mean"):
    dataclasses.replace(config, init_take='upcicle')


# An object store.

_MINE = 'gs://runs/mine'


@pytest.fixture(scope='module')
def away(written, tmp_path_factory):
  """A store with a run of 6 steps, and all that was done to it."""
  store = Store(tmp_path_factory.mktemp('away') / 'store')
  with store.mounted():
    loop.train(_load(written), _MINE, config_path=written)
  return store


def _cuts(store) -> range:
  """How many changes were done at any moment of the last save, list included.

  A process that is killed leaves just these: an object is there or it is not.
  """
  at = [
    n
    for n, (name, data) in enumerate(store.journal, 1)
    if name.startswith('runs/mine/checkpoints/6/') and data is not None
  ]
  assert store.journal[at[-1] - 1][0].endswith('/6/files.json')
  return range(at[0], at[-1] + 1)


def test_a_run_in_a_bucket(away, run, written, store, capsys):
  """The same numbers, and whatever is done with a run is done with this one."""
  # Rows are there before the checkpoint that says they were written.
  names = [name.removeprefix('runs/mine/') for name, _ in away.journal]
  rows = names.index('metrics-00000.jsonl')
  assert rows < names.index('checkpoints/2/files.json')
  store.replay(away.journal)
  folder = store.root / 'runs' / 'mine'
  assert {p.name for p in folder.iterdir()} >= {
    'config.py', 'config.json', 'about.json', 'vocabulary.model', 'tensorboard',
  }  # fmt: skip
  assert _checkpoints(folder) == [2, 4, 6]
  assert _steps(_MINE) == _steps(run)
  jax.tree.map(np.testing.assert_array_equal, _params(_MINE), _params(run))
  loop.train(_load(written), _MINE)
  assert capsys.readouterr().out == f'{_MINE} is finished: 6 steps.\n'
  # Evaluated, asked, converted, and started from.
  found = evaluate.evaluate(_MINE, mixture=['reds'])
  told = json.loads((folder / 'evaluation' / 'metrics.json').read_text())
  assert told['metrics'] == found and told['checkpoint'].endswith('points/6')
  loaded = st_moe.load(f'{_MINE}/checkpoints/4')
  assert loaded.step == 4 and loaded.path == f'{_MINE}/checkpoints/4'
  (text,) = st_moe.load(_MINE).generate(['ruby rose'], max_length=3)
  assert [text] == st_moe.load(run).generate(['ruby rose'], max_length=3)
  convert.convert(_MINE, 'gs://runs/bare')
  jax.tree.map(
    np.testing.assert_array_equal, _params('gs://runs/bare'), _params(run)
  )
  with pytest.raises(ValueError, match='gs://runs/bare is not empty'):
    convert.convert(_MINE, 'gs://runs/bare')
  _tune('gs://runs/bare', written, 'gs://runs/tuned')
  assert st_moe.load('gs://runs/tuned').step == 1


def test_a_kill_at_any_write_of_a_save_loses_no_bit(
  away, run, written, tmp_path, capsys
):
  moments = _cuts(away)
  assert len(moments) > 25
  again = Store(tmp_path / 'again')
  again.replay(away.journal[: moments[0] - 1])
  for done in moments:
    again.replay(away.journal[done - 1 : done])
    with again.mounted():
      newest = 6 if done == moments[-1] else 4
      assert checkpoint.last_step(_MINE) == newest
      assert checkpoint.find(_MINE).name == f'{newest}'
      assert checkpoint.is_sound(_MINE, newest)
    if done in (moments[0], moments[-2], moments[-1]):
      with _copied(again, tmp_path / f'{done}').mounted():
        _ends_as(run, written, capsys)


def _copied(store, folder):
  return Store(shutil.copytree(store.root, folder))


def _ends_as(run, written, capsys):
  """The same command ends with the same bits and rows, and then is done."""
  capsys.readouterr()
  saved = checkpoint.last_step(_MINE) == 6
  loop.train(_load(written), _MINE)
  said = capsys.readouterr().out
  # Once it is saved, its evaluation may be over too.
  assert 'step 6 evaluated' in said or saved and 'is finished' in said
  jax.tree.map(np.testing.assert_array_equal, _params(_MINE), _params(run))
  assert _steps(_MINE) == _steps(run)
  measured = [r['step'] for r in read_rows(_MINE) if 'loss' not in r]
  assert measured == [2, 4, 6]
  loop.train(_load(written), _MINE)
  assert capsys.readouterr().out == f'{_MINE} is finished: 6 steps.\n'


@pytest.mark.slow
def test_every_write_of_a_save_in_turn(away, run, written, tmp_path, capsys):
  for done in _cuts(away):
    again = Store(tmp_path / f'{done}')
    again.replay(away.journal[:done])
    with again.mounted():
      _ends_as(run, written, capsys)


@pytest.mark.slow
def test_processes_that_die_in_the_place_of_a_write(
  run, written, tmp_path, capsys
):
  """As SIGKILL would end them: nothing is tidied up, no thread runs on."""
  for done in (0, 6, 12, 18, 24):
    folder = tmp_path / f'{done}'
    died = subprocess.run(
      [
        sys.executable, '-m', 'tests.store', f'{folder}',
        'runs/mine/checkpoints/6/', f'{done}',
        'train', f'--config={written}', f'--workdir={_MINE}',
      ],
      capture_output=True,
    )  # fmt: skip
    assert died.returncode == 137, died.stderr
    with Store(folder).mounted():
      _ends_as(run, written, capsys)


# What is kept as the best, when a run is finished, and when it gives up.


@pytest.fixture
def scored(monkeypatch):
  """Evaluations find what a table says, step -> loss of reds."""
  table, whole = {}, begin.Evaluator.__call__

  def evaluate(self, params, sources, **kwargs):
    found = whole(self, params, sources, **kwargs)
    step = len(table['done']) * 2 + 2
    table['done'].append(step)
    return found | {'eval/reds/loss': np.float64(table[step])}

  table['done'] = []
  monkeypatch.setattr(begin.Evaluator, '__call__', evaluate)
  return table


def test_the_best_is_saved_when_it_is_measured(written, tmp_path, scored):
  """Evaluated every 2 steps, saved every 6; a restart still knows the best."""
  scored.update({2: 5.5, 4: 3.9, 6: 5.2, 8: 4.0})
  config = lambda steps: _load(
    written,
    total_steps=steps,
    checkpoint__every='6',
    checkpoint__keep_last='1',
    checkpoint__keep_best='-eval/reds/loss',
  )
  loop.train(config('6'), tmp_path)
  assert _checkpoints(tmp_path) == [4, 6]
  loop.train(config('8'), tmp_path)
  assert _checkpoints(tmp_path) == [4, 8]
  rows = [r for r in read_rows(tmp_path) if 'loss' not in r]
  losses = [(r['step'], r['eval/reds/loss']) for r in rows]
  assert losses == [(2, 5.5), (4, 3.9), (6, 5.2), (8, 4.0)]


def test_an_evaluation_is_given_up_when_told_to_stop(
  run, written, tmp_path, monkeypatch, capsys
):
  """SIGTERM in the first batch of the evaluation of step 4, no save due."""
  config = _load(written, checkpoint__every='100')
  whole, batches = begin.Evaluator._text_loss, []

  def told(self, params, source, *rest):
    batches.append(source.name)
    if len(batches) == 3:  # Step 2 has two sources.
      os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, params, source, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(begin.Evaluator, '_text_loss', told)
    with pytest.raises(SystemExit) as stopped:
      loop.train(config, tmp_path)
  assert stopped.value.code == 75 and len(batches) == 3
  assert _checkpoints(tmp_path) == [4]
  # It is made up for.
  loop.train(config, tmp_path)
  said = capsys.readouterr().out
  assert said.index('step 4 evaluated') < said.index('step 5/6')
  measured = [r['step'] for r in read_rows(tmp_path) if 'loss' not in r]
  assert measured == [2, 4, 6]
  assert _steps(tmp_path) == _steps(run)
  jax.tree.map(np.testing.assert_array_equal, _params(tmp_path), _params(run))


def test_a_run_killed_in_its_last_evaluation_is_not_finished(
  copy, written, capsys
):
  rows = (copy / 'metrics.jsonl').read_text().splitlines()
  assert 'eval/reds/loss' in rows[-1]
  (copy / 'metrics.jsonl').write_text('\n'.join(rows[:-1]) + '\n')
  row = loop.train(_load(written), copy)
  assert 'step 6 evaluated' in capsys.readouterr().out
  assert json.loads(rows[-1]).items() <= read_rows(copy)[-1].items()
  assert row['eval/reds/loss'] == pytest.approx(
    json.loads(rows[-1])['eval/reds/loss'], rel=1e-6
  )


def test_what_is_rotten_does_not_pass_for_finished(copy, run, written, capsys):
  """A bit of the last checkpoint, an empty one behind it, what lies beside."""
  last = copy / 'checkpoints' / '6'
  path = max(last.rglob('d/*'), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)
  (copy / 'checkpoints' / '99').mkdir()
  (copy / 'vocabulary.model').unlink()
  vocabulary.train(['a red fox'] * 9, copy / 'vocabulary.model', size=199)
  config = (copy / 'config.json').read_bytes()
  (copy / 'config.json').write_bytes(config[:100])
  loop.train(_load(written), copy)
  said = capsys.readouterr().out
  assert f'{copy}/config.json is damaged, and written anew.' in said
  assert (copy / 'config.json').read_bytes() == config
  name = path.relative_to(last)
  assert (
    f'Checkpoint 6 is damaged: its file {name} has other bytes than were'
    ' written. Using 4.'
  ) in said
  own = copy / 'vocabulary.model'
  assert f'{own} is not the vocabulary of this run: it is written anew.' in said
  assert own.read_bytes() == (run / 'vocabulary.model').read_bytes()
  jax.tree.map(np.testing.assert_array_equal, _params(copy), _params(run))
  assert _steps(copy) == _steps(run)


def test_a_finished_run_of_older_code_is_read_to_know(copy, written, capsys):
  """Its list has sizes alone; where all bytes can be read it is finished."""
  listed = copy / 'checkpoints' / '6' / 'files.json'
  sizes = json.loads(listed.read_text().splitlines()[0])
  listed.write_text(
    json.dumps({name: size for name, (size, _) in sizes.items()})
  )
  loop.train(_load(written), copy)
  assert capsys.readouterr().out == f'{copy} is finished: 6 steps.\n'


def test_a_score_that_is_not_measured_is_refused_before_work(written, tmp_path):
  config = _load(written, checkpoint__keep_best='-eval/reds/lost')
  message = (
    "checkpoint.keep_best 'eval/reds/lost'. Did you mean 'eval/reds/loss'"
  )
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path)
  assert not (tmp_path / 'checkpoints').exists()


class _Report:
  """Remembers what it is told."""

  def __init__(self):
    self.notes, self.rows, self.first = [], [], 1

  def note(self, text):
    self.notes.append(text)

  def write(self, step, row):
    self.rows.append(step)

  def progress(self, step, row):
    pass


def test_a_step_draws_from_the_seed_of_the_run(written, tmp_path, monkeypatch):
  class Stop(Exception):
    pass

  class Jitted:
    def __init__(self, *_, **__):
      pass

    def lower(self, state, batch, seed):
      raise Stop(seed)

  # All of JAX is as it is, but for the compiler of the step.
  patched = types.SimpleNamespace(**{**vars(jax), 'jit': Jitted})
  monkeypatch.setattr(loop, 'jax', patched)
  config = _load(written, seed='7', log__tensorboard='false')
  with pytest.raises(Stop) as found:
    loop.train(config, tmp_path / 'run')
  (seed,) = found.value.args
  assert seed == 7 and seed.dtype == np.uint32


def test_too_many_bad_steps_end_a_run(written):
  config = _load(written, optimizer__max_bad_steps='3', log__every='100')
  report, clock = _Report(), Clock()
  metrics = {'loss': np.float32('nan'), 'bad_steps': np.int32(2)}
  look = lambda n, **more: loop._look(
    config.log.every,
    config.optimizer.max_bad_steps,
    report,
    clock,
    (n, {**metrics, **more}, (10, ())),
    {},
  )
  look(11)
  assert report.notes == ['step 11 was not applied: loss nan']
  with pytest.raises(ValueError, match='3 steps in a row .* the last one 12'):
    look(12, bad_steps=np.int32(3))


def test_rows_are_written_now_and_then(written):
  config = _load(written, log__every='100')
  report, clock = _Report(), Clock()
  metrics = {'loss': np.float32(1), 'bad_steps': np.int32(0)}
  for n in range(1, 301):
    loop._look(
      config.log.every,
      config.optimizer.max_bad_steps,
      report,
      clock,
      (n, metrics, (10, ())),
      {},
    )
  assert report.rows == [1, 100, 200, 300]
  assert report.notes == []


def test_what_the_data_cannot_train(written, tmp_path):
  config = _load(written)
  for stack in ('encoder', 'decoder'):
    model = dataclasses.replace(config.model, **{stack: None})
    with pytest.raises(ValueError, match='this model has only its'):
      loop.train(dataclasses.replace(config, model=model), tmp_path / 'x')
  with pytest.raises(ValueError, match='total_steps is 0'):
    loop.train(dataclasses.replace(config, total_steps=0), tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


def test_patterns_name_every_metric_they_fit():
  known = ['eval/a/accuracy', 'eval/a/loss', 'eval/b/accuracy', 'eval/b/f1']
  assert begin._best('eval/*/accuracy,-eval/a/loss', known) == [
    'eval/a/accuracy', 'eval/b/accuracy', '-eval/a/loss',
  ]  # fmt: skip
  assert begin._best('', known) == []
  # What fits no task of this run is for another.
  assert begin._best('eval/*/em,eval/b/f1', known) == ['eval/b/f1']
  with pytest.raises(ValueError, match="keep_best 'eval/\\*/em'"):
    begin._best('eval/*/em', known)


# Fine-tuning: what is frozen, what the optimizer remembers.


def test_frozen_parameters_keep_their_bits_after_a_resume(
  run, written, tmp_path, monkeypatch
):
  config = _load(
    written, init=str(run), total_steps='4', optimizer__train='router'
  )

  with monkeypatch.context() as patch:
    patch.setattr(pipeline.TrainData, 'iterate', _cut_short(2))
    with pytest.raises(KeyboardInterrupt):
      loop.train(config, tmp_path)
  assert checkpoint.last_step(tmp_path) == 2
  loop.train(config, tmp_path)
  before, after = (paths.by_path(_params(p)) for p in (run, tmp_path))
  moved = {k for k in before if not np.array_equal(before[k], after[k])}
  assert moved == {k for k in before if '/router/' in k} and len(moved) == 2


def _cut_short(steps):
  """`TrainData.iterate`, interrupted before the batch behind the last."""
  whole = pipeline.TrainData.iterate

  def iterate(self, start=0, **kwargs):
    for n, batch in enumerate(whole(self, start, **kwargs), start):
      if n == steps:
        raise KeyboardInterrupt
      yield batch

  return iterate


def test_kept_slots_are_those_of_the_run_it_starts_from(run, written, tmp_path):
  """A step whose gradients barely count leaves the second moments alone."""
  config = _load(
    written,
    init=str(run),
    init_slots='keep',
    total_steps='1',
    optimizer__train='moe',
    optimizer__decay_exponent='9.0',  # (6 + 1) ** -9: one part in 40 million.
  )
  loop.train(config, tmp_path)
  found, theirs = _slots(tmp_path), _slots(run)
  assert found.pop('count') == theirs.pop('count') + 1 == 7
  assert found.keys() == {name for name in theirs if '/moe/' in name}
  assert len(found) >= 4
  for name, moment in found.items():
    np.testing.assert_allclose(moment, theirs[name], rtol=1e-4, err_msg=name)


def _slots(path):
  """The optimizer's second moments in the newest checkpoint of a run."""
  own = config_file.from_dict(checkpoint.read_run(path)['config'])
  model = Transformer(own.model)
  made = optimizer.make(own.optimizer, parameter_axes(model))
  boxed = jax.eval_shape(lambda: init_state(model, made, jax.random.key(0)))
  state = checkpoint.load_rest(path, sharding.unbox(boxed))
  return paths.by_path(state['opt_state'][0])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'init_slots': 'kept'}, "config.init_slots 'kept'. Did you mean 'keep'"),
    ({'optimizer.name': 'adamw'}, 'has slots of adafactor, this config wants'),
    ({'optimizer.min_dim_to_factor': '4'}, 'has no slot .*init_slots='),
    ({'optimizer.train': 'rooter'}, "train='rooter' trains nothing: it is"),
    ({'optimizer.train': '('}, 'and no regular expression'),
  ],
)
def test_slots_and_roles_that_cannot_be(
  run, written, tmp_path, changes, message
):
  asked = {
    'init': str(run),
    'init_slots': 'keep',
    'total_steps': '1',
    **changes,
  }
  with pytest.raises(ValueError, match=message):
    loop.train(_load(written, **asked), tmp_path)
  assert not checkpoint.last_step(tmp_path)


def test_slots_of_a_checkpoint_that_has_none(run, written, tmp_path):
  bare = tmp_path / 'bare'
  checkpoint.save_params(bare, _params(run), checkpoint.read_run(run))
  config = _load(written, init=str(bare), init_slots='keep', total_steps='1')
  with pytest.raises(ValueError, match='has parameters alone, no optimizer'):
    loop.train(config, tmp_path / 'run')
