"""`st-moe doctor`: can this machine do the work? Answers before a run asks."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time

from etils import epath

from st_moe import terminal

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'sentencepiece',
  'numpy',
)
_EXTRAS = ('seqio', 'tensorflow')


def examine(workdir: str) -> int:
  """Prints one line per question; returns 1 if something stands in the way."""
  from rich.text import Text

  console, broken = terminal.console(), 0
  for name, question in _QUESTIONS.items():
    try:
      mark, answer = Text('ok  ', 'green'), question(workdir)
    except Exception as e:  # Whatever is wrong here is the answer.
      mark, answer, broken = Text('no  ', 'red'), f'{e}', 1
    console.print(mark + f'{name:14}', answer, soft_wrap=True)
  return broken


def _versions(workdir) -> str:
  found = [f'python {platform.python_version()}']
  for package in _PACKAGES:
    found.append(f'{package} {importlib.metadata.version(package)}')
  for package in _EXTRAS:
    try:
      found.append(f'{package} {importlib.metadata.version(package)}')
    except importlib.metadata.PackageNotFoundError:
      found.append(f'no {package}')
  return ', '.join(found)


def _devices(workdir) -> str:
  import jax

  kinds = [f'{d.platform}:{d.id} {d.device_kind}' for d in jax.devices()]
  return f'{len(kinds)}: {", ".join(kinds[:8])}'


def _matmul(workdir) -> str:
  """A product large enough to show whether the device is what it should be."""
  import jax
  import jax.numpy as jnp

  n = 1024
  a = jnp.ones((n, n))
  multiply = jax.jit(lambda a: a @ a).lower(a).compile()
  multiply(a).block_until_ready()
  start = time.perf_counter()
  for _ in range(4):
    a = multiply(a) / n
  a.block_until_ready()
  rate = 4 * 2 * n**3 / (time.perf_counter() - start)
  return f'{rate / 1e9:,.0f} GFLOP/s in float32'


def _memory(workdir) -> str:
  import jax

  free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  text = f'host {free / 2**30:.1f} of {total / 2**30:.1f} GiB free'
  stats = jax.devices()[0].memory_stats() or {}
  if 'bytes_limit' in stats:
    text += f', each device {stats["bytes_limit"] / 2**30:.1f} GiB'
  return text


def _write(workdir) -> str:
  if '://' in workdir:
    probe = epath.Path(workdir) / '.st_moe_probe'
    probe.write_text('ok')
    probe.unlink()
    return workdir
  there = os.path.abspath(workdir)
  while not os.path.exists(there):  # A run would make it.
    there = os.path.dirname(there)
  with tempfile.NamedTemporaryFile(dir=there):
    pass
  free = shutil.disk_usage(there).free
  return f'{os.path.abspath(workdir)}, {free / 2**30:.1f} GiB free'


def _corpus(workdir) -> str:
  from st_moe.data import sources

  characters = sum(map(len, sources.embedded_corpus('train')))
  return f'{characters:,} characters of the Python reference manual'


def _data(workdir) -> str:
  place = os.environ.get('ST_MOE_DATA', '')
  if not place:
    return '$ST_MOE_DATA is not set; only the embedded data will be found'
  found = sorted(p.name for p in epath.Path(place).iterdir() if p.is_dir())
  return f'$ST_MOE_DATA={place}: {", ".join(found)}'


def _extras(workdir) -> str:
  extras = {'wandb': 'wandb', 'transformers': 'hf', 't5x': 'git install'}
  return ', '.join(
    f'{module} {"there" if importlib.util.find_spec(module) else "absent"}'
    f' ({extra})'
    for module, extra in extras.items()
  )


_QUESTIONS = {
  'versions': _versions,
  'devices': _devices,
  'speed': _matmul,
  'memory': _memory,
  'writing': _write,
  'corpus': _corpus,
  'data': _data,
  'extras': _extras,
}
