"""docs/gin.md, whose tables are made from the macros.

python -m tests.gin_page
"""

import pathlib

from st_moe import gin_file

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'gin.md'
TABLE = '## Macros\n'


def page() -> str:
  said = PAGE.read_text().partition(TABLE)[0]
  rows = [said, TABLE, '\n| macro | field |\n| --- | --- |\n']
  for name, made in gin_file.MACROS.items():
    if callable(made):
      said = ' '.join(made.__doc__.split())
    else:
      said = ', '.join(f'`{field}`' for field in made)
    rows.append(f'| `{name}` | {said} |\n')
  for name, flag in gin_file.FLAGS.items():
    if name not in gin_file.MACROS:
      rows.append(f'| `{name}` | the flag `--{flag}` |\n')
  rows.append(
    '\n## Parameters\n\n| parameter of T5X | macro |\n| --- | --- |\n'
  )
  for name, macro in gin_file.PARAMETERS.items():
    rows.append(f'| `{name}` | `{macro}` |\n')
  return ''.join(rows)


if __name__ == '__main__':
  PAGE.write_text(page())
