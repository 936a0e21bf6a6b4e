"""The pages tell the truth about the commands and the tree.

`tests.pages` runs what a page says in code. What it leaves out, and what stands
in passing, is read here, and checked against the real parser and fields.
"""

import ast
import pathlib
import re

import pytest

from st_moe import config_file, verbs
from st_moe.config import Config
from st_moe.interop import convert
from tests import pages

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (*pages.pages(), 'CONTRIBUTING.md')


def tree_paths(text: str) -> list[str]:
  """Paths of the last code block: two spaces of indent are one folder down."""
  paths, parents = [], []
  for line in pages.blocks(text)[-1].code.splitlines():
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


@pytest.mark.parametrize(
  ('page', 'least'), [('README.md', 15), ('docs/tree.md', 200)]
)
def test_every_path_of_a_tree_exists(page, least):
  paths = tree_paths((ROOT / page).read_text())
  assert len(paths) >= least
  missing = [path for path in paths if not (ROOT / path).exists()]
  assert not missing


def test_every_module_is_in_the_tree():
  paths = set(tree_paths((ROOT / 'docs/tree.md').read_text()))
  modules = [
    str(path.relative_to(ROOT))
    for folder in ('st_moe', 'configs', 'scripts', 'benchmarks')
    for path in (ROOT / folder).rglob('*.*')
    if path.suffix in ('.py', '.sh') and path.name != '__init__.py'
  ]
  assert not sorted(set(modules) - paths)


def test_a_readme_is_read_in_two_minutes():
  text = (ROOT / 'README.md').read_text()
  assert text.count('\n') <= 150
  assert 'bash scripts/quickstart.sh' in text
  assert 'bash scripts/test.sh' in text


# Commands.


def test_lines_and_commands_of_a_page():
  page = """
```
st-moe train --workdir=a \\
  --config.data.mixture="{'a b': 1.0}"   # why
$vm create && $vm setup; ls
```
```python
st-moe = 1
```
`st-moe list
tasks` and `x`
"""
  typed = pages.lines(page)
  assert len(typed) == 2
  assert [pages.commands(line) for line in typed] == [
    [['st-moe', 'train', '--workdir=a', "--config.data.mixture={'a b': 1.0}"]],
    [['$vm', 'create'], ['$vm', 'setup'], ['ls']],
  ]
  assert pages.spans(page) == ['st-moe list tasks', 'x']


def _said() -> list[tuple[str, bool, str]]:
  """(place, whether it is whole, command) of all that the pages say."""
  found = []
  for page in PAGES:
    text = (ROOT / page).read_text()
    # Of the pages under docs the others are run.
    of_docs = page.startswith('docs/')
    typed = pages.left_out(text) if of_docs else pages.lines(text)
    found += [(page, True, line) for line in typed]
    found += [(page, False, span) for span in pages.spans(text)]
  for path in config_file.shipped():
    text = ast.get_docstring(ast.parse(path.read_text()))
    typed = re.findall(r'^ *(st-moe .*)$', text.replace('\\\n', ' '), re.M)
    found += [(path.name, True, line) for line in typed]
  return found


def _st_moe():
  for place, whole, line in _said():
    commands = pages.commands(line) if whole else [line.split()]
    for words in commands:
      if words[0] == 'st-moe' and len(words) > 1:
        yield place, whole, words[1:]


def _fields(words) -> dict[str, str]:
  pairs = (word.partition('=') for word in words)
  return {
    name.removeprefix('--config.'): value
    for name, _, value in pairs
    if name.startswith('--config.') and '*' not in name
  }


@pytest.fixture(scope='module')
def parsers():
  """The parser of each verb."""
  return verbs.parser()[1]


def test_there_are_commands_to_check():
  assert {*verbs.VERBS} <= {words[0] for _, _, words in _st_moe()}
  assert len(list(_st_moe())) > 40


@pytest.mark.parametrize(
  ('place', 'whole', 'words'),
  list(_st_moe()),
  ids=lambda x: ' '.join(x)[:60] if isinstance(x, list) else '',
)
def test_a_command_is_one(parsers, place, whole, words, capsys):
  verb, *rest = words
  assert verb in parsers or verb.startswith('-'), place
  flags = [word.partition('=')[0] for word in rest if word.startswith('--')]
  known = parsers[verb]._option_string_actions if verb in parsers else flags
  theirs = {f for f in flags if not f.startswith(('--config.', '--gin.'))}
  assert theirs <= set(known)
  fields = _fields(rest)
  for field, value in fields.items():
    config_file.merge(Config, {}, field, value)
  if not whole:  # In passing: what matters of it.
    return
  if verb not in parsers:  # --version
    return
  asked, overrides = parsers[verb].read(rest)
  assert overrides == fields
  if verb == 'convert':
    for uri in (getattr(asked, 'from'), asked.to):
      convert.split(uri)
  # `...` and PATH are for the reader to fill in.
  given = getattr(asked, 'config', '')
  if given and not re.search('[.]{3}|=[A-Z]+', given):
    config_file.load(given, fields)


def test_a_path_that_is_named_is_there():
  folders = 'configs|scripts|benchmarks|tests|st_moe|docs|experiments'
  path = re.compile(rf'(?<![\w/])((?:{folders})/[\w./]*\w)')
  for place, _, text in _said():
    for name in path.findall(text):
      if re.search('NAME[.]py|MONTH[.]md', name):  # Of one to be written.
        continue
      assert (ROOT / name).exists(), f'{place}: {name} in {text!r}'
  for page in PAGES:
    links = re.findall(r'\]\(([^)#:]+)\)', (ROOT / page).read_text())
    for link in links:
      assert (ROOT / page).parent.joinpath(link).exists(), f'{page}: {link}'


def test_a_field_that_is_named_is_one():
  # `data.workers`, `config.init`, `model.moe.eval_capacity` in passing.
  heads = 'model|data|loss|optimizer|mesh|checkpoint|evaluate|log'
  field = re.compile(rf'(?:config[.])?((?:{heads})[.][\w.]*\w)(=.*)?')
  found = 0
  for place, whole, text in _said():
    match = field.fullmatch(text)
    if match and not whole:
      found += 1
      try:
        config_file.merge(Config, {}, match[1], 'x')
      except ValueError as e:
        raise AssertionError(f'{place}: {text}: {e}') from None
  assert found > 10
