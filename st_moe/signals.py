"""SIGTERM, which is how machines are taken away: an orderly end at any moment.

While steps are taken `hosts.preemption` lets the one in flight finish. Before
and after there is nothing to save, and the program ends at once: all it writes
is whole or absent. A closed terminal (SIGHUP) is no other matter, unless
`nohup` was there before.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

# Exit status of a run that was told to stop and can go on: EX_TEMPFAIL.
PREEMPTED = 75

STOPS = (signal.SIGTERM, signal.SIGHUP)
_ENDINGS = {
  **dict.fromkeys(STOPS, ('Told to stop', PREEMPTED)),
  signal.SIGINT: ('Interrupted', 130),
}
_once = threading.Lock()


def handle(
  handler, numbers: Sequence[int] = STOPS
) -> Callable[[], list[object]]:
  """Makes `handler` that of signals which nobody ignores; returns the undoing.

  Ctrl-C is KeyboardInterrupt again.
  """
  wanted = {n: handler for n in numbers}
  if signal.getsignal(signal.SIGINT) is _end:
    wanted[signal.SIGINT] = signal.default_int_handler
  heard = [n for n in wanted if signal.getsignal(n) != signal.SIG_IGN]
  before = [(n, signal.signal(n, wanted[n])) for n in heard]
  return lambda: [signal.signal(n, h or signal.SIG_DFL) for n, h in before]


def in_main_thread() -> bool:
  """Whether signals may be handled here."""
  return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def orderly(*, interrupt: bool = False) -> Iterator[None]:
  """Within, SIGTERM ends the program with a sentence and PREEMPTED.

  No exception would do: raised anywhere, libraries make others of it, with
  their traces, or none.

  Args:
    interrupt: Ctrl-C does likewise, with 130: of a command, not of a notebook.
  """
  free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  if not in_main_thread() or not free:  # Nested, or somebody else's.
    yield
    return
  restore = handle(_end, (*STOPS, *[signal.SIGINT] * interrupt))
  signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # See `hold`.
  ear, mouth = os.pipe()
  os.set_blocking(mouth, False)
  wakeup = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
  threading.Thread(target=_listen, args=(ear,), daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(wakeup)
    os.close(mouth)  # The listener hears that, and ends.
    restore()


def hold() -> None:
  """Before this process starts anew: a signal waits for its next `orderly`."""
  if signal.getsignal(signal.SIGTERM) is _end:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def _listen(ear: int) -> None:
  """Ends the process while its main thread is in a compiler, or waits.

  Python runs a handler there only when it comes back.
  """
  with open(ear, 'rb', buffering=0) as heard:
    while number := heard.read(1):
      if signal.getsignal(number[0]) is _end:
        _end(number[0])


def _end(number: int, frame=None) -> None:
  if not _once.acquire(blocking=False):
    return
  what, status = _ENDINGS[number]
  text = f'{what}: nothing was lost; the same command goes on.\n'
  # Not by `print`: whoever is printing at this moment holds the stream.
  with contextlib.suppress(OSError):
    os.write(1, text.encode())
  for child in multiprocessing.active_children():
    child.kill()
  os._exit(status)
