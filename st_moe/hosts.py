"""Many processes, one program: how they meet, agree and stop.

Every process runs the same code; its devices are part of one mesh. Where there
is one process, everything here is a plain call.
"""

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax._src import distributed  # No public door to its key-value store.
from jax.experimental import multihost_utils

from st_moe import backend, signals, terminal

MEETING = 300  # Seconds in which all processes must have started.
# Seconds after which a machine that says nothing counts as dead; a process that
# dies is noticed at once.
SILENCE = 40

_PATIENCE = 7 * 24 * 3600 * 1000  # Milliseconds; tokenising may take days.
_GRACE = 3  # Seconds that process 0 leaves the others for their last words.
_GOODBYE = b'.'
_KEEPALIVE = {
  'TCP_KEEPIDLE': SILENCE // 4,
  'TCP_KEEPINTVL': SILENCE // 8,
  'TCP_KEEPCNT': 3,
}
_LOST = ('gloo', 'coordination', 'barrier', 'unavailable:', 'deadline_exceeded')
_numbers = itertools.count()  # Of decisions: all processes make the same ones.


class Told(ValueError):
  """Process 0 found something wrong, and says so itself."""


def start(
  coordinator: str = '',
  processes: int | None = None,
  process: int | None = None,
  *,
  preemptible: bool = False,
) -> None:
  """Meets the other processes, if there are any; before devices are touched.

  Args:
    coordinator: HOST:PORT of process 0. Without it the environment tells: that
      of `several`, or JAX_COORDINATOR_ADDRESS, _NUM_PROCESSES and _PROCESS_ID.
    preemptible: SIGTERM is left to `preemption`.

  Raises:
    ValueError: a part is missing, or there is no such place to meet.
  """
  env = os.environ
  if not (coordinator or processes or process is not None):
    coordinator = env.get('JAX_COORDINATOR_ADDRESS', '')
    processes = _number(env.get('JAX_NUM_PROCESSES'))
    process = _number(env.get('JAX_PROCESS_ID'))
  given = [bool(coordinator), processes is not None, process is not None]
  if any(given) and not all(given) and not several(env):
    raise ValueError(
      f'--coordinator={coordinator or "?"} --processes={_shown(processes)}'
      f' --process={_shown(process)}: several processes need all three, or'
      ' JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.'
    )
  if all(given) and not 0 <= process < processes:
    raise ValueError(
      f'--process={process} is none of --processes={processes}; they are'
      f' counted from 0 to {processes - 1}.'
    )
  if processes == 1 or not (all(given) or several(env)):
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # Without it SIGTERM ends a process, as it does everywhere.
  jax.config.update('jax_enable_preemption_service', preemptible)
  where = coordinator or 'the coordinator of the environment'
  patience = threading.Timer(MEETING, _give_up, [where])
  patience.start()
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes,
      process,
      local_device_ids=_local_devices(env),
      initialization_timeout=2 * MEETING,  # Its own end is no exception.
      heartbeat_timeout_seconds=SILENCE,
    )
  except RuntimeError as e:
    raise ValueError(
      f'No meeting at {where}: {_line(e)}. Name a port that is free there.'
    ) from e
  finally:
    patience.cancel()
  _watch.begin()


def _give_up(where: str):
  print(
    f'st-moe: not all processes came to {where} within {MEETING} s. Is each'
    ' started, with a number of its own, and can it reach that address?',
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _number(text: str | None) -> int | None:
  return int(text) if text else None


def _shown(number: int | None):
  return '?' if number is None else number


def several(env: Mapping[str, str]) -> bool:
  """Whether Slurm, Open MPI or a TPU's workers say that there are several.

  JAX knows their details. Asking it at once would wait for others in vain on
  every machine that has none.
  """
  step = ('JOB_ID', 'STEP_NODELIST', 'NTASKS', 'PROCID', 'LOCALID')
  if all(f'SLURM_{name}' in env for name in step):
    return int(env['SLURM_NTASKS']) > 1
  if int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    return True
  if env.get('JAX_PLATFORMS', '').startswith('cpu') or not backend.has_tpu():
    return False
  if int(env.get('MEGASCALE_NUM_SLICES', 1)) > 1:
    return True
  workers = env.get('TPU_PROCESS_ADDRESSES', env.get('TPU_WORKER_HOSTNAMES'))
  return ',' in (_metadata() if workers is None else workers)


def _metadata() -> str:
  """The workers of a Cloud TPU, by commas; '' elsewhere."""
  request = urllib.request.Request(
    'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
    'worker-network-endpoints',
    headers={'Metadata-Flavor': 'Google'},
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, OSError):
    return ''


def _local_devices(env: Mapping[str, str]) -> list[int] | None:
  """All GPUs for the one task of a node; JAX would give it the first alone."""
  gpus = int(env.get('SLURM_GPUS_ON_NODE') or 0)
  alone = env.get('SLURM_STEP_TASKS_PER_NODE', '').partition('(')[0] == '1'
  return list(range(gpus)) if gpus and alone else None


def count() -> int:
  return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
  return jax.process_index() if jax.distributed.is_initialized() else 0


def first() -> bool:
  """Whether this is process 0, the only one that writes text and speaks."""
  return index() == 0


def tell(*lines: str) -> None:
  """Prints lines, once."""
  if first():
    for line in lines:
      terminal.say(line)


def agreed(decide: Callable):
  """What process 0 makes of `decide`, a value of JSON, on every process.

  The others wait for it. To be called by all of them in the same order.

  Raises:
    ValueError, OSError: what `decide` raises; on the others `Told`.
  """
  if count() == 1:
    return decide()
  store = distributed.global_state.client
  key = f'st_moe/{next(_numbers)}'
  if first():
    try:
      said = {'value': decide()}
    except (ValueError, OSError) as e:
      store.key_value_set(key, json.dumps({'error': str(e)}))
      raise
    store.key_value_set(key, json.dumps(said))
  said = json.loads(store.blocking_key_value_get(key, _PATIENCE))
  if 'error' in said:
    raise Told(said['error'])
  return said['value']


def gathered(key: str, value) -> list:
  """Each process's value, of JSON, on every process, in their order.

  `key` is the same on all of them and new each time. Unlike `agreed` this may
  be called from any thread.
  """
  if count() == 1:
    return [value]
  store = distributed.global_state.client
  store.key_value_set(f'st_moe/{key}/{index()}', json.dumps(value))
  return [
    json.loads(store.blocking_key_value_get(f'st_moe/{key}/{i}', _PATIENCE))
    for i in range(count())
  ]


def in_turn(make: Callable):
  """`make()` on process 0, then on the others, which find on disk what it left.

  Where disks are not shared they make their own.
  """
  made = []
  agreed(lambda: made.append(make()))
  return made[0] if made else make()


def rows(sharding: jax.sharding.Sharding, size: int) -> list[int]:
  """The rows of a batch that lie on devices of this process, in order."""
  places = sharding.addressable_devices_indices_map((size,)).values()
  return sorted({i for (rows,) in places for i in range(size)[rows]})


def spread(tree, sharding: jax.sharding.Sharding, held: Sequence[int], size):
  """Arrays of `size` rows from the rows `held` here, over all devices."""
  at = {row: place for place, row in enumerate(held)}

  def put(a):
    def part(index):
      wanted = range(size)[index[0]]
      start = at[wanted[0]]
      return a[(slice(start, start + len(wanted)), *index[1:])]

    return jax.make_array_from_callback((size, *a.shape[1:]), sharding, part)

  return jax.tree.map(put, tree)


def spread_whole(tree, sharding: jax.sharding.Sharding):
  """Arrays that every process has whole, over all devices."""
  return jax.tree.map(
    lambda a: jax.make_array_from_callback(
      a.shape, sharding, np.asarray(a).__getitem__
    ),
    tree,
  )


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
  """A function to be asked after every piece of work: save and stop?

  Yes, after SIGTERM. Several processes ask equally often and all get their yes
  at the same question, one that none of them has asked when the signal arrives
  at any of them.
  """
  if count() > 1:  # JAX has taken SIGTERM, and nothing else.
    numbers, came = itertools.count(1), []

    def stops():
      if not came and multihost_utils.reached_preemption_sync_point(
        next(numbers)
      ):
        came.append(True)
      return bool(came)

    restore = signals.handle(signal.SIG_DFL, [signal.SIGHUP])
    try:
      yield stops
    finally:
      restore()
    return
  if not signals.in_main_thread():
    yield lambda: False
    return
  came = []
  restore = signals.handle(lambda *_: came.append(True))
  try:
    yield lambda: bool(came)
  finally:
    restore()


def is_loss(e: Exception) -> bool:
  """Whether an error is how the loss of another process shows itself here."""
  return any(sign in str(e).lower() for sign in _LOST)


class _Watch:
  """Connections between process 0 and each other one, closed by death alone.

  A collective waits for the dead, and JAX's heartbeat, after SILENCE, ends in
  pages of traces. The kernel tells of a death at once.
  """

  def __init__(self):
    self.others: dict[int, socket.socket] = {}
    self.leaving = False

  def begin(self):
    try:
      self.connect()
    except OSError as e:
      print(
        f'Process {index()} of {count()} has no second connection to process 0'
        f' ({e}): a death will be noticed after {SILENCE} s.',
        file=sys.stderr,
      )
    for connection in self.others.values():
      connection.settimeout(None)
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
      for name, seconds in _KEEPALIVE.items():
        if hasattr(socket, name):
          option = getattr(socket, name)
          connection.setsockopt(socket.IPPROTO_TCP, option, seconds)
    threading.Thread(target=self.listen, daemon=True).start()

  def connect(self):
    server = socket.create_server(('', 0)) if first() else None
    port = agreed(lambda: server.getsockname()[1])
    if not server:
      host = distributed.global_state.coordinator_address.rpartition(':')[0]
      self.others[0] = socket.create_connection((host.strip('[]'), port), 10)
      self.others[0].send(str(index()).encode())
      return
    with server:
      server.settimeout(20)  # They all know the port by now.
      while len(self.others) < count() - 1:
        connection, _ = server.accept()
        connection.settimeout(10)
        self.others[int(connection.recv(16))] = connection

  def listen(self):
    with selectors.DefaultSelector() as waiting:
      for number, connection in self.others.items():
        waiting.register(connection, selectors.EVENT_READ, number)
      while waiting.get_map():
        for key, _ in waiting.select():
          try:
            said = key.fileobj.recv(16)
          except OSError:
            said = b''
          waiting.unregister(key.fileobj)
          if said != _GOODBYE and not self.leaving:
            self.lose(said.decode() or key.data)

  def lose(self, number):
    print(
      f'st-moe: process {index()} of {count()} stops: process {number} has'
      ' died; its own last words tell why. Start all of them again: a run goes'
      ' on from its last checkpoint.',
      file=sys.stderr,
    )
    if first():
      self.say(str(number).encode())
    leave(1)

  def say(self, text: bytes):
    for connection in self.others.values():
      with contextlib.suppress(OSError):
        connection.send(text)


_watch = _Watch()


def end():
  """Before an orderly end: nobody is to be alarmed by it."""
  _watch.leaving = True
  _watch.say(_GOODBYE)


def last_words(e: Exception, text: str) -> str:
  """`text`, what there is to say of `e`, as one of several processes says it.

  '' where another one does; another text where `e` is but the end of another.
  """
  who = f'process {index()} of {count()}'
  if isinstance(e, Told):
    return ''
  if is_loss(e):
    time.sleep(_GRACE)  # The watch knows who it was, and ends this process.
    return (
      f'{who} stops: another one does not answer ({_line(e)}). Start all of'
      ' them again: a run goes on from its last checkpoint.'
    )
  return text if first() else f'{who}: {text}'


def leave(status: int):
  """Ends this process without waiting for the others, which may be dead."""
  _watch.leaving = True
  sys.stdout.flush()
  sys.stderr.flush()
  if first():
    # Its end is that of the others, who may not have said why they stop.
    time.sleep(_GRACE)
  os._exit(status)


def _line(e: BaseException) -> str:
  return (str(e).strip() or repr(e)).splitlines()[0][:200]
