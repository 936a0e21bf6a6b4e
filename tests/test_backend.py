"""What is said to XLA and to the allocator, and when it is better not to."""

import os
import subprocess
import sys

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


def test_caches_of_who_has_no_home(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(backend.tempfile, 'gettempdir', lambda: str(tmp_path))
  home = lambda path: monkeypatch.setattr(
    backend.os.path, 'expanduser', lambda name: name.replace('~', path)
  )
  home('/home/somebody')
  assert backend.cache_dir() == '/home/somebody/.cache/st_moe'
  backend._shelter.cache_clear()
  shelter = str(tmp_path / f'st_moe-{os.getuid()}')
  home('~')  # As Python says where neither HOME nor passwd knows.
  assert backend.cache_dir() == backend.cache_dir() == shelter
  assert os.stat(shelter).st_mode & 0o777 == 0o700
  said = f'There is no home directory: caches go to {shelter}.\n'
  assert capsys.readouterr().err == said
  # A HOME of / is as good as none to who may not write there.
  home('/')
  monkeypatch.setattr(backend.os, 'access', lambda path, mode: path != '/')
  assert backend.cache_dir() == shelter
  # Nobody trusts a folder that somebody else has made.
  backend._shelter.cache_clear()
  monkeypatch.setattr(backend.os, 'getuid', lambda: 54_321)
  os.makedirs(tmp_path / 'st_moe-54321')
  assert backend.cache_dir() not in (shelter, str(tmp_path / 'st_moe-54321'))
  backend._shelter.cache_clear()


def test_each_backend_hears_its_own(monkeypatch):
  libc = lambda *found: monkeypatch.setattr(
    backend.platform, 'libc_ver', lambda: found
  )

  def told(**env):
    said = dict(env)
    return backend.prepare(env), env.keys() - said.keys()

  release = lambda name: monkeypatch.setattr(
    backend.importlib.metadata, 'version', lambda package: name
  )
  release('0.10.7')
  libc('glibc', '2.36')
  assert told(JAX_PLATFORMS='tpu') == (False, {'LIBTPU_INIT_ARGS'})
  assert told(JAX_PLATFORMS='cuda') == (False, {'XLA_FLAGS'})
  both = {'XLA_FLAGS', 'GLIBC_TUNABLES'}
  assert told(JAX_PLATFORMS='cpu') == (True, both)
  # Who sets up the allocator knows why; and once is enough.
  for theirs in ('MALLOC_ARENA_MAX', 'GLIBC_TUNABLES'):
    assert told(JAX_PLATFORMS='cpu', **{theirs: ''}) == (False, {'XLA_FLAGS'})
  for other in (('glibc', '2.31'), ('', '')):
    libc(*other)
    assert told(JAX_PLATFORMS='cpu') == (False, {'XLA_FLAGS'})
  release('0.12.0.1')
  assert told(JAX_PLATFORMS='cuda') == (False, {'XLA_FLAGS'})
  # Another release may not know the flags, and would end the process.
  release('0.11.0')
  assert told(JAX_PLATFORMS='cuda') == (False, set())


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


def test_xla_knows_the_flags():
  code = 'import jax; print(len(jax.devices()))'
  flags = _told('cpu') + _told('gpu')
  status, said = _run(code, XLA_FLAGS=' '.join(flags))
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


_STEP = """
import os, re, sys
from st_moe import backend
if {tell} and backend.prepare(os.environ):
  backend.start_anew(os.environ)
held = b'x' * 2**26
rollup = open('/proc/self/smaps_rollup').read()
print(re.search('AnonHugePages: *([0-9]+)', rollup)[1], *sys.argv)
"""


def _large_pages() -> str:
  try:
    with open('/sys/kernel/mm/transparent_hugepage/enabled') as file:
      return file.read()
  except OSError:
    return ''


@pytest.mark.skipif(
  '[madvise]' not in _large_pages()
  or backend.platform.libc_ver()[0] != 'glibc',
  reason='not a machine on which programs choose large pages',
)
def test_a_command_starts_anew_with_large_pages():
  told, untold = (_run(_STEP.format(tell=t))[1].split() for t in (True, False))
  assert told[1:] == untold[1:] == ['-c']
  assert int(untold[0]) < 2**13 < 2**15 < int(told[0])  # KiB, of 2**16.


def test_what_is_free_is_given_back():
  # Between two that stay, or the heap would end there.
  code = """
import os
from st_moe import backend
def resident():
  pages = int(open("/proc/self/statm").read().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
many = [b'x' * 2**16 for _ in range(1024)]
del many[:-1]
before = resident()
backend.give_back()
print(before - resident())
"""
  assert 60 < float(_run(code)[1]) < 80  # MiB.
