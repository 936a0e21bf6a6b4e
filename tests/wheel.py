"""The wheel of this tree, and the environment of somebody who has no more."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# Where an environment may come from: pip and networks, nothing of our own.
_KEPT = r'PATH|LANG|PIP_.*|UV_.*|SSL_.*|.*_proxy|.*_PROXY'


def build(folder: pathlib.Path) -> pathlib.Path:
  """Writes the wheel into `folder`: this tree as it is, committed or not."""
  tree = folder / 'tree'
  for name in ('st_moe', 'configs', 'experiments'):
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, tree / name, ignore=ignore)
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, tree)
  subprocess.run(
    [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--quiet']
    + ['--wheel-dir', str(folder), str(tree)],
    check=True,
    stderr=subprocess.DEVNULL,
  )
  (wheel,) = folder.glob('*.whl')
  return wheel


def surroundings(home: pathlib.Path, venv: pathlib.Path) -> dict[str, str]:
  """Variables of a shell with an empty home in which `venv` is active."""
  kept = {k: v for k, v in os.environ.items() if re.fullmatch(_KEPT, k)}
  # Of the environment that runs this, nothing.
  here = os.path.dirname(sys.executable)
  paths = [p for p in kept['PATH'].split(':') if p != here]
  return {**kept, 'HOME': str(home), 'PATH': ':'.join([f'{venv}/bin', *paths])}
