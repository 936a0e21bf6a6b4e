"""From a config file, its argument and flags to a checked `Config`, and back.

  load('configs/st_moe_tiny.py:dense', {'total_steps': '10'})

Every mistake (an unknown field, argument or type) is a ValueError that names
the place, what is known there, and the nearest spelling.
"""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Callable, Mapping

from st_moe import config as config_lib
from st_moe.config import unknown

_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def parse_arg(arg: str | None, **defaults) -> types.SimpleNamespace:
  """`'dense,seed=1'` as typed values: a bare name is True."""
  values = dict(defaults)
  for item in filter(None, (arg or '').split(',')):
    name, _, text = item.partition('=')
    if name not in defaults:
      raise unknown('config argument', name, defaults)
    kind = type(defaults[name])
    value = _literal(text, kind) if text else True
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
      raise ValueError(
        f'Config argument {name}={text!r} should be a {kind.__name__}.'
      )
    values[name] = value
  return types.SimpleNamespace(**values)


def choose(what: str, name: str, table: Mapping):
  """The entry of `table` that a config argument names."""
  if name not in table:
    raise unknown(what, name, table)
  return table[name]


def _literal(text: str, kind=object):
  """A flag's text as a value for `kind`; what is no literal is a string.

  'none' is None only where None may stand: elsewhere it is a word, as in
  `model.remat=none`.
  """
  if kind is str:
    return text
  if text.lower() == 'none' and type(None) in typing.get_args(kind):
    return None
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def build(kind, value, where: str = 'config', default=None):
  """`value` (plain dicts and scalars) as an instance of the type `kind`.

  What a dict leaves open is as in `default`, an instance: a decoder, or the
  capacity of evaluation, has defaults of its own.
  """
  if isinstance(kind, types.UnionType):
    if value is None and type(None) in kind.__args__:
      return None
    kinds = [k for k in kind.__args__ if k is not type(None)]
    for k in kinds[:-1]:
      try:
        return build(k, value, where, default)
      except ValueError:
        continue
    return build(kinds[-1], value, where, default)
  if dataclasses.is_dataclass(kind):
    return _build_dataclass(kind, value, where, default)
  origin = typing.get_origin(kind) or kind
  if origin is Mapping:
    if not isinstance(value, Mapping):
      raise ValueError(f'{where} = {value!r} should be a dict.')
    item = (typing.get_args(kind) or (str, object))[1]
    return {k: build(item, v, f'{where}.{k}') for k, v in value.items()}
  if origin is float and type(value) is int:
    return float(value)
  if origin is not object and type(value) is not origin:
    raise ValueError(f'{where} = {value!r} should be a {origin.__name__}.')
  return value


def _build_dataclass(kind, value, where: str, default):
  if isinstance(value, kind):
    return value
  if kind is config_lib.Part:
    value = {'name': value} if isinstance(value, str) else value
    if not isinstance(value, Mapping) or 'name' not in value:
      raise ValueError(f'{where} = {value!r} needs a name.')
    return config_lib.Part.of(**value)
  if not isinstance(value, Mapping):
    raise ValueError(f'{where} = {value!r} should be a dict.')
  hints = typing.get_type_hints(kind)
  for name in value:
    if name not in hints:
      raise unknown(f'field of {where}', name, hints)
  default = default if isinstance(default, kind) else kind()
  try:
    return dataclasses.replace(
      default,
      **{
        k: build(hints[k], v, f'{where}.{k}', getattr(default, k))
        for k, v in value.items()
      },
    )
  except ValueError as e:
    # `kind` itself refused: say where, once.
    raise (
      e
      if str(e).startswith((where, 'Unknown'))
      else ValueError(f'{where}: {e}')
    ) from None


def merge(kind, base: dict, path: str, value, where: str = 'config') -> dict:
  """`base` with the field at dotted `path` of dataclass `kind` set."""
  head, _, rest = path.partition('.')
  hints = typing.get_type_hints(kind) if kind else {}
  if kind and head not in hints:
    raise unknown(f'field of {where}', head, hints)
  hint = hints.get(head, object)
  if not rest:
    value = _literal(value, hint) if isinstance(value, str) else value
    return {**base, head: value}
  nested = next(
    (
      k
      for k in getattr(hint, '__args__', (hint,))
      if dataclasses.is_dataclass(k) and k is not config_lib.Part
    ),
    None,
  )
  inner = base.get(head)
  if inner is None:  # The file left this to its defaults: start from them.
    inner = to_dict(getattr(kind(), head)) if kind else {}
  if hint is config_lib.Part and isinstance(inner, str):
    inner = {'name': inner}
  where = f'{where}.{head}'
  if not isinstance(inner, Mapping):
    raise ValueError(f'{where} = {inner!r} has no field {rest!r}.')
  return {**base, head: merge(nested, dict(inner), rest, value, where)}


def set_field(values: dict, field: str, value) -> dict:
  """A run's `values` with a dotted field set to a value or a flag's text."""
  value = _literal(value) if isinstance(value, str) else value
  return merge(config_lib.Config, values, field, value)


def to_dict(value):
  """`value` as plain dicts, lists and scalars, ready for JSON."""
  if isinstance(value, config_lib.Part):
    return {'name': value.name, **value.kwargs}
  if dataclasses.is_dataclass(value):
    return {
      f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)
    }
  if isinstance(value, Mapping):
    return {k: to_dict(v) for k, v in value.items()}
  return value


def _over(below: Mapping, above: Mapping) -> dict:
  """`above` laid over `below`, dicts inside dicts likewise."""
  merged = dict(below)
  for key, value in above.items():
    inner = below.get(key)
    both = isinstance(value, Mapping) and isinstance(inner, Mapping)
    merged[key] = _over(inner, value) if both else value
  return merged


def from_dict(value: Mapping) -> config_lib.Config:
  """The inverse of `to_dict` for a whole run."""
  return build(config_lib.Config, value)


def to_json(config: config_lib.Config) -> str:
  return json.dumps(to_dict(config), indent=2, sort_keys=True, allow_nan=False)


def diff(a: Mapping, b: Mapping, path: str = '') -> list[str]:
  """Lines 'field: a -> b' for what differs between two `to_dict` results."""
  lines = []
  for key in sorted(set(a) | set(b)):
    left, right = a.get(key), b.get(key)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
      lines += diff(left, right, f'{path}{key}.')
    elif left != right:
      lines.append(f'{path}{key}: {left!r} -> {right!r}')
  return lines


def routed(values: Mapping) -> dict:
  """A run's `values` with what their `routing` says and they leave open."""
  code = values.get('routing', 'paper')
  for field, value in choose('routing', code, config_lib.ROUTINGS).items():
    values = _fill(config_lib.Config, values, field.split('.'), value)
  return dict(values)


def _fill(kind, values: Mapping, path: list[str], value) -> dict:
  """`values` of dataclass `kind` with a field set, if they leave it open."""
  head, *rest = path
  if not rest:
    return {head: value, **values}
  hint = typing.get_type_hints(kind)[head]
  inner = values.get(head, {})
  if inner is None:  # A stack that is not there.
    return dict(values)
  if hint is config_lib.Part:
    inner = {'name': inner} if isinstance(inner, str) else dict(inner)
    inner.setdefault('name', getattr(kind(), head).name)
    return {**values, head: {rest[0]: value, **inner}}
  nested = next(k for k in getattr(hint, '__args__', (hint,)))
  return {**values, head: _fill(nested, inner, rest, value)}


def find(name: str) -> pathlib.Path:
  """The config file `name`: as given, or among the ones shipped."""
  path = pathlib.Path(name)
  for place in (path, _CONFIGS / path.name):
    if place.is_file():
      return place
  known = [f'configs/{p.name}' for p in shipped()]
  raise unknown('config file', name, known)


def shipped() -> list[pathlib.Path]:
  """The config files that come with the package."""
  return sorted(_CONFIGS.glob('*.py'))


def summary(path: pathlib.Path) -> str:
  """The first line of a config file's docstring."""
  return (ast.get_docstring(ast.parse(path.read_text())) or '').split('\n')[0]


def arguments(path: pathlib.Path) -> dict[str, str]:
  """What `get_config` of a config file takes, and its defaults, as written."""
  calls = (n for n in ast.walk(ast.parse(path.read_text())) if _parses(n))
  return {
    keyword.arg: ast.unparse(keyword.value)
    for call in calls
    for keyword in call.keywords
  }


def _parses(node: ast.AST) -> bool:
  if not isinstance(node, ast.Call):
    return False
  return ast.unparse(node.func).rpartition('.')[2] == parse_arg.__name__


def read(name: str) -> dict:
  """A config as plain dicts: of a workdir, or of FILE[:ARG]."""
  path = pathlib.Path(name) / 'config.json'
  if path.is_file():
    return to_dict(of_run(path))
  return to_dict(load(name))


def of_run(path: pathlib.Path) -> config_lib.Config:
  """What WORKDIR/config.json says, the fields that have come since included.

  Raises:
    ValueError: it is damaged, or of newer code.
  """
  try:
    return from_dict(json.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError) as e:
    decoding = isinstance(e, json.JSONDecodeError | UnicodeDecodeError)
    what = 'is damaged' if decoding else f'is no config of this version ({e})'
    raise ValueError(
      f'{path} {what}: move it away and run the same command again. Every'
      ' checkpoint of the run has a copy.'
    ) from e


def load(
  spec: str,
  overrides: Mapping | None = None,
  *,
  base: Callable[[str], Mapping] | None = None,
) -> config_lib.Config:
  """The run described by `FILE[:argument,argument=value]` and overrides.

  Args:
    spec: a Python file with `get_config(arg)`, and its argument.
    overrides: dotted field -> value, or its text as given on a command line.
    base: `init` -> the config of that checkpoint, whose model a config with an
      `init` continues; what its file says of the model goes on top.

  Raises:
    ValueError: what is wrong and where.
  """
  name, _, arg = spec.partition(':')
  path = find(name)
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  values = module.get_config(arg or None).to_dict()
  values.setdefault('name', path.stem)
  if 'routing' in (overrides or {}):
    values['routing'] = overrides['routing']
  values = routed(values)
  for field, value in (overrides or {}).items():
    values = merge(config_lib.Config, values, field, value)
  if values.get('init') and base:
    model = base(values['init'])['model']
    values['model'] = _over(model, values.get('model', {}))
  return build(config_lib.Config, values)
