"""What a machine is told before JAX starts: flags of XLA, glibc's allocator.

An unknown flag ends the process, so each is tried on the compiler it is for.
"""

import ctypes
import pathlib
import platform
from collections.abc import MutableMapping

# Backend -> (variable that its compiler reads, flags).
FLAGS = {
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

# What a step frees stays for the next, which else waits for as many new pages.
# By the numbers of glibc's malloc.h.
ONE_HEAP = {-8: 1}  # M_ARENA_MAX: the others give back whatever is set.
KEEP_FREED = {
  -4: 0,  # M_MMAP_MAX: large arrays from the heap too.
  -1: 2**31 - 1,  # M_TRIM_THRESHOLD.
}


def prepare(env: MutableMapping[str, str]) -> None:
  """Tells the backend that JAX will choose; what the user said stays."""
  kind = expected(env)
  if kind in FLAGS:
    add_flags(kind, env)
  _allocate(ONE_HEAP, env)


def keep_freed_memory(env: MutableMapping[str, str]) -> None:
  """To be called once all is compiled.

  Compilers leave holes: kept from the start, they cost a third of the memory.
  """
  _allocate(KEEP_FREED, env)


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


def _allocate(settings: dict[int, int], env) -> None:
  """Sets up glibc for a CPU's arrays, unless the user did."""
  theirs = any(k.startswith(('MALLOC_', 'GLIBC_TUNABLES')) for k in env)
  glibc = platform.libc_ver()[0] == 'glibc'
  if expected(env) == 'cpu' and glibc and not theirs:
    for number, value in settings.items():
      ctypes.CDLL(None).mallopt(number, value)
