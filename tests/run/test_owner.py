"""One run at a time in a workdir, whoever was killed there before."""

import json
import os
import re
import socket

import pytest
from etils import epath

from st_moe.run import owner


@pytest.fixture
def quick(monkeypatch):
  """A run gives a sign of life every 20 ms, and is given 300 ms."""
  monkeypatch.setattr(owner, 'BEAT', 0.02)
  monkeypatch.setattr(owner, '_POLL', 0.01)
  monkeypatch.setattr(owner, 'SILENCE', 0.3)


@pytest.fixture(params=['disk', 'no locks', 'store'])
def place(request, tmp_path, monkeypatch, quick):
  """A workdir that is not there yet."""
  if request.param == 'store':
    request.getfixturevalue('bucket')
    return epath.Path('gs://runs/a')
  if request.param == 'no locks':

    def none(*_):
      raise OSError('this disk has none')

    monkeypatch.setattr(owner.fcntl, 'flock', none)
  return epath.Path(tmp_path / 'runs' / 'a')


def _there(place):
  path = place / 'owner.json'
  return json.loads(path.read_text()) if path.exists() else {}


def test_a_second_run_is_told_who_is_there(place):
  with owner.held(place) as check:
    assert _there(place)['pid'] == os.getpid()
    with pytest.raises(ValueError) as refused, owner.held(place):
      pass
    check()
  said = re.sub(r'\(since [^)]*\)', '(since then)', str(refused.value))
  assert said == (
    f'{place} belongs to process {os.getpid()} on {socket.gethostname()}'
    ' (since then), which is at work: wait for its end, stop it, or use'
    ' another workdir.'
  )
  # An end leaves nothing: not even the folder, where it was made for nothing.
  assert not (place / 'owner.json').exists()
  with owner.held(place):
    pass


def test_a_folder_made_in_vain_goes(tmp_path):
  (tmp_path / 'mine').mkdir()
  with pytest.raises(ValueError), owner.held(tmp_path / 'runs' / 'a'):
    raise ValueError('a mistake in the config')
  with owner.held(tmp_path / 'mine'):
    pass
  assert [p.name for p in tmp_path.iterdir()] == ['mine']


def _dead(place, **changes):
  """The file of a run that was killed."""
  with owner.held(place):
    left = _there(place)
  place.mkdir(parents=True, exist_ok=True)
  (place / 'owner.json').write_text(json.dumps({**left, **changes}))


def test_after_a_kill_the_next_one_starts_at_once(tmp_path, capsys):
  # The kernel has dropped its lock; nobody waits for 45 s.
  _dead(epath.Path(tmp_path / 'a'), pid=1, id='dead')
  with owner.held(tmp_path / 'a'):
    pass
  (tmp_path / 'a').mkdir(exist_ok=True)
  (tmp_path / 'a' / 'owner.json').write_text('{"pid": ')  # Cut short.
  with owner.held(tmp_path / 'a'):
    pass
  assert capsys.readouterr().out == ''


def test_another_machine_is_given_time_for_a_sign_of_life(place, capsys):
  _dead(place, host='tpu-0', pid=7, boot='other', id='dead', since='noon')
  with owner.held(place) as check:
    check()
    assert _there(place)['pid'] == os.getpid()
  assert capsys.readouterr().out == (
    f'{place} was left without a word by process 7 on tpu-0 (since noon):'
    ' waiting 0.3 s, to see whether that run is still at work.\n'
  )


def test_a_sign_of_life_refuses(place, monkeypatch):
  _dead(place, host='tpu-0', pid=7, boot='other', id='alive', beat=3)

  def later(seconds):
    left = _there(place)
    (place / 'owner.json').write_text(json.dumps({**left, 'beat': 4}))

  monkeypatch.setattr(owner.time, 'sleep', later)
  with pytest.raises(
    ValueError, match='process 7 on tpu-0 .* is at work: wait'
  ):
    with owner.held(place):
      pass
  assert _there(place)['id'] == 'alive'  # It keeps its place.


def test_who_was_silent_for_too_long_gives_way(place):
  with owner.held(place) as check:
    theirs = {**_there(place), 'host': 'tpu-9', 'id': 'other'}
    (place / 'owner.json').write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match='taken over by process .* on tpu-9'):
      for _ in range(1000):
        check()
        owner.time.sleep(0.01)
  assert _there(place)['id'] == 'other'
