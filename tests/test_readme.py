"""The README tells the truth about the tree it ends in."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def tree_paths(text: str) -> list[str]:
  """Paths of the last code block: two spaces of indent are one folder down."""
  block = re.findall(r'```\n(.*?)```', text, re.DOTALL)[-1]
  paths, parents = [], []
  for line in block.splitlines():
    name = line.split()[0]
    depth = (len(line) - len(line.lstrip())) // 2
    del parents[depth:]
    paths.append('/'.join([*(p.rstrip('/') for p in parents), name]))
    if name.endswith('/'):
      parents.append(name)
  return paths


def test_tree_paths_reads_an_indented_tree():
  text = '```\na/        first\n  b.py    second\n  c/\n    d.py\ne.md\n```\n'
  assert tree_paths(text) == ['a/', 'a/b.py', 'a/c/', 'a/c/d.py', 'e.md']


def test_every_path_of_the_tree_exists():
  paths = tree_paths((ROOT / 'README.md').read_text())
  assert len(paths) > 30
  missing = [path for path in paths if not (ROOT / path).exists()]
  assert not missing


def test_every_module_is_in_the_tree():
  paths = set(tree_paths((ROOT / 'README.md').read_text()))
  modules = [
    str(path.relative_to(ROOT))
    for folder in ('st_moe', 'configs', 'scripts', 'benchmarks')
    for path in (ROOT / folder).rglob('*.*')
    if path.suffix in ('.py', '.sh') and path.name != '__init__.py'
  ]
  assert not sorted(set(modules) - paths)


def test_the_two_commands_are_there():
  text = (ROOT / 'README.md').read_text()
  assert 'bash scripts/quickstart.sh' in text
  assert 'bash scripts/test.sh' in text
