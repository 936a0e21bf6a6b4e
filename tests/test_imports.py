"""Who may import whom: the rooms of the code base and the arrows between them.

A room is a module or a whole package of `st_moe`. It may import what stands on
its own line and on the lines above, unless `NEVER` says otherwise. Rooms that
are not built yet are named already.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LINES = (
  (
    'about',
    'shipped',
    'fields',
    'flags',
    'layer_plan',
    'config',
    'counts',
    'config_file',
    'gin_file',
    'schedules',
    'paths',
    'backend',
    'signals',
    'stdio',
    'terminal',
  ),
  ('routing',),
  ('sharding', 'hosts'),
  ('model',),
  ('decode', 'train'),
  ('data',),
  ('history', 'listing', 'checkpoint', 'interop'),
  ('analysis',),
  ('infer',),
  ('run',),
  ('surgery', 'plan', 'doctor', 'methods'),
  ('verbs',),
  ('cli', 't5x_bridge', '__init__', '__main__', 'train.__init__'),  # Leaves.
)
LINE_OF = {room: i for i, line in enumerate(LINES) for room in line}

# What a line above allows and the room does not want.
NEVER = {
  'sharding': ('routing', 'hosts'),
  'hosts': ('routing', 'sharding', 'config', 'counts', 'config_file'),
  # These know a model as an apply function.
  'decode': ('model', 'hosts'),
  'train': ('model', 'hosts'),
  'model': ('hosts',),
  'data': ('model', 'train', 'infer', 'hosts'),
}

# Other packages a room may import; a room not named here may any.
PACKAGES = {
  'about': (),
  'shipped': (),
  'fields': (),
  'flags': (),
  'layer_plan': (),
  'config': ('numpy',),
  'counts': (),
  'backend': (),
  'signals': (),
  'stdio': (),
  'terminal': ('rich',),
  'config_file': ('numpy',),
  'schedules': ('numpy', 'jax'),
  'paths': ('jax',),
  'routing': ('numpy', 'jax', 'flax.struct'),
  'sharding': ('numpy', 'jax', 'flax'),
  'hosts': ('numpy', 'jax'),
  'model': ('numpy', 'jax', 'flax'),
}

# Seconds to import, and not always there: at the module level of one only.
HEAVY = ('seqio', 'tensorflow', 'tensorflow_datasets', 'tensorflow_text')
# Modules that must not even need jax to be imported; the verbs import on use.
LIGHT = (
  'about',
  'backend',
  'signals',
  'stdio',
  'fields',
  'flags',
  'terminal',
  'cli',
  'verbs',
  'infer.generate_flags',
  'plan.plan_flags',
  '__init__',
  '__main__',
)


def room_of(module: str) -> str:
  """'model.moe' -> 'model'; '' if unknown."""
  room = module if module in LINE_OF else module.split('.')[0]
  return room if room in LINE_OF else ''


def imports(tree: ast.Module) -> list[tuple[str, bool]]:
  """(dotted name, at module level) of everything imported anywhere."""
  found = []

  def visit(node, top):
    if isinstance(node, ast.Import):
      found.extend((alias.name, top) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: a relative import'
      names = (f'{node.module}.{alias.name}' for alias in node.names)
      found.extend((name, top) for name in names)
    top = top and not isinstance(node, ast.FunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
      visit(child, top)

  visit(tree, True)
  return found


def _within(name: str, packages) -> bool:
  return any(name == p or name.startswith(f'{p}.') for p in packages)


def wrong(module: str, source: str) -> list[str]:
  """What `st_moe.<module>` imports and should not."""
  room, bad = room_of(module), []
  for name, top in imports(ast.parse(source)):
    if _within(name, HEAVY) and top and module != 'data.tasks':
      bad.append(f'{name} at module level')
    if _within(name, ('t5x',)) and room != 't5x_bridge':
      bad.append(name)
    if _within(name, ('jax', 'flax', 'optax', 'orbax')) and top:
      bad += [f'{name} at module level'] if module in LIGHT else []
    if name == 'st_moe' or name.startswith('st_moe.'):
      other = name.removeprefix('st_moe.')
      line = LINE_OF.get(room_of(other), len(LINES))
      same_package = other.split('.')[0] == module.split('.')[0]
      leaf = line == len(LINES) - 1
      if line > LINE_OF[room] or (leaf and not same_package):
        bad.append(name)
      if _within(other, NEVER.get(room, ())):
        bad.append(name)
    elif room in PACKAGES and name.split('.')[0] not in sys.stdlib_module_names:
      bad += [] if _within(name, PACKAGES[room]) else [name]
  return bad


def _modules():
  for path in sorted((ROOT / 'st_moe').rglob('*.py')):
    yield (
      '.'.join(path.relative_to(ROOT / 'st_moe').with_suffix('').parts),
      path,
    )


MODULES = dict(_modules())


@pytest.mark.parametrize('module', MODULES)
def test_module(module):
  assert room_of(module), f'{module} stands on no line; give it one above.'
  assert wrong(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize('folder', ['st_moe', 'scripts', 'benchmarks'])
def test_nobody_imports_a_leaf_folder(folder):
  leaves = ('scripts', 'notebooks', 'benchmarks', 'tests', 'configs')
  for path in (ROOT / folder).rglob('*.py'):
    names = [name for name, _ in imports(ast.parse(path.read_text()))]
    assert not [name for name in names if _within(name, leaves)], path


def test_configs_import_their_own_kind_only():
  for path in (ROOT / 'configs').rglob('*.py'):
    for name, _ in imports(ast.parse(path.read_text())):
      ours = ('ml_collections', 'st_moe.config', 'st_moe.config_file')
      stdlib = name.split('.')[0] in sys.stdlib_module_names
      assert stdlib or _within(name, ours), f'{path} imports {name}'


@pytest.mark.parametrize(
  ('module', 'line', 'allowed'),
  [
    ('routing.seating', 'import flax.struct', True),
    ('routing.seating', 'from flax import struct', True),
    ('routing.seating', 'import flax.linen as nn', False),
    ('routing.seating', 'from flax import linen', False),
    ('routing.seating', 'from st_moe import sharding', False),
    ('routing.seating', 'from st_moe.sharding import constrain', False),
    ('routing.seating', 'def f():\n  from st_moe import sharding', False),
    ('routing.seating', 'from st_moe.routing.types import Seats', True),
    ('model.moe', 'from st_moe.routing.types import Seats', True),
    ('model.moe', 'from st_moe.train import step', False),
    ('model.moe', 'import optax', False),
    ('model.moe', 'from st_moe import hosts', False),
    ('hosts', 'from st_moe import sharding', False),
    ('hosts', 'import orbax.checkpoint', False),
    ('checkpoint', 'from st_moe import hosts', True),
    ('config', 'import jax', False),
    ('config_file', 'from st_moe import config', True),
    ('config_file', 'from st_moe.model.moe import MoE', False),
    ('train.step', 'from st_moe.train import terms', True),
    ('train.step', 'from st_moe.model.moe import MoE', False),
    ('train.terms', 'from st_moe.run import loop', False),
    ('run.loop', 'from st_moe.train import step', True),
    ('run.loop', 'from st_moe.model import transformer', True),
    ('run.loop', 'import seqio', False),
    ('run.loop', 'def f():\n  import seqio', True),
    ('run.loop', 'from st_moe import cli', False),
    ('surgery.upcycle', 'from st_moe import checkpoint', True),
    ('data.tasks', 'import seqio', True),
    ('data.catalogue', 'import seqio', False),
    ('data.seqio_shards', 'def f():\n  import seqio', True),
    ('data.tasks', 'from st_moe.train import step', False),
    ('data.tasks', 'from st_moe.model import transformer', False),
    ('cli', 'import jax', False),
    ('cli', 'def main():\n  import jax', True),
    ('t5x_bridge', 'import t5x', True),
    ('interop.t5x', 'def f():\n  import t5x', False),
  ],
)
def test_the_rules_themselves(module, line, allowed):
  assert (not wrong(module, line)) == allowed


# What never leaves the program: between its processes, in its cache, to be
# compared, and in its words.
INSIDE = (
  *('hosts', 'data.task', 'data.tasks', 'data.task_shards', 'data.trust'),
  'data.seqio_shards',
  'interop.safetensors',
)


def test_json_is_written_without_nan():
  """Which is no JSON: other programs refuse a whole file for it."""
  found = {}
  for module, path in MODULES.items():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        'json.dump', 'json.dumps',
      ):  # fmt: skip
        strict = any(ast.unparse(k) == 'allow_nan=False' for k in node.keywords)
        found.setdefault(module, []).append(strict)
  loose = {module for module, calls in found.items() if not all(calls)}
  assert loose <= set(INSIDE)
  # Everybody else leaves it to one.
  assert found.keys() - set(INSIDE) == {'data.files', 'config_file'}


def test_every_planned_room_has_a_line():
  planned = 'infer.generate train.stability run.loop analysis.trace'
  planned += ' surgery.upcycle interop.huggingface plan.cost cli t5x_bridge'
  assert all(map(room_of, planned.split()))
  assert not room_of('kitchen')
