"""Lines in, lines out: what `st-moe generate` does."""

import codecs
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import IO

from etils import epath

from st_moe import terminal
from st_moe.data import files
from st_moe.infer.generate import HALF, Answer, Generator, Options
from st_moe.infer.output import Output, check_output

_PATIENCE = 30  # Seconds for a pipe.
_WINDOW = 16  # Batches of a file that are sorted by length together.
_DEEPEST = 100  # Objects in objects.
# Legal in JSON's texts as they are, but half a surrogate pair is no character
# that a file could hold, and at the others some readers end a line.
_ODD = re.compile('[\ud800-\udfff\x85\u2028\u2029]')


@dataclasses.dataclass(frozen=True)
class Format:
  """How lines are read and written."""

  jsonl: bool = False  # Objects, or plain text.
  field: str = 'inputs'  # Of an object: the prompt.
  targets: str = ''  # Of an object: what to score; '': generate.
  fill: bool = False  # Answers are the prompts, their sentinels filled.


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of input."""

  prompt: str
  target: str = ''
  values: dict = dataclasses.field(default_factory=dict)  # Of an object.


def parse(lines: Iterable[bytes], name: str, form: Format) -> Iterator[Row]:
  """Rows of the lines of the file `name`; between objects lines may be blank.

  Raises:
    ValueError: a line that is not UTF-8, no JSON object, or lacks a field.
  """
  for number, raw in enumerate(lines, 1):
    where = f'{name}, line {number}'
    if number == 1:
      raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
      text = raw.decode().rstrip('\r\n')
    except UnicodeDecodeError as e:
      raise ValueError(f'{where} is not UTF-8: {e.reason}.') from None
    if not form.jsonl:
      yield Row(text)
      continue
    if not text.strip():
      continue
    values = _object(text, where)
    for field in filter(None, (form.field, form.targets)):
      if not isinstance(values.get(field), str):
        raise ValueError(f'{where} has no text in the field {field!r}.')
      if HALF.search(values[field]):
        raise ValueError(f'{where} has half a surrogate pair in {field!r}.')
    yield Row(values[form.field], values.get(form.targets, ''), values)


def _object(text: str, where: str) -> dict:
  """A line as an object that can be written again, nothing of it lost."""
  try:
    values = json.loads(
      text, parse_constant=_no_number, object_pairs_hook=_each_once
    )
  except json.JSONDecodeError as e:
    raise ValueError(f'{where} is no JSON: {e.msg}.') from None
  except RecursionError:
    raise _too_deep(where) from None
  except ValueError as e:
    raise ValueError(f'{where} cannot be read: {e}.') from None
  if not isinstance(values, dict):
    raise ValueError(f'{where} is no JSON object.')
  if _is_deep(values, _DEEPEST):
    raise _too_deep(where)
  return values


def _no_number(text: str):
  raise ValueError(f'{text} is no number of JSON, which has null')


def _each_once(pairs: list[tuple]) -> dict:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'it has a field {twice!r} twice')
  return found


def _is_deep(value, left: int) -> bool:
  inner = value.values() if isinstance(value, dict) else value
  if not isinstance(value, dict | list):
    return False
  return not left or any(_is_deep(v, left - 1) for v in inner)


def _too_deep(where: str) -> ValueError:
  return ValueError(f'{where} is nested more than {_DEEPEST} levels deep.')


def results(
  generator: Generator,
  rows: Iterable[Row],
  options: Options,
  form: Format,
  *,
  first: int = 0,
  window_size: int = 1,
) -> Iterator[tuple[str, int]]:
  """(line of output, tokens said) of each row, in order, as they come.

  A prompt without a token has an empty answer.

  Args:
    first: number of the first row.
    window_size: batches whose prompts are sorted by length together.
  """
  rows, number = iter(rows), first
  size = window_size * generator.batch_size
  while window := list(itertools.islice(rows, size)):
    real = {
      number + n: row
      for n, row in enumerate(window)
      if generator.ids(row.prompt)
    }
    prompts = [row.prompt for row in real.values()]
    if form.targets:
      targets = [row.target for row in real.values()]
      found = generator.scored(prompts, targets, options, numbers=list(real))
    else:
      found = generator.answers(prompts, options, numbers=list(real))
    for n, row in enumerate(window, number):
      answers = next(found) if n in real else []
      told = sum(len(a.tokens) for a in answers)
      yield _line(generator, row, answers, form), told
    number += len(window)


def _line(
  generator: Generator, row: Row, answers: list[Answer], form: Format
) -> str:
  texts = [a.text for a in answers]
  if form.fill:
    texts = [generator.fill(row.prompt, a) for a in answers]
  if not form.jsonl:
    in_line = {'\n': '\\n', '\r': '\\r'}
    return '\t'.join(t.translate(str.maketrans(in_line)) for t in texts)
  said = [
    {**dataclasses.asdict(a), 'text': text}
    for text, a in zip(texts, answers, strict=True)
  ]
  line = files.as_json({**row.values, 'outputs': said}, ensure_ascii=False)
  return _ODD.sub(lambda odd: f'\\u{ord(odd[0]):04x}', line)


def run(
  generator: Generator,
  options: Options,
  form: Format,
  *,
  source: str = '',
  prompts: list[str] = (),
  output: str = '',
  about: dict | None = None,
) -> None:
  """Answers prompts, the lines of `source`, or those of standard input.

  Args:
    output: a file; '': standard output.
    about: what makes answers what they are, besides `options`.
  """
  if output:
    check_output(output, source)
  with contextlib.ExitStack() as opened:
    window, stamp = 1, None
    if prompts:
      # What was no UTF-8 on a command line is told as of a file.
      name, lines = 'prompt', map(os.fsencode, prompts)
      stamp = list(prompts)
    elif source:
      file = opened.enter_context(_open(source))
      name, lines = source, files.lines(file, source)
      if _is_file(source):
        window, stamp = _WINDOW, files.stamp(_path(source))
    elif sys.stdin.isatty():
      if output or form.targets:
        raise ValueError('A conversation has no --output and no --targets.')
      return converse(generator, options, form)
    else:
      name = 'standard input'
      lines = files.lines(sys.stdin.buffer, name)
    generator.understood(options)  # Or nothing is written.
    rows = parse(lines, name, form)
    answer = functools.partial(
      results, generator, options=options, form=form, window_size=window
    )
    if not output:
      return _print(answer(rows))
    about = {**(about or {}), **_jsonable(options), **dataclasses.asdict(form)}
    to = opened.enter_context(Output(output, {**about, 'source': stamp}))
    if to.done and stamp is None:
      raise ValueError(
        f'{output} holds {to.done} lines, and {name} cannot be read again from'
        ' its beginning: give --input=FILE, or name another output.'
      )
    if to.done:
      terminal.say(
        f'{output}: {to.done} lines are there, going on', file=sys.stderr
      )
    rest = itertools.islice(rows, to.done, None)
    found = answer(rest, first=to.done)
    with _Progress() as progress:
      while several := list(itertools.islice(found, generator.batch_size)):
        to.write([line for line, _ in several])
        progress.advance(len(several), sum(tokens for _, tokens in several))
    to.join()
  terminal.say(f'wrote {output}: {to.done} lines', file=sys.stderr)
  return None


def _print(found) -> None:
  # A terminal shows the lines themselves.
  shown = contextlib.nullcontext() if sys.stdout.isatty() else _Progress()
  with shown as progress:
    for line, tokens in found:
      # Elsewhere the bytes are what they are.
      print(terminal.shown(line) if sys.stdout.isatty() else line, flush=True)
      if progress:
        progress.advance(1, tokens)


def _jsonable(options: Options) -> dict:
  return json.loads(files.as_json(dataclasses.asdict(options)))


def check(source: str, form: Format) -> None:
  """Says what is wrong with a file of prompts before work is begun."""
  if not _path(source).exists() or _path(source).is_dir():
    raise ValueError(f'{source}: no such file.')
  if _is_file(source):  # A pipe can be read once.
    with _path(source).open('rb') as file:
      for _ in parse(files.lines(file, source), source, form):
        pass


def _open(source: str) -> IO[bytes]:
  """Opens a file, or a pipe that somebody writes into.

  Raises:
    ValueError: nobody does.
  """
  if _is_file(source):
    return _path(source).open('rb')
  # Opening a pipe waits for who writes into it, without end.
  opened = queue.SimpleQueue()

  def wait():
    try:
      opened.put(_path(source).open('rb'))
    except OSError as e:
      opened.put(e)

  threading.Thread(target=wait, daemon=True).start()
  try:
    found = opened.get(timeout=_PATIENCE)
  except queue.Empty:
    raise ValueError(
      f'{source}: for {_PATIENCE} s nobody has opened this pipe to write.'
    ) from None
  if isinstance(found, OSError):
    raise found
  return found


def _path(source: str) -> epath.Path:
  return epath.Path(source).expanduser()


def _is_file(source: str) -> bool:
  return files.is_remote(source) or os.path.isfile(_path(source))


def converse(generator: Generator, options: Options, form: Format) -> None:
  """A prompt at a time, until the end of input."""
  print('One prompt a line; end with Ctrl-D.', file=sys.stderr)
  for number in itertools.count():
    try:
      text = input('> ')
    except EOFError:
      print()
      return
    try:
      row = [Row(text)] if text.strip() else []
      for line, _ in results(generator, row, options, form, first=number):
        terminal.say(line)
    except ValueError as e:
      terminal.say(e, file=sys.stderr)


class _Progress:
  """Lines and tokens a second, on standard error if people see it."""

  def __enter__(self):
    from rich import progress as bars

    console = terminal.console(stderr=True)

    self._bar = bars.Progress(
      bars.TextColumn('{task.completed} lines'),
      bars.TextColumn('{task.fields[rate]:,.0f} tokens/s'),
      bars.TimeElapsedColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self._bar.start()
    self._task = self._bar.add_task('', total=None, rate=0.0)
    self._tokens, self._start = 0, time.perf_counter()
    return self

  def advance(self, lines: int, tokens: int):
    self._tokens += tokens
    rate = self._tokens / (time.perf_counter() - self._start)
    self._bar.update(self._task, advance=lines, rate=rate)

  def __exit__(self, *_):
    self._bar.stop()
