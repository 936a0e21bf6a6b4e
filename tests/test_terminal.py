"""Text from outside is shown, and neither obeyed nor taken for markup."""

import io
import sys
import types

from rich.table import Table

from st_moe import terminal

EVIL = 'a[red]b[/] :smile: \x1b[2J\x07\r\x7f\x9b \u202e \udcff'
HARMLESS = r'a[red]b[/] :smile: \x1b[2J\x07\r\x7f\x9b \u202e \udcff'


def test_control_characters_are_written_out():
  assert terminal.shown(EVIL) == HARMLESS
  assert terminal.shown('line\n\tline é 漢 👍') == 'line\n\tline é 漢 👍'
  assert terminal.shown(ValueError(EVIL)) == HARMLESS


def test_lines(capsys):
  terminal.say('x', EVIL)
  assert capsys.readouterr().out == f'x {HARMLESS}\n'


def test_tables_and_titles():
  console = terminal.console()
  console.file = io.StringIO()
  console.print(EVIL, soft_wrap=True)
  table = Table('name', title=EVIL)
  table.add_row(EVIL)
  console.print(table)
  said = console.file.getvalue()
  assert said.count(HARMLESS) == 3 and '\x1b' not in said


def test_a_notebook_is_no_terminal(monkeypatch):
  """Though it asks for colours: no bar moves there, and lines are text."""
  monkeypatch.setenv('FORCE_COLOR', '1')
  shell = types.SimpleNamespace()
  ipython = types.SimpleNamespace(get_ipython=lambda: shell)
  monkeypatch.setitem(sys.modules, 'IPython', ipython)
  assert terminal.console().is_terminal
  shell.kernel = 'of a notebook'
  console = terminal.console()
  assert not console.is_terminal and not console.is_jupyter
  console.file = io.StringIO()
  table = Table('name', title='title')
  table.add_row('row')
  console.print(table)
  said = console.file.getvalue()
  assert 'row' in said and '\x1b' not in said
