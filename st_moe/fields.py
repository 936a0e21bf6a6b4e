"""What one value may be: the rules of config fields, options and flags.

A rule stands in the annotation of what it is of, and nowhere else:

  dropout: Rate = 0.0
  activation: Literal['geglu', 'relu'] = 'geglu'
  def top_k(..., *, k: Count, threshold: Above0 = 0.2): ...

Without one a number must be finite, and a text one that a file can hold.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, or strictly between."""

  low: float = -math.inf
  high: float = math.inf
  above: bool = False  # `low` itself is out.
  below: bool = False  # `high` itself is out.
  says: str = ''  # What else helps: what 0 means, say.

  def __contains__(self, value) -> bool:
    low = self.low < value if self.above else self.low <= value
    return low and (value < self.high if self.below else value <= self.high)

  def __str__(self) -> str:
    low = f'{"above" if self.above else "at least"} {self.low:,}'
    high = f'{"below" if self.below else "at most"} {self.high:,}'
    ends = [low] * math.isfinite(self.low) + [high] * math.isfinite(self.high)
    return ' and '.join(ends) + (f' ({self.says})' if self.says else '')


class Filled:
  """Texts that say something."""

  def __contains__(self, value) -> bool:
    return bool(value)

  def __str__(self) -> str:
    return 'not empty'


# Sizes end where something was mistyped: no machine has room for more.
_MOST = 2**24
_INT32 = 2**31 - 1

Size = Annotated[int, Range(1, _MOST)]  # Of an array.
SizeOr0 = Annotated[int, Range(0, _MOST)]
Length = Annotated[int, Range(1, 2**20)]  # Tokens of a row.
Count = Annotated[int, Range(1, _INT32)]
CountOr0 = Annotated[int, Range(0, _INT32)]
Above0 = Annotated[float, Range(0, above=True)]
AtLeast0 = Annotated[float, Range(0)]
Rate = Annotated[float, Range(0, 1, below=True, says='10 percent are 0.1')]
Share = Annotated[float, Range(0, 1, says='10 percent are 0.1')]
# JAX drops what is more than 32 bits: two seeds would be one.
Seed = Annotated[int, Range(0, 2**32 - 1)]
Text = Annotated[str, Filled()]


def unknown(
  what: str, name: object, known: Iterable[str], near: Iterable[str] = ()
) -> ValueError:
  """The error for a `name` that is not among the `known` ones.

  Args:
    near: what was meant, if somebody knows better than the spelling.
  """
  known = sorted(map(str, known))
  near = [*near] or difflib.get_close_matches(str(name), known, n=1)
  hint = f' Did you mean {" or ".join(map(repr, near))}?' if near else ''
  listed = f'Known: {known}.' if known else 'There is none.'
  return ValueError(f'Unknown {what} {shown(name)}.{hint} {listed}')


def shown(value) -> str:
  """`value` as code has it, if that is short."""
  text = repr(value)
  return text if len(text) <= 100 else f'{text[:80]} ... {text[-10:]}'


def alternatives(hint) -> tuple:
  """The members of a union, or the one type."""
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if union else (hint,)


def base(hint) -> tuple[type, tuple]:
  """A type without its annotation, and the rules in that."""
  if typing.get_origin(hint) is Annotated:
    kind, *rules = typing.get_args(hint)
    return kind, tuple(rules)
  return hint, ()


def check(value, hint, where: str):
  """`value` as `hint` has it: a whole number is a fine float.

  Args:
    where: the name of the field, for the error.

  Raises:
    ValueError: another type, or one that breaks a rule.
  """
  wanted = alternatives(hint)
  for each in wanted:
    found = _as(value, each, where)
    if found is not _NO:
      return found
  words = [w for each in wanted for w in _words(each)]
  if isinstance(value, str) and words and len(wanted) == 1:
    raise unknown(where, value, words)
  rule = ', or '.join(map(described, wanted))
  raise ValueError(f'{where} = {shown(value)} should be {rule}.')


def read(text: str, hint, where: str):
  """What the text of a flag says, as `check` has it."""
  kinds = {base(each)[0] for each in alternatives(hint)}
  try:
    value = (
      int(text) if int in kinds else float(text) if float in kinds else text
    )
  except ValueError:
    value = text
  return check(value, hint, where)


_NO = object()


def _as(value, hint, where: str):
  """`value` if it is one of `hint`, else _NO."""
  kind, rules = base(hint)
  if kind is None or kind is type(None):
    return value if value is None else _NO
  if kind is object or kind is inspect.Parameter.empty:
    return value
  if words := _words(kind):
    return value if isinstance(value, str) and value in words else _NO
  origin = typing.get_origin(kind) or kind
  if origin is Mapping:
    if not isinstance(value, Mapping):
      return _NO
    names, item = typing.get_args(kind) or (str, object)
    return {
      check(k, names, f'a name in {where}'): check(v, item, f'{where}.{k}')
      for k, v in value.items()
    }
  if origin is tuple and (of := typing.get_args(kind)):
    if not isinstance(value, list | tuple):
      return _NO
    return tuple(check(v, of[0], f'{where}[{i}]') for i, v in enumerate(value))
  if origin in (int, float):
    of = numbers.Integral if origin is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, of):
      return _NO
    # A rule looks at the number first: `float` overflows at large ones.
    if not all(value in rule for rule in rules):
      return _NO
    try:
      value = origin(value)
    except OverflowError:
      return _NO
    return value if origin is int or math.isfinite(value) else _NO
  if not isinstance(value, origin):
    return _NO
  if origin is str and not _storable(value):
    return _NO
  return value if all(value in rule for rule in rules) else _NO


def _words(kind) -> tuple:
  return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _storable(text: str) -> bool:
  try:
    return '\0' not in text and bool(text.encode() or True)
  except UnicodeEncodeError:  # Half of a pair, or bytes that are no UTF-8.
    return False


def described(hint) -> str:
  kind, rules = base(hint)
  if words := _words(kind):
    return ' or '.join(map(repr, words))
  origin = typing.get_origin(kind) or kind
  name = {type(None): 'none', Mapping: 'a dict'}.get(origin)
  rules = [*map(str, rules)]
  if origin is float and not any('at most' in r or 'below' in r for r in rules):
    rules.append('finite')
  return ', '.join([name or f'a {origin.__name__}', *rules])


@functools.cache
def of(kind: type) -> Mapping[str, object]:
  """The fields of a dataclass and what they may be."""
  return typing.get_type_hints(kind, include_extras=True)


class Checked:
  """A dataclass whose fields are looked at whenever one is made."""

  def __post_init__(self):
    for name, hint in of(type(self)).items():
      check(getattr(self, name), hint, f'{type(self).__name__}.{name}')


def hint(parameter: inspect.Parameter):
  """What an option may be: by its annotation, or as its default is."""
  if parameter.annotation is not parameter.empty:
    return parameter.annotation
  default = parameter.default
  return object if default in (None, parameter.empty) else type(default)
