"""The site is whole: blocks that run, links that lead, nothing left out.

Whether it builds says `bash scripts/docs.sh`; whether its commands run,
`python -m tests.pages`.
"""

import functools
import pathlib
import re

import pytest

import st_moe
from st_moe import methods, verbs
from tests import experiments, pages

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
# What links and anchors are looked at in.
LINKED = (*pages.pages(), 'CONTRIBUTING.md', 'EXPERIMENTS.md')

PAGE = """
```bash
st-moe list configs  # which there are
st-moe train --config=a \\
  --workdir=b   # needs a TPU
```

```bash
mkdir -p a
# needs a network, and days
st-moe list tasks
```

Save this as `mine.py`:

```python
x = 1
```

```python
import mine
```

```text
step 1
```

```
a/    a tree, and no command
```
"""


def test_what_of_a_page_is_run():
  made = pages.blocks(PAGE)
  assert [block.line for block in made] == [2, 8, 16, 20, 24, 28]
  assert [pages.runs(block) for block in made] == [
    'st-moe list configs  # which there are\n',
    'mkdir -p a\n',
    'cat > mine.py <<"END"\nx = 1\nEND\n',
    'python - <<"END"\nimport mine\nEND\n',
    '',
    '',
  ]
  assert pages.left_out(PAGE) == [
    'st-moe train --config=a --workdir=b # needs a TPU',
    '# needs a network, and days',
    'st-moe list tasks',
  ]


def test_a_page_is_run_to_its_first_failure(tmp_path, monkeypatch, capsys):
  def told(text):
    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    (tmp_path / 'page.md').write_text(text)
    ran = pages.run('page.md', tmp_path, {'PATH': '/usr/bin:/bin'})
    return ran, re.sub(r'\d+[.]\d', 'n', capsys.readouterr().out)

  good = '```bash\nbash -c "echo 1"\n```\n'
  assert told(good * 2) == (True, 'page.md:1  n s\npage.md:4  n s\n')
  ran, said = told(good + '```bash\nbash -c "echo why; exit 3"\n```\n' + good)
  assert not ran
  assert said == (
    'page.md:1  n s\npage.md:4 failed:\nbash -c "echo why; exit 3"\n\n'
    'It said:\nwhy\n\n'
  )


@pytest.mark.parametrize('verb', verbs.VERBS)
def test_a_verb_has_its_page(verb):
  (page,) = [
    path
    for path in DOCS.rglob('*.md')
    if f'```{{flags}} {verb}\n' in path.read_text()
  ]
  assert page.stem == verb
  name = page.relative_to(DOCS).with_suffix('').as_posix()
  assert f'\n{name}\n' in (DOCS / 'index.md').read_text()
  # A command of it is run, or at least said.
  assert any(f'st-moe {verb}' in b.code for b in pages.blocks(page.read_text()))


def test_what_is_public_is_in_the_reference():
  page = (DOCS / 'api' / 'index.md').read_text()
  documented = set(_documented())
  for name in st_moe.__all__:
    row = re.search(
      rf'^\| `st_moe\.{name}` \| \{{py:\w+\}}`([\w.]+)`', page, re.MULTILINE
    )
    assert row, name
    module = row[1] if row[1] in documented else row[1].rpartition('.')[0]
    assert module in documented
    found = getattr(st_moe, name)
    if callable(found) and name != 'train':
      assert row[1] == f'{found.__module__}.{found.__qualname__}'


def _documented():
  for path in (DOCS / 'api').glob('*.md'):
    yield from re.findall(r'automodule:: (\S+)', path.read_text())


def test_every_mechanism_is_in_the_reference():
  made = {method.made for method in methods.entries()}
  plain = {m.func if isinstance(m, functools.partial) else m for m in made}
  assert {m.__module__ for m in plain} <= set(_documented())


def _anchors(path: pathlib.Path) -> set[str]:
  text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.S | re.M)
  heads = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return {
    experiments.anchor(re.sub(r'\[(.*?)\]\(.*?\)', r'\1', h)) for h in heads
  }


@pytest.mark.parametrize('page', LINKED)
def test_a_link_leads_somewhere(page):
  path = ROOT / page
  text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.S | re.M)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'\w+:', link):
      continue
    place, _, anchor = link.partition('#')
    there = path.parent / place if place else path
    assert there.exists(), link
    if anchor:
      assert anchor in _anchors(there), link
