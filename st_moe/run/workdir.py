"""What a run keeps in its workdir besides numbers and checkpoints."""

import pathlib
import subprocess

from etils import epath

from st_moe import checkpoint, config_file
from st_moe.config import Config
from st_moe.data import files
from st_moe.history import METRICS

_FILES = ('config.json', 'config.py', 'about.json', 'vocabulary.model')
_FOLDERS = ('checkpoints', 'damaged', 'tensorboard', 'profile')


def check(workdir: epath.Path) -> None:
  """Refuses a workdir whose names stand for other things than a run's."""
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f'{workdir} is a file; a workdir is a folder.')
  for name in (*_FILES, METRICS):
    if (workdir / name).is_dir():
      raise ValueError(
        f'{workdir / name} is a folder, where a run keeps a file: move it away,'
        ' or use another workdir.'
      )
  for name in _FOLDERS:
    if (workdir / name).exists() and not (workdir / name).is_dir():
      raise ValueError(
        f'{workdir / name} is a file, where a run keeps a folder: move it away,'
        ' or use another workdir.'
      )


def check_new(workdir: epath.Path) -> None:
  """Refuses a folder where files that no run wrote have names of a run's."""
  for name in ('config.py', 'about.json', METRICS):
    files.check_free(workdir / name, lambda _: False)


def explain(workdir: epath.Path, config: Config, path: str) -> None:
  """Leaves what the run is made of, from config file to versions.

  Args:
    path: of the config file and its argument; '': there is none.
  """
  text = config_file.to_json(config)
  files.write_whole(workdir / 'config.json', text.encode())
  if path:
    source = config_file.find(path.partition(':')[0])
    (workdir / 'config.py').write_text(source.read_text())
  about = {'commit': commit(), 'versions': checkpoint.versions()}
  (workdir / 'about.json').write_text(files.as_json(about, indent=2))


def commit() -> str:
  """The commit of this code, '+' where files differ from it; '' if unknown."""
  root = pathlib.Path(__file__).resolve().parents[2]
  git = lambda *args: subprocess.run(
    ['git', '-C', root, *args], capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    # Installed in a folder of somebody's project, it is not in that history.
    if pathlib.Path(git('rev-parse', '--show-toplevel')).resolve() != root:
      return ''
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return ''
