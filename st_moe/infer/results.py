"""What evaluations leave behind, side by side: none is written over.

A folder holds what one checkpoint scored under one set of settings. Scores of
further tasks join them; where another checkpoint or other settings were asked
for, what is there moves to `earlier/N` first.
"""

import zipfile
from collections.abc import Iterable, Mapping

from etils import epath

from st_moe.data import files
from st_moe.infer import submission

_METRICS, _BEST, _EARLIER = 'metrics.json', 'best.json', 'earlier'


def check(folder: epath.Path, tasks: Iterable[str]) -> None:
  """Says before work is begun what could not be written.

  Args:
    tasks: those that will have predictions.

  Raises:
    ValueError: `folder` is none or cannot be written to, or holds a file of
      somebody else's under a name of ours.
  """
  there = next(p for p in (folder, *folder.parents) if p.exists())
  if not there.is_dir():
    raise ValueError(f'--output={folder}: {there} is a file, not a directory.')
  if not files.is_writable(there):
    raise ValueError(
      f'{folder} cannot be written; say with --output=DIR where results go.'
    )
  for name in (_METRICS, _BEST, submission.NAME, *map(_predictions, tasks)):
    files.check_free(folder / name, _is_ours)


def _predictions(task: str) -> str:
  return f'predictions-{task}.jsonl'


def _is_ours(path: epath.Path) -> bool:
  """Whether a file has what we write under its name."""
  if path.name == _METRICS:
    return {'checkpoint', 'step', 'metrics'} <= files.json_in(path).keys()
  if path.name == _BEST:
    found = files.json_in(path)
    return bool(found) and all(name.startswith('eval/') for name in found)
  with path.open('rb') as file:
    if path.name != submission.NAME:
      return file.read(8) == b'{"idx": '
    if not zipfile.is_zipfile(file):
      return False
    with zipfile.ZipFile(file) as archive:
      return set(archive.namelist()) <= set(submission.FILES.values())


def write(
  folder: epath.Path, about: Mapping, found: dict, measured: Mapping
) -> tuple[dict[str, float], bool]:
  """Writes metrics.json and predictions; whole, the metrics last.

  Args:
    about: the checkpoint and the settings, as JSON.
    found: metrics by name.
    measured: task -> its metrics and predictions.

  Returns:
    All metrics that are there now, and whether others were moved for them.
  """
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / _METRICS
  then = files.json_in(path) if path.exists() else {}
  others = bool(then) and any(then.get(k) != about[k] for k in about)
  if others:
    said = [p.name for p in folder.glob(_predictions('*'))]
    aside = _set_aside(folder, [*said, submission.NAME, _METRICS])
    what = f'{then["checkpoint"]}, step {then["step"]}'
    print(f'{folder}: what {what}, scored is now in {aside}')
  for name, (_, rows) in measured.items():
    if rows:
      lines = ''.join(f'{files.as_json(row)}\n' for row in rows)
      files.write_whole(folder / _predictions(name), lines.encode())
  metrics = found if others else {**then.get('metrics', {}), **found}
  text = files.as_json({**about, 'metrics': metrics}, indent=2)
  files.write_whole(path, text.encode())
  return {name: float(value) for name, value in metrics.items()}, others


def write_best(folder: epath.Path, best: Mapping, others: bool) -> None:
  """Metric -> the step it was best at and how good, where there are any.

  Args:
    others: whether the best there may be of other settings.
  """
  if others:
    _set_aside(folder, [_BEST])
  if best:
    text = files.as_json(best, indent=2)
    files.write_whole(folder / _BEST, text.encode())


def _set_aside(folder: epath.Path, names: Iterable[str]) -> epath.Path:
  """Moves our files of these names to a new folder, the last one last."""
  earlier, number = folder / _EARLIER, 0
  while any((earlier / f'{number}' / n).exists() for n in (_METRICS, _BEST)):
    number += 1
  aside = earlier / f'{number}'
  for name in names:
    path = folder / name
    if path.exists() and _is_ours(path):
      aside.mkdir(parents=True, exist_ok=True)
      files.copy(path, aside / name)
      path.unlink()
  return aside
