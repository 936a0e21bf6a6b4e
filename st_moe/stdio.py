"""Standard output may go away: what is printed stops no run.

A pipe whose reader has left, a log on a full disk, a terminal that was closed:
the text is lost, and nothing else.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
  """Within, all that is printed, by whomever, may be lost and never raises."""
  before = sys.stdout, sys.stderr
  # A stream closed before the start is None, and its number is the next file's.
  with open(os.devnull, 'w') as nowhere:
    ours = [_lasting(stream or nowhere) for stream in before]
    sys.stdout, sys.stderr = ours
    try:
      yield
    finally:
      for stream in ours:
        stream.settle()
      sys.stdout, sys.stderr = before


def _lasting(stream) -> '_Lasting':
  return stream if isinstance(stream, _Lasting) else _Lasting(stream)


class _Lasting:
  """A text stream that outlives what it writes to."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
    except UnicodeEncodeError as e:
      self.write(text.encode(e.encoding, 'backslashreplace').decode(e.encoding))
    except (OSError, ValueError) as e:  # ValueError: somebody closed it.
      self._lose(e)
    return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except (OSError, ValueError) as e:
      self._lose(e)

  def settle(self) -> None:
    """Lets go of what still cannot be written, or Python's end would fail."""
    try:
      self._stream.flush()
    except (OSError, ValueError):
      self._silence()

  def _lose(self, e: Exception) -> None:
    # A full disk may have room again.
    if getattr(e, 'errno', None) in _GONE:
      self._silence()

  def _silence(self) -> None:
    """What is written from now on goes nowhere."""
    # A stand-in for a stream may have no number.
    with contextlib.suppress(OSError, ValueError, AttributeError):
      number = self._stream.fileno()
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, number)
      os.close(nowhere)
      self._stream.flush()
