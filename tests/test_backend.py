"""What is said to XLA and to the allocator, and when it is better not to."""

import os
import subprocess
import sys
import types

import pytest

from st_moe import backend


def _told(kind, **env):
  backend.add_flags(kind, env)
  return env[backend.FLAGS[kind][0]].split()


def test_what_the_user_said_stays():
  (variable, flags) = backend.FLAGS['gpu']
  assert _told('gpu') == [*flags]
  mine = '--xla_gpu_enable_triton_gemm=true', '--xla_dump_to=here'
  told = _told('gpu', **{variable: ' '.join(mine)})
  assert told == [*mine, *(f for f in flags if 'triton' not in f)]
  # absl's way to say false.
  mine = '--noxla_tpu_enable_async_all_to_all'
  told = _told('tpu', LIBTPU_INIT_ARGS=mine)
  assert [flag for flag in told if 'async_all_to_all' in flag] == [mine]
  assert len(told) == len(backend.FLAGS['tpu'][1])
  # The name of a file, which XLA reads instead.
  assert _told('gpu', XLA_FLAGS='flags.txt') == ['flags.txt']


@pytest.mark.parametrize('kind', backend.FLAGS)
def test_once_is_enough(kind):
  env = {}
  backend.add_flags(kind, env)
  once = dict(env)
  backend.add_flags(kind, env)
  assert env == once


@pytest.mark.parametrize(
  ('env', 'tpu', 'kind'),
  [
    ({}, True, 'tpu'),
    ({'JAX_PLATFORMS': 'cpu'}, True, 'cpu'),
    ({'JAX_PLATFORMS': 'tpu,cpu'}, False, 'tpu'),
    ({'JAX_PLATFORMS': 'cuda'}, False, 'gpu'),
  ],
)
def test_which_backend(monkeypatch, env, tpu, kind):
  monkeypatch.setattr(backend, 'has_tpu', lambda: tpu)
  assert backend.expected(env) == kind


def test_each_backend_hears_its_own(monkeypatch):
  heard = []
  libc = types.SimpleNamespace(mallopt=lambda *pair: heard.append(pair))
  monkeypatch.setattr(backend.ctypes, 'CDLL', lambda _: libc)
  monkeypatch.setattr(backend.platform, 'libc_ver', lambda: ('glibc', '2.36'))

  def prepare(**env):
    said = dict(env)
    backend.prepare(env)
    backend.keep_freed_memory(env)
    return env.keys() - said.keys()

  assert prepare(JAX_PLATFORMS='tpu') == {'LIBTPU_INIT_ARGS'}
  assert prepare(JAX_PLATFORMS='cuda') == {'XLA_FLAGS'}
  # Who sets up the allocator knows why.
  assert not prepare(JAX_PLATFORMS='cpu', MALLOC_ARENA_MAX='4')
  assert not prepare(JAX_PLATFORMS='cpu', GLIBC_TUNABLES='glibc.malloc.check=3')
  assert heard == []
  assert not prepare(JAX_PLATFORMS='cpu')
  assert heard == [(-8, 1), (-4, 0), (-1, 2**31 - 1)]
  monkeypatch.setattr(backend.platform, 'libc_ver', lambda: ('', ''))
  prepare(JAX_PLATFORMS='cpu')
  assert len(heard) == 3


def _run(code, **env):
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', **env}
  env.pop('GLIBC_TUNABLES')
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=env,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout + done.stderr


def test_xla_knows_the_flags_for_gpus():
  code = 'import jax; print(len(jax.devices()))'
  status, said = _run(code, XLA_FLAGS=' '.join(_told('gpu')))
  assert status == 0, said
  # It would have said so.
  status, said = _run(code, XLA_FLAGS='--xla_gpu_enable_magic=true')
  assert status and 'Unknown flag' in said


_COMPILE = """
import os
from st_moe import backend
from st_moe.plan import plan_flags, topology
plan_flags.prepare()
os.environ['LIBTPU_INIT_ARGS'] = {flags!r}
import jax
mesh = jax.sharding.Mesh(topology.devices('v5e:2x2'), 'x')
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
x = jax.ShapeDtypeStruct((512, 512), 'float32', sharding=split)
print(jax.jit(lambda a: (a @ a).sum()).lower(x).compile().as_text()[:9])
"""


def test_libtpu_knows_the_flags_for_tpus():
  pytest.importorskip('libtpu', reason='jax[tpu] is not installed')
  status, said = _run(_COMPILE.format(flags=' '.join(_told('tpu'))))
  assert status == 0 and 'HloModule' in said, said
  status, said = _run(_COMPILE.format(flags='--xla_tpu_enable_magic=true'))
  assert status and 'Unknown command line flag' in said


_STEPS = """
import os, threading
from st_moe import backend
if {tell}:
  backend.prepare(os.environ)
  backend.keep_freed_memory(os.environ)
import numpy as np
def resident():
  pages = int(open('/proc/self/statm').read().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20
def step():
  np.ones(2**20), np.ones(2**22)  # 8 and 32 MiB.
before = resident()
for _ in range(3):
  other = threading.Thread(target=step)
  other.start()
  other.join()
  step()
print(resident() - before)
"""


@pytest.mark.skipif(
  backend.platform.libc_ver()[0] != 'glibc', reason='another allocator'
)
def test_what_a_step_frees_is_there_for_the_next():
  told, untold = (
    float(_run(_STEPS.format(tell=tell))[1]) for tell in (True, False)
  )
  # All 40 MiB, in one heap for both threads; untold, what glibc thinks right.
  assert untold < 20 < 40 <= told < 60
