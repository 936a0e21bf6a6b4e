"""Wrong inputs by the hundred: each must end in a sentence that names it.

  python -m tests.fuzz --output=runs/fuzz.jsonl      # minutes; goes on if rerun

What is wrong is written here by hand, by kind of value, and not read from the
rules of the code: a rule that was forgotten shows as an input that is accepted.
Fields and flags are those there are, so that new ones are tried too.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
import typing
from collections.abc import Iterator, Mapping

from st_moe import cli, config, fields, verbs

TINY = 'configs/st_moe_tiny.py:runlocal'
SECONDS = 60  # For a case, before it counts as one that does not end.

# Of a field or flag of each kind, as typed: nothing of this can be meant.
WRONG = {
  int: 'two|1.5|-1|nan|inf|1e400|[1]|true|none|99999999999999999999',
  float: 'two|-1|nan|inf|-inf|1e400|[1]|true|{}',
  bool: 'two|3|0.5|[1]|nan',
  str: '\udce9',  # A byte that is no UTF-8, as the shell hands it on.
  typing.Literal: 'nonsense|3|NONE|[1]',
  Mapping: '3|word|[1]|true',
  tuple: "3|word|[1]|true|{'x': 'y'}|{3: {}}",
  object: '3|word|[1]|true',
}
# What the kind would allow and the meaning does not.
ALSO_WRONG = {
  'model.moe.num_experts': '0|100000000',
  'model.moe.expert_dropout': '1|1.5|20',
  'model.moe.train_capacity.factor': '0',
  'model.moe.train_capacity.multiple': '0',
  'model.moe.eval_capacity.factor': '0',
  'model.moe.eval_capacity.multiple': '0',
  'model.moe.gate': 'lineer|{}|{"name": 3}',
  'model.moe.gate.jitter': '-0.1|1.5|nan|word|none',
  'model.moe.gate.jittter': '0.1',
  'model.moe.selector': 'top_k|top_kk|{"kk": 2}|{"name": "top_k", "kk": 2}',
  'model.moe.selector.k': '0|-1|9|two|1.5|true|none|nan',
  'model.moe.selector.threshold': '-1|nan|word|[0.2]|1e400',
  'model.moe.selector.train_policy': 'most|3|none_',
  'model.moe.selector.eval_policy': 'most|3|none_',
  'model.moe.selector.normalize': 'two|3',
  'model.moe.selector.kk': '2',
  'model.moe.dispatcher': '|indexx|none',
  'model.encoder.num_layers': '0|100000000',
  'model.encoder.sparse_offset': '5',
  'model.encoder.group_size': '0',
  'model.decoder.num_layers': '0|100000000',
  'model.decoder.sparse_offset': '5',
  'model.decoder.group_size': '0',
  'model.vocab_size': '100000000',
  'model.embed_dim': '0|100000000',
  'model.num_heads': '0|100000000',
  'model.head_dim': '0|100000000',
  'model.mlp_dim': '0|100000000',
  'model.dropout': '1|1.5|10',
  'model.relpos_buckets': '0|1|2|3|100000000',
  'model.relpos_max_distance': '0|16',
  'model.init_scale': '0',
  'model.relpos_init_scale': '0',
  'data.mixture': "{'python_reference': -1}|{'python_reference': 0}|{'': 1}",
  'data.mixture.python_reference': '0|-1|nan|inf|true|word|none|[1]',
  'data.temperature': '0|0.0001',
  'data.files': "{'mine': 3}|{'mine': 'a.txt'}|{'mine': {'train': 3}}",
  'data.files.mine.train': '|3|true',
  'data.text_field': '|',
  'data.noise_density': '0|1|15',
  'data.mean_span': '0|0.5',
  'data.vocabulary_size': '0|100000000',
  'data.inputs_length': '0|100000000',
  'data.targets_length': '0|100000000',
  'data.batch_size': '0|100000000',
  'data.workers': '0|100000000',
  'model.moe.losses': "{'load_balance': -1}|{'load_balanse': 1}|{3: 1}|7",
  'model.moe.losses.load_balance': '-1|nan|word|true',
  'model.moe.losses.load_balance.weight': '-1|nan|word|true',
  'model.moe.shaping': "{'noize': {}}|noise|[1]",
  'model.moe.weighing': "{'eom': 0.1}|x",
  'model.moe.experts': 'ffm',
  'model.moe.beside': 'nothin',
  'loss.label_smoothing': '1|2',
  'optimizer.train': '|',
  'optimizer.learning_rate': '-0.1',
  'optimizer.decay_exponent': '0',
  'optimizer.clip_threshold': '0',
  'optimizer.b1': '1|2',
  'optimizer.b2': '1|2',
  'optimizer.max_bad_steps': '0',
  'mesh.fsdp': '0',
  'mesh.expert': '0',
  'mesh.model': '0',
  'evaluate.split': '|',
  'log.wandb_project': '|',
  'microbatches': '0',
  'seed': '18446744073709551616|4294967296',
  'data.seed': '18446744073709551616|4294967296',
  'init_rules': "{'a': 3}|{3: 'a'}",
  # Of other places, or misspelt.
  'model.num_experts': '8',
  'moe.num_experts': '8',
  'Embed-Dim': '8',
  'learning_rate': '0.1',
  'model.selector.k': '2',
  'total-steps': '3',
  'model.embed_dimm': '8',
  'model.embed_dim.x': '8',
  'xyzzy': '1',
  '': '1',
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A command line, and the names of which its message must have one."""

  argv: tuple[str, ...]
  names: tuple[str, ...]
  files: Mapping[str, object] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    files = {
      k: v if isinstance(v, str) else repr(v) for k, v in self.files.items()
    }
    text = ' '.join(map(repr, self.argv)) + (f' {files}' if files else '')
    return text.encode('utf-8', 'backslashreplace').decode()[:400]


# Fields.


def leaves(kind=config.Config, above: str = '') -> Iterator[tuple[str, type]]:
  """Every field of a config, by its path, and its kind of value."""
  for name, hint in fields.of(kind).items():
    held = [fields.base(each)[0] for each in fields.alternatives(hint)]
    inner = next((k for k in held if dataclasses.is_dataclass(k)), None)
    origin = typing.get_origin(held[0]) or held[0]
    if inner and inner is not config.Part:
      yield above + name, object
      yield from leaves(inner, f'{above}{name}.')
    else:
      yield above + name, object if inner else origin


def of_fields(verb=('config', f'--config={TINY}')) -> Iterator[Case]:
  """Each field with everything it cannot be."""
  none = {'expert_dropout', 'relpos_init_scale'}  # May be none.
  for path, kind in leaves():
    last = path.rpartition('.')[2]
    for value in WRONG[kind].split('|'):
      if value != 'none' or last not in none:
        yield Case((*verb, f'--config.{path}={value}'), (last,))
  for path, values in ALSO_WRONG.items():
    names = [n for n in path.split('.') if n]
    for value in values.split('|'):
      yield Case(
        (*verb, f'--config.{path}={value}'), (names[-1] if names else 'field',)
      )


def of_verbs() -> Iterator[Case]:
  """A wrong field given to every verb that takes some."""
  verbs = {
    'train': ('train', f'--config={TINY}', '--workdir=run'),
    'grid': (
      *('grid', f'--config={TINY}', '--workdir=run'),
      *('--vary=seed=0,1', '--metric=eval/python_reference/loss'),
    ),
    'prepare': ('prepare', f'--config={TINY}'),
    'plan': ('plan', f'--config={TINY}', '--count'),
    'evaluate': ('evaluate', '--checkpoint=model'),
    'convert': ('convert', '--from=model', '--to=st_moe:out'),
  }
  wrong = {
    'model.dropout': '2',
    'optimizer.learning_rate': 'nan',
    'model.moe.selector.k': '9',
    'model.moe.selector.threshold': '-1',
    'model.num_experts': '3',
    'data.batch_size': 'many',
    'seed': '99999999999999999999',
    'model.moe.gate': 'lineer',
    'model.embed_dim': '100000000',
    'data.mixture': "{'python_reference': nan}",
  }
  for argv in verbs.values():
    for path, value in wrong.items():
      yield Case((*argv, f'--config.{path}={value}'), (path.split('.')[-1],))
      yield Case((*argv, f'--config.{path}', value), (path.split('.')[-1],))
  model = {
    'model.embed_dim': '24',
    'model.num_heads': '3',
    'model.vocab_size': '999',
  }
  for path, value in model.items():
    yield Case(
      (*verbs['evaluate'], f'--config.{path}={value}'), (path.split('.')[-1],)
    )
  train = verbs['train']
  for path, value in {
    'total_steps': '0',
    'mesh.data': '3',
    'mesh.expert': '3',
    'microbatches': '3',
    'evaluate.batch_size': '-3',
    'evaluate.split': 'dev',
    'checkpoint.keep_best': 'eval/none/loss',
    'init': 'nowhere',
    'data.vocabulary': 'nowhere.model',
    'data.targets_length': '2',
    'data.inputs_length': '2',
    'data.vocabulary_size': '90',
    'model.vocab_size': '50',
    'model.encoder': 'none',
    'optimizer.train': 'nothing',
  }.items():
    yield Case((*train, f'--config.{path}={value}'), (path.split('.')[-1],))
  mixture = "--config.data.mixture={'nothing': 1}"
  yield Case((*train, mixture), ('nothing',))
  # What no machine holds.
  for path, value in {
    'model.embed_dim': '16777216',
    'model.mlp_dim': '16777216',
    'model.moe.num_experts': '16777216',
    'data.batch_size': '16777216',
  }.items():
    yield Case((*train, f'--config.{path}={value}'), (path.split('.')[-1],))
  yield Case(
    ('train', '--config=configs/finetune.py', '--workdir=run'), ('init',)
  )
  yield Case(('plan', '--config=configs/finetune.py', '--count'), ('init',))
  yield Case(
    (
      'train',
      '--config=configs/finetune.py',
      '--config.init=',
      '--workdir=run',
    ),
    ('init',),
  )
  for vary in ('', 'seed', 'seed=', 'seed=a', 'sede=1', 'seed+x=1', 'seed=1,1'):
    argv = 'grid', f'--config={TINY}', '--workdir=run', f'--vary={vary}'
    yield Case(argv, ('vary', 'seed', 'sede'))


# Flags.


def of_flags() -> Iterator[Case]:
  """Each flag of each verb: unknown, twice, without a value, wrong."""
  others = {
    'train': (f'--config={TINY}', '--workdir=run'),
    'grid': (f'--config={TINY}', '--workdir=run', '--vary=seed=0,1'),
    'prepare': (f'--config={TINY}',),
    'plan': (f'--config={TINY}', '--chip=v5e', '--devices=8'),
    'config': (f'--config={TINY}',),
    'evaluate': ('--checkpoint=model',),
    'generate': ('--checkpoint=model', 'hi'),
    'convert': ('--from=model', '--to=st_moe:out'),
    'report': ('nowhere',),
    'doctor': (),
    'methods': (),
    'list': ('configs',),
  }
  more = {
    'temperature': '-0.5',
    'top_p': '0|1.5',
    'num_beams': '0|1000000000',
    'num_return': '0|1000000000|2',
    'max_length': '0|1000000000',
    'batch_size': '0|1000000000',
    'max_inputs': '1|1000000000',
    'repetition_penalty': '0',
    'k': '0|9',
    'seed': '18446744073709551616',
    'contrast_alpha': '0|2',
    'contrast_rank': '0',
    'devices': '0|1000000007',
    'chip': 'v55|3',
    'topology': 'v5p|x:y',
    'profile': '3|b:a|5:2|3:99999|nan',
    'process': '3',
    'processes': '0',
    'coordinator': 'nowhere',
    'vary': 'seed',
    'from': 'xx:|hf:nowhere|nowhere',
    'to': 'xx:',
    'early_stopping': 'maybe',
    'long': 'trim',
    'off': 'decoder.1.9|x|decoder|decoder.1.two',
    'on': 'decoder.1.9|x|decoder|decoder.1.two',
    'forbid': '',
    'targets': 'there',
    'input': 'nowhere.txt|.',
    'vocabulary': 'nowhere.model|.',
    'mixture': 'nothing',
    'checkpoint': 'nowhere|.|hf:nowhere',
    'workdir': '/proc/nothing',
    'config': '/typo/finetune.py|nowhere.py|.|x\0y|' + 'x' * 5000,
    'module_import': 'no_such_module|.x|3',
  }
  free = ('data_dir', 'coordinator', 'field', 'prefix', 'metric', 'submission')
  _, parsers = verbs.parser()
  for verb, parser in parsers.items():
    rest = others[verb]
    yield Case((verb, *rest, '--workdirr=3'), ('--workdirr',))
    yield Case((verb, *rest, '--Batch-Size=3'), ('--Batch-Size',))
    yield Case((verb, *rest, '--total_steps', '3'), ('--total_steps',))
    yield Case((verb, *rest, '-x'), ('-x',))
    yield Case((verb, *rest, '--config.seed'), ('seed', 'config'))
    for option, action in parser._option_string_actions.items():
      if option in ('-h', '--help') or action.nargs == 0:
        continue
      kept = [a for a in rest if not a.startswith(f'{option}=')]
      name = action.dest
      yield Case((verb, *kept, option), (option,))
      if name not in free and action.rule is not str:
        yield Case((verb, *kept, f'{option}='), (option,))
      if not action.several:
        yield Case((verb, *kept, f'{option}=3', f'{option}=4'), (option,))
      kinds = [fields.base(k)[0] for k in fields.alternatives(action.rule)]
      values = more.get(name, '').split('|') if name in more else []
      for kind in (int, float):
        values += WRONG[kind].split('|') if kind in kinds else []
      for value in values:
        # A negative penalty makes answers short, and a new vocabulary goes
        # where one says.
        meant = ('generate', 'length_penalty', '-1'), ('prepare', 'vocabulary')
        said = verb, name, value
        if value and said not in meant and said[:2] not in meant:
          names = option, name, value.strip(':').split(':')[-1][:40]
          yield Case((verb, *kept, f'{option}={value}'), names)
  for argv in (
    ('generate', '--checkpoint=model', '--targets=t', 'hi'),
    ('generate', '--checkpoint=model', 'hi', '--input=x'),
    ('generate', '--checkpoint=model', 'hi', '--top_k=3'),
    (
      'generate',
      '--checkpoint=model',
      'hi',
      '--num_beams=2',
      '--temperature=1',
    ),
    ('plan', f'--config={TINY}'),
    ('plan', f'--config={TINY}', '--count', '--chip=v5e', '--devices=8'),
    ('plan', f'--config={TINY}', '--search'),
    ('train', '--workdir=run'),
    ('config', 'dif', 'a', 'b'),
    ('list', 'tusks'),
    ('methods', 'rebalance'),
    ('trane',),
    ('evaluate', '--checkpoint=model', '--submission', '--mixture=tiny_cb'),
  ):
    yield Case(
      argv,
      (
        '--',
        'trane',
        'tusks',
        'rebalance',
        'dif',
        'num_',
        'top_k',
        'Beam',
        'test',
      ),
    )


# Files.

_CONFIG = 'def get_config(arg=None):\n  return '


def of_files() -> Iterator[Case]:
  """Files that are not what they should be."""
  sources = {
    'empty': '',
    'syntax': 'def get_config(:\n',
    'raises': 'def get_config(arg=None):\n  raise KeyError("x")\n',
    'exits': 'import sys\nsys.exit(3)\n',
    'none': _CONFIG + 'None\n',
    'list': _CONFIG + '[1]\n',
    'word': _CONFIG + '{"model": 3}\n',
    'field': _CONFIG + '{"modle": {}}\n',
    'number': _CONFIG + '{3: {}}\n',
    'object': _CONFIG + '{"seed": object()}\n',
    'import': 'import no_such_module\n',
    'noarg': 'def get_config():\n  return {}\n',
    'value': 'get_config = 3\n',
    'recursion': 'def get_config(arg=None):\n  return get_config(arg)\n',
    'assertion': 'assert False\n',
    'binary': bytes(range(256)),
    'nul': b'x = 1\0\n',
    'latin': b'x = "caf\xe9"\n',
    'memory': 'raise MemoryError\n',
    'folder': None,
    'fifo': 'FIFO',
    'zero': '-> /dev/zero',
    'circle': '-> circle.py',
    'huge': 'HUGE',
  }
  for kind, data in sources.items():
    file = f'{kind}.py'
    for verb in (('config',), ('train', '--workdir=run')):
      names = file, 'model', 'seed', 'config 3'
      yield Case((*verb, f'--config={file}'), names, {file: data})
  broken = 'syntax exits import assertion binary nul latin memory folder'
  for kind in broken.split():
    yield Case(
      ('train', f'--config={TINY}', '--workdir=run', f'--module_import={kind}'),
      (f'{kind}.py', f'--module_import={kind}'),
      {f'{kind}.py': sources[kind]},
    )
  yield Case(('config', '--config=x.json'), ('x.json',), {'x.json': '{}'})
  yield Case(('config', f'--config={TINY},dens'), ('dens',))
  yield Case(('config', f'--config={TINY},seed=x'), ('seed',))

  # A workdir whose config.json is something else.
  damaged = {
    'empty': '',
    'text': 'hello',
    'half': '{"model": {',
    'list': '[1]',
    'binary': bytes(range(256)),
    'deep': '[' * 100_000,
    'field': '{"modle": 3}',
    'rule': '{"model": {"dropout": 7.0}}',
    'word': '{"model": 3}',
    'folder': None,
  }
  for kind, data in damaged.items():
    files = {f'w_{kind}/config.json': data}
    names = (f'w_{kind}', 'config')
    yield Case(
      ('train', f'--config={TINY}', f'--workdir=w_{kind}'), names, files
    )
    yield Case(('config', 'diff', f'w_{kind}', TINY), names, files)
    yield Case(('report', f'w_{kind}'), names, files)
    yield Case(('generate', f'--checkpoint=w_{kind}', 'hi'), names, files)
    yield Case(('evaluate', f'--checkpoint=w_{kind}'), names, files)

  for kind, data in {
    'empty': b'',
    'binary': bytes(range(256)) * 9,
    'text': 'hello\n',
    'folder': None,
  }.items():
    files = {f'{kind}.model': data}
    yield Case(
      ('generate', '--checkpoint=model', f'--vocabulary={kind}.model', 'hi'),
      (f'{kind}.model',),
      files,
    )
    yield Case(
      (
        *('train', f'--config={TINY}', '--workdir=run'),
        f'--config.data.vocabulary={kind}.model',
      ),
      (f'{kind}.model',),
      files,
    )
  for name, data in {
    'empty.txt': b'',
    'latin.txt': b'caf\xe9\n',
    'half.jsonl': b'{"text": "a"\n',
    'list.jsonl': b'[1]\n',
    'field.jsonl': b'{"body": "a"}\n',
    'number.jsonl': b'{"text": 3}\n',
    'deep.jsonl': b'[' * 100_000,
    'broken.txt.gz': b'\x1f\x8bhello',
    'plain.txt.gz': b'hello\n',
    'what.xyz': b'hello\n',
    'folder.txt': None,
    'nowhere-*.txt': 'NOTHING',
  }.items():
    files = {} if data == 'NOTHING' else {name: data}
    stem = name.partition('.')[0]
    yield Case(
      (
        *('train', f'--config={TINY}', '--workdir=run'),
        *(
          f'--config.data.files.mine.{s}={name}'
          for s in ('train', 'validation')
        ),
        "--config.data.mixture={'mine': 1}",
      ),
      (name, stem),
      files,
    )
  for name, data in {
    'latin.txt': b'caf\xe9\n',
    'half.jsonl': b'{"inputs": "a"\n',
    'list.jsonl': b'[1]\n',
    'field.jsonl': b'{"body": "a"}\n',
    'number.jsonl': b'{"inputs": 3}\n',
    'deep.jsonl': b'[' * 100_000,
    'folder.txt': None,
  }.items():
    jsonl = ('--jsonl',) if name.endswith('jsonl') else ()
    yield Case(
      ('generate', '--checkpoint=model', f'--input={name}', *jsonl),
      (name,),
      {name: data},
    )
  # Where something is in the way.
  yield Case(
    ('train', f'--config={TINY}', '--workdir=file'), ('file',), {'file': 'x'}
  )
  yield Case(
    ('train', f'--config={TINY}', '--workdir=file/run'),
    ('file',),
    {'file': 'x'},
  )
  yield Case(('doctor', '--workdir=file'), ('file',), {'file': 'x'})
  yield Case(('doctor', '--workdir=nowhere'), ('nowhere',))
  yield Case(('report', 'file'), ('file',), {'file': 'x'})
  yield Case(('report', ''), ('workdir',))
  yield Case(
    ('convert', '--from=model', '--to=st_moe:file/x'), ('file',), {'file': 'x'}
  )
  yield Case(
    ('train', f'--config={TINY}', '--workdir=' + 'x' * 300), ('x' * 20,)
  )
  yield Case(('train', f'--config={TINY}', '--workdir=a\0b'), ('workdir',))


def all_cases() -> list[Case]:
  found = {}
  for part in (of_fields, of_verbs, of_flags, of_files):
    for case in part():
      found.setdefault(case.name, case)
  return list(found.values())


# Trying.


def attempt(case: Case) -> tuple[str, str]:
  """('fine' or what is wrong, what was said) of a case, in this process."""
  out, err = io.StringIO(), io.StringIO()
  code = None
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      cli.main([*case.argv])
  except SystemExit as e:
    code = e.code
  except Exception as e:
    return 'trace', f'{type(e).__name__}: {e}'[:500]
  said = err.getvalue() + out.getvalue()
  return judged(case, code, said), said[-600:]


def judged(case: Case, code, said: str) -> str:
  if code == 0:
    return 'accepted'
  if 'Traceback' in said:
    return 'trace'
  if not any(name in said for name in case.names):
    return 'unnamed'
  return 'fine'


def lay(files: Mapping[str, object]) -> None:
  """Puts what a case needs into the working directory."""
  for name, data in files.items():
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
      path.mkdir()
    elif data == 'FIFO':
      os.mkfifo(path)
    elif data == 'HUGE':
      with path.open('wb') as f:
        f.truncate(2**33)
    elif isinstance(data, str) and data.startswith('-> '):
      path.symlink_to(data.removeprefix('-> '))
    else:
      path.write_bytes(data.encode() if isinstance(data, str) else data)


def _serve() -> None:
  """Reads numbers of cases, answers each with a line of JSON."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  cases = all_cases()
  with tempfile.TemporaryDirectory() as home:
    os.environ['ST_MOE_DATA'] = home
    _model(f'{home}/model')
    for line in sys.stdin:
      case = cases[int(line)]
      before, path = dict(os.environ), [*sys.path]
      with tempfile.TemporaryDirectory() as here:
        os.chdir(here)
        os.symlink(f'{home}/model', 'model')
        lay(case.files)
        verdict, said = attempt(case)
        os.chdir('/')
      os.environ.clear()
      os.environ.update(before)
      sys.path[:] = path
      print(json.dumps([verdict, said]), file=answers, flush=True)


def _model(where: str) -> None:
  """A checkpoint of a random model that reads bytes."""
  import numpy as np

  from st_moe.interop import ours
  from st_moe.model.transformer import Transformer
  from tests.helpers import random_params, tiny

  made = config.Config(model=tiny(vocab_size=360))
  one = np.ones((1, 1), np.int32)
  params = random_params(Transformer(made.model), one, one, one)
  ours.save(where, params, made, b'')


class _Worker:
  """A process that tries cases; another one, once it died or hung."""

  def __init__(self):
    self._process = None

  def ask(self, number: int) -> tuple[str, str]:
    if self._process is None:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'tests.fuzz', '--serve'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, 'PYTHONPATH': os.getcwd(), 'JAX_PLATFORMS': 'cpu'},
      )
    process, late = self._process, []
    timer = threading.Timer(
      SECONDS, lambda: (late.append(True), process.kill())
    )
    timer.start()
    print(number, file=process.stdin, flush=True)
    line = process.stdout.readline()
    timer.cancel()
    if line:
      return tuple(json.loads(line))
    self.close()
    return ('endless' if late else 'died'), ''

  def close(self):
    if self._process:
      self._process.kill()
      self._process.wait()
    self._process = None


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', default='fuzz.jsonl')
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--only', default='', help='cases with this in the name')
  parser.add_argument('--serve', action='store_true')
  flags = parser.parse_args()
  if flags.serve:
    _serve()
    return
  output = pathlib.Path(flags.output)
  done = {}
  if output.exists():
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    done = {row['case']: row for row in rows}
  cases, waiting, lock = all_cases(), queue.Queue(), threading.Lock()
  for number, case in enumerate(cases):
    if case.name not in done and flags.only in case.name:
      waiting.put(number)

  def work():
    worker = _Worker()
    while True:
      try:
        number = waiting.get_nowait()
      except queue.Empty:
        return worker.close()
      began = time.monotonic()
      verdict, said = worker.ask(number)
      row = {
        'case': cases[number].name,
        'verdict': verdict,
        'said': said,
        'seconds': round(time.monotonic() - began, 2),
      }
      with lock, output.open('a') as f:
        f.write(json.dumps(row) + '\n')
        done[row['case']] = row
        if verdict != 'fine':
          print(f'{verdict}: {row["case"]}\n  {said}', flush=True)

  threads = [threading.Thread(target=work) for _ in range(flags.workers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  totals = collections.Counter(row['verdict'] for row in done.values())
  print(f'{sum(totals.values())} wrong inputs: {dict(totals)}')
  sys.exit(int(set(totals) != {'fine'}))


if __name__ == '__main__':
  main()
