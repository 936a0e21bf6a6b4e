"""docs/methods.md, made from the tables of mechanisms.

python -m tests.methods_page
"""

import pathlib

from st_moe import methods

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'methods.md'
HEAD = """# Mechanisms of the literature

Each is a line of a table and a config; `st-moe methods NAME` shows what one
does, its options and what its config claims; whether that showed here, and in
what figures, is in [experiments/methods.md](../experiments/methods.md). Made by
`python -m tests.methods_page`.
"""


def _paper(name: str) -> str:
  if name.startswith('http'):
    return f'<{name}>'
  number = name.removeprefix('arXiv:')
  return (
    f'[{number}](https://arxiv.org/abs/{number})' if number != name else name
  )


def page() -> str:
  """docs/methods.md as it should be."""
  heads = *methods.COLUMNS[:4], 'field', *methods.COLUMNS[4:]
  lines = [HEAD, f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
  named = [m for m in methods.entries() if m.paper]
  for method, row in zip(named, methods.table(), strict=True):
    source, name, _, kind, causal, noisy, config, shown = row
    link = f'[{config}](../configs/methods/{config}.py)' if config else ''
    cells = (
      *(source, f'`{name}`', _paper(method.paper), kind),
      *(f'`{method.place}`', causal, noisy, link, shown),
    )
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


if __name__ == '__main__':
  PAGE.write_text(page())
