"""What people see: text from outside cannot speak to their terminal.

Names in checkpoints, paths and answers may hold control characters, which a
terminal obeys, and brackets, which rich takes for markup.
"""

import re
import sys

# Of ASCII and Latin-1 but \t and \n; what turns the direction of writing; what
# a file's name has where it is not UTF-8.
_CONTROL = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]'
)


def shown(text: object) -> str:
  """Text with its control characters written out, as \\x1b."""
  escape = lambda m: m[0].encode('unicode_escape').decode()
  return _CONTROL.sub(escape, str(text))


def say(*words: object, file=None) -> None:
  """Prints a line to people, at once."""
  print(*map(shown, words), file=file or sys.stdout, flush=True)


def _in_notebook() -> bool:
  ipython = sys.modules.get('IPython')
  return hasattr(ipython and ipython.get_ipython(), 'kernel')


def console(*, stderr: bool = False):
  """A rich console that prints every string as it is, in tables too."""
  from rich.console import Console

  plain = dict(markup=False, emoji=False, highlight=False)
  if _in_notebook():
    # As HTML every line would be a paragraph, and FORCE_COLOR, which is set
    # there, makes it a terminal, where no bar can move.
    plain |= dict(force_jupyter=False, force_terminal=False)
  made = Console(stderr=stderr, **plain)
  render = made.render_str
  made.render_str = lambda text, **options: render(shown(text), **options)
  return made
