"""The table of verdicts in EXPERIMENTS.md, made from the entries.

  python -m tests.experiments

An entry is a section '## DATE TITLE' of experiments/MONTH.md. Its verdict
begins with '*Verdict.*'; the table has the first sentence.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'EXPERIMENTS.md'
HEADING = '## Verdicts'


def entries() -> list[tuple[str, str, str, str]]:
  """(month, date, title, first sentence of the verdict), newest first."""
  found = []
  for path in sorted((ROOT / 'experiments').glob('*.md')):
    for entry in re.split(r'^## ', path.read_text(), flags=re.MULTILINE)[1:]:
      date, title = entry.partition('\n')[0].split(' ', 1)
      _, _, said = entry.partition('*Verdict.*')
      verdict = re.match(r'(.+?\.)(?=\s|$)', ' '.join(said.split()))
      found.append((path.stem, date, title, verdict and verdict[1]))
  return found[::-1]


def anchor(heading: str) -> str:
  """That which GitHub gives a heading."""
  kept = re.sub(r'[^\w\- ]', '', heading.lower())
  return kept.replace(' ', '-')


def table() -> str:
  rows = ['| | | verdict |', '| --- | --- | --- |']
  for month, date, title, verdict in entries():
    link = f'experiments/{month}.md#{anchor(f"{date} {title}")}'
    rows.append(f'| {date} | [{title}]({link}) | {verdict} |')
  return '\n'.join(rows)


def page() -> str:
  """EXPERIMENTS.md as it should be."""
  head, _, _ = PAGE.read_text().partition(HEADING)
  return f'{head.rstrip()}\n\n{HEADING}\n\n{table()}\n'


if __name__ == '__main__':
  PAGE.write_text(page())
