"""Pictures show what they are given, whatever it spells."""

import numpy as np

from st_moe.analysis import figures
from st_moe.analysis.trace import Layer, Trace
from st_moe.data import vocabulary

BYTES = vocabulary.load('bytes')


def _trace(text: str, experts=4, kept=True):
  ids = np.array(BYTES.encode(text), np.int32)
  n = np.arange(len(ids))
  return Trace(
    (Layer('encoder', 1, experts),),
    layer=np.zeros(len(ids), np.int16),
    example=np.zeros(len(ids), np.int32),
    position=n,
    token=ids,
    expert=(n % experts).astype(np.int16)[:, None],
    weight=np.ones((len(ids), 1), np.float32),
    kept=np.full((len(ids), 1), kept),
  )


def _texts(picture):
  return [t.get_text() for axes in picture.axes for t in axes.texts]


def test_a_text_is_written_out_and_coloured():
  # What matplotlib would take for mathematics, and what HTML would obey.
  text = r'$\frac{1}$ <b>&'
  picture = figures.tokens(_trace(text), BYTES)
  said = _texts(picture)
  assert said[0] == 'encoder.1'
  assert [t for t in said[1:] if not t.isdigit()] == [*text.replace('1', '')]
  assert not any(t.get_parse_math() for t in picture.axes[0].texts)
  boxes = picture.axes[0].patches
  assert len(boxes) == len(text)
  # Its fifth token is of the expert that its first is of.
  colours = [box.get_facecolor() for box in boxes]
  assert colours[4] == colours[0] and len(set(colours)) == 4
  assert picture._repr_png_().startswith(b'\x89PNG')


def test_a_line_that_is_full_goes_on_below():
  picture = figures.tokens(_trace('a' * 25), BYTES, columns=10)
  rows = {box.get_y() for box in picture.axes[0].patches}
  assert len(rows) == 3


def test_a_token_that_was_dropped_is_in_brackets():
  assert '(0)' in _texts(figures.tokens(_trace('a', kept=False), BYTES))


def test_a_letter_that_the_font_lacks_is_no_warning():
  figure = figures.Picture(1, 1)
  figure.text(0.5, 0.5, '漢')
  assert figure._repr_png_()


def test_loads_are_in_percent_of_even():
  picture = figures.load(_trace('aaaaaa'))  # 2, 2, 1 and 1 of 6.
  assert _texts(picture) == ['133', '133', '67', '67']


def test_bars_begin_at_their_base():
  picture = figures.bars(
    {'a': (50, 70), 'b': (40, 90)}, '%', names=('chance', 'ours'), base=50
  )
  ends = {
    patch.get_y() + patch.get_height() for patch in picture.axes[0].patches
  }
  assert ends == {50, 70, 40, 90}
  assert {patch.get_y() for patch in picture.axes[0].patches} == {50}
