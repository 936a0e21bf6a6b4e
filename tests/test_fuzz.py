"""Nothing wrong is accepted in silence; the rest is `python -m tests.fuzz`."""

import dataclasses
import sys
import typing

import pytest

from st_moe import cli, config, fields, verbs
from st_moe.model import dispatch, gates
from st_moe.routing import selectors
from tests import fuzz


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('TF_CPP_MIN_LOG_LEVEL', 'JAX_COMPILATION_CACHE_DIR'):
    monkeypatch.setenv(name, '3')
  monkeypatch.setattr(sys, 'path', [*sys.path])


def _ruled(hint) -> bool:
  """Whether a number or word says what it may be; bools and texts need not."""
  kind, rules = fields.base(hint)
  if rules or dataclasses.is_dataclass(kind) or kind in (bool, str):
    return True
  origin = typing.get_origin(kind)
  if origin in (typing.Literal, type(None)) or kind is type(None):
    return True
  parts = typing.get_args(kind)
  return origin is not None and all(p is ... or _ruled(p) for p in parts)


def _kinds(kind=config.Config):
  yield kind
  for hint in fields.of(kind).values():
    for each in fields.alternatives(hint):
      if dataclasses.is_dataclass(each):
        yield from _kinds(each)


def test_every_field_has_a_rule():
  kinds = {*_kinds()} - {config.Part}
  assert config.Capacity in kinds and len(kinds) == 12
  bare = [
    f'{kind.__name__}.{name}'
    for kind in kinds
    for name, hint in fields.of(kind).items()
    if not _ruled(hint)
  ]
  assert not bare
  assert not _ruled(int) and not _ruled(float | None) and _ruled(fields.Rate)
  # A config made in Python is looked at as well.
  assert all(issubclass(kind, fields.Checked) for kind in kinds)


def test_every_option_of_a_mechanism_has_a_rule():
  for table in (gates.GATES, selectors.SELECTORS, dispatch.DISPATCHERS):
    for name, made in table.items():
      for option, hint in config.options(made).items():
        assert _ruled(hint), f'{name}.{option}'


def test_no_field_takes_what_it_cannot_be():
  cases = [*fuzz.of_fields()]
  assert len(cases) > 900
  verdicts = [(case.name, *fuzz.attempt(case)) for case in cases]
  assert [v for v in verdicts if v[1] != 'fine'] == []


@pytest.mark.parametrize(
  'case',
  [case for case in fuzz.of_files() if case.argv[0] == 'config'],
  ids=lambda case: ' '.join(case.argv[1:])[-30:],
)
def test_no_file_is_taken_for_a_config(case):
  fuzz.lay(case.files)
  verdict, said = fuzz.attempt(case)
  assert verdict == 'fine', said
  assert said.count('\n') == 1  # One sentence.


def test_what_counts_as_fine():
  case = fuzz.Case(('config',), ('seed',))
  assert fuzz.judged(case, 1, 'st-moe: config.seed = -1 should be') == 'fine'
  assert fuzz.judged(case, 0, '{"seed": -1}') == 'accepted'
  assert fuzz.judged(case, 1, 'st-moe: wrong') == 'unnamed'
  assert fuzz.judged(case, 1, 'seed\nTraceback (most') == 'trace'
  assert fuzz.attempt(fuzz.Case(('list', 'configs'), ()))[0] == 'accepted'


def test_a_bug_stays_a_trace(monkeypatch):
  def bug(flags, overrides):
    raise KeyError('ours')

  monkeypatch.setitem(cli._RUN, 'config', bug)
  assert fuzz.attempt(fuzz.Case(('config',), ())) == (
    'trace',
    "KeyError: 'ours'",
  )


def test_every_verb_is_tried():
  cases = fuzz.all_cases()
  assert {case.argv[0] for case in cases} >= {*verbs.VERBS}
  assert len({case.name for case in cases}) == len(cases) > 1500
