"""Pictures of what routers do, as figures of matplotlib.

Colours are those of Okabe and Ito, told apart by colour-blind readers too, and
numbers stand beside them where there are more things than colours.
"""

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from st_moe.analysis import specialization
from st_moe.analysis.trace import Trace
from st_moe.data.vocabulary import Vocabulary

COLOURS = (
  *('#0072B2', '#E69F00', '#009E73', '#CC79A7'),
  *('#56B4E9', '#D55E00', '#F0E442', '#999999'),
)
DPI = 100
_SIZE = 9  # Of a monospaced font, in points; a letter is 0.6 times as wide.
_LETTER, _LINE = 0.65 * _SIZE / 72, 0.16  # Inches: with some air.


class Picture(Figure):
  """A figure that a notebook shows by itself, whatever backend there is."""

  def __init__(self, width: float, height: float, layout='constrained'):
    """`width` and `height` in inches."""
    super().__init__(figsize=(width, height), dpi=DPI, layout=layout)

  def _repr_png_(self) -> bytes:
    with io.BytesIO() as out, warnings.catch_warnings():
      # Of a script that the font lacks a box is drawn.
      warnings.filterwarnings('ignore', 'Glyph .* missing from')
      self.savefig(out, format='png', metadata={'Software': None})
      return out.getvalue()


def colour(number: int, white: float = 0.0) -> tuple[float, float, float]:
  """Of expert or run `number`, mixed with so much white."""
  rgb = np.array(to_rgb(COLOURS[number % len(COLOURS)]))
  return tuple(rgb + (1 - rgb) * white)


def tokens(
  trace: Trace,
  vocabulary: Vocabulary,
  *,
  example: int = 0,
  choice: int = 0,
  columns: int = 100,
) -> Picture:
  """A text once for every sparse layer, each token in the colour of its expert.

  The expert's number stands below the token, in brackets if it was dropped.

  Args:
    choice: 0 is the expert that was asked first, 1 the second.
    columns: characters in a line.
  """
  one = trace.of_example(example)
  blocks = []
  for n in np.unique(one.layer):
    lines = _lines(one.rows(one.layer == n), vocabulary, columns)
    blocks.append((str(trace.layers[n]), lines))
  margin, high, between = 12, 2.5, 0.8  # In letters and lines.
  height = sum(len(lines) * high + between for _, lines in blocks)
  size = (margin + columns + 1) * _LETTER, height * _LINE
  figure = Picture(*size, layout='none')
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set(xlim=(-margin, columns + 1), ylim=(height, 0))
  axes.axis('off')
  write = lambda x, y, text, size=_SIZE, **more: axes.text(
    x, y, text, size=size, family='monospace', va='center', parse_math=False,
    **more,
  )  # fmt: skip
  y = 0.2
  for name, lines in blocks:
    write(0.5 - margin, y + 0.7, name, weight='bold')
    for line in lines:
      for start, text, row in line:
        expert, kept = int(row.expert[0, choice]), row.kept[0, choice]
        if expert >= 0:
          box = (start + 0.05, y), len(text) - 0.1, 1.4
          axes.add_patch(Rectangle(*box, lw=0, fc=colour(expert, 0.5)))
          said, middle = f'{expert}' if kept else f'({expert})', len(text) / 2
          write(start + middle, y + 1.85, said, 6, ha='center', color='0.3')
        for n, letter in enumerate(text):  # A font has steps of its own.
          write(start + n + 0.5, y + 0.7, letter, ha='center')
      y += high
    y += between
  return figure


def _lines(rows: Trace, vocabulary: Vocabulary, columns: int) -> list[list]:
  """[(column, text, its row)] of every line of a text."""
  lines, at = [[]], 0
  for n in range(len(rows)):
    row = rows.rows(slice(n, n + 1))
    text = _shown(row, vocabulary)[:columns]
    if at + len(text) > columns:
      lines.append([])
      at = 0
    lines[-1].append((at, text, row))
    at += len(text)
  return lines


def _shown(row: Trace, vocabulary: Vocabulary) -> str:
  """The token of a row as people read it; a decoder begins with none."""
  id = int(row.token[0])
  return vocabulary.piece(id).replace('▁', ' ') if id else '<start>'


def load(trace: Trace) -> Picture:
  """Tokens of every expert and layer, in percent of an even load."""
  counts = specialization.load(trace)
  there = np.unique(trace.layer)
  most = max(trace.layers[n].experts for n in there)
  shares = np.full((len(there), most), np.nan)
  for row, n in enumerate(there):
    experts = trace.layers[n].experts
    mine = counts[n, :experts]
    shares[row, :experts] = 100 * mine * experts / max(mine.sum(), 1)
  figure = Picture(1.8 + 0.45 * min(most, 24), 1.3 + 0.4 * len(there))
  axes = figure.add_subplot()
  image = axes.imshow(shares, cmap='cividis', vmin=0, vmax=200, aspect='auto')
  axes.set_xlabel('expert')
  axes.set_xticks(range(0, most, -(-most // 24)))
  axes.set_yticks(range(len(there)), [str(trace.layers[n]) for n in there])
  if most <= 24:
    for (row, expert), share in np.ndenumerate(shares):
      if np.isfinite(share):
        ink = 'white' if share < 110 else 'black'
        axes.text(
          expert, row, f'{share:.0f}', ha='center', va='center', color=ink,
          fontsize=8,
        )  # fmt: skip
  bar = figure.colorbar(image, ax=axes, extend='max', pad=0.02)
  bar.set_label('% of an even load', fontsize=8)
  return figure


def bars(
  values: Mapping[str, Sequence[float]],
  label: str,
  *,
  names: Sequence[str],
  base: float = 0.0,
) -> Picture:
  """Under each key of `values` a bar for each of `names`.

  Args:
    label: of the axis of numbers.
    base: where bars begin.
  """
  rows = np.array(list(values.values()), float)  # [keys, names]
  each = len(names)
  figure = Picture(1.5 + (0.3 * each + 0.3) * len(rows), 2.8)
  axes = figure.add_subplot()
  for n, column in enumerate(rows.T):
    at = np.arange(len(rows)) + (n - (each - 1) / 2) * 0.8 / each
    of_name = dict(bottom=base, color=colour(n), label=names[n])
    axes.bar(at, column - base, 0.8 / each, **of_name)
  axes.set_xticks(range(len(rows)), list(values))
  axes.set_ylabel(label)
  axes.axhline(base, color='black', lw=0.8)
  axes.grid(axis='y', alpha=0.3)
  axes.set_axisbelow(True)
  figure.legend(loc='outside upper center', ncols=min(each, 4), fontsize=8)
  return figure
