"""What a run keeps in its workdir besides numbers and checkpoints."""

import pathlib
import subprocess
from collections.abc import Mapping

from etils import epath

from st_moe import checkpoint, config_file, hosts
from st_moe.data import files
from st_moe.history import METRICS

_FILES = ('config.json', 'config.py', 'about.json', 'vocabulary.model')
_FOLDERS = ('checkpoints', 'damaged', 'tensorboard', 'profile')

# A run may go on with other values of these: they change none of its numbers.
_FREE = (
  'name',
  'paper_params',
  'max_padding',
  'total_steps',
  'checkpoint.',
  'evaluate.',
  'log.',
  'mesh.',
  'model.remat',
  'model.moe.dispatcher',
  'model.moe.transport',
  'loss.positions',
  'microbatches',  # But see `claim`.
  'data.workers',
  'data.allow_cut',
  'data.cache_dir',
  'data.may_change',
  'data.files.',  # Of these two `begin` sees what lies there.
  'data.data_dir',
  'optimizer.max_bad_steps',
)


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


def claim(workdir: epath.Path, ours: Mapping, run: dict | None = None) -> int:
  """The steps done in a workdir; refuses one where another config trained.

  Args:
    ours: the config, in plain values.
    run: what its newest checkpoint says.
  """
  path, done = workdir / 'config.json', checkpoint.last_step(workdir)
  is_ours = lambda p: run or 'total_steps' in files.json_in(p)
  files.check_free(path, is_ours)
  if not path.exists():
    if not done:
      check_new(workdir)
    return done
  free = _FREE
  # By way of a Config, which knows the fields that have come since.
  try:
    theirs = config_file.of_run(path)
  except ValueError:
    if not run:
      raise
    hosts.tell(f'{path} is damaged, and written anew.')
    theirs = config_file.from_dict(run['config'], f'a checkpoint of {workdir}')
    free = (*free, 'model.vocab_size')  # Settled there, and not as asked for.
  changed = config_file.diff(config_file.to_dict(theirs), ours)
  lines = [line for line in changed if not line.startswith(free)]
  if lines and not checkpoint.any_steps(workdir):
    # Nothing is lost, and the advice of an error may be followed on the spot.
    (workdir / 'vocabulary.model').unlink(missing_ok=True)
  elif lines:
    listed = '\n  '.join(lines)
    raise ValueError(
      f'{workdir} belongs to another config:\n  {listed}\nUse another workdir,'
      ' or the config it was started with.'
    )
  for line in changed:
    if line.startswith('microbatches') and done:
      hosts.tell(
        f'{line}: each microbatch draws dropout, jitter and second experts by a'
        ' lot of its own, so a run that has these goes on with other draws.'
      )
  return done


def explain(workdir: epath.Path, said: Mapping, path: str) -> None:
  """Leaves what the run is made of, from config file to versions.

  Args:
    said: the config, in plain values.
    path: of the config file and its argument; '': there is none.
  """
  text = config_file.to_json(said)
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
