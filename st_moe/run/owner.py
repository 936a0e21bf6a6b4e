"""One run at a time in a workdir: `held` names who is at work there.

WORKDIR/owner.json says who, and is written again every BEAT seconds. On a disk
a lock beside it, which the kernel drops with its process, tells at once whether
an owner of this machine lives. Of another machine, and in an object store,
which knows no locks, an owner lives if its file changes within SILENCE seconds:
no two clocks are compared. An owner who finds another one's name there stops.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from st_moe import hosts
from st_moe.data import files

BEAT = 10
SILENCE = 45

_POLL = 1.0  # Seconds between two looks at another's file.
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[Callable[[], None]]:
  """Within, this program alone works in `workdir`, whatever its processes.

  Yields:
    What is to be asked now and then; it raises where another one took over.

  Raises:
    ValueError: another one is at work there.
  """
  owner = _Owner(epath.Path(workdir))
  try:
    hosts.agreed(owner.take)
    yield owner.check
  finally:
    owner.leave()


class _Owner:
  def __init__(self, workdir: epath.Path):
    self._workdir, self._path = workdir, workdir / 'owner.json'
    self._lock: int | None = None
    self._made: list[pathlib.Path] = []  # Folders, innermost first.
    self._other, self._left = None, threading.Event()
    self._me = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'since': f'{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}',
      'boot': _boot(),
      'id': uuid.uuid4().hex,
    }

  def take(self) -> None:
    locked = False
    if not files.is_remote(self._workdir):
      try:
        self._make_folders()
        locked = self._take_lock()
      except OSError as e:
        if e.errno in _READ_ONLY:
          return  # What cannot be written can be disturbed by nobody.
        raise
    theirs = self._read()
    if theirs and not (locked and theirs.get('boot') == self._me['boot']):
      self._wait(theirs)
    self._write(0)
    threading.Thread(target=self._live, daemon=True).start()

  def _make_folders(self) -> None:
    workdir = pathlib.Path(self._workdir)
    folders = [workdir, *workdir.parents]
    self._made = [folder for folder in folders if not folder.exists()]
    workdir.mkdir(parents=True, exist_ok=True)

  def _take_lock(self) -> bool:
    """Locks the file; False where the disk has no locks."""
    while True:
      lock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        os.close(lock)
        raise self._refusal(self._read()) from None
      except OSError:
        self._lock = lock
        return False
      # Its owner may have removed it in between.
      with contextlib.suppress(FileNotFoundError):
        if os.fstat(lock).st_ino == os.stat(self._path).st_ino:
          self._lock = lock
          return True
      os.close(lock)

  def _wait(self, theirs: dict) -> None:
    """Until the owner gives a sign of life, or none for long enough."""
    hosts.tell(
      f'{self._workdir} was left without a word by {_who(theirs)}: waiting'
      f' {SILENCE} s, to see whether that run is still at work.'
    )
    until = time.monotonic() + SILENCE
    while time.monotonic() < until:
      time.sleep(_POLL)
      now = self._read()
      if not now:
        return
      if now != theirs:
        raise self._refusal(now)

  def _refusal(self, theirs: dict) -> ValueError:
    return ValueError(
      f'{self._workdir} belongs to {_who(theirs)}, which is at work: wait for'
      ' its end, stop it, or use another workdir.'
    )

  def _read(self) -> dict:
    """What the file says; nothing if it is not there, or half written."""
    try:
      there = self._path.exists()
      found = json.loads(self._path.read_text()) if there else {}
    except (FileNotFoundError, ValueError):
      return {}
    return found if isinstance(found, dict) else {}

  def _write(self, beat: int) -> None:
    data = files.as_json({**self._me, 'beat': beat}).encode()
    if self._lock is None:
      files.write_whole(self._path, data)
    else:  # In place: a file that is replaced takes no lock along.
      os.pwrite(self._lock, data, 0)
      os.ftruncate(self._lock, len(data))

  def _live(self) -> None:
    beat = 0
    while not self._left.wait(BEAT):
      beat += 1
      # A disk that is full for a while, a network that is away: try again.
      with contextlib.suppress(OSError):
        theirs = self._read()
        if theirs and theirs.get('id') != self._me['id']:
          self._other = theirs
          return
        self._write(beat)

  def check(self) -> None:
    if self._other:
      raise ValueError(
        f'{self._workdir} was taken over by {_who(self._other)}: this run gave'
        f' no sign of life for {SILENCE} s, and stops.'
      )

  def leave(self) -> None:
    self._left.set()
    if hosts.first() and self._read().get('id') == self._me['id']:
      self._path.unlink(missing_ok=True)
    if self._lock is not None:
      os.close(self._lock)
    for folder in self._made:
      with contextlib.suppress(OSError):  # There is something in it.
        folder.rmdir()


def _boot() -> str:
  """Which machine this is, from its start to its end."""
  try:
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return socket.gethostname()


def _who(owner: dict) -> str:
  if not owner:
    return 'another run'
  return 'process {pid} on {host} (since {since})'.format(
    **{'pid': '?', 'host': '?', 'since': '?', **owner}
  )
