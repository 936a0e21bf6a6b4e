"""A hash of what a function would do, to tell whether its results are stale.

`Walk` follows a value through what it is made of: functions with their code,
defaults, closures and the globals they name, partials, classes, instances. Code
of local packages is read; installed packages count by name and version. Texts
that name files stand for these. What cannot be followed is in `unknown`: a key
made of such a walk knows too little to vouch for anything.
"""

import copyreg
import dis
import enum
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
import types
from collections.abc import ItemsView, Iterable, KeysView, Mapping, ValuesView

from st_moe.data import files

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
_INSTALLED = ('site-packages', 'dist-packages')


class Walk:
  """Takes in values, one after the other; `digest` is of all so far."""

  def __init__(self):
    self.unknown: list[str] = []
    self._hash = hashlib.sha256()
    self._numbers: dict[int, int] = {}  # By identity: what was met already.
    self._kept = []  # Nobody else may get these identities.

  @property
  def digest(self) -> str:
    return self._hash.hexdigest()

  def take(self, value) -> None:
    if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
      self._say(type(value).__name__, repr(value))
      self._file(value)
    elif self._is_new(value):
      try:
        self._follow(value)
      except Exception as e:  # Of any kind: strangers' code makes these values.
        kind, error = type(value).__qualname__, type(e).__name__
        self.unknown.append(f'{_name(value) or kind} ({error})')

  def _say(self, *words: str) -> None:
    for word in words:
      self._hash.update(word.encode(errors='backslashreplace') + b'\0')

  def _is_new(self, value) -> bool:
    number = self._numbers.setdefault(id(value), len(self._numbers))
    if number < len(self._kept):
      self._say('again', str(number))
      return False
    self._kept.append(value)
    return True

  def _file(self, value) -> None:
    if (
      isinstance(value, str) and 0 < len(value) < 1024 and os.path.isfile(value)
    ):
      self._say(str(files.stamp(value)[1:]))

  def _all(self, kind: str, values: Iterable) -> None:
    values = list(values)
    self._say(kind, str(len(values)))
    for value in values:
      self.take(value)

  def _follow(self, value) -> None:
    if isinstance(value, types.ModuleType):
      self._module(value, ())
    elif isinstance(value, types.FunctionType):
      self._function(value)
    elif isinstance(value, types.CodeType):
      self._code(value)
    elif isinstance(value, types.MethodType):
      self._all('method', [value.__func__, value.__self__])
    elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
      self._all('builtin', [value.__qualname__, _owner(value)])
    elif isinstance(value, type):
      self._class(value)
    elif isinstance(value, functools.partial):
      self._all('partial', [value.func, value.args, value.keywords])
    elif isinstance(value, staticmethod | classmethod):
      self._all(type(value).__name__, [value.__func__])
    elif isinstance(value, property | functools.cached_property):
      self._all('property', [getattr(value, 'fget', None) or value.func])
    elif isinstance(value, Mapping):
      self._all(type(value).__name__, itertools.chain(*value.items()))
    elif isinstance(value, KeysView | ValuesView | ItemsView):
      self._all('view', value)
    elif isinstance(value, set | frozenset):
      self._say(type(value).__name__, *sorted(map(_alone, value)))
    elif isinstance(value, list | tuple):
      self._say(type(value).__qualname__)
      self._all('list', value)
    elif inner := _wrapped(value):
      self._all('wrapper', [type(value), inner])
    else:
      self._instance(value)

  def _function(self, f) -> None:
    self._say('function', f.__qualname__, f.__globals__.get('__name__', ''))
    home = sys.modules.get(f.__globals__.get('__name__', ''))
    if not _is_local(home):
      self._say(_version(home.__name__))
    elif home:
      self._source(home)
    if any(
      not _is_local(m) and _lookup(m, f) is f
      for m in (home, sys.modules.get(f.__module__))
    ):
      return  # Its package has it; the version says the rest.
    cells = [cell.cell_contents for cell in f.__closure__ or () if _full(cell)]
    self._all('closure', [f.__defaults__, f.__kwdefaults__, *cells])
    if inner := _wrapped(f):
      self.take(inner)
    if _is_local(home):
      self.take(f.__code__)
      self._named(f.__code__, f.__globals__)

  def _code(self, code) -> None:
    self._say('code', code.co_code.hex(), *code.co_names, *code.co_varnames)
    self._all('constants', code.co_consts)

  def _named(self, code, names: Mapping) -> None:
    """The globals and imports that code names, its inner functions' too."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    for name in code.co_names:
      if name in names and not isinstance(names[name], types.ModuleType):
        self.take(names[name])
      elif name in names:
        self._module(names[name], code.co_names)
    for name, members in _imports(code, names):
      self._say('import', name)
      if not _is_local_name(name.partition('.')[0]):
        self._say(_version(name))
      else:
        module = importlib.import_module(name)
        for member in members:
          if not hasattr(module, member):  # `from package import module`
            importlib.import_module(f'{name}.{member}')
        self._module(module, code.co_names)
    for each in inner:
      self._named(each, names)

  def _module(self, module, names: Iterable[str]) -> None:
    """A module, of which code uses some of these names."""
    self._say('module', module.__name__)
    if not _is_local(module):
      self._say(_version(module.__name__))
      return
    self._source(module)
    for name in names:
      value = vars(module).get(name)
      if isinstance(value, types.ModuleType):
        if self._is_new((module, value)):  # Modules may name each other.
          self._module(value, names)
      elif value is not None:
        self.take(value)

  def _source(self, module) -> None:
    try:
      self._say(inspect.getsource(module))
    except (OSError, TypeError):  # A notebook has no file, only code.
      pass

  def _class(self, cls) -> None:
    home = sys.modules.get(cls.__module__)
    self._say('class', cls.__module__, cls.__qualname__)
    if not _is_local(home):
      self._say(_version(home.__name__))
      return
    if home:
      self._source(home)
    self._all('bases', cls.__bases__)
    for name, member in vars(cls).items():
      special = name.startswith('__') or name == '_abc_impl'
      if isinstance(member, types.FunctionType) or not special:
        self._say(name)
        self.take(member)

  def _instance(self, value) -> None:
    """As it would be pickled: a maker, its arguments, and the state."""
    self.take(type(value))
    if (fs := getattr(value, '__fspath__', None)) is not None:
      self.take(fs())
      return
    reduce = copyreg.dispatch_table.get(type(value))
    made = reduce(value) if reduce else value.__reduce_ex__(4)
    if isinstance(made, str):  # A constant of its module.
      self._say(made)
      return
    maker, arguments, *state = made
    self._all('made', [maker, arguments])
    for each in state:
      self.take(list(each) if hasattr(each, '__next__') else each)


def _alone(value) -> str:
  walk = Walk()
  walk.take(value)
  return walk.digest


def _name(value) -> str:
  return getattr(value, '__qualname__', '')


def _owner(builtin):
  owner = getattr(builtin, '__self__', None)
  return owner.__name__ if isinstance(owner, types.ModuleType) else owner


def _wrapped(value):
  """What a decorator hides: of functools, or of `tf.function`."""
  inner = inspect.getattr_static(value, '__wrapped__', None)
  return inner or getattr(value, 'python_function', None)


def _full(cell) -> bool:
  try:
    return cell.cell_contents is not None
  except ValueError:  # Not filled yet.
    return False


def _lookup(found, f):
  for part in f.__qualname__.split('.'):
    found = getattr(found, part, None)
  return found


def _imports(code, names: Mapping) -> list[tuple[str, tuple[str, ...]]]:
  """Modules that code imports when it runs, and what it takes from them."""
  found, before = [], [0, None]
  for step in dis.get_instructions(code):
    if step.opname == 'IMPORT_NAME':
      level = before[-2] if isinstance(before[-2], int) else 0
      package = names.get('__package__') or ''
      name = '.' * level + step.argval
      found.append(
        (importlib.util.resolve_name(name, package), before[-1] or ())
      )
    before = [before[-1], step.argval]
  return found


def _is_local(module) -> bool:
  """Whether its code may be edited: neither installed nor Python's own."""
  if module is None:
    return True  # Whose it is nobody knows.
  return _is_local_name(module.__name__.partition('.')[0])


@functools.cache
def _is_local_name(top: str) -> bool:
  if top in ('st_moe', '__main__'):
    return True
  if top in sys.stdlib_module_names or top in sys.builtin_module_names:
    return False
  module = sys.modules.get(top)
  spec = getattr(module, '__spec__', None) or importlib.util.find_spec(top)
  if spec is None:  # Missing, or made by hand.
    return module is not None
  # A namespace has no file of its own, but folders.
  places = [spec.origin or '', *(spec.submodule_search_locations or ())]
  return not any(
    part in _INSTALLED
    for place in places
    for part in place.replace(os.sep, '/').split('/')
  )


@functools.cache
def _version_of(top: str) -> str:
  import importlib.metadata

  if top in sys.stdlib_module_names:
    return sys.version.split()[0]
  found = getattr(sys.modules.get(top), '__version__', None)
  try:
    return str(found or importlib.metadata.version(top))
  except importlib.metadata.PackageNotFoundError:
    return ''


def _version(name: str) -> str:
  return _version_of(name.partition('.')[0])
