"""Text from outside is shown, and neither obeyed nor taken for markup."""

import io

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
