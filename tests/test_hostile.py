"""A few of each kind of the drill, and that it sees what it is there to see."""

import os
import random

import pytest

from tests import hostile
from tests.hostile_bases import Attempt, Case

# What takes seconds; the drill has them all.
_SLOW = ('20 GB', 'bomb', '600 MB', '/dev', '/proc', 'elsewhere', 'turned over')


def _few():
  kinds = {}
  for case in hostile.table():
    if not any(word in case.name for word in _SLOW):
      kinds.setdefault(case.kind, []).append(case)
  draw = random.Random(0)
  return [c for found in kinds.values() for c in draw.sample(found, 4)]


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  return hostile.build(tmp_path_factory.mktemp('bases'))


@pytest.mark.parametrize('case', _few(), ids=str)
def test_it_ends_in_a_sentence(case, bases, tmp_path):
  found = hostile.tried(case, bases, tmp_path)
  assert found['passed'], found


def test_there_are_hundreds():
  assert len(hostile.table()) >= 400
  assert len({case.kind for case in hostile.table()}) >= 11


def _outcome(command, bases, tmp_path, *, made='', never=None):
  make = lambda *_: Attempt(command, lambda: made, never=never)
  case = Case('none', 'none', make)
  return hostile.tried(case, bases, tmp_path)['outcome']


def test_what_goes_wrong_is_seen(bases, tmp_path, monkeypatch):
  outcome = lambda command, **more: _outcome(command, bases, tmp_path, **more)

  def refused():
    raise ValueError('a.json is no JSON')

  def broken():
    raise TypeError('a list')

  def large():
    assert len(bytearray(100 << 20).replace(b'\0', b'\1')) == 100 << 20
    refused()

  assert outcome(refused) == 'refused'
  assert outcome(broken) == 'a trace'
  assert outcome(lambda: None, made='other') == 'accepted'
  assert outcome(refused, never=bases.root) == 'wrote elsewhere'
  monkeypatch.setattr(hostile, 'BYTES', 50 << 20)
  assert outcome(large) == 'too much'
  monkeypatch.setattr(hostile, 'SECONDS', 0)
  assert outcome(refused) == 'too much'


def test_code_that_runs_is_seen(bases, tmp_path):
  canary = tmp_path / 'canary'
  assert _outcome(lambda: os.mkdir(canary), bases, tmp_path) == 'executed'


def test_a_broken_drill_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
  path, ran = tmp_path / 'found.jsonl', []
  cases = hostile.table()[:3]

  class Worker:
    def __init__(self, *_):
      pass

    def try_(self, number):
      ran.append(cases[number])
      if len(ran) == 2:
        raise KeyboardInterrupt
      return {'outcome': 'refused', 'passed': True, 'seconds': 1, 'grown': 1}

    def close(self):
      pass

  monkeypatch.setattr(hostile, '_Worker', Worker)
  monkeypatch.setattr(hostile, 'build', lambda root: None)
  monkeypatch.setattr(hostile, 'table', lambda: cases)
  start = lambda: hostile.main([f'--output={path}'])
  with pytest.raises(KeyboardInterrupt):
    start()
  with path.open('a') as out:
    out.write('{"case": ')
  assert start() == 0
  assert ran == [cases[0], cases[1], cases[1], cases[2]]
  assert start() == 0 and len(ran) == 4
  assert cases[0].kind in capsys.readouterr().out
