"""Predictions as the leaderboard of SuperGLUE takes them: one file a task.

Each line is {"idx": ..., "label": ...}, in the order of the test file; MultiRC
nests answers in questions in passages. BoolQ and WiC say true and false, WSC
True and False, COPA and MultiRC 0 and 1, ReCoRD the entity, others the label.
"""

import json
import zipfile
from collections.abc import Iterable, Mapping

from etils import epath

from st_moe.data import files, superglue
from st_moe.data.task import SENTINEL, class_number

NAME = 'superglue.zip'
FILES = {
  task: f'{spec.files["test"][0].split("/")[1]}.jsonl'
  for task, spec in superglue.TASKS.items()
}
_LOWER = ('false', 'true')
# What is written for each class where that is not the text of the label.
_WRITTEN = {
  'boolq': _LOWER,
  'wic': _LOWER,
  'wsc': ('False', 'True'),
  'copa': (0, 1),
  'multirc': (0, 1),
}


def _task(name: str) -> str:
  """'boolq' of 'super_glue_boolq'; '' of what is not among the ten."""
  task = name.removeprefix('super_glue_').removesuffix(SENTINEL)
  return task if name.startswith('super_glue_') and task in FILES else ''


def check(names: Iterable[str]) -> None:
  """Raises if none of the sources `names` is a task of SuperGLUE."""
  if not any(map(_task, names)):
    raise ValueError(
      f'No submission of {sorted(names)}: none is a task of SuperGLUE; use'
      ' --mixture=super_glue.'
    )


def write(folder: epath.PathLike, measured: Mapping[str, tuple]) -> epath.Path:
  """Zips the predictions of `Evaluator.measure`; says which tasks are missing.

  Ranked answers where there are such: what a model says may be no label, and
  then counts as the first.

  Raises:
    ValueError: none of the tasks is SuperGLUE's.
  """
  check(measured)
  lines = {}
  for name, (_, rows) in measured.items():
    if task := _task(name):
      ways = {row['by'] for row in rows}
      way = 'rank' if 'rank' in ways else 'decoding'
      lines[task] = _lines(task, [r for r in rows if r['by'] == way])
  path = epath.Path(folder) / NAME
  with files.appearing(path) as temp, zipfile.ZipFile(temp, 'w') as archive:
    for task, found in lines.items():
      text = ''.join(f'{files.as_json(line)}\n' for line in found)
      archive.writestr(FILES[task], text)
  if missing := sorted(FILES.keys() - lines):
    print(f'The leaderboard wants all ten; missing: {", ".join(missing)}.')
  return path


def _lines(task: str, rows: list[dict]) -> list[dict]:
  if task == 'multirc':
    return _nested(rows)
  found = {}
  for row in rows:  # ReCoRD has a row for each right answer to a query.
    idx = row['idx']['query'] if task == 'record' else row['idx']
    found.setdefault(idx, {'idx': idx, 'label': _label(task, row)})
  return list(found.values())


def _nested(rows: list[dict]) -> list[dict]:
  passages = {}
  for row in rows:
    idx = row['idx']
    questions = passages.setdefault(idx['paragraph'], {})
    answers = questions.setdefault(idx['question'], [])
    answers.append({'idx': idx['answer'], 'label': _label('multirc', row)})
  return [
    {
      'idx': passage,
      'passage': {
        'questions': [
          {'idx': question, 'answers': answers}
          for question, answers in questions.items()
        ]
      },
    }
    for passage, questions in passages.items()
  ]


def _label(task: str, row: dict):
  said = row['prediction']
  if task == 'record':
    return said
  if task == 'wsc':
    example = {'targets_pretokenized': row['target']}
    number = superglue.wsc_value(said, example)
  else:
    number = class_number(said, superglue.TASKS[task].labels)
  written = _WRITTEN.get(task) or superglue.TASKS[task].labels
  return written[max(number, 0)]


def problems(path: epath.PathLike, data_dir: str = '') -> list[str]:
  """What the leaderboard would refuse in a zip; [] if it is fine.

  Compares with the test files in `data_dir`, where these are there.
  """
  found = []
  if not zipfile.is_zipfile(epath.Path(path)):
    return [f'{path} is no zip']
  with zipfile.ZipFile(epath.Path(path)) as archive:
    names = archive.namelist()
    for name in sorted(set(names) - set(FILES.values())):
      found.append(f'{name} is no file of the benchmark')
    for task, name in FILES.items():
      if names.count(name) != 1:
        found.append(f'{name} is there {names.count(name)} times')
        continue
      try:
        text = archive.read(name).decode().removesuffix('\n')
        lines = text.split('\n') if text else []
        found += _problems(task, name, [json.loads(x) for x in lines], data_dir)
      except (ValueError, KeyError, TypeError) as e:
        found.append(f'{name} is malformed: {type(e).__name__} {e}')
  return found


def _problems(task, name, lines, data_dir) -> list[str]:
  """Labels that are none, and examples that are not those of the test file."""
  labels, ids = [], []
  for line in lines:
    if task != 'multirc':
      ids.append(line['idx'])
      labels.append(line['label'])
      continue
    for question in line['passage']['questions']:
      for answer in question['answers']:
        ids.append((line['idx'], question['idx'], answer['idx']))
        labels.append(answer['label'])
  allowed = _WRITTEN.get(task) or superglue.TASKS[task].labels
  wrong = [
    label
    for label in labels
    if (label not in allowed or isinstance(label, bool))
    and not (task == 'record' and isinstance(label, str))
  ]
  found = [f'{name}: {label!r} is no label' for label in wrong[:3]]
  try:
    examples = superglue.TASKS[task].load('test', data_dir)
  except ValueError:  # No test file to compare with.
    return found
  parts = {
    'multirc': ('idx/paragraph', 'idx/question', 'idx/answer'),
    'record': ('idx/query',),
  }.get(task, ('idx',))
  wanted = [tuple(e[part] for part in parts) for e in examples]
  wanted = [each if len(parts) > 1 else each[0] for each in wanted]
  if ids != list(dict.fromkeys(wanted)):
    found.append(
      f'{name}: {len(ids)} examples are not, in order, the {len(wanted)} of the'
      ' test file'
    )
  return found
