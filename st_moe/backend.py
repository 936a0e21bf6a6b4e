"""What a machine is told before JAX starts: flags of XLA, glibc, caches.

An unknown flag ends the process, so each is tried on the compiler it is for,
and none is said to another release of it.
"""

import ctypes
import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import tempfile
from collections.abc import MutableMapping
from typing import NoReturn

from st_moe import signals

_TRIED = '0.10.', '0.12.'  # Releases of jaxlib; the second without a GPU.
# Backend -> (variable that its compiler reads, flags).
FLAGS = {
  'cpu': (
    'XLA_FLAGS',
    (
      # What is read for the last time is not copied before it is written over.
      '--xla_cpu_copy_insertion_use_region_analysis=true',
      # Nothing is made long before it is read. By itself XLA puts what could
      # run at once early, though a product takes all cores alone.
      '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
    ),
  ),
  'tpu': (
    'LIBTPU_INIT_ARGS',
    (
      # Tokens on their way to the experts, while others are computed.
      '--xla_tpu_enable_async_all_to_all=true',
      # Weights under `fsdp`, gathered under the products before: what libtpu
      # does today by itself, and did not always.
      '--xla_enable_async_all_gather=true',
      '--xla_tpu_enable_async_collective_fusion=true',
      '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
      '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
      '--xla_tpu_overlap_compute_collective_tc=true',
      # Gradients of one layer summed under the backward pass of the next,
      # between slices too.
      '--xla_enable_async_all_reduce=true',
      '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
      '--xla_tpu_data_parallel_opt_different_sized_ops=true',
    ),
  ),
  'gpu': (
    'XLA_FLAGS',
    (
      # Exchanges begin as early and end as late as what is computed allows.
      '--xla_gpu_enable_latency_hiding_scheduler=true',
      # And across the turns of the scan over layers.
      '--xla_gpu_enable_pipelined_all_gather=true',
      '--xla_gpu_enable_pipelined_reduce_scatter=true',
      '--xla_gpu_enable_pipelined_all_reduce=true',
      # cuBLAS multiplies as fast; to try Triton's kernels costs minutes.
      '--xla_gpu_enable_triton_gemm=false',
    ),
  ),
}

# Of glibc's malloc. What a step frees goes back to the system, and the next one
# waits for as many new pages: of 2 MB there are 512 times fewer. To keep it
# instead costs up to twice the memory: crumbs of alignment spoil the holes. One
# heap, or each thread keeps holes of its own.
TUNABLES = 'glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1'


def prepare(env: MutableMapping[str, str]) -> bool:
  """Tells the backend that JAX will choose; what the user said stays.

  Returns:
    Whether this process hears all of it only if it starts anew.
  """
  kind = expected(env)
  if kind in FLAGS and importlib.metadata.version('jaxlib').startswith(_TRIED):
    add_flags(kind, env)
  theirs = any(k.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for k in env)
  libc, version = platform.libc_ver()
  version = tuple(map(int, re.findall(r'\d+', version)))
  if kind != 'cpu' or theirs or libc != 'glibc' or version < (2, 35):
    return False
  env['GLIBC_TUNABLES'] = TUNABLES
  return True


def start_anew(env: MutableMapping[str, str]) -> NoReturn:
  """The same command in the same process, from its first line, in `env`."""
  signals.hold()
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def give_back() -> None:
  """Gives the system what is free: a compiler leaves hundreds of MB."""
  if platform.libc_ver()[0] == 'glibc':
    ctypes.CDLL(None).malloc_trim(0)


def cache_dir() -> str:
  """~/.cache/st_moe; a folder under the temporary one for who has no home.

  As in a container whose user has no entry in passwd: there `~` would be the
  name of a folder, and HOME is often a / that nobody may write to.
  """
  home = os.path.expanduser('~')
  path = there = os.path.join(home, '.cache', 'st_moe')
  while there != home and not os.path.exists(there):
    there = os.path.dirname(there)
  missing = not os.path.exists(there)  # It may yet be made.
  if os.path.isabs(home) and (missing or os.access(there, os.W_OK)):
    return path
  return _shelter()


@functools.cache
def _shelter() -> str:
  path = os.path.join(tempfile.gettempdir(), f'st_moe-{os.getuid()}')
  os.makedirs(path, mode=0o700, exist_ok=True)
  if os.stat(path).st_uid != os.getuid():  # Somebody else was here before.
    path = tempfile.mkdtemp(prefix='st_moe-')
  print(f'There is no home directory: caches go to {path}.', file=sys.stderr)
  return path


def expected(env: MutableMapping[str, str]) -> str:
  """'tpu', 'gpu' or 'cpu', by what the user or the machine says."""
  asked = env.get('JAX_PLATFORMS', '').partition(',')[0]
  if asked:
    return {'cuda': 'gpu', 'rocm': 'gpu'}.get(asked, asked)
  if has_tpu():
    return 'tpu'
  return 'gpu' if any(pathlib.Path('/dev').glob('nvidia[0-9]*')) else 'cpu'


def has_tpu() -> bool:
  """Whether there is a TPU to be seen, without touching it."""
  dev = pathlib.Path('/dev')
  return any(dev.glob('accel*')) or any(dev.glob('vfio/[0-9]*'))


def add_flags(kind: str, env: MutableMapping[str, str]) -> None:
  """Adds the flags of a backend that `env` does not name yet."""
  variable, flags = FLAGS[kind]
  given = env.get(variable, '').strip()
  if given and not given.startswith('-'):
    return  # XLA takes it for the name of a file.
  named = {_name(word) for word in given.split()}
  more = (flag for flag in flags if _name(flag) not in named)
  env[variable] = ' '.join([given, *more]).strip()


def _name(flag: str) -> str:
  return flag.partition('=')[0].lstrip('-').removeprefix('no')
