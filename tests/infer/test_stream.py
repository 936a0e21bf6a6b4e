"""Lines in, lines out: nothing lost, doubled or out of order."""

import dataclasses
import io
import json
import os
import threading
import types

import pytest

from st_moe.data import files
from st_moe.infer import stream
from st_moe.infer.generate import Answer, Options
from st_moe.infer.stream import Format, Row

LINES, JSONL = Format(), Format(jsonl=True)
PLAIN = Options()


class Echo:
  """Answers each prompt with itself, and its number; counts them."""

  batch_size = 3

  def __init__(self, breaks_at=10**9):
    self.answered, self.breaks_at = 0, breaks_at

  def ids(self, text):
    return text.split()

  def understood(self, asked):
    if asked.off:
      raise ValueError('no such expert')

  def answers(self, prompts, asked, *, numbers):
    assert len(prompts) == len(numbers)
    for prompt, number in zip(prompts, numbers, strict=True):
      if number == self.breaks_at:
        raise KeyboardInterrupt
      self.answered += 1
      text = f'{number}:{prompt}'
      yield [
        Answer(text, [1, 2], [-0.5, -0.25], -0.75)
      ] * asked.method.num_return

  def scored(self, prompts, targets, asked, *, numbers):
    for target in targets:
      yield [Answer(target, [5], [-2.0], -2.0)]

  def fill(self, prompt, answer):
    return f'{prompt} <- {answer.text}'


def _parse(data: bytes, form=LINES):
  return list(stream.parse(io.BytesIO(data), 'in.txt', form))


def test_lines_and_objects():
  assert _parse(b'one\r\n\ntwo') == [Row('one'), Row(''), Row('two')]
  (row,) = _parse('{"inputs": "ü", "id": 7}\n'.encode(), JSONL)
  assert row.prompt == 'ü' and row.values == {'inputs': 'ü', 'id': 7}


@pytest.mark.parametrize(
  ('data', 'form', 'message'),
  [
    (
      b'fine\n\xff\xfe\n',
      Format(),
      'in.txt, line 2 is not UTF-8: invalid start',
    ),
    (b'{"inputs": "a"}\n{"inp\n', JSONL, 'in.txt, line 2 is no JSON: Untermin'),
    (
      b'{"inputs": "\\ud800"}\n',
      JSONL,
      "line 1 has half a surrogate pair in 'i",
    ),
    (b'["a"]\n', JSONL, 'in.txt, line 1 is no JSON object'),
    (b'{"inputs": "a", "n": NaN}', JSONL, 'line 1 cannot be read: NaN is no'),
    (b'{"inputs": "a", "n": [-Infinity]}', JSONL, '-Infinity is no number'),
    (b'{"inputs": "a", "inputs": "b"}', JSONL, "it has a field 'inputs' twice"),
    (b'{"inputs": "a", "n": {"x": 1, "x": 2}}', JSONL, "'x' twice"),
    (
      b'{"inputs": "a", "n": %s}' % (b'[' * 5000 + b']' * 5000),
      JSONL,
      'line 1 is nested more than 100 levels deep',
    ),
    (
      b'{"inputs": "a", "n": %s}' % (b'[' * 101 + b']' * 101),
      JSONL,
      'line 1 is nested more than 100',
    ),
    (b'{"inputs": "a", "n": %s}' % (b'9' * 5000), JSONL, 'line 1 cannot be'),
    (b'{"inputs": null}', JSONL, "no text in the field 'inputs'"),
    (b'{"input": "a"}\n', JSONL, "line 1 has no text in the field 'inputs'"),
    (
      b'{"inputs": "a", "t": 3}\n',
      Format(jsonl=True, targets='t'),
      "line 1 has no text in the field 't'",
    ),
  ],
)
def test_a_line_that_cannot_be_read(data, form, message):
  with pytest.raises(ValueError, match=message):
    _parse(data, form)


def _written(data: bytes, form=JSONL):
  found = stream.results(Echo(), _parse(data, form), PLAIN, form)
  return [line for line, _ in found]


def test_what_else_a_file_may_hold():
  mark = b'\xef\xbb\xbf'
  assert _parse(mark + b'a\n\xef\xbb\xbfb') == [Row('a'), Row('\ufeffb')]
  lines = mark + b'{"inputs": "a"}\n\n \t\r\n{"inputs": "b"}\n\n'
  assert [row.prompt for row in _parse(lines, JSONL)] == ['a', 'b']
  # Only line feeds end a line.
  odd = 'a\0b\rc\u2028d\x85e'
  assert _parse(f'{odd}\n\r\n'.encode()) == [Row(odd), Row('')]


def test_an_answer_is_a_line():
  """Whatever it holds, and whoever reads it."""
  said = '{"inputs": "a\\r\\nb\\u2028c\\u0085d", "id": "\\ud83d", "n": 1e999}'
  (line,) = _written(said.encode())
  assert line.splitlines() == [line]
  line.encode()  # Half a surrogate pair is written as it was read.
  strict = lambda text: pytest.fail(f'{text} is no JSON')
  found = json.loads(line, parse_constant=strict)
  assert found['id'] == '\ud83d' and found['inputs'] == 'a\r\nb\u2028c\x85d'
  assert found['n'] == 'inf'
  assert _lines([Row('a\r\nb')]) == ['0:a\\r\\nb']


def test_what_is_not_finite_is_written_as_text():
  class Broken(Echo):
    def answers(self, prompts, asked, *, numbers):
      yield [Answer('', [0], [float('nan')], -float('inf'))]

  ((line, _),) = stream.results(Broken(), [Row('a')], PLAIN, JSONL)
  (said,) = json.loads(line)['outputs']
  assert (said['logprobs'], said['score']) == (['nan'], '-inf')


def _lines(rows, form=LINES, **options):
  wanted = Options.of(**options)
  found = stream.results(Echo(), rows, wanted, form, window_size=2)
  return [line for line, _ in found]


def test_an_empty_prompt_has_an_empty_answer():
  rows = [Row('a'), Row(' '), Row('b\nc')]
  # Numbers are those of lines: samples do not depend on what is empty.
  assert _lines(rows) == ['0:a', '', '2:b\\nc']
  (_, empty, _) = map(json.loads, _lines(rows, JSONL))
  assert empty == {'outputs': []}


def test_objects_keep_their_fields():
  row = Row('a', values={'inputs': 'a', 'id': 7})
  (found,) = map(json.loads, _lines([row], JSONL))
  said = {'text': '0:a', 'tokens': [1, 2], 'logprobs': [-0.5, -0.25]}
  assert found == {
    'inputs': 'a',
    'id': 7,
    'outputs': [{**said, 'score': -0.75}],
  }


def test_several_answers_scores_and_spans():
  assert _lines([Row('a')], num_return=2, temperature=1.0) == ['0:a\t0:a']
  assert _lines([Row('a')], Format(fill=True)) == ['a <- 0:a']
  form = Format(jsonl=True, targets='t')
  (found,) = map(json.loads, _lines([Row('a', 'yes', {'t': 'yes'})], form))
  assert found['outputs'][0]['score'] == -2.0


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
  if request.param == 'disk':
    return str(tmp_path)
  request.getfixturevalue('bucket')
  return 'gs://b'


@pytest.fixture
def source(tmp_path):
  path = tmp_path / 'prompts.txt'
  path.write_text(''.join(f'p{n}\n' for n in range(100)))
  return str(path)


WANT = [f'{n}:p{n}' for n in range(100)]


def _run(source, output, echo=None, options=PLAIN):
  echo = echo or Echo()
  about = {'checkpoint': 'c'}
  stream.check(source, LINES)
  stream.run(echo, options, Format(), source=source, output=output, about=about)
  return echo.answered


def _read(path):
  return stream.epath.Path(path).read_text().splitlines()


def test_a_run_that_is_interrupted_goes_on(source, place, capsys):
  output = f'{place}/out.txt'
  with pytest.raises(KeyboardInterrupt):
    _run(source, output, Echo(breaks_at=61))
  # 48 prompts are sorted together; of the next window whole batches are there.
  assert _run(source, output) == 100 - 60
  assert _read(output) == WANT
  assert '60 lines are there, going on' in capsys.readouterr().err
  assert _run(source, output) == 0  # All is done.
  assert _read(output) == WANT
  assert not stream.epath.Path(f'{output}.parts').exists()


def test_a_torn_line_is_written_anew(source, tmp_path):
  output = tmp_path / 'out.txt'
  _run(source, str(output))
  whole = output.read_bytes()
  for cut in (0, 1, 4, 5, 6, 301, len(whole) - 1):
    output.write_bytes(whole[:cut])
    done = whole[:cut].count(b'\n')
    assert _run(source, str(output)) == 100 - done
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
  'there',
  [
    {'out': b'no line end'},
    {'out': b'\xff\x00binary\n'},
    {'out': b'a', 'out.about.json': b''},
    {'out': b'a', 'out.about.json': b'{"method": {'},  # Damaged.
    {'out.about.json': b'{"method": {'},
    {'out.about.json': b'{"title": "all about it"}'},
    {'out.about.json': b'[' * 5000},
    {'out.about.json': b'not JSON'},
    {'out.parts/000000000000': b'one\n'},
    {'out': b'', 'out.parts/photo.jpg': b'jpg'},
    {'out.parts/photo.jpg': b'jpg'},
  ],
)
def test_what_is_not_ours_stays(there, source, place):
  base = stream.epath.Path(place) / 'there'
  for name, data in there.items():
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).write_bytes(data)
  if 'gs:' in place or not any('.parts' in name for name in there):
    with pytest.raises(ValueError, match='was not written by this command, or'):
      _run(source, f'{base}/out')
  else:  # On a disk there are no parts, and the folder is somebody's.
    _run(source, f'{base}/out')
    there.pop('out', None)
  for name, data in there.items():
    assert (base / name).read_bytes() == data


def test_an_empty_file_may_be_filled(source, place):
  output = stream.epath.Path(place) / 'out.txt'
  output.parent.mkdir(exist_ok=True)
  output.write_bytes(b'')
  with pytest.raises(KeyboardInterrupt):
    _run(source, str(output), Echo(breaks_at=61))
  assert _run(source, str(output)) == 40
  assert _read(str(output)) == WANT


def test_the_input_is_no_output(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'prompts.txt'
  (tmp_path / 'folder').mkdir()
  for prompts in ('one prompt without an end', 'two\nlines\n', ''):
    path.write_text(prompts)
    (tmp_path / 'soft').symlink_to(path)
    (tmp_path / 'hard').hardlink_to(path)
    for name in (
      str(path),
      'prompts.txt',
      'folder/../prompts.txt',
      'soft',
      'hard',
    ):
      with pytest.raises(ValueError, match=f'{name} is the input itself'):
        _run(str(path), name)
      assert path.read_text() == prompts
    (tmp_path / 'soft').unlink()
    (tmp_path / 'hard').unlink()
  assert not list(tmp_path.glob('*.about.json'))


def test_an_output_is_a_file(source, tmp_path):
  fifo = tmp_path / 'fifo'
  os.mkfifo(fifo)
  for output, message in {
    tmp_path: 'is a directory; name a file',
    fifo: 'fifo is a device or a pipe; name a file',
    '/dev/null': '/dev/null is a device or a pipe; name a file',
  }.items():
    with pytest.raises(ValueError, match=message):
      _run(source, str(output))
  assert {p.name for p in tmp_path.iterdir()} == {'fifo', 'prompts.txt'}


def test_what_another_command_wrote_is_left_alone(source, tmp_path):
  output = tmp_path / 'out.txt'
  _run(source, str(output))
  with pytest.raises(
    ValueError, match='(?s)begun by another.*seed: 0 then, 1 now'
  ):
    _run(source, str(output), options=Options(seed=1))
  other = tmp_path / 'other.txt'
  other.write_text('precious\n')
  with pytest.raises(
    ValueError, match='other.txt exists and .* was not written'
  ):
    _run(source, str(other))
  assert other.read_text() == 'precious\n'
  with pytest.raises(ValueError, match='nowhere.txt: no such file'):
    _run(str(tmp_path / 'nowhere.txt'), str(tmp_path / 'x'))


def test_a_broken_line_is_told_before_work_is_begun(tmp_path):
  path = tmp_path / 'in.txt'
  path.write_bytes(b'a\n' * 50 + b'\xff\n')
  echo = Echo()
  with pytest.raises(ValueError, match='line 51 is not UTF-8'):
    _run(str(path), str(tmp_path / 'out'), echo)
  assert echo.answered == 0 and not (tmp_path / 'out').exists()


def test_a_line_without_end_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'LONGEST_LINE', 1000)
  path = tmp_path / 'in.txt'
  path.write_bytes(b'a\n' + b'x' * 999 + b'\n')
  stream.check(str(path), LINES)
  path.write_bytes(b'a\n' + b'x' * 1001)
  with pytest.raises(ValueError, match='in.txt, line 2 has more than'):
    stream.check(str(path), LINES)


def test_arguments_that_are_no_characters():
  # What Python makes of the byte ff on a command line.
  with pytest.raises(ValueError, match='prompt, line 2 is not UTF-8'):
    stream.run(Echo(), PLAIN, LINES, prompts=['a', '\udcff'])


def test_standard_input_and_a_conversation(monkeypatch, capsys):
  read = io.BytesIO(b'a\nb\n')
  piped = types.SimpleNamespace(buffer=read, isatty=lambda: False)
  monkeypatch.setattr(stream.sys, 'stdin', piped)
  stream.run(Echo(), Options(), Format())
  assert capsys.readouterr().out == '0:a\n1:b\n'
  typed = iter(['hello', ' ', 'again'])

  def type_in(_):
    try:
      return next(typed)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr('builtins.input', type_in)
  monkeypatch.setattr(piped, 'isatty', lambda: True)
  stream.run(Echo(), Options(), Format())
  assert capsys.readouterr().out == '0:hello\n2:again\n\n'
  with pytest.raises(ValueError, match='conversation has no --output'):
    stream.run(Echo(), PLAIN, LINES, output='x')


def test_a_pipe_is_read_once(monkeypatch, tmp_path, capsys):
  piped = lambda text: types.SimpleNamespace(
    buffer=io.BytesIO(text), isatty=lambda: False
  )
  output = str(tmp_path / 'out')
  monkeypatch.setattr(stream.sys, 'stdin', piped(b'a\nb\n'))
  stream.run(Echo(), PLAIN, LINES, output=output)
  monkeypatch.setattr(stream.sys, 'stdin', piped(b'x\ny\nz\n'))
  with pytest.raises(ValueError, match='cannot be read again from its begin'):
    stream.run(Echo(), PLAIN, LINES, output=output)
  assert _read(output) == ['0:a', '1:b']
  fifo = tmp_path / 'fifo'
  os.mkfifo(fifo)
  writer = threading.Thread(target=fifo.write_text, args=('p\nq\n',))
  writer.start()
  stream.check(str(fifo), LINES)
  capsys.readouterr()
  stream.run(Echo(), PLAIN, LINES, source=str(fifo))
  writer.join()
  assert capsys.readouterr().out == '0:p\n1:q\n'


def test_other_prompts_are_another_command(tmp_path):
  output = str(tmp_path / 'out')
  stream.run(Echo(), PLAIN, LINES, prompts=['a'], output=output)
  with pytest.raises(ValueError, match='(?s)begun by another.*source:'):
    stream.run(Echo(), PLAIN, LINES, prompts=['b'], output=output)


def test_a_first_try_that_fails_leaves_nothing(source, tmp_path):
  output = tmp_path / 'out.txt'
  with pytest.raises(ValueError, match='no such expert'):
    _run(source, str(output), options=Options.of(off='decoder.9.9'))
  assert not output.exists()
  _run(source, str(output))
  assert _read(output) == WANT
  output.unlink()  # As the message says, it can be removed.
  assert _run(source, str(output), options=Options.of(seed=3)) == 100


def test_the_order_of_options_is_no_difference(source, tmp_path):
  output = str(tmp_path / 'out.txt')
  _run(source, output, options=Options.of(stop=['x'], num_beams=2))
  assert _run(source, output, options=Options.of(num_beams=2, stop='x')) == 0
  about = json.loads((tmp_path / 'out.txt.about.json').read_text())
  assert about['method']['num_beams'] == 2
  assert dataclasses.asdict(Options.of(stop='x'))['stop'] == ('x',)


def test_input_without_end(monkeypatch, tmp_path):
  """A device is a line that never ends, a pipe one that may never begin."""
  monkeypatch.setattr(files, 'LONGEST_LINE', 1 << 20)
  with pytest.raises(ValueError, match='/dev/zero, line 1 has more than 1 MiB'):
    stream.run(Echo(), PLAIN, LINES, source='/dev/zero')
  monkeypatch.setattr(stream, '_PATIENCE', 0.1)
  os.mkfifo(tmp_path / 'fifo')
  with pytest.raises(ValueError, match='nobody has opened this pipe to write'):
    stream.run(Echo(), PLAIN, LINES, source=str(tmp_path / 'fifo'))


def test_a_terminal_is_shown_what_a_file_holds(monkeypatch, capsys, tmp_path):
  """An answer cannot move the cursor, name a window or paste."""
  said = 'a\x1b]0;owned\x07 b\tc \x9b2J \u202egpj'
  stream.run(Echo(), Options(), Format(), prompts=[said])
  assert capsys.readouterr().out == f'0:{said}\n'
  monkeypatch.setattr(stream.sys.stdout, 'isatty', lambda: True)
  stream.run(Echo(), Options(), Format(), prompts=[said])
  assert capsys.readouterr().out == (
    '0:a\\x1b]0;owned\\x07 b\tc \\x9b2J \\u202egpj\n'
  )
