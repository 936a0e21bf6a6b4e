"""Runs the commands of the README in its order, as a stranger would.

  python -m tests.first_hour --directory=/tmp/hour

Clones what is committed, with an empty home and an empty environment, and gives
the commands to one shell, one after the other, `activate` included. Some are
changed first, for reasons that stand in `CHANGES`, and what a reader would have
already (a text, rows of SuperGLUE, a base model, models of HuggingFace) is made
small by `prepare`. `--quick` leaves out the training of the quickstart; without
it all takes twenty minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]

# Of each command: what is written otherwise, and why.
CHANGES = (
  (
    r'^bash scripts/test\.sh\b',
    'bash scripts/test.sh tests/test_readme.py',
    'the whole suite has a run of its own',
  ),
  (
    r'(configs/(st_moe_tiny|finetune|finetune_superglue)\.py):?(?=\s|$|mixture)',
    r'\1:runlocal,',
    'steps enough to see that they are taken',
  ),
  (r'^st-moe prepare superglue .*', '', 'a network'),
  (r'hf:google/switch-base-8 (.*) --verify', r'hf:made/switch \1', 'torch'),
  (r'hf:google/flan-t5-base', 'hf:made/t5', 'a network'),
  (r'^st-moe plan .*--topology=.*', '', 'jax[tpu]'),
  (r'\$vm (\w+)', r'$vm \1 --dry-run', 'gcloud and a TPU'),
)

# Where the environment may come from: pip and networks, nothing of our own.
KEPT = r'PATH|LANG|PIP_.*|UV_.*|SSL_.*|.*_proxy|.*_PROXY'

# What stands in for the files of a reader, made after the first runs.
PREPARE = r"""
import dataclasses, gzip, json, pathlib, shutil
import jax
from pydoc_data import topics
from st_moe import Transformer, config_file, sharding
from st_moe.interop import huggingface
from st_moe.train.state import init_params
from tests.first_hour import superglue

texts = pathlib.Path('texts')
texts.mkdir()
documents = list(topics.topics.values())
for name, some in {'0': documents[::2], '1': documents[1::2]}.items():
  with gzip.open(texts / f'train-{name}.jsonl.gz', 'wt') as file:
    for text in some:
      print(json.dumps({'text': text}), file=file)
(texts / 'valid.txt').write_text('\n\n'.join(documents[:9]))

faq = pathlib.Path('faq')
faq.mkdir()
asked = [{'inputs': f'{n} and 1?', 'targets': f'{n + 1}'} for n in range(64)]
rows = '\n'.join(map(json.dumps, asked))
with gzip.open(faq / 'train-0.jsonl.gz', 'wt') as file:
  file.write(rows)
(faq / 'valid.jsonl').write_text(rows)

superglue(pathlib.Path('data/superglue'))
shutil.copytree('runs/tiny', 'runs/base')

pieces = pathlib.Path('runs/tiny/vocabulary.model').read_bytes()
small = {
  'model.embed_dim': '16', 'model.num_heads': '2', 'model.head_dim': '8',
  'model.mlp_dim': '32', 'model.vocab_size': '2048',
  'model.encoder.num_layers': '2', 'model.decoder.num_layers': '2',
}
for place, spec, more in (
  ('made/switch', 'switch.py:experts=4', {'routing': 'huggingface'}),
  ('made/t5', 't5_1_1.py', {}),
):
  config = config_file.load(f'configs/{spec}', {**small, **more})
  params = init_params(Transformer(config.model), jax.random.key(0))
  params = sharding.unbox(params)
  huggingface.save(place, params, config, pieces)
"""


def blocks(text: str) -> list[str]:
  """The code blocks of a page that are commands: those of no language."""
  found = re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
  return [code for language, code in found if not language]


def spans(text: str) -> list[str]:
  """Code in passing, between single backticks."""
  prose = re.sub(r'^```.*?^```', '', text, flags=re.DOTALL | re.MULTILINE)
  return [' '.join(span.split()) for span in re.findall('`([^`]+)`', prose)]


def lines(text: str) -> list[str]:
  """What a reader types, line by line: the blocks that have a command."""
  typed = [
    line.strip()
    for block in blocks(text)
    for line in block.replace('\\\n', ' ').splitlines()
    if re.search(r'(^|\s)(st-moe|bash|\$vm|sbatch) ', block)
  ]
  return [' '.join(line.split()) for line in typed if line]


def commands(line: str) -> list[list[str]]:
  """The words of each command of a line, without comments."""
  found, words = [], shlex.shlex(line, posix=True, punctuation_chars=';&|')
  words.whitespace_split = True
  command = []
  for word in [*words, ';']:
    if not set(word) <= set(';&|'):
      command.append(word)
    elif command:
      found.append(command)
      command = []
  return found


def python(text: str) -> str:
  """What a page says in Python in passing, as a program."""
  said = r'import st_moe|m\.\w|params, config = |st_moe\.[A-Z]'
  found = [span for span in spans(text) if re.match(said, span)]
  names = "prompts, targets, texts = ['a'], ['b'], ['a <extra_id_0> b']"
  return '\n'.join([names, *found]).replace('hf:DIR', 'hf:made/t5')


def changed(line: str) -> str:
  """`line` as it is run here; '' if it is not."""
  for pattern, instead, _ in CHANGES:
    line = re.sub(pattern, instead, line)
  return line


def superglue(place: pathlib.Path) -> None:
  """Files of the official form, with the same few rows in every split."""
  said = {'premise': 'Tom heated the cup.', 'hypothesis': 'The cup is hot.'}
  text = 'Tom heated the cup. Then he left.'
  rows = {
    'BoolQ': {'passage': text, 'question': 'is the cup hot', 'label': True},
    'CB': {**said, 'label': 'entailment'},
    'COPA': {
      'premise': 'Tom heated the cup.',
      'choice1': 'It was hot.',
      'choice2': 'It was cold.',
      'question': 'effect',
      'label': 0,
    },
    'MultiRC': {
      'passage': {
        'text': text,
        'questions': [
          {
            'question': 'Who left?',
            'idx': 0,
            'answers': [{'text': 'Tom', 'idx': 0, 'label': 1}],
          }
        ],
      }
    },
    'RTE': {**said, 'label': 'entailment'},
    'WiC': {
      'word': 'cup',
      'sentence1': 'A cup.',
      'sentence2': 'Your cup.',
      'label': True,
    },
    'WSC': {
      'text': text,
      'target': {
        'span1_index': 0,
        'span1_text': 'Tom',
        'span2_index': 5,
        'span2_text': 'he',
      },
      'label': True,
    },
    'ReCoRD': {
      'passage': {'text': text, 'entities': [{'start': 0, 'end': 2}]},
      'qas': [
        {'query': '@placeholder left', 'idx': 0, 'answers': [{'text': 'Tom'}]}
      ],
    },
    'AX-b': {
      'sentence1': said['premise'],
      'sentence2': said['hypothesis'],
      'label': 'entailment',
      'logic': '',
    },
    'AX-g': {**said, 'label': 'entailment', 'pair_id': 0},
  }
  for folder, row in rows.items():
    (place / folder).mkdir(parents=True)
    only = folder.startswith('AX')  # A file without splits.
    for split in (folder,) if only else ('train', 'val', 'test'):
      written = (json.dumps({**row, 'idx': n}) for n in range(8))
      (place / folder / f'{split}.jsonl').write_text('\n'.join(written))


def script(readme: str, *, quick: bool = False) -> str:
  """All of it for one shell, which stops where a command fails."""
  made, typed = False, ['set -e']
  for line in lines(readme):
    run = changed(line)
    if quick and 'quickstart.sh' in run:
      run = 'bash scripts/env.sh'
    if not made and 'texts/' in line:
      typed.append(f'python - <<"END"\n{PREPARE}\nEND')
      made = True
    shown = line if run == line else f'{line}\n   as: {run}'
    typed.append(f'printf "\\n@@ %s s: %s\\n" $SECONDS {shlex.quote(shown)}')
    typed.append(run or ':')
  typed.append(f'python - <<"END"\n{python(readme)}\nEND')
  return '\n'.join([*typed, 'printf "\\n@@ %s s: the end\\n" $SECONDS'])


def main(argv=None) -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument('--directory', required=True)
  parser.add_argument('--quick', action='store_true')
  flags = parser.parse_args(argv)
  directory = pathlib.Path(flags.directory).resolve()
  home, clone = directory / 'home', directory / 'clone'
  home.mkdir(parents=True)
  subprocess.run(['git', 'clone', '-q', ROOT, clone], check=True)
  readme = (clone / 'README.md').read_text()
  (directory / 'hour.sh').write_text(script(readme, quick=flags.quick))
  env = {k: v for k, v in os.environ.items() if re.fullmatch(KEPT, k)}
  # Of the environment that runs this, nothing.
  here = os.path.dirname(sys.executable)
  paths = [p for p in env['PATH'].split(':') if p != here]
  env.update(HOME=str(home), PATH=':'.join(paths))
  began = time.monotonic()
  done = subprocess.run(['bash', directory / 'hour.sh'], cwd=clone, env=env)
  left = subprocess.run(
    ['git', 'status', '--porcelain', '--ignored=no'],
    cwd=clone,
    capture_output=True,
    text=True,
  ).stdout
  print(f'{time.monotonic() - began:.0f} s, exit status {done.returncode}')
  if left:
    print(f'not ignored by git:\n{left}')
  return done.returncode


if __name__ == '__main__':
  sys.exit(main())
