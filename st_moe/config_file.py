"""From a config file, its argument and flags to a checked `Config`, and back.

  load('configs/st_moe_tiny.py:dense', {'total_steps': '10'})

Every mistake (an unknown field, argument or type) is a ValueError that names
the place, what is known there, and the nearest spelling.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import pathlib
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from st_moe import config as config_lib
from st_moe import fields
from st_moe.fields import shown, unknown
from st_moe.shipped import folder

_CONFIGS = folder('configs')

# How other codes route, as fields that differ from the defaults; a checkpoint
# means what it meant only under the routing it was trained with.
#
#                        paper           flaxformer           huggingface
#   weights of top-2     renormalised    probabilities        (top-1 only)
#   second choices       random 0.2      all                  (top-1 only)
#   capacity             floor           round                64 a sequence
#   a group              tokens          tokens               a sequence
#   padding              asks nothing    goes to expert 0     as any token
#   balance counts       first choices   all choices          first choices
#   losses over layers   sum             mean                 mean
#   first sparse layer   the last of     the last of          the second
#                        each period     each period
#
# 'paper' is that of Mesh-TensorFlow too. HuggingFace takes the balance loss
# over all layers of a stack joined, as if they were one, which we do not.
ROUTINGS = {
  'paper': {},
  'flaxformer': {
    'model.moe.selector.k': 2,
    'model.moe.selector.normalize': False,
    'model.moe.selector.train_policy': 'all',
    'model.moe.train_capacity.rounding': 'round',
    'model.moe.eval_capacity.rounding': 'round',
    'model.moe.padding': 'zeroed',
    'model.moe.losses': {'load_balance_all': 1e-2, 'router_z': 1e-3},
    'loss.layers': 'mean',
  },
  'huggingface': {
    'model.encoder.sparse_offset': 1,
    'model.decoder.sparse_offset': 1,
    'model.moe.selector.k': 1,
    'model.moe.train_capacity.count': 64,
    'model.moe.eval_capacity.count': 64,
    'model.moe.group_by': 'sequence',
    'model.moe.padding': 'routed',
    'model.moe.extra_ffn': 'none',
    'loss.layers': 'mean',
  },
}


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


def own_arg(arg: str | None, **defaults) -> tuple[types.SimpleNamespace, str]:
  """A method's own arguments, as `parse_arg`; and the others, for its base."""
  words = [word for word in (arg or '').split(',') if word]
  mine = [word for word in words if word.partition('=')[0] in defaults]
  rest = [word for word in words if word not in mine]
  return parse_arg(','.join(mine), **defaults), ','.join(rest)


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
  kinds = [fields.base(each)[0] for each in fields.alternatives(kind)]
  if str in kinds or any(typing.get_origin(k) is Literal for k in kinds[:1]):
    return text
  if text.lower() == 'none' and type(None) in kinds:
    return None
  if text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text  # The last two: of a thousand brackets.


def build(hint, value, where: str = 'config', default=None):
  """`value` (plain dicts and scalars) as what `hint` says.

  What a dict leaves open is as in `default`, an instance: a decoder, or the
  capacity of evaluation, has defaults of its own.

  Raises:
    ValueError: a field that is unknown, or breaks its rule; by its whole path.
  """
  if hint == config_lib.Parts:
    return _build_parts(value, where)
  kind = _dataclass_of(hint)
  if (
    kind and not isinstance(value, kind) and (value is not None or hint is kind)
  ):
    return _build_dataclass(kind, value, where, default)
  return fields.check(value, hint, where)


def _dataclass_of(hint):
  """The dataclass that a field holds, if it holds one."""
  of = fields.alternatives(hint)
  return next((k for k in of if dataclasses.is_dataclass(k)), None)


def _build_parts(value, where: str) -> config_lib.Parts:
  """A list of mechanisms from a dict in order: name -> options.

  A bare number is the option `weight`, None no entry at all.
  """
  if not isinstance(value, Mapping):
    if isinstance(value, tuple):
      return fields.check(value, config_lib.Parts, where)
    raise ValueError(
      f'{where} = {shown(value)} should be a dict: name -> options.'
    )
  found = []
  for name, options in value.items():
    if options in (None, 'none'):
      continue
    if isinstance(options, int | float) and not isinstance(options, bool):
      options = {'weight': options}
    if not isinstance(options, Mapping):
      raise ValueError(
        f'{where}.{name} = {shown(options)} should be a dict of its options, a'
        ' number (its weight), or none.'
      )
    found.append(_part({**options, 'name': name}, f'{where}.{name}'))
  return tuple(found)


def _part(value, where: str, default=None) -> config_lib.Part:
  value = {'name': value} if isinstance(value, str) else value
  if isinstance(value, Mapping) and value and default and 'name' not in value:
    value = {**to_dict(default), **value}
  if not isinstance(value, Mapping) or not isinstance(value.get('name'), str):
    raise ValueError(f'{where} = {shown(value)} needs a name.')
  try:
    return config_lib.option(value)
  except ValueError as e:
    raise ValueError(f'{where}: {e}') from None


def _build_dataclass(kind, value, where: str, default):
  if kind is config_lib.Part:
    return _part(value, where, default)
  if not isinstance(value, Mapping):
    raise ValueError(f'{where} = {shown(value)} should be a dict.')
  hints = fields.of(kind)
  for name in value:
    if name not in hints:
      raise _unknown_field(kind, name, where)
  default = default if isinstance(default, kind) else kind()
  if kind is config_lib.ModelConfig:
    default = _with_stacks(default, value, where)
  built = {
    k: build(hints[k], v, f'{where}.{k}', getattr(default, k))
    for k, v in value.items()
  }
  try:
    return dataclasses.replace(default, **built)
  except ValueError as e:  # Fields that do not go together.
    raise ValueError(f'{where}.{e}') from None


# Where a field stood before -> where it is.
_MOVED = {'config.loss.router': 'model.moe.losses'}


def _with_stacks(default, value: Mapping, where: str):
  """`default`, in which a stack's own `moe` begins as the model's."""
  moe = value.get('moe', default.moe)
  moe = build(config_lib.MoEConfig, moe, f'{where}.moe', default.moe)
  changes = {}
  for stack in ('encoder', 'decoder'):
    cfg, own = getattr(default, stack), value.get(stack)
    if cfg and isinstance(own, Mapping) and own.get('moe'):
      changes[stack] = dataclasses.replace(cfg, moe=cfg.moe or moe)
  return dataclasses.replace(default, **changes)


def _unknown_field(kind, name, where: str, rest: str = '') -> ValueError:
  """The error for a field that `kind` does not have: where is it, then?

  What is spelt nearly alike may stand beside it, and what is spelt alike
  anywhere in a config: `model.num_experts` is `model.moe.num_experts`.
  """
  beside, leaf = fields.of(kind), rest.rpartition('.')[2]
  close = lambda of, cutoff: difflib.get_close_matches(
    _plain(name), of, n=1, cutoff=cutoff
  )
  everywhere = [*map(_last, _paths(config_lib.Config))]
  moved = _MOVED.get(f'{where}.{name}', '')
  near = (
    (moved and [f'{moved}.{rest}' if rest else moved])
    or close(beside, 0.8)
    or [f'{path}.{rest}' if rest else path for path in named(name)]
    or (leaf and named(leaf))
    or close(beside, 0.6)
    or [path for other in close(everywhere, 0.8) for path in named(other)]
  )
  return unknown(f'field of {where}', name, beside, near)


def named(name: object) -> list[str]:
  """The fields of a config that have a name, by their dotted paths.

  Where a part of the model has it too, as a stack's own `moe`, the model's.
  """
  paths = _paths(config_lib.Config)
  found = [path for path in paths if _last(path) == _plain(name)]
  least = min((path.count('.') for path in found), default=0)
  return [path for path in found if path.count('.') == least]


def leaves() -> list[str]:
  """Every field of a config that holds a value, by its dotted path."""
  paths = list(_paths(config_lib.Config))
  groups = {path.rpartition('.')[0] for path in paths}
  return [path for path in paths if path not in groups]


def _plain(name: object) -> str:
  return str(name).lower().replace('-', '_')


def _last(path: str) -> str:
  return path.rpartition('.')[2]


def _paths(kind, above: str = '') -> Iterator[str]:
  """Every field of a dataclass, by its dotted path, groups included."""
  for name, hint in fields.of(kind).items():
    yield above + name
    inner = _dataclass_of(hint)
    if inner and inner is not config_lib.Part:
      yield from _paths(inner, f'{above}{name}.')


def merge(kind, base: dict, path: str, value, where: str = 'config') -> dict:
  """`base` with the field at dotted `path` of dataclass `kind` set."""
  head, _, rest = path.partition('.')
  hints = fields.of(kind) if kind else {}
  if kind and head not in hints:
    raise _unknown_field(kind, head, where, rest)
  hint = hints.get(head, object)
  if not rest:
    if value == '' and base.get(head) is ...:  # Of a shell: $RUN is not set.
      return base
    value = _literal(value, hint) if isinstance(value, str) else value
    return {**base, head: value}
  nested = _dataclass_of(hint)
  nested = None if nested is config_lib.Part else nested
  inner = base.get(head)
  if inner is None:  # The file left this to its defaults: start from them.
    inner = _plainly(getattr(kind(), head), hint) if kind else {}
    # Of what is none by default; what a mechanism has beside, `build` knows.
    inner = {} if hint is config_lib.Part else inner or {}
  if hint is config_lib.Part and isinstance(inner, str):
    inner = {'name': inner}
  if hint == config_lib.Parts and isinstance(inner, Mapping):
    name = rest.partition('.')[0]
    if not isinstance(inner.get(name, {}), Mapping):  # A number, or none.
      weight = {} if inner[name] is None else {'weight': inner[name]}
      inner = {**inner, name: weight} if '.' in rest else inner
  where = f'{where}.{head}'
  if not isinstance(inner, Mapping):
    raise ValueError(f'{where} = {shown(inner)} has no field {rest!r}.')
  return {**base, head: merge(nested, dict(inner), rest, value, where)}


def set_field(values: dict, field: str, value) -> dict:
  """A run's `values` with a dotted field set to a value or a flag's text."""
  return merge(config_lib.Config, values, field, value)


def to_dict(value):
  """`value` as plain dicts, lists and scalars, ready for JSON."""
  if isinstance(value, config_lib.Part):
    return {'name': value.name, **_options(value)}
  if dataclasses.is_dataclass(value):
    hints = fields.of(type(value))
    found = {
      f.name: _plainly(getattr(value, f.name), hints[f.name])
      for f in dataclasses.fields(value)
    }
    if isinstance(value, config_lib.ModelConfig):
      _leave_out_the_same(found)
    return found
  if isinstance(value, Mapping):
    return {k: to_dict(v) for k, v in value.items()}
  return value


def _leave_out_the_same(model: dict) -> None:
  """Of a stack's own `moe` keeps what differs from the model's.

  So what is set for the model later is so for the stack, too.
  """
  for stack in ('encoder', 'decoder'):
    own = (model[stack] or {}).get('moe')
    if own:
      other = {k: v for k, v in own.items() if v != model['moe'][k]}
      model[stack]['moe'] = other or None


def _plainly(value, hint):
  if hint == config_lib.Parts:
    return {part.name: _options(part) for part in value}
  return to_dict(value)


def _options(part: config_lib.Part) -> dict:
  """As JSON has them: an inner list of Parts stays a list."""
  plain = lambda v: [*map(plain, v)] if isinstance(v, tuple) else to_dict(v)
  return {name: plain(value) for name, value in part.options}


def _over(below: Mapping, above: Mapping) -> dict:
  """`above` laid over `below`, dicts inside dicts likewise."""
  merged = dict(below)
  for key, value in above.items():
    inner = below.get(key)
    both = isinstance(value, Mapping) and isinstance(inner, Mapping)
    # Another mechanism has options of its own.
    other = both and value.get('name', ...) != inner.get('name', ...)
    merged[key] = _over(inner, value) if both and not other else value
  return merged


def from_dict(value: Mapping, source: object = '') -> config_lib.Config:
  """The inverse of `to_dict` for a whole run.

  Args:
    source: the file it was read from, for errors.
  """
  try:
    return build(config_lib.Config, _renewed(value))
  except ValueError as e:
    raise ValueError(f'{source}: {e}' if source else str(e)) from None


def _renewed(values: Mapping) -> Mapping:
  """The values of a run of older code, as fields are called today."""
  loss, model = values.get('loss'), values.get('model')
  if not isinstance(loss, Mapping) or 'router' not in loss:
    return values
  loss = {k: v for k, v in loss.items() if k != 'router'}
  if isinstance(model, Mapping) and isinstance(model.get('moe'), Mapping):
    moe = {'losses': values['loss']['router'], **model['moe']}
    model = {**model, 'moe': moe}
  return {**values, 'loss': loss, 'model': model}


def to_json(values: Mapping) -> str:
  """What `to_dict` makes, as text."""
  # Unsorted: a chain of mechanisms has its order.
  return json.dumps(values, indent=2, allow_nan=False)


# Fields whose order counts.
CHAINS = ('shaping', 'weighing', 'after')


def diff(a: Mapping, b: Mapping, path: str = '') -> list[str]:
  """Lines 'field: a -> b' for what differs between two `to_dict` results."""
  lines = []
  for key in sorted(set(a) | set(b)):
    left, right = a.get(key), b.get(key)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
      lines += diff(left, right, f'{path}{key}.')
      if key in CHAINS and left == right and [*left] != [*right]:
        lines.append(f'{path}{key}: {[*left]} -> {[*right]}')
    elif left != right:
      lines.append(f'{path}{key}: {left!r} -> {right!r}')
  return lines


def routed(values: Mapping) -> dict:
  """A run's `values` with what their `routing` says and they leave open."""
  hint = fields.of(config_lib.Config)['routing']
  code = fields.check(values.get('routing', 'paper'), hint, 'config.routing')
  for field, value in ROUTINGS[code].items():
    values = _fill(config_lib.Config, values, field.split('.'), value)
  return dict(values)


def _fill(kind, values: Mapping, path: list[str], value) -> dict:
  """`values` of dataclass `kind` with a field set, if they leave it open."""
  head, *rest = path
  if not rest:
    return {head: value, **values}
  nested, inner = _dataclass_of(fields.of(kind)[head]), values.get(head, {})
  if nested is config_lib.Part and isinstance(inner, str):
    inner = {'name': inner}
  if not isinstance(inner, Mapping):  # None, or what `build` refuses.
    return dict(values)
  if nested is config_lib.Part:
    name = inner.get('name', getattr(kind(), head).name)
    return {**values, head: {'name': name, rest[0]: value, **inner}}
  return {**values, head: _fill(nested, inner, rest, value)}


def find(name: str) -> pathlib.Path:
  """The config file `name`: as given, or among the ones shipped.

  Those are meant by `NAME`, `NAME.py` and `configs/NAME.py` alone.
  """
  if os.path.isfile(name):
    return pathlib.Path(name)
  known = {f'configs/{p.relative_to(_CONFIGS)}': p for p in shipped()}
  for spelling in (name, f'configs/{name}', f'{name}.py', f'configs/{name}.py'):
    if spelling in known:
      return known[spelling]
  if os.path.exists(name):
    raise ValueError(
      f'The config {name} is no file. One of Python is needed, with'
      ' get_config(arg); `st-moe list configs` shows some.'
    )
  raise unknown('config file', name, known)


def shipped() -> list[pathlib.Path]:
  """The config files that come with the package."""
  return [*sorted(_CONFIGS.glob('*.py')), *methods()]


def methods() -> list[pathlib.Path]:
  """One config for each mechanism of the literature."""
  return sorted(_CONFIGS.glob('methods/*.py'))


def base_of_method(arg: str | None, name: str = 'st_moe_tiny.py'):
  """(the base of a config of `configs/methods`, whether it asks for no more).

  Its argument is that of the base; with 'base' in it, the method stays out:
  what the file changes is what the two differ by.
  """
  words = [word for word in (arg or '').split(',') if word]
  rest = ','.join(word for word in words if word != 'base')
  return _made(_CONFIGS / name, rest), 'base' in words


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
  called = ast.unparse(node.func).rpartition('.')[2]
  return called in (parse_arg.__name__, own_arg.__name__)


def read(name: str) -> dict:
  """A config as plain dicts: of a workdir, or of FILE[:ARG]."""
  path = os.path.join(name, 'config.json')
  if not os.path.isfile(path):
    return to_dict(load(name))
  return to_dict(of_run(pathlib.Path(path)))


def of_run(path: pathlib.Path) -> config_lib.Config:
  """What WORKDIR/config.json says, the fields that have come since included.

  Raises:
    ValueError: it is damaged, or of newer code.
  """
  try:
    return from_dict(json.loads(path.read_text()))
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    decoding = isinstance(e, json.JSONDecodeError | UnicodeDecodeError)
    what = 'is damaged' if decoding else f'is no config of this version ({e})'
    raise ValueError(
      f'{path} {what}: move it away and run the same command again. Every'
      ' checkpoint of the run has a copy.'
    ) from e


def load(
  spec: str | os.PathLike,
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
  name, _, arg = os.fspath(spec).partition(':')
  path = find(name)
  values = _values(path, arg)
  values.setdefault('name', path.stem)
  return settle(values, overrides, base=base, where=path)


def settle(
  values: dict,
  overrides: Mapping | None = None,
  *,
  base: Callable[[str], Mapping] | None = None,
  where='',
) -> config_lib.Config:
  """The run of plain `values`, of which `where` is the file; as `load`."""
  if 'routing' in (overrides or {}):
    values['routing'] = overrides['routing']
  values = routed(values)
  of_model, rest = {}, {}
  for field, value in (overrides or {}).items():
    (of_model if field.startswith('model.') else rest)[field] = value
  values = file = _merged(values, rest)
  values = _closed(_merged(values, of_model), where, refuse=base is not None)
  if values.get('init') and base:
    own = _closed(file, where, refuse=False).get('model', {})
    hint = fields.of(config_lib.Config)['init']
    init = fields.check(values['init'], hint, 'config.init')
    try:
      model = base(init)['model']
    except ValueError as e:
      raise ValueError(f'config.init = {init!r}: {e}') from None
    values['model'] = _over(model, own) if isinstance(own, Mapping) else own
    # Last, so that what else a stack has is not of the defaults.
    values = _merged(values, of_model)
  return build(config_lib.Config, values)


def _merged(values: dict, overrides: Mapping) -> dict:
  for field, value in overrides.items():
    values = merge(config_lib.Config, values, field, value)
  return values


_LARGEST = 2**20  # Bytes of a config file. More is something else.


def _values(path: pathlib.Path, arg: str) -> dict:
  """What the `get_config` of a file returns, as plain dicts."""
  config = _made(path, arg)
  with blamed(path):
    values = config.to_dict() if hasattr(config, 'to_dict') else config
  if not isinstance(values, Mapping):
    raise ValueError(
      f'{path}: get_config returned {shown(config)}, and not the ConfigDict or'
      ' dict it made.'
    )
  return dict(values)


def _made(path: pathlib.Path, arg: str):
  """What the `get_config` of a file returns."""
  if path.suffix != '.py' or path.stat().st_size > _LARGEST:
    raise ValueError(
      f'The config {path} is no file of Python with get_config(arg); `st-moe'
      ' list configs` shows some.'
    )
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(module_spec)
  with blamed(path):
    module_spec.loader.exec_module(module)
  make = getattr(module, 'get_config', None)
  if not callable(make):
    raise ValueError(f'{path} has no function get_config(arg=None).')
  try:
    inspect.signature(make).bind(None)
  except (TypeError, ValueError):
    line = getattr(getattr(make, '__code__', None), 'co_firstlineno', 1)
    raise ValueError(
      f'{path}, line {line}: get_config is called with what follows the colon'
      ' of --config=FILE:ARG, or None: write `def get_config(arg=None)`.'
    ) from None
  with blamed(path):
    return make(arg or None)


@contextlib.contextmanager
def blamed(what: object):
  """Runs code of a user: whatever it raises is a sentence with file and line.

  Args:
    what: which code, where no line of it is to blame.

  Raises:
    ValueError: it raised something.
  """
  try:
    yield
  except (Exception, SystemExit) as e:
    raise ValueError(f'{_place(e, what)}{_said(e)}') from e


def _place(e: BaseException, what: object) -> str:
  """The line to blame: the last outside of libraries and of this package."""
  if isinstance(e, SyntaxError) and e.filename:
    return f'{e.filename}, line {e.lineno or 1}: '
  others = (sysconfig.get_path('stdlib'), str(pathlib.Path(__file__).parent))
  for frame in reversed(traceback.extract_tb(e.__traceback__)):
    file = frame.filename
    library = file.startswith(others) or 'site-packages' in file
    if os.path.isfile(file) and not library:
      return f'{file}, line {frame.lineno}: '
  return f'{what}: '


def _said(e: BaseException) -> str:
  text = e.msg if isinstance(e, SyntaxError) else str(e)
  plain = type(e) is ValueError and text
  text = text if plain else f'{type(e).__name__}: {text}'.rstrip(': ')
  return text if text.endswith(('.', '?')) else f'{text}.'


def _closed(values: Mapping, path, refuse: bool, above: str = '') -> dict:
  """`values` without what a file leaves open, written `...`.

  Raises:
    ValueError: with `refuse`, there is some.
  """
  found = {}
  for name, value in values.items():
    field = f'{above}{name}'
    if value is ... and refuse:
      raise ValueError(
        f'{path} leaves config.{field} to you: set --config.{field}=VALUE.'
      )
    if isinstance(value, Mapping):
      value = _closed(value, path, refuse, f'{field}.')
    if value is not ...:
      found[name] = value
  return found
