"""What is saved comes back to the bit; what is broken is passed over."""

import errno
import gc
import json
import os
import pathlib
import pwd
import re
import shutil
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend

import st_moe
from st_moe import checkpoint, config_file, sharding
from st_moe.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  OptimizerConfig,
  StackConfig,
)
from st_moe.data import files, vocabulary
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer
from st_moe.train.state import TrainState, parameter_axes, starting
from tests.helpers import examples, padded_batch, random_params, tiny

# What a state is made of, and how 8 devices hold it.
_SHARDS = {
  'bank': (('expert', 'fsdp', None), (4, 2, 3)),
  'scale': ((), (5,)),
}


def _state(step, seed=0, mesh=None):
  """A small state whose numbers have all their bits in use."""
  rng = np.random.default_rng([seed, step])
  devices = jax.devices()[:1]
  mesh = mesh or sharding.make_mesh(devices=devices)

  def draw():
    return {
      name: jax.device_put(
        rng.standard_normal(shape).astype('f4'),
        jax.NamedSharding(mesh, jax.P(*spec)),
      )
      for name, (spec, shape) in _SHARDS.items()
    }

  everywhere = jax.NamedSharding(mesh, jax.P())
  number = lambda n: jax.device_put(jnp.int32(n), everywhere)
  moments = {k: optimizer.Moments(full=v) for k, v in draw().items()}
  return TrainState(
    number(step), draw(), optimizer.AdafactorState(number(step), moments),
    number(2),
  )  # fmt: skip


def _abstract(state):
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
  )


def _save(workdir, *steps, scores=None, known=None, best=(), **config):
  """`scores` come after their step; `known` are those of an earlier start."""
  checkpoints = checkpoint.Checkpoints(
    workdir, CheckpointConfig(**config), best, known
  )
  for step in steps:
    checkpoints.save(step, _state(step), {'step': step})
    if scores and step in scores:
      checkpoints.score(step, scores[step])
  checkpoints.close()


def _restore(workdir, like=None, **config):
  """(state, run) and what was said on the way."""
  said = []
  checkpoints = checkpoint.Checkpoints(workdir, CheckpointConfig(**config))
  found = checkpoints.restore(_abstract(like or _state(0)), notify=said.append)
  checkpoints.close()
  return found, said


def _steps(workdir):
  there = (workdir / 'checkpoints').iterdir()
  return sorted(int(p.name) for p in there if p.is_dir())


def _same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), b)


def _largest(directory: pathlib.Path) -> pathlib.Path:
  """The file that most of the arrays are in."""
  there = (p for p in directory.rglob('*') if p.is_file())
  return max(there, key=lambda p: p.stat().st_size)


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert _restore(tmp_path) == (None, [])
  assert checkpoint.last_step(tmp_path) == 0


def test_parameters_optimizer_and_counts_come_back(tmp_path):
  _save(tmp_path, 7)
  (state, run), said = _restore(tmp_path)
  _same_bits(state, _state(7))
  assert type(state.opt_state) is optimizer.AdafactorState
  assert state.step == 7 and state.bad_steps == 2
  assert run == {'step': 7} and said == []
  assert checkpoint.last_step(tmp_path) == 7


def test_a_state_may_be_overwritten_while_it_is_saved(tmp_path):
  # The loop donates it to the next step at once.
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  state = _state(3)
  checkpoints.save(3, state, {})
  jax.tree.map(lambda a: a.delete(), state)
  checkpoints.close()
  (found, _), _ = _restore(tmp_path)
  _same_bits(found, _state(3))


@pytest.mark.parametrize('asynchronous', [True, False])
def test_the_last_two_stay(tmp_path, asynchronous):
  _save(tmp_path, 1, 2, 3, 4, keep_last=2, asynchronous=asynchronous)
  assert _steps(tmp_path) == [3, 4]
  # And each has the list of its files.
  lists = sorted((tmp_path / 'checkpoints').glob('*/files.json'))
  assert [path.parent.name for path in lists] == ['3', '4']


def test_every_third_stays_for_ever(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, 5, 6, 7, keep_last=1, keep_every=3)
  assert _steps(tmp_path) == [3, 6, 7]


def test_with_keep_last_0_all_stay(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, keep_last=0)
  assert _steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(('name', 'best'), [('score', 2), ('-score', 3)])
def test_the_best_stays(tmp_path, name, best):
  # Step 4 was not measured. A run that starts again still knows its best.
  scores = {
    s: {'score': v} for s, v in {1: 2.0, 2: 5.0, 3: 1.0, 5: 3.0}.items()
  }
  _save(tmp_path, 1, 2, 3, 4, 5, scores=scores, best=[name], keep_last=1)
  assert _steps(tmp_path) == [best, 5]
  later = {6: {'score': 4.0}}
  _save(tmp_path, 6, 7, scores=later, known=scores, best=[name], keep_last=1)
  assert _steps(tmp_path) == [best, 7]
  (state, _), _ = _restore(tmp_path)
  assert state.step == 7  # It goes on from the last all the same.


def test_a_best_that_is_beaten_goes(tmp_path):
  scores = {s: {'x': v} for s, v in {1: 1.0, 2: 3.0, 3: 2.0}.items()}
  _save(tmp_path, 1, 2, 3, scores=scores, best=['x'], keep_last=1)
  assert _steps(tmp_path) == [2, 3]
  later = {4: {'x': 3.5}}
  _save(tmp_path, 4, scores=later, known=scores, best=['x'], keep_last=1)
  assert _steps(tmp_path) == [4]
  # What is no number is no record, and of equals the first stays.
  same = {4: {'x': 3.5}, 5: {'x': 3.5}, 6: {'x': 'nan'}}
  _save(tmp_path, 5, 6, scores=same, known=later, best=['x'], keep_last=1)
  assert _steps(tmp_path) == [4, 6]


def test_the_best_of_each_task_stays(tmp_path):
  # boolq is best at 2, copa at 3, the loss at 1; 4 is best at nothing.
  table = {
    1: (50, 60, 0.1),
    2: (70, 50, 0.4),
    3: (60, 80, 0.3),
    4: (65, 70, 0.2),
  }
  scores = {
    step: dict(zip(('boolq', 'copa', 'loss'), row, strict=True))
    for step, row in table.items()
  }
  best = ['boolq', 'copa', '-loss']
  _save(tmp_path, 1, 2, 3, 4, 5, scores=scores, best=best, keep_last=1)
  assert _steps(tmp_path) == [1, 2, 3, 5]


# Damage.


def _truncate(directory):
  file = _largest(directory / 'params')
  file.write_bytes(file.read_bytes()[:-5])


def _lose_a_file(directory):
  _largest(directory / 'rest').unlink()


def _lose_an_item(directory):
  shutil.rmtree(directory / 'params')


def _lose_an_unlisted_item(directory):
  # As when it was killed between the checkpoint and the list of its files.
  (directory / 'files.json').unlink()
  shutil.rmtree(directory / 'rest')


_DAMAGES = {
  _truncate: r'its file params/.* has \d+ bytes instead of \d+',
  _lose_a_file: r'its file rest/.* is missing',
  _lose_an_item: r'its file params/.* is missing',
  _lose_an_unlisted_item: r'it cannot be read \(FileNotFoundError: .*/3/rest',
}


def _list_sizes_alone(directory):
  """Makes files.json what it was before it had checksums."""
  path = directory / 'files.json'
  listed = json.loads(path.read_text().splitlines()[0])
  path.write_text(
    json.dumps({name: size for name, (size, _) in listed.items()})
  )


@pytest.fixture(params=['disk', 'gs'])
def place(request, tmp_path):
  """(a workdir, the folder that its files are in), on a disk or in a store."""
  if request.param == 'disk':
    return tmp_path, tmp_path
  return epath.Path('gs://runs/a'), request.getfixturevalue('bucket') / 'runs/a'


def test_no_bit_of_any_file_goes_unnoticed(place):
  """Each file in turn: one bit turned, one byte short, empty, gone."""
  workdir, folder = place
  _save(workdir, 1, 2)
  newest = folder / 'checkpoints' / '2'
  everything = [p for p in sorted(newest.rglob('*')) if p.is_file()]
  names = {p.relative_to(newest).as_posix() for p in everything}
  assert len(everything) > 20 and names >= {
    'files.json', 'run/metadata', 'params/_METADATA', 'commit_success.txt',
    'rest/manifest.ocdbt', '_CHECKPOINT_METADATA',
  }  # fmt: skip
  rng = np.random.default_rng(0)
  for path in everything:
    right = path.read_bytes()
    wrongs = [right[:-1], b'']
    for at in {0, len(right) - 1, *rng.integers(0, len(right), 2)}:
      wrong = np.frombuffer(right, np.uint8).copy()
      wrong[at] ^= np.uint8(1 << rng.integers(8))
      wrongs.append(wrong.tobytes())
    for wrong in wrongs:
      path.write_bytes(wrong)
      assert checkpoint.find(workdir).name == '1', (path, wrong)
    path.unlink()
    if path.name != 'files.json':
      assert checkpoint.find(workdir).name == '1', path
    path.write_bytes(right)
  assert checkpoint.find(workdir).name == '2'


def test_whatever_is_damaged_the_run_goes_on_from_the_one_before(place, capsys):
  """Readers say it on standard error; a run says it and sets it aside."""
  workdir, folder = place
  _save(workdir, 1)
  number = 2
  while number < 5:
    _save(workdir, number, keep_last=0)
    newest = folder / 'checkpoints' / f'{number}'
    everything = [p for p in sorted(newest.rglob('*')) if p.is_file()]
    path = (
      everything[5 * number % len(everything)]
      if number < 4
      else newest / 'files.json'
    )
    data = bytearray(path.read_bytes())
    data[number % len(data)] ^= 1 << number % 8
    path.write_bytes(data)
    name = path.relative_to(newest).as_posix()
    what = (
      'its files.json is damaged'
      if name == 'files.json'
      else f'its file {name} has other bytes than were written'
    )
    assert checkpoint.read_run(workdir) == {'step': 1}
    said = capsys.readouterr().err
    checkpoints = f'{workdir}/checkpoints'
    assert said == f'{checkpoints}/{number} is damaged: {what}. Using 1.\n'
    with pytest.raises(ValueError, match=f'/{number} is damaged: {what}.'):
      checkpoint.find(f'{checkpoints}/{number}')
    assert [p.name for p in checkpoint.all_steps(workdir)] == ['1']
    assert capsys.readouterr().err == said
    (state, run), told = _restore(workdir)
    _same_bits(state, _state(1))
    assert run == {'step': 1}
    assert told == [f'Checkpoint {number} is damaged: {what}. Using 1.']
    aside = folder / 'damaged' / f'{number}-{number - 2}'
    assert not newest.exists() and (aside / name).read_bytes() == data
    number += 1
  assert checkpoint.is_sound(workdir, 1)


def test_an_older_list_has_sizes_alone(tmp_path):
  _save(tmp_path, 1, 2)
  newest = tmp_path / 'checkpoints' / '2'
  _list_sizes_alone(newest)
  (state, _), said = _restore(tmp_path)
  _same_bits(state, _state(2))
  assert said == [] and checkpoint.find(tmp_path) == epath.Path(newest)
  # It says nothing of bytes, so that it is no proof that a run has ended well.
  assert not checkpoint.is_sound(tmp_path, 2)
  _truncate(newest)
  assert checkpoint.find(tmp_path).name == '1'


def test_a_checkpoint_without_a_list_is_read_and_it_is_said(tmp_path, capsys):
  _save(tmp_path, 1)
  newest = tmp_path / 'checkpoints' / '1'
  (newest / 'files.json').unlink()
  message = f'Checkpoint {newest} has no files.json: it can be read, but nothin'
  (state, _), said = _restore(tmp_path)
  _same_bits(state, _state(1))
  assert len(said) == 1 and said[0].startswith(message)
  assert checkpoint.read_run(tmp_path) == {'step': 1}
  assert capsys.readouterr().err.startswith(message)


def test_what_is_old_is_checked_once_by_a_command(tmp_path, monkeypatch):
  _save(tmp_path, 1)
  newest, hour = tmp_path / 'checkpoints' / '1', time.time() - 3600
  checksum, read = files.checksum, []
  monkeypatch.setattr(
    files, 'checksum', lambda p: read.append(p) or checksum(p)
  )
  checkpoint.find(tmp_path)
  once = len(read)
  assert once > 20
  # What was written a moment ago may have been changed since, unseen.
  checkpoint.find(tmp_path)
  assert len(read) == 2 * once
  everything = [p for p in newest.rglob('*') if p.is_file()]
  for path in everything:
    os.utime(path, (hour, hour))
  checkpoint.find(tmp_path)
  checkpoint.find(tmp_path)
  assert len(read) == 3 * once
  # A change shows in the file's time.
  path = _largest(newest)
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(ValueError, match='can be used:\n  1: its file'):
    checkpoint.find(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
  _save(tmp_path, 1)
  (tmp_path / 'checkpoints' / '99').mkdir()
  assert checkpoint.last_step(tmp_path) == 1
  (state, _), said = _restore(tmp_path)
  assert state.step == 1 and said == []
  _save(tmp_path, 99)  # Nor is it in the way.
  assert checkpoint.last_step(tmp_path) == 99


def test_what_a_kill_left_half_written_goes(place):
  workdir, folder = place
  _save(workdir, 1, 2)
  if workdir == folder:
    half = '3.st-moe-tmp', '3.st-moe-tmp.orbax-checkpoint-tmp'
    for name in half:
      shutil.copytree(folder / 'checkpoints/2', folder / 'checkpoints' / name)
  else:
    half = ['3']
    for name in ('run/metadata', '_CHECKPOINT_METADATA'):
      (workdir / 'checkpoints' / '3' / name).write_text('{}')
  assert checkpoint.last_step(workdir) == 2
  (state, _), said = _restore(workdir)
  assert state.step == 2 and said == []
  assert not any((folder / 'checkpoints' / name).exists() for name in half)


def test_a_store_that_orbax_does_not_know(tmp_path):
  message = 's3://b/run: checkpoints lie on a disk or in gs://; mount other'
  with pytest.raises(ValueError, match=message):
    checkpoint.find('s3://b/run')


@pytest.mark.parametrize(
  ('error', 'kind', 'message'),
  [
    (
      ImportError('Please install gcsfs to access Google Storage'),
      ValueError,
      "gs://runs/a: Please install gcsfs .*; pip install 'st_moe.gcp.'",
    ),
    (
      RuntimeError('Could not resolve host\n\t when reading metadata'),
      OSError,
      'gs://runs/a cannot be reached: Could not resolve host$',
    ),
  ],
)
def test_a_store_that_does_not_answer(store, monkeypatch, error, kind, message):
  def fail(*_):
    raise error

  monkeypatch.setattr(backend._FileSystemSpecBackend, 'fs', fail)
  with pytest.raises(kind, match=message):
    checkpoint.find('gs://runs/a')


def test_a_user_without_a_name(tmp_path, monkeypatch):
  """As containers are started with --user=54321: nobody in /etc/passwd."""

  def unknown(uid):
    raise KeyError(f'getpwuid(): uid not found: {uid}')

  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  _save(tmp_path, 1, 2)
  (state, _), said = _restore(tmp_path)
  assert state.step == 2 and said == []


@pytest.mark.parametrize('damage', _DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
  _save(tmp_path, 1, 2, 3, keep_last=3)
  damage(tmp_path / 'checkpoints' / '3')
  (state, run), said = _restore(tmp_path, keep_last=3)
  _same_bits(state, _state(2))
  assert run == {'step': 2}
  assert len(said) == 1
  message = f'Checkpoint 3 is damaged: {_DAMAGES[damage]}.* Using 2.'
  assert re.fullmatch(message, said[0]), said
  # It is out of the way, and not thrown away.
  assert _steps(tmp_path) == [1, 2]
  assert [p.name for p in (tmp_path / 'damaged').iterdir()] == ['3-0']
  _save(tmp_path, 3, keep_last=3)
  (state, _), said = _restore(tmp_path, keep_last=3)
  _same_bits(state, _state(3))
  assert said == [] and _steps(tmp_path) == [1, 2, 3]


def test_two_damaged_ones_in_a_row(tmp_path):
  _save(tmp_path, 1, 2, 3, keep_last=3)
  _truncate(tmp_path / 'checkpoints' / '3')
  _lose_an_item(tmp_path / 'checkpoints' / '2')
  assert checkpoint.last_step(tmp_path) == 1
  assert checkpoint.find(tmp_path).name == '1'
  (state, _), said = _restore(tmp_path)
  assert state.step == 1 and len(said) == 2
  assert len(list((tmp_path / 'damaged').iterdir())) == 2


def test_all_damaged_is_no_new_run(tmp_path):
  """Starting over in silence would cost days; nothing is moved either."""
  _save(tmp_path, 1)
  _truncate(tmp_path / 'checkpoints' / '1')
  with pytest.raises(ValueError, match=r'can be used:\n  1: its file'):
    _restore(tmp_path)
  assert _steps(tmp_path) == [1] and not (tmp_path / 'damaged').exists()


def test_a_relative_workdir_comes_back(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _save('run', 1)
  (state, _), said = _restore('run')
  _same_bits(state, _state(1))
  assert said == []


def test_a_checkpoint_that_was_never_finished(tmp_path):
  """Killed while writing: Orbax names it last, so it is no checkpoint yet."""
  _save(tmp_path, 1, 2)
  checkpoints = tmp_path / 'checkpoints'
  half = checkpoints / '3.orbax-checkpoint-tmp'
  shutil.copytree(checkpoints / '2', half)
  assert checkpoint.last_step(tmp_path) == 2
  (state, _), said = _restore(tmp_path)
  assert state.step == 2 and said == []


def test_another_shape_is_no_damage(tmp_path):
  _save(tmp_path, 1)
  like = _state(0)
  bank = jax.ShapeDtypeStruct((4, 2, 9), jnp.float32)
  like = _abstract(like).replace(params={**like.params, 'bank': bank})
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  message = (
    r'Another model: bank is float32\[4, 2, 3\] in the checkpoint .*/1 and'
    r' float32\[4, 2, 9\] in this config'
  )
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(like)
  like = like.replace(params={'scale': like.params['scale']})
  with pytest.raises(ValueError, match='bank is .*3\\] .* and absent in this'):
    checkpoints.restore(like)
  checkpoints.close()
  assert _steps(tmp_path) == [1]  # Still where it was.


# A full disk.


@pytest.mark.parametrize('method', ['save', 'wait_until_finished'])
def test_a_full_disk_is_said_in_words(tmp_path, monkeypatch, method):
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, _state(1), {})
  checkpoints.save(2, _state(2), {})
  checkpoints._finish()  # 2 is there.

  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints._writer, method, full)
    with pytest.raises(
      ValueError, match=r'The disk of .*checkpoints is full. Older .* intact'
    ):
      checkpoints.save(3, _state(3), {})
  checkpoints.close()
  (state, _), said = _restore(tmp_path)
  assert state.step == 2 and said == []


def test_too_little_room_is_said_before_anything_is_written(
  tmp_path, monkeypatch
):
  # 500,000 float32 are 1.9 MiB, and 16 are kept for what describes them.
  state = _state(1).replace(params={'bank': jnp.zeros(500_000)})
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, state, {})
  with monkeypatch.context() as patch:
    left = types.SimpleNamespace(free=9 << 20)
    patch.setattr(shutil, 'disk_usage', lambda _: left)
    message = 'is full .9 MiB of the 18 MiB of a checkpoint are free'
    with pytest.raises(ValueError, match=message):
      checkpoints.save(2, state, {})
    left.free = 18 << 20
    checkpoints.save(3, state, {})
  checkpoints.close()
  assert _steps(tmp_path) == [1, 3]


def test_other_errors_are_themselves(tmp_path, monkeypatch):
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())

  def forbidden(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(checkpoints._writer, 'save', forbidden)
  with pytest.raises(PermissionError):
    checkpoints.save(1, _state(1), {})
  checkpoints.close()


# Meshes.


# Axes, devices, and how many of 8 experts each device has.
_MESHES = {
  '1x8': (dict(expert=8), 8, 1),
  '2x2x2': (dict(fsdp=2, expert=2, model=2), 8, 4),
  '1': ({}, 1, 8),
}


@pytest.mark.parametrize(
  ('there', 'here'),
  [('1x8', '2x2x2'), ('1x8', '1'), ('2x2x2', '1x8'), ('1', '2x2x2')],
)
def test_a_run_goes_on_on_another_mesh(tmp_path, there, here):
  """The state of a whole model with its optimizer, to the bit."""
  model = Transformer(tiny(vocab_size=128, moe={'num_experts': 8}))

  def plan(name):
    axes, devices, _ = _MESHES[name]
    mesh = sharding.make_mesh(**axes, devices=jax.devices()[:devices])
    with sharding.use(mesh):
      tx = optimizer.make(OptimizerConfig(), parameter_axes(model))
      return starting(model, tx, mesh)

  old, new = plan(there), plan(here)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda a, s: jax.device_put(rng.normal(size=a.shape).astype(a.dtype), s),
    old.shapes,
    old.shardings,
  )
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(4, state, {})
  checkpoints.close()
  like = sharding.placed(new.shapes, new.shardings)
  checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
  found, _ = checkpoints.restore(like)
  checkpoints.close()
  _same_bits(found, jax.device_get(state))
  for a, b in zip(*map(jax.tree.leaves, (found, like)), strict=True):
    assert a.sharding == b.sharding
  bank = found.params['encoder']['layers']['layer_1']['moe']['experts']
  shards = bank['wo']['kernel'].addressable_shards
  _, devices, experts = _MESHES[here]
  assert len(shards) == devices
  assert {shard.data.shape[1] for shard in shards} == {experts}


# Use.


def test_find(tmp_path):
  _save(tmp_path, 5, 10, keep_last=2)
  checkpoints = tmp_path / 'checkpoints'
  for path in (tmp_path, checkpoints, checkpoints / '10'):
    assert checkpoint.find(str(path)).name == '10'  # Not 5, as text would sort.
  assert checkpoint.find(checkpoints / '5').name == '5'
  _truncate(checkpoints / '10')
  assert checkpoint.find(tmp_path).name == '5'
  with pytest.raises(ValueError, match='/10 is damaged: its file params/'):
    checkpoint.find(checkpoints / '10')
  for path in (tmp_path / 'nowhere', checkpoints / '7'):
    message = f'No checkpoint in {path}: give a workdir of `st-moe train`'
    with pytest.raises(ValueError, match=message):
      checkpoint.find(path)


# One sparse layer.
_MODEL = tiny(
  vocab_size=200,
  encoder=StackConfig(1, 1, 0, 16),
  decoder=None,
  moe={'extra_ffn': 'none'},
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """(workdir, config, parameters, vocabulary) of a run at step 20."""
  workdir = tmp_path_factory.mktemp('trained')
  words = 'a cat sat on the mat and ate rice by the red door of an old inn'
  vocab = vocabulary.train([words] * 50, workdir / 'v.model', size=200)
  config = Config(
    name='tuned',
    model=_MODEL,
    data=DataConfig(mixture={'text': 1.0}),
    optimizer=OptimizerConfig(learning_rate=0.5),
  )
  params = random_params(Transformer(_MODEL), **_inputs())
  run = checkpoint.describe_run(
    config_file.to_dict(config), vocab.model, tokens_seen={'text': 7}
  )
  state = TrainState(jnp.int32(20), params, {}, jnp.int32(0))
  checkpoints = checkpoint.Checkpoints(workdir, CheckpointConfig())
  checkpoints.save(20, jax.tree.map(jnp.asarray, state), run)
  checkpoints.close()
  return workdir, config, params, vocab


def _inputs():
  return padded_batch(_MODEL, examples(_MODEL))


def test_load_needs_the_step_directory_alone(trained, tmp_path):
  workdir, config, params, vocab = trained
  alone = tmp_path / '20'
  shutil.copytree(workdir / 'checkpoints' / '20', alone)
  for path in (workdir, alone):
    loaded = st_moe.load(str(path))
    assert loaded.config == config and loaded.model.config == _MODEL
    assert loaded.step == 20
    assert loaded.vocabulary.model == vocab.model
    assert loaded.vocabulary.decode(vocab.encode('red cat')) == 'red cat'
    _same_bits(loaded.params, params)
  forward = jax.jit(
    lambda p: loaded.model.apply(
      {'params': p}, **_inputs(), enable_dropout=False
    )
  )
  np.testing.assert_array_equal(forward(loaded.params), forward(params))


def test_load_on_eight_devices(trained):
  mesh = sharding.make_mesh(data=2, expert=4)
  loaded = st_moe.load(trained[0], mesh=mesh)
  _same_bits(loaded.params, trained[2])
  bank = loaded.params['encoder']['layers']['layer_0']['moe']['experts']
  assert len(bank['wo']['kernel'].sharding.device_set) == 8
  assert {s.data.shape[1] for s in bank['wo']['kernel'].addressable_shards} == {
    1
  }


def test_a_run_says_what_it_was(trained):
  run = checkpoint.read_run(trained[0])
  assert run['tokens_seen'] == {'text': 7}
  assert config_file.from_dict(run['config']) == trained[1]
  assert {'python', 'jax', 'flax', 'numpy'} <= set(run['versions'])
  assert run['versions']['jax'] == jax.__version__
  assert checkpoint.vocabulary_of(run) == trained[3].model
  bytes_run = checkpoint.describe_run({}, b'')
  assert checkpoint.vocabulary_of(bytes_run) == b''


def test_load_of_what_cannot_be_read(trained, tmp_path, capfd):
  # It carries the list of its files with it.
  alone = tmp_path / '20'
  shutil.copytree(trained[0] / 'checkpoints' / '20', alone)
  largest = _largest(alone / 'params')
  size = largest.stat().st_size
  largest.write_bytes(b'')
  with pytest.raises(
    ValueError, match='/20 is damaged: its file params/.* has'
  ):
    st_moe.load(alone)
  # As long as before, and rotten: one message, and nothing printed besides.
  largest.write_bytes(bytes(size))
  with pytest.raises(ValueError, match='/20 is damaged: its file .* other byt'):
    st_moe.load(alone)
  _list_sizes_alone(alone)
  with pytest.raises(ValueError, match='/20 is damaged: it cannot be read'):
    st_moe.load(alone)
  gc.collect()
  assert capfd.readouterr().err == ''
