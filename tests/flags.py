"""What XLA is told in tests and in the commands that they start.

Tests compile much and compute little: without optimization, and with the CPU's
older emitters while jaxlib has them, a step compiles in half the time.
"""

import importlib.util
import mmap
import pathlib


def _knows(flag: bytes) -> bool:
  """XLA ends the process at a flag that it does not know."""
  found = importlib.util.find_spec('jaxlib').origin
  library = pathlib.Path(found).with_name('libjax_common.so')
  if not library.exists():
    return False
  with library.open('rb') as file:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
      # A name of its own: protocols keep those of flags that are gone.
      return text.find(b'\0' + flag + b'\0') >= 0


IN_HASTE = '--xla_backend_optimization_level=0'
if _knows(b'xla_cpu_use_fusion_emitters'):
  IN_HASTE += ' --xla_cpu_use_fusion_emitters=false'
