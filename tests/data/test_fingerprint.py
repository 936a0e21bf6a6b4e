"""Whether the results of code are stale: every way in which they may be."""

import functools
import importlib
import random
import re
import sys
import textwrap
import threading
import types

import numpy as np
import pytest

from st_moe.data import fingerprint


def walked(value):
  walk = fingerprint.Walk()
  walk.take(value)
  return walk


def digest(value):
  walk = walked(value)
  assert walk.unknown == []
  return walk.digest


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Files of a package `mine` -> its module `task`, loaded anew each time."""
  monkeypatch.syspath_prepend(tmp_path)

  def load(**sources):
    (tmp_path / 'mine').mkdir(exist_ok=True)
    for name, source in {'__init__': '', **sources}.items():
      path = tmp_path / 'mine' / f'{name}.py'
      path.write_text(textwrap.dedent(source))
    for name in [n for n in sys.modules if n.partition('.')[0] == 'mine']:
      del sys.modules[name]
    importlib.invalidate_caches()
    return importlib.import_module('mine.task')

  yield load
  for name in [n for n in sys.modules if n.partition('.')[0] == 'mine']:
    del sys.modules[name]


HELP = 'def clean(text):\n  return text.{}()\n'
# How a function may come by another one.
IMPORTS = {
  'from': """
    from mine.help import clean
    def f(x): return clean(x)""",
  'as': """
    from mine.help import clean as tidy
    def f(x): return tidy(x)""",
  'module': """
    import mine.help
    def f(x): return mine.help.clean(x)""",
  'from package': """
    from mine import help as h
    def f(x): return h.clean(x)""",
  'relative': """
    from .help import clean
    def f(x): return clean(x)""",
  'inside': """
    def f(x):
      from mine.help import clean
      return clean(x)""",
  'inside, relative': """
    def f(x):
      from . import help
      return help.clean(x)""",
  'two steps': """
    from mine.between import g
    def f(x): return g(x)""",
  'nested': """
    from mine.help import clean
    def f(x): return [g() for g in [lambda: clean(x)]]""",
  'decorated': """
    import functools
    from mine.help import clean
    def again(g):
      @functools.wraps(g)
      def h(x): return g(x)
      return h
    @again
    def f(x): return clean(x)""",
  'cached': """
    import functools
    from mine.help import clean
    @functools.lru_cache
    def f(x): return clean(x)""",
  'method': """
    from mine.help import clean
    class A:
      def go(self, x): return clean(x)
    f = A().go""",
  'base': """
    from mine.between import Base
    class A(Base):
      def __call__(self, x): return self.go(x)
    f = A()""",
  'class': """
    from mine.between import Base
    f = Base""",
  'static method': """
    from mine.help import clean
    class A:
      @staticmethod
      def go(x): return clean(x)
    f = A.go""",
  'property': """
    from mine.help import clean
    class A:
      @property
      def x(self): return clean('x')
    f = A()""",
  'list': """
    from mine.help import clean
    f = [lambda x: clean(x)]""",
  'dict': """
    from mine.help import clean
    TABLE = {'clean': clean}
    def f(x): return TABLE['clean'](x)""",
  'partial': """
    import functools
    from mine.help import clean
    def g(x, fn): return fn(x)
    f = functools.partial(g, fn=clean)""",
  'default': """
    from mine.help import clean
    def f(x, fn=clean): return fn(x)""",
  'keyword default': """
    from mine.help import clean
    def f(x, *, fn=clean): return fn(x)""",
}
BETWEEN = """
  from mine import help
  def g(x): return help.clean(x)
  class Base:
    def go(self, x): return help.clean(x)
"""


@pytest.mark.parametrize('way', IMPORTS)
def test_a_helper_that_was_edited(package, way):
  files = {'between': BETWEEN, 'task': IMPORTS[way]}
  lower, upper, again = (
    digest(package(help=HELP.format(to), **files).f)
    for to in ('lower', 'upper', 'lower')
  )
  assert lower == again != upper


def test_constants_of_a_module(package):
  """Whether they are written there or come from elsewhere."""
  source = 'SIZE = {}\ndef f(x): return x[:SIZE]'
  one, two = (digest(package(task=source.format(n)).f) for n in (1, 2))
  assert one != two
  module = package(task=source.format(1))
  assert digest(module.f) == one
  module.SIZE = 3
  assert digest(module.f) not in (one, two)


def test_code_that_has_no_file():
  def made(text):
    names = {'__name__': 'notebook'}
    exec(text, names)
    return names['f']

  one = digest(made('def f(x): return x + 1'))
  assert one == digest(made('def f(x): return x + 1'))
  assert one != digest(made('def f(x): return x + 2'))
  assert one != digest(made('def f(x): return x - 1'))


def _take(x, n=1, *, m=2):
  return x[n:m]


def _after(n):
  return lambda x: x[n:]


class Cut:
  def __init__(self, n):
    self.n = n

  def __call__(self, x):
    return x[: self.n]


def _defaults(n, m):
  return types.FunctionType(_take.__code__, globals(), 'f', (n,)), m


PAIRS = {
  'partial': [functools.partial(_take, n=n) for n in (1, 2)],
  'nested partial': [
    functools.partial(functools.partial(_take, n=n), m=3) for n in (1, 2)
  ],
  'closure': [_after(n) for n in (1, 2)],
  'closure over an array': [_after(np.arange(n)) for n in (1, 2)],
  'closure over a closure': [_after(_after(n)) for n in (1, 2)],
  'default': [_defaults(n, 0) for n in (1, 2)],
  'lambda': [lambda x: x + 1, lambda x: x + 2],
  'list': [[_after(1), _after(n)] for n in (1, 2)],
  'order': [[1, 2], [2, 1]],
  'instance': [Cut(1), Cut(2)],
  'method': [Cut(1).__call__, Cut(2).__call__],
  'pattern': [re.compile('a'), re.compile('a', re.I)],
  'bound': ['a'.join, 'b'.join],
  'array': [np.zeros(2), np.zeros(2, 'f4')],
  'kind': [1, 1.0],
  'generator of numbers': [random.Random(0), random.Random(1)],
  'set': [{'a', 'b'}, {'a', 'c'}],
}


@pytest.mark.parametrize('pair', PAIRS)
def test_arguments_that_differ(pair):
  one, two = map(digest, PAIRS[pair])
  assert one != two and one == digest(PAIRS[pair][0])


def test_a_file_that_is_named_was_replaced(tmp_path):
  path = tmp_path / 'words.txt'
  path.write_text('one')
  reads = (_after(str(path)), functools.partial(_take, path), [str(path)])
  before = [digest(f) for f in reads]
  assert before == [digest(f) for f in reads]
  path.write_text('three')
  assert not set(before) & {digest(f) for f in reads}


def test_what_is_installed_counts_by_its_version(monkeypatch):
  before = digest(np.median), digest(lambda x: np.median(x))
  monkeypatch.setattr(fingerprint, '_version_of', lambda top: f'{top} 99')
  assert digest(np.median) != before[0]
  assert digest(json_of) != ''


def json_of(x):
  import json

  import no_such_package  # Of those who lack it, nobody comes here.

  return json.dumps(x), no_such_package


def test_rings_end():
  ring = []
  ring.append(ring)
  assert digest(ring) == digest(ring)

  def f(x):
    return f(x - 1) if x else g(x)

  def g(x):
    return f(x)

  assert digest(f)


def test_what_cannot_be_followed_is_told():
  lock = threading.Lock()
  walk = walked([1, lambda: lock, _after(2)])
  assert walk.unknown == ['lock (TypeError)']
