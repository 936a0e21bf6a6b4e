"""Notebooks as they are kept; `scripts/notebooks.sh` runs them."""

import ast
import importlib.util
import pathlib
import re

import nbformat
import pytest

from tests import notebooks

ROOT = pathlib.Path(__file__).parents[1]
each = pytest.mark.parametrize(
  'path', notebooks.NOTEBOOKS, ids=[p.stem for p in notebooks.NOTEBOOKS]
)


def _kept(path):
  return nbformat.read(path.with_suffix('.ipynb'), as_version=4)


def _code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def _tagged(notebook, tag):
  return [c for c in notebook.cells if tag in c.metadata.get('tags', ())]


def test_there_are_six():
  names = [path.stem for path in notebooks.NOTEBOOKS]
  assert names == list(notebooks.EXPECTED)
  there = (ROOT / 'notebooks').glob('*.ipynb')
  assert sorted(path.stem for path in there) == names


@each
def test_both_forms_say_the_same(path):
  said, kept = notebooks.read(path), _kept(path)
  seen = lambda notebook: [
    (c.id, c.cell_type, c.source, c.metadata) for c in notebook.cells
  ]
  assert seen(said) == seen(kept), 'bash scripts/notebooks.sh --write'
  assert said.metadata == kept.metadata
  nbformat.validate(kept)


@each
def test_they_import_and_never_define(path):
  notebook = notebooks.read(path)
  never = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda
  for cell in _code(notebook):
    nodes = ast.walk(ast.parse(cell.source))
    assert not any(isinstance(node, never) for node in nodes), cell.source
  title, first = notebook.cells[:2]
  assert re.match('# [A-Z]', title.source) and '![' not in title.source
  assert _tagged(notebook, 'install') == [first]
  assert len(_tagged(notebook, 'parameters')) == 1
  assert _tagged(notebook, 'result') == [notebook.cells[-1]]
  # What is not of st_moe stands in setup.py, or in Python.
  for cell in _code(notebook)[1:]:
    for node in ast.walk(ast.parse(cell.source)):
      if isinstance(node, ast.ImportFrom):
        assert importlib.util.find_spec(node.module)


@each
def test_what_is_kept_is_whole(path):
  kept = _kept(path)
  assert notebooks.problems(path.stem, kept, 0.0, (str(ROOT),)) == []
  pictures = [
    output.data['image/png']
    for output in notebooks.outputs(kept)
    if 'image/png' in output.get('data', {})
  ]
  assert pictures
  for cell in _code(kept):
    assert cell.execution_count, 'a cell that was not run'
    assert not cell.outputs or cell.metadata.get('tags') != ['install']


def test_the_installing_cell_is_the_same_everywhere():
  cells = {
    _tagged(notebooks.read(path), 'install')[0].source
    for path in notebooks.NOTEBOOKS
  }
  assert len(cells) == 1


def test_what_is_wrong_is_found():
  notebook = nbformat.v4.new_notebook()
  show = nbformat.v4.new_output
  value = show('execute_result', data={'text/plain': "{'loss': 9.0}"})
  wrong = show('stream', name='stderr', text='UserWarning: of /home/me/x')
  cell = nbformat.v4.new_code_cell('x', outputs=[value])
  notebook.cells = [cell]
  judge = lambda **more: notebooks.problems(
    '2_pretrain', notebook, **{'seconds': 0.0, 'places': (), **more}
  )
  notebook.cells[0].outputs[0].data['text/plain'] = (
    "{'loss': {'a': 9.0}, 'parameters': {'sparse': 3, 'dense': 1},"
    " 'vocabulary': 2048}"
  )
  assert judge()[0].startswith('its values are')
  cell.outputs = [value, wrong]
  (said,) = judge()
  assert said.startswith('on standard error: UserWarning')
  assert 'took 301 s, and has 300' in judge(seconds=301.0)
  assert 'names /home/me, a place here' in judge(places=('/home/me',))
