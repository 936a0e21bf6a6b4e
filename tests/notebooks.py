"""Runs the notebooks as somebody does who has nothing but a notebook server.

  bash scripts/notebooks.sh            # all of them; minutes
  bash scripts/notebooks.sh 1 5        # some
  bash scripts/notebooks.sh --write    # and keeps what they showed

Their kernel lives in a new virtual environment that holds `ipykernel` and what
comes with it; `st_moe`, a wheel of this tree, is installed by their own first
cell. They run in an empty folder with an empty home, one after the other, as
somebody does who works through them, and end in a cell of values, which is held
against `EXPECTED`. The text form, NAME.py, is what is run: `--write` makes
NAME.ipynb of it.
"""

import argparse
import ast
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from tests import wheel

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.py'))
LIMIT = 300  # Seconds of one notebook.
LARGEST = 500_000  # Bytes of one that is kept.

# What must be true of the values of each.
EXPECTED = {
  '1_first_hour': lambda v: (
    2 < v['loss'] < 5
    and v['layers'] == ['encoder.0', 'encoder.1', 'decoder.1']
    and v['experts met'] == 8
    and v['tokens'] > 20
  ),
  '2_pretrain': lambda v: (
    max(v['loss'].values()) < 5.5
    and v['parameters']['sparse'] > 1.5 * v['parameters']['dense']
    and v['vocabulary'] == 2048
  ),
  '3_superglue': lambda v: (
    v['best'].keys() == {'super_glue_boolq', 'super_glue_cb', 'super_glue_copa'}
    and all(v['best'][task] > v['majority'][task] + 5 for task in v['best'])
    and v['problems'] == 7  # The files of the other tasks.
  ),
  '4_checkpoints': lambda v: (
    v['in differs by'] == v['out differs by'] == 0 and v['loss'] < 5.5
  ),
  '5_experts': lambda v: (
    2 < v['loss'] < 5
    and v['rise'] > 0
    and all(0 <= e < 2.08 for e in v['sentinel entropy'].values())
  ),
  '6_plan_a_pod': lambda v: (
    v['parameters'] == 269_104_613_376
    and v['fastest'] == 'fsdp=2 expert=64'
    and v['GiB'] < 95
  ),
}


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='notebooks.sh')
  parser.add_argument('numbers', nargs='*', help='of notebooks; none are all')
  parser.add_argument(
    '--write', action='store_true', help='keep what they show'
  )
  parser.add_argument('--python', default=sys.executable, help='of the kernel')
  flags = parser.parse_args(argv)
  chosen = [
    path
    for path in NOTEBOOKS
    if not flags.numbers or path.stem.split('_')[0] in flags.numbers
  ]
  with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    env = surroundings(place, flags.python)
    for folder in ('home', 'work'):
      (place / folder).mkdir()
    total, wrong = 0.0, []
    for path in chosen:
      try:
        made, seconds, of_install = run(path, place / 'work', env)
      except (CellTimeoutError, DeadKernelError) as e:
        wrong.append(f'{path.stem}: {str(e).partition(chr(10))[0]}')
        continue
      total += seconds
      told = f'{path.stem}: {seconds:.0f} s'
      if of_install > 2:
        told += f', {of_install:.0f} of them to install'
      print(told, flush=True)
      found = problems(path.stem, made, seconds, (str(place), str(ROOT)))
      wrong += [f'{path.stem}: {line}' for line in found]
      if flags.write and not found:
        path.with_suffix('.ipynb').write_text(nbformat.writes(made) + '\n')
    print(f'all: {total:.0f} s')
  print(*wrong, sep='\n', end='\n' if wrong else '')
  return int(bool(wrong))


def surroundings(place: pathlib.Path, python: str) -> dict[str, str]:
  """A kernel in `place`; the environment it is used in, with a wheel."""
  venv = place / 'venv'
  subprocess.run([python, '-m', 'venv', venv], check=True)
  pip = [venv / 'bin' / 'python', '-m', 'pip', '--disable-pip-version-check']
  subprocess.run([*pip, 'install', '--quiet', 'ipykernel'], check=True)
  kernel = place / 'jupyter' / 'kernels' / 'bare'
  kernel.mkdir(parents=True)
  command = [f'{venv}/bin/python', '-m', 'ipykernel_launcher', '-f']
  spec = {'argv': [*command, '{connection_file}'], 'display_name': 'bare'}
  (kernel / 'kernel.json').write_text(json.dumps(spec))
  os.environ['JUPYTER_PATH'] = str(place / 'jupyter')
  env = wheel.surroundings(place / 'home', venv)
  quiet = {'PIP_DISABLE_PIP_VERSION_CHECK': '1'}
  return env | quiet | {'ST_MOE': str(wheel.build(place))}


def read(path: pathlib.Path):
  """A notebook of its text form, with ids that stay as they are."""
  notebook = jupytext.read(path)
  for number, cell in enumerate(notebook.cells):
    cell.id = f'cell-{number}'
  # What opened the text form does not matter.
  notebook.metadata.get('jupytext', {}).pop('text_representation', None)
  return notebook


def run(path: pathlib.Path, work: pathlib.Path, env: dict) -> tuple:
  """The notebook with what it shows, its seconds, and those of installing."""
  notebook = read(path)
  client = NotebookClient(
    notebook,
    kernel_name='bare',
    timeout=LIMIT,
    allow_errors=True,
    record_timing=False,
    coalesce_streams=True,
    resources={'metadata': {'path': str(work)}},
  )
  began, installed = time.monotonic(), []
  client.on_cell_executed = lambda cell, **_: (
    installed.append(time.monotonic() - began)
    if 'install' in cell.metadata.get('tags', ())
    else None
  )
  client.execute(env=env)
  seconds = time.monotonic() - began
  notebook.metadata.pop('language_info', None)
  for output in outputs(notebook):
    if 'text' in output:  # Some tell where on this machine they write.
      output.text = output.text.replace(f'{work}/', '')
  return notebook, seconds, installed[0]


def problems(name: str, notebook, seconds: float, places) -> list[str]:
  """What is wrong with a notebook that was run; [] if nothing is."""
  found = broken(notebook)
  if not found:
    try:
      if not EXPECTED[name](values(notebook)):
        found.append(f'its values are {values(notebook)}')
    except ValueError as e:
      found.append(f'its last cell shows no plain values: {e}')
  if seconds > LIMIT:
    found.append(f'took {seconds:.0f} s, and has {LIMIT}')
  text = nbformat.writes(notebook)
  if len(text) > LARGEST:
    found.append(f'has {len(text):,} bytes, and may have {LARGEST:,}')
  found += [f'names {place}, a place here' for place in places if place in text]
  return found


def broken(notebook) -> list[str]:
  """Errors and what stood on standard error, of all cells."""
  found = []
  for output in outputs(notebook):
    if output.output_type == 'error':
      found.append(f'{output.ename}: {output.evalue}')
    elif output.get('name') == 'stderr':
      found.append(f'on standard error: {output.text[:500]}')
  return found


def outputs(notebook) -> list:
  return [o for c in notebook.cells for o in c.get('outputs', ())]


def values(notebook) -> dict:
  """What its last cell shows."""
  (shown,) = notebook.cells[-1].outputs
  return ast.literal_eval(shown.data['text/plain'])


if __name__ == '__main__':
  sys.exit(main())
