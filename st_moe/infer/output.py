"""A file of lines that grows, whatever interrupts it, and nobody else's."""

import os
import pathlib
import re

from etils import epath

from st_moe.data import files


class Output:
  """A file of lines that grows; begun again, it goes on where it stopped.

  What was asked is kept beside it. An object store cannot append: there each
  `write` is a part of its own, and `join` makes one of them.
  """

  def __init__(self, path, about: dict):
    """Opens `path`; `done` lines of it are complete.

    Raises:
      ValueError: it is there, and something else was asked.
    """
    check_output(path)
    self.path = epath.Path(path).expanduser()
    self._remote = files.is_remote(path)
    self._about, self._parts = _beside(self.path)
    self.done = self._size = 0
    if self.path.exists():
      self.done = self._complete_lines()
    joined = self._size
    if self._remote and not joined and self._parts.exists():
      parts = [p.read_bytes() for p in self._all_parts()]
      self.done = sum(data.count(b'\n') for data in parts)
      self._size = sum(map(len, parts))
    if self._size:
      self._check(about)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(self._about, files.as_json(about, indent=2).encode())
    self._file = None
    if self._remote and joined:  # Killed while they were removed.
      self._remove_parts()
    if not self._remote:
      if self.path.exists():
        os.truncate(self.path, self._whole)
      self._file = pathlib.Path(self.path).open('ab')

  def _check(self, about: dict):
    then = files.json_in(self._about)
    differing = sorted(
      k for k in {*then, *about} if then.get(k) != about.get(k)
    )
    if differing:
      listed = '\n  '.join(
        f'{k}: {then.get(k)!r} then, {about.get(k)!r} now' for k in differing
      )
      raise ValueError(
        f'{self.path} was begun by another command:\n  {listed}\nName another'
        ' file, or remove it.'
      )

  def _complete_lines(self) -> int:
    """Counts them, up to what was being written when it was killed."""
    count = whole = 0
    with self.path.open('rb') as f:
      while chunk := f.read(1 << 20):
        count += chunk.count(b'\n')
        last = chunk.rfind(b'\n')
        if last >= 0:
          whole = self._size + last + 1
        self._size += len(chunk)
    self._whole = whole
    return count

  def _all_parts(self):
    return sorted(self._parts.iterdir(), key=lambda p: p.name)

  def write(self, lines: list[str]):
    data = ''.join(f'{line}\n' for line in lines).encode()
    if self._file:
      self._file.write(data)
      self._file.flush()
    elif lines:
      self._parts.mkdir(parents=True, exist_ok=True)
      files.write_whole(self._parts / f'{self.done:012}', data)
    self.done += len(lines)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._file:
      self._file.close()

  def join(self):
    """Makes one object of the parts, where there are any."""
    if self._remote and self._parts.exists():
      parts = [p.read_bytes() for p in self._all_parts()]
      files.write_whole(self.path, b''.join(parts))
      self._remove_parts()

  def _remove_parts(self):
    if self._parts.exists():
      self._parts.rmtree()


def _beside(path: epath.Path) -> tuple[epath.Path, epath.Path]:
  """What is kept beside an output: what was asked, and parts of it."""
  about, parts = f'{path.name}.about.json', f'{path.name}.parts'
  return path.parent / about, path.parent / parts


def check_output(output: str, source: str = '') -> None:
  """Says before work is begun what it would destroy.

  Raises:
    ValueError: `output` is no file, is the `source`, or was not written by us.
  """
  path = epath.Path(output).expanduser()
  about, parts = _beside(path)
  if source and _is_same(path, epath.Path(source).expanduser()):
    raise ValueError(f'--output={output} is the input itself; name another.')
  files.check_free(about, _is_about)
  files.check_free(path, lambda _: about.exists() and _is_about(about))
  if files.is_remote(output) and parts.exists():
    is_part = lambda p: re.fullmatch(r'\d{12}', p.name) and about.exists()
    for part in parts.iterdir():
      files.check_free(part, is_part)


def _is_about(path: epath.Path) -> bool:
  every = {'method', 'seed', 'jsonl', 'source'}  # Whatever is asked.
  return every <= files.json_in(path).keys()


def _is_same(a: epath.Path, b: epath.Path) -> bool:
  if files.is_remote(a) or files.is_remote(b):
    return a == b
  return a.exists() and b.exists() and os.path.samefile(a, b)
