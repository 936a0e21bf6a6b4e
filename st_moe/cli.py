"""The command `st-moe`: its verbs, their flags, and errors in plain words."""

import argparse
import contextlib
import os
import sys

from st_moe import backend
from st_moe.infer import generate_flags
from st_moe.plan import plan_flags

_VERBS = {
  'train': 'pre-train or fine-tune: config, workdir -> checkpoints, metrics',
  'grid': 'train a config under all values of some fields -> one table',
  'evaluate': 'score a checkpoint on its tasks -> metrics.json, predictions',
  'generate': 'answer prompts: arguments, lines of a file, or a conversation',
  'convert': "HuggingFace's and our checkpoints into each other",
  'plan': 'what a run costs on machines you have not bought yet',
  'prepare': 'train a vocabulary, write a mixture to indexed shards',
  'report': 'stages and task scores of finished runs, side by side',
  'doctor': 'devices, versions, memory, write access, data found',
  'list': 'configs, tasks or methods there are',
  'config': 'show a resolved config, or `diff` two of them',
}

_EPILOG = """
--config=configs/NAME.py[:argument,argument=value] names a config file;
--config.path.to.field=value sets a field of it.
ST_MOE_TRACEBACK=1 shows where in the code an error arose.
"""


def main(argv: list[str] | None = None) -> None:
  """Runs a verb; a user's mistake is one message and exit status 1."""
  try:
    sys.exit(run(sys.argv[1:] if argv is None else argv))
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    os._exit(0)  # `st-moe ... | head`; nobody is left to be told.
  except (ValueError, OSError) as e:
    if os.environ.get('ST_MOE_TRACEBACK'):
      raise
    print(f'st-moe: {_plainly(e)}', file=sys.stderr)
    sys.exit(1)


@contextlib.contextmanager
def _hosts(flags, *, preemptible: bool = False):
  """Work that several processes may do together; if one fails, all end."""
  from st_moe import hosts

  hosts.start(
    flags.coordinator, flags.processes, flags.process, preemptible=preemptible
  )
  try:
    yield
    hosts.end()
  except SystemExit:
    hosts.end()
    raise
  except Exception as e:
    if hosts.count() == 1:
      raise
    plain = isinstance(e, ValueError | OSError) or hosts.is_loss(e)
    if os.environ.get('ST_MOE_TRACEBACK') or not plain:
      sys.excepthook(*sys.exc_info())
    if text := hosts.last_words(e, _plainly(e)):
      print(f'st-moe: {text}', file=sys.stderr)
    hosts.leave(1)
  except KeyboardInterrupt:
    if hosts.count() == 1:
      raise
    hosts.leave(130)


def _plainly(e: Exception) -> str:
  import errno

  if isinstance(e, OSError) and e.errno == errno.ENOSPC:
    where = f' of {e.filename}' if e.filename else ''
    return (
      f'The disk{where} is full. What was saved before is intact: free some'
      ' space and run the same command again.'
    )
  return str(e)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='st-moe',
    description='Sparse expert encoder-decoder models in JAX.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=_EPILOG,
    allow_abbrev=False,
  )
  verbs = parser.add_subparsers(dest='verb', metavar='VERB')
  made = {
    name: verbs.add_parser(
      name,
      help=text,
      description=text,
      epilog=_EPILOG,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    for name, text in _VERBS.items()
  }
  for name in ('train', 'grid', 'prepare', 'plan', 'config'):
    made[name].add_argument('--config', metavar='FILE[:ARG]', default='')
  for name in ('train', 'grid', 'prepare', 'evaluate'):
    made[name].add_argument(
      '--module_import',
      metavar='MODULE',
      action='append',
      default=[],
      help='imported first: where your own seqio tasks are registered',
    )
    made[name].add_argument(
      '--data_dir', default='', help="of the files of tasks; '': $ST_MOE_DATA"
    )
  for name in ('train', 'grid'):
    made[name].add_argument('--workdir', required=True)
  for name in ('train', 'grid', 'evaluate'):
    several = made[name].add_argument_group(
      'several processes',
      'each runs the same command; Slurm and TPU pods need none of these',
    )
    several.add_argument(
      '--coordinator', metavar='HOST:PORT', default='', help='of process 0'
    )
    several.add_argument('--processes', metavar='N', type=int)
    several.add_argument('--process', metavar='I', type=int, help='from 0')
  made['train'].add_argument(
    '--profile',
    metavar='START:STOP',
    default='',
    help='steps to trace into WORKDIR/profile: 10:13 are 11, 12 and 13',
  )
  made['grid'].add_argument(
    '--vary',
    metavar='FIELD=A,B',
    action='append',
    required=True,
    help='values of a field, or of fields that change together: F+G=a+x,b+y',
  )
  made['grid'].add_argument(
    '--metric', action='append', default=[], help="columns: 'eval/TASK/NAME'"
  )
  made['prepare'].add_argument(
    'what', nargs='?', choices=('superglue',), help='a benchmark to download'
  )
  made['prepare'].add_argument(
    '--vocabulary', default='', help='where a new vocabulary goes'
  )
  made['evaluate'].add_argument(
    '--checkpoint', required=True, help='a workdir, or its checkpoints/STEP'
  )
  made['evaluate'].add_argument(
    '--mixture', default='', help="NAME or NAME,NAME; '': what it trained on"
  )
  made['evaluate'].add_argument(
    '--vocabulary', default='', help="'': the checkpoint's"
  )
  made['evaluate'].add_argument(
    '--output', default='', help="'': WORKDIR/evaluation"
  )
  made['evaluate'].add_argument(
    '--all', action='store_true', help='every checkpoint of a workdir'
  )
  made['evaluate'].add_argument(
    '--submission',
    action='store_true',
    help="also write superglue.zip, as SuperGLUE's leaderboard takes it",
  )
  generate_flags.add(made['generate'])
  for name, text in (('from', 'what to read'), ('to', 'a new place')):
    made['convert'].add_argument(
      f'--{name}', metavar='FORMAT:PLACE', required=True, help=text
    )
  made['convert'].add_argument(
    '--verify',
    action='store_true',
    help="compare logits with the source's own implementation",
  )
  plan_flags.add(made['plan'])
  made['report'].add_argument('workdirs', nargs='+')
  made['report'].add_argument(
    '--baseline', default='', help='a run fine-tuned alike from scratch'
  )
  made['report'].add_argument(
    '--curves',
    metavar='FILE.png',
    default='',
    help='draw validation losses over steps (.png, .svg or .pdf)',
  )
  made['doctor'].add_argument('--workdir', default='.')
  made['list'].add_argument('what', choices=('configs', 'tasks', 'methods'))
  made['config'].add_argument(
    'files', nargs='*', help='diff CONFIG CONFIG, each FILE[:ARG] or a workdir'
  )
  return parser


def run(argv: list[str]) -> int:
  """Parses and runs; returns the exit status."""
  parser = _parser()
  flags, rest = parser.parse_known_args(argv)
  if not flags.verb:
    parser.print_help()
    return 2
  overrides = _overrides(rest)
  if getattr(flags, 'data_dir', ''):
    overrides.setdefault('data.data_dir', flags.data_dir)
  if overrides and flags.verb in ('report', 'doctor', 'list', 'generate'):
    raise ValueError(f'`st-moe {flags.verb}` has no config to set fields of.')
  return _RUN[flags.verb](flags, overrides) or 0


def _overrides(rest: list[str]) -> dict[str, str]:
  """`--config.a.b=value` as {'a.b': 'value'}; anything else is refused."""
  found, rest = {}, list(rest)
  while rest:
    flag, equals, value = rest.pop(0).partition('=')
    if not flag.startswith('--config.'):
      raise ValueError(
        f'Unknown flag {flag!r}; fields of the config are --config.FIELD=VALUE,'
        ' the rest is in `st-moe VERB --help`.'
      )
    if not equals:
      if not rest:
        raise ValueError(f'{flag} needs a value: {flag}=VALUE.')
      value = rest.pop(0)
    found[flag.removeprefix('--config.')] = value
  return found


def _start(flags) -> None:
  """What must happen before JAX and TensorFlow do."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', os.path.join(backend.cache_dir(), 'compiled')
  )
  import importlib
  import logging

  if not backend.has_tpu():
    # Else libtpu, where it is installed, asks the network for one.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  command = os.path.basename(sys.argv[0]) in ('st-moe', 'cli.py')
  if backend.prepare(os.environ) and command:
    backend.start_anew(os.environ)
  # Orbax logs what it raises, with a trace; `main` says it in one line.
  if not os.environ.get('ST_MOE_TRACEBACK'):
    logging.getLogger('absl').setLevel(logging.CRITICAL)
  sys.path.insert(0, os.getcwd())
  for name in getattr(flags, 'module_import', ()):
    try:
      importlib.import_module(name)
    except ImportError as e:
      raise ValueError(f'--module_import={name}: {e}.') from None


def _load(flags, overrides):
  if not flags.config:
    raise ValueError(
      'Which config? Pass --config=configs/NAME.py; `st-moe list configs` shows'
      ' them.'
    )
  from st_moe import config_file

  def base(init):
    from st_moe.interop import convert

    return config_file.to_dict(convert.open_source(init).config)

  return config_file.load(flags.config, overrides, base=base)


def _train(flags, overrides):
  _start(flags)
  with _hosts(flags, preemptible=True):
    config = _load(flags, overrides)
    from st_moe.train import loop

    loop.train(
      config,
      flags.workdir,
      config_path=flags.config,
      profile=flags.profile,
      modules=flags.module_import,
    )


def _grid(flags, overrides):
  _start(flags)
  with _hosts(flags, preemptible=True):
    from st_moe.train import grid

    grid.run(
      lambda cell: _load(flags, {**overrides, **cell}),
      flags.vary,
      flags.workdir,
      metrics=flags.metric,
      config_path=flags.config,
      modules=flags.module_import,
    )


def _prepare(flags, overrides):
  _start(flags)
  if flags.what == 'superglue':
    from st_moe.data import download

    download.superglue(flags.data_dir)
    return
  config = _load(flags, overrides)
  from st_moe.data import pipeline, vocabulary

  pipeline.check(config.data)
  if config.data.vocabulary:
    vocab = vocabulary.load(config.data.vocabulary)
  else:
    path = flags.vocabulary or f'{config.name}.model'
    vocab = pipeline.train_vocabulary(
      config.data, path, config.data.vocabulary_size
    )
    print(
      f'wrote {path}: {vocab.size} ids; use --config.data.vocabulary={path}'
    )
  show = lambda name, done, total: print(f'{name}: part {done} of {total}')
  counts = pipeline.prepare(config.data, vocab, progress=show, note=print)
  for name, splits in counts.items():
    for split, count in splits.items():
      print(
        f'{name} {split}:', ', '.join(f'{v:,} {k}' for k, v in count.items())
      )


def _evaluate(flags, overrides):
  _start(flags)
  with _hosts(flags):
    from st_moe.infer import evaluate

    evaluate.evaluate(
      flags.checkpoint,
      mixture=[name for name in flags.mixture.split(',') if name],
      output=flags.output,
      vocabulary=flags.vocabulary,
      overrides=overrides,
      every_step=flags.all,
      submission=flags.submission,
    )


def _generate(flags, overrides):
  generate_flags.check(flags)
  _start(flags)
  generate_flags.run(flags)


def _convert(flags, overrides):
  # Needs no accelerator, and should neither wait for one nor fill it.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  _start(flags)
  from st_moe.interop import convert

  lines = convert.convert(
    getattr(flags, 'from'),
    flags.to,
    overrides=overrides,
    verify=flags.verify,
  )
  print('\n'.join(lines))


def _plan(flags, overrides):
  def load():
    _start(flags)
    return _load(flags, overrides)

  return plan_flags.run(flags, load)


def _report(flags, overrides):
  from st_moe.train import compare

  compare.compare(flags.workdirs, baseline=flags.baseline)
  if flags.curves:
    runs = [*flags.workdirs, *filter(None, [flags.baseline])]
    compare.draw_curves(runs, flags.curves)


def _doctor(flags, overrides):
  _start(flags)
  from st_moe import doctor

  return doctor.examine(flags.workdir)


def _list(flags, overrides):
  from st_moe import config_file

  if flags.what == 'configs':
    for path in config_file.shipped():
      print(f'configs/{path.name:24}{config_file.summary(path)}')
  elif flags.what == 'tasks':
    _start(flags)
    from st_moe.data import task_shards

    print('\n'.join(task_shards.registered()))
  else:
    _start(flags)
    from st_moe.model import dispatch, gates
    from st_moe.routing import losses, selectors

    for kind, table in {
      'gate': gates.GATES,
      'selector': selectors.SELECTORS,
      'dispatcher': dispatch.DISPATCHERS,
      'loss': losses.LOSSES,
    }.items():
      for name, method in table.items():
        first = (method.__doc__ or '').strip().splitlines()[0]
        print(f'{kind:12}{name:16}{first}')


def _config(flags, overrides):
  from st_moe import config_file

  if flags.files and flags.files[0] == 'diff' and len(flags.files) == 3:
    a, b = (config_file.read(name) for name in flags.files[1:])
    for line in config_file.diff(a, b):
      print(line)
  elif flags.files:
    raise ValueError(
      f'`st-moe config {" ".join(flags.files)}`: only `config diff A B`, or'
      ' `config --config=FILE` to see one whole.'
    )
  else:
    print(config_file.to_json(_load(flags, overrides)))


_RUN = {
  'train': _train,
  'grid': _grid,
  'evaluate': _evaluate,
  'generate': _generate,
  'convert': _convert,
  'plan': _plan,
  'prepare': _prepare,
  'report': _report,
  'doctor': _doctor,
  'list': _list,
  'config': _config,
}

if __name__ == '__main__':
  main()
