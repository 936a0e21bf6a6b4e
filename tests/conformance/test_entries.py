"""What every entry of every table says of itself, and whether it is so."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from st_moe import about, config_file, methods, schedules
from st_moe.config import Part
from st_moe.config import options as options_of
from st_moe.model import parts
from tests.conformance import chain, tables
from tests.conformance.tables import Case
from tests.test_fuzz import _ruled as ruled

ROOT = pathlib.Path(__file__).parents[2]
TESTS = [*ROOT.glob('tests/**/test_*.py')]
every_entry = pytest.mark.parametrize('case', tables.entries(), ids=str)
every_case = pytest.mark.parametrize('case', tables.cases(), ids=str)


@every_entry
def test_it_says_where_it_comes_from(case):
  said = about.of(case.entry)
  assert re.fullmatch(r'S\d-\d\d|', said.row), said.row
  assert re.match(
    r'arXiv:\d{4}\.\d{4,5}$|doi:|https?://|\S+ \d{4}$', said.paper
  )
  first = (case.entry.__doc__ or '').strip().partition('\n')[0]
  assert len(first) > 10 and first.endswith(('.', ':', '?')), first


@every_entry
def test_a_config_has_it_and_a_test_names_it(case):
  routed = case.part.name in str(config_file.ROUTINGS)  # By another code.
  assert tables.is_used(case) or routed, 'no config of configs/methods has it'
  word = rf'\b({case.part.name}|{case.entry.__name__})\b'
  here = pathlib.Path(__file__).parent
  texts = [p.read_text() for p in TESTS if here not in p.parents]
  assert any(re.search(word, text) for text in texts), 'no test names it'


@every_case
def test_its_options_are_keywords_with_rules(case):
  for name, hint in options_of(case.entry).items():
    # A schedule may go anywhere, and what may be one says so.
    free = case.kind == 'schedule' and hint is not object
    assert free or hint == schedules.Number or ruled(hint), name
  if case.kind in parts.TABLES:
    parts.choose(case.kind, case.part)
  with pytest.raises(ValueError) as e:
    case.at(wieght=1).made  # noqa: B018
  assert 'option of ' in str(e.value) and 'wieght' in str(e.value)
  for name in options_of(case.entry):
    with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
      case.at(**{f'{name}x': 1}).made  # noqa: B018


@every_case
def test_it_says_at_what_it_changes_nothing(case):
  """Or why that cannot be; a loss has its weight."""
  neutral = case.about.neutral
  if case.kind in ('shaping', 'weighing', 'beside', 'after'):
    plain = case.kind == 'beside' and not case.about.paper
    assert neutral is not None or plain, 'about(neutral=...) is missing'
  if isinstance(neutral, dict):
    case.at(**neutral).made  # noqa: B018
  assert not isinstance(neutral, str) or len(neutral) > 10


# Looking ahead.


def test_the_decoder_refuses_what_looks_ahead():
  for case in (case for case in tables.cases() if not case.about.causal):
    part = Part.of(case.part.name, **{**case.part.kwargs, 'force': False})
    with pytest.raises(ValueError, match='looks ahead'):
      parts.choose(case.kind, part, causal=True)
    part = Part.of(case.part.name, **{**case.part.kwargs, 'force': True})
    parts.choose(case.kind, part, causal=True)


# Drawing numbers.


def _answers(case: Case, *, train: bool, key):
  """What an entry says where what stands before it draws as ever."""
  ctx = chain.context(train=train)
  if case.kind == 'gate':
    return chain.gate(case)(chain.inputs(), ctx, key)
  scores = chain.scores(case, ctx, until=case.part)
  if case.kind == 'shaping':
    return case.made(scores, ctx, key, chain.kept(case, seed=5))
  if case.kind == 'selector':
    return case.made(scores, ctx, key, 4)
  select = parts.choose('selector', case.moe.selector)
  return case.made(select(scores, ctx, chain.KEYS[0], 4), ctx, key)


@pytest.mark.parametrize(
  'case', tables.of('gate', 'shaping', 'selector', 'weighing'), ids=str
)
def test_it_draws_where_it_says_so(case):
  say = lambda train, key: _answers(case, train=train, key=key)
  a, b = (say(True, key) for key in chain.KEYS)
  if case.about.noisy:
    more = [say(True, jax.random.key(n)) for n in range(2, 6)]
    assert not all(chain.same(a, each) for each in [b, *more])
  else:
    assert chain.same(a, b)
  # The same key, the same numbers; in an evaluation none are drawn.
  assert chain.same(a, say(True, chain.KEYS[0]))
  a, b, none = (say(False, key) for key in [*chain.KEYS, None])
  assert chain.same(a, b) and chain.same(a, none)


# Keeping.


class Spy(dict):
  """A dict that knows what was read of it."""

  def __getitem__(self, name):
    self.read = {*getattr(self, 'read', ()), name}
    return super().__getitem__(name)


@pytest.mark.parametrize('case', tables.of('shaping'), ids=str)
def test_it_reads_what_it_keeps(case):
  ctx = chain.context(train=True)
  kept = Spy(chain.kept(case))
  case.made(chain.scores(case, ctx, until=case.part), ctx, chain.KEYS[0], kept)
  assert getattr(kept, 'read', set()) == {n for n, _ in case.about.keeps}


# Schedules.


@pytest.mark.parametrize('case', tables.of('schedule'), ids=str)
def test_a_schedule_is_a_number_at_every_step(case):
  at = [schedules.value(case.part, step) for step in [*range(12), None]]
  assert all(jnp.shape(v) == () and np.isfinite(v) for v in at)
  assert at[-1] == at[-2]  # Its end.
  traced = jax.jit(lambda step: schedules.value(case.part, step))(3)
  np.testing.assert_allclose(traced, at[3], rtol=1e-6)


# The central files.

MOST = {
  'model/moe.py': 160,
  'model/transformer.py': 480,
  'run/loop.py': 300,
  'train/step.py': 220,
}


def _named(tree: ast.AST) -> set[str]:
  """The names of mechanisms that code compares something with."""
  names = {name for table in tables.TABLES.values() for name in table}
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Compare | ast.MatchValue):
      words = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
      found |= {word for word in words if isinstance(word, str)} & names
  return found


@pytest.mark.parametrize('file', MOST)
def test_no_mechanism_adds_a_branch(file):
  text = (ROOT / 'st_moe' / file).read_text()
  assert text.count('\n') <= MOST[file]
  assert _named(ast.parse(text)) == set()
  assert _named(ast.parse("if part.name == 'top_k': pass")) == {'top_k'}
  assert _named(ast.parse("if name in ('x', 'grouped'): pass")) == {'grouped'}


# Configs.


@pytest.mark.parametrize('name', tables.METHODS)
def test_a_config_is_its_base_and_its_own_lines(name):
  path = tables.METHODS[name]
  text, doc = path.read_text(), ast.get_docstring(ast.parse(path.read_text()))
  assert re.search(
    r'\((S\d-\d\d, )?(arXiv:|http)[^)]+\)', doc.split('\n')[0]
  ), doc
  assert 'Claim: ' in doc, 'what would an experiment show?'
  shown = methods.experiments()[name]['shown']
  assert shown in ('yes', 'no', 'in part', 'not yet')
  whole, base = (
    config_file.to_dict(config_file.load(f'{path}:{arg}runlocal'))
    for arg in ('', 'base,')
  )
  lines = config_file.diff(base, whole)
  assert lines, 'it is its base'
  body = text.partition('return c\n')[2]
  for line in lines:
    words = line.partition(':')[0].split('.')
    said = [word for word in words if re.search(rf'\b{word}\b', body)]
    assert len(said) >= min(2, len(words)), f'{line}: not among its lines'
