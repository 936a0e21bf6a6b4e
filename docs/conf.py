"""How Sphinx makes the site: `bash scripts/docs.sh`.

The source folder is the repository, so that a page may stand anywhere in it and
a link between pages is the same file here and on GitHub.
"""

import logging
import os
import pathlib
import re
import typing

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.util.typing import stringify_annotation

os.environ['COLUMNS'] = '80'  # Of the help of a verb, whoever asks.

ROOT = pathlib.Path(__file__).parents[1]

project = 'st_moe'
root_doc = 'docs/index'
include_patterns = [
  'docs/**', 'notebooks/*.ipynb', 'experiments/*.md',
  'README.md', 'CONTRIBUTING.md', 'EXPERIMENTS.md',
]  # fmt: skip
exclude_patterns = ['docs/_build', '.*', 'runs', 'build']

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
html_theme = 'sphinx_book_theme'
html_title = 'st_moe'
html_extra_path = ['_extra']  # index.html, since the root lies in docs/.
html_theme_options = {'show_toc_level': 2}
html_copy_source = False

# Notebooks are shown as they were run; nothing runs here.
nb_execution_mode = 'off'
myst_heading_anchors = 4
myst_enable_extensions = ['dollarmath']
highlight_language = 'bash'
# A tree of files is no bash: then it is shown as it stands.
suppress_warnings = ['misc.highlighting_failure']
nitpicky = True

# Docstrings are in Google's style, with `code` in single backticks.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_inherit_docstrings = False
autodoc_default_options = {
  'exclude-members': 'replace, set',  # Of flax.struct and matplotlib.
  'special-members': '__call__',
}
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 80
autodoc_typehints = 'signature'
# Of other packages there are no pages here to refer to.
nitpick_ignore_regex = [('py:.*', r'(?!st_moe[.]).*')]


class Flags(Directive):
  """`{flags} VERB`: what `st-moe VERB --help` prints."""

  required_arguments = 1

  def run(self):
    from st_moe import verbs

    text = verbs.parser()[1][self.arguments[0]].format_help()
    return [nodes.literal_block(text, text, language='none')]


class Mechanisms(Directive):
  """`{mechanisms}`: what `st-moe methods NAME` prints of each, by kind."""

  def run(self):
    from st_moe import methods

    kinds = {}
    for name, kind in dict.fromkeys(
      (m.name, m.kind) for m in methods.entries()
    ):
      kinds.setdefault(kind, []).append(name)
    made = []
    for kind, names in kinds.items():
      section = self._section(kind)
      for name in names:
        section += self._section(name, kind)
        for card in methods.cards(name):
          section[-1] += nodes.literal_block(card, card, language='none')
      made.append(section)
    return made

  def _section(self, title, above=''):
    section = nodes.section('', nodes.title('', title))
    section['ids'] = section['names'] = [f'{above}-{title}'.strip('-')]
    self.state.document.note_implicit_target(section, section)
    return section


def as_it_stands(app, what, name, obj, options, lines):
  """An indented block of a docstring is an example or a table of words."""
  before = '', ''  # The last line of all, and the last one that says something.
  kept = []
  for line in lines:
    if line.startswith(' ') and not before[0] and not before[1].startswith(' '):
      kept += ['.. code-block:: text', '']
    before = line, line or before[1]
    kept.append(line)
  lines[:] = kept


def plain_types(app, what, name, obj, options, signature, returned):
  """A rule by its name, `Rate`, and of a module what its users give."""
  from st_moe import fields, schedules

  if not signature:
    return None
  for rule, hint in [*vars(fields).items(), *vars(schedules).items()]:
    if typing.get_origin(hint) is typing.Annotated:
      said = stringify_annotation(hint, 'smart')
      signature = signature.replace(said, rule)
  for pattern, instead in {
    r'Annotated\[(\w+), [^\]]*\]': r'\1',
    r'(, )?parent: .*': ')',
    r'<function [\w.]*<lambda>>|<factory>': '...',
    r'<function ([\w.]+)>': r'\1',
  }.items():
    signature = re.sub(pattern, instead, signature)
  return signature, returned


def setup(app):
  # A glob that matches nothing is as meant: not every checkout has notebooks.
  logging.getLogger('sphinx.sphinx.directives.other').addFilter(
    lambda record: 'toctree glob pattern' not in record.msg
  )
  app.add_directive('flags', Flags)
  app.add_directive('mechanisms', Mechanisms)
  # Before napoleon, which indents what stands under `Args:`.
  app.connect('autodoc-process-docstring', as_it_stands, priority=400)
  app.connect('autodoc-process-signature', plain_types)
