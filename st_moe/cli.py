"""The command `st-moe`: its verbs, their flags, and errors in plain words."""

import contextlib
import os
import pathlib
import shutil
import sys

from st_moe import backend, signals, stdio, terminal
from st_moe.fields import Count, CountOr0
from st_moe.flags import Parser, twice
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
  'methods': 'mechanisms of the literature that are here, or one of them',
  'list': 'configs, tasks or mechanisms there are',
  'config': 'show a resolved config, or `diff` two of them',
}

_EXAMPLES = {
  'train': '--config=st_moe_tiny --workdir=runs/tiny',
  'grid': '--config=st_moe_tiny --workdir=runs/k --vary=seed=0,1',
  'evaluate': '--checkpoint=runs/tuned --mixture=tiny_glue',
  'generate': "--checkpoint=runs/tuned 'a prompt' 'another'",
  'convert': '--from=hf:google/switch-base-8 --to=st_moe:runs/switch --verify',
  'plan': '--config=st_moe_32b --topology=v5p:4x4x8',
  'prepare': '--config=st_moe_tiny --vocabulary=my.model',
  'report': 'runs/tiny runs/tuned --curves=curves.png',
  'doctor': '--workdir=runs',
  'methods': 'gshard',
  'list': 'configs',
  'config': 'diff st_moe_tiny st_moe_tiny:dense',
}

_EPILOG = """
--config=configs/NAME.py[:argument,argument=value] names a config file;
--config.path.to.field=value sets a field of it.
ST_MOE_TRACEBACK=1 shows where in the code an error arose.
"""


_FORMATS = """
FORMAT:PLACE is one of
  PLACE            a run of `st-moe train`, or its checkpoints/STEP
  st_moe:PLACE     the same; as a target, a new directory
  hf:PLACE         HuggingFace's T5, T5 1.1, Flan-T5, mT5, Switch: a directory,
                   or, to read, an id of the hub
  t5x:PLACE        T5X's and Flaxformer's checkpoint_N: written in the old
                   layout, read in either
  t5x_orbax:PLACE  the same, written as Orbax does today
  mtf:PLACE        Mesh-TensorFlow's model.ckpt-N, read only
"""


def main(argv: list[str] | None = None) -> None:
  """Runs a verb; a user's mistake is one message and exit status 1."""
  try:
    sys.exit(run(sys.argv[1:] if argv is None else argv))
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    os._exit(0)  # `st-moe ... | head`; nobody is left to be told.
  except Exception as e:
    if os.environ.get('ST_MOE_TRACEBACK') or not _is_plain(e):
      raise
    terminal.say(f'st-moe: {_plainly(e)}', file=sys.stderr)
    sys.exit(1)


@contextlib.contextmanager
def _lasting():
  """Work of days: SIGTERM ends it in order, and what it prints never does."""
  with stdio.lasting(), signals.orderly(interrupt=True):
    yield


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
    plain = _is_plain(e) or hosts.is_loss(e)
    if os.environ.get('ST_MOE_TRACEBACK') or not plain:
      sys.excepthook(*sys.exc_info())
    if text := hosts.last_words(e, _plainly(e)):
      terminal.say(f'st-moe: {text}', file=sys.stderr)
    hosts.leave(1)
  except KeyboardInterrupt:
    if hosts.count() == 1:
      raise
    hosts.leave(130)


# What the system says of a file, and the way out.
_OF_FILES = {
  'ENOENT': 'no such file or folder.',
  'EISDIR': 'is a folder, where a file is needed.',
  'ENOTDIR': 'a part of this path is a file, where a folder is needed.',
  'EEXIST': 'is there already.',
  'EACCES': 'you may not read or write here: look at its owner and rights.',
  'EPERM': 'you may not do this here: look at its owner and rights.',
  'EROFS': 'this file system can only be read: name another place.',
  'ENAMETOOLONG': 'this name is too long.',
  'ELOOP': 'its links lead in a circle.',
  'EMFILE': 'too many files are open; `ulimit -n` raises the limit.',
}


def _is_plain(e: Exception) -> bool:
  """Whether a user is told in words: a mistake, or a machine that is full."""
  return isinstance(e, ValueError | OSError | MemoryError) or _is_full(e)


def _is_full(e: Exception) -> bool:
  # The compiler's own error; its class is not worth waiting for JAX.
  return isinstance(e, MemoryError) or (
    type(e).__name__ in ('JaxRuntimeError', 'XlaRuntimeError')
    and any(sign in str(e) for sign in ('RESOURCE_EXHAUSTED', 'bad_alloc'))
  )


def _plainly(e: Exception) -> str:
  if _is_full(e):
    said = str(e).partition('\n')[0].removeprefix('RESOURCE_EXHAUSTED: ')
    return (
      f'Out of memory: {said.rstrip(".") or "the machine has no more"}. Less is'
      ' held with a smaller batch (--config.data.batch_size in training,'
      ' --config.evaluate.batch_size, --batch_size of answers), more'
      ' --config.microbatches, --config.model.remat=full, some'
      ' --config.loss.positions, a smaller --max_length, or parameters split'
      ' over more devices (--config.mesh.fsdp).'
    )
  if isinstance(e, OSError) and e.errno:
    import errno

    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      where = f' of {e.filename}' if e.filename else ''
      return (
        f'The disk{where} is full. What was saved before is intact: free some'
        ' space and run the same command again.'
      )
    what = _OF_FILES.get(errno.errorcode.get(e.errno), f'{e.strerror}.')
    return f'{e.filename}: {what}' if e.filename else what
  return str(e)


def _example(verb: str) -> str:
  return f'example:\n  st-moe {verb} {_EXAMPLES[verb]}\n'


def _parser() -> tuple[Parser, dict[str, Parser]]:
  """The parser of the command, and that of each verb."""
  parser = Parser(
    prog='st-moe',
    description='Sparse expert encoder-decoder models in JAX.',
    epilog=_EPILOG,
  )
  parser.add_argument(
    '--version', action='store_true', help='of st_moe and what it stands on'
  )
  verbs = parser.add_subparsers(dest='verb', metavar='VERB')
  made = {
    name: verbs.add_parser(
      name, help=text, description=text, epilog=_example(name) + _EPILOG
    )
    for name, text in _VERBS.items()
  }
  for name in ('train', 'grid', 'prepare', 'plan', 'config'):
    made[name].add_argument(
      '--config', metavar='FILE[:ARG]', default='', rule=str
    )
  for name in ('train', 'grid', 'prepare', 'plan', 'config', 'evaluate'):
    made[name].add_argument(
      '--gin_file',
      metavar='FILE',
      action='append',
      default=[],
      help='in place of --config: macros as of T5X; later files win',
    )
    made[name].add_argument(
      '--gin',
      metavar='NAME=VALUE',
      action='append',
      default=[],
      help='a macro; also --gin.NAME=VALUE',
    )
  for name in ('train', 'grid', 'prepare', 'evaluate'):
    made[name].add_argument(
      '--module_import',
      metavar='MODULE',
      action='append',
      default=[],
      help='imported first: where your own seqio tasks are registered',
    )
    made[name].add_argument(
      '--data_dir',
      default='',
      rule=str,
      help="of the files of tasks; '': $ST_MOE_DATA",
    )
  for name in ('train', 'grid'):
    made[name].add_argument('--workdir', help='where all of it goes')
  for name in ('train', 'grid', 'evaluate'):
    several = made[name].add_argument_group(
      'several processes',
      'each runs the same command; Slurm and TPU pods need none of these',
    )
    several.add_argument(
      '--coordinator', metavar='HOST:PORT', default='', help='of process 0'
    )
    several.add_argument('--processes', metavar='N', rule=Count)
    several.add_argument('--process', metavar='I', rule=CountOr0, help='from 0')
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
    help='values of a field, or of fields that change together: F+G=a+x,b+y;'
    ' config=FILE,FILE are configs side by side',
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
    '--checkpoint', help='a workdir, or its checkpoints/STEP'
  )
  made['evaluate'].add_argument(
    '--mixture',
    default='',
    rule=str,
    help="NAME or NAME,NAME; '': what it trained on",
  )
  made['evaluate'].add_argument(
    '--vocabulary', default='', rule=str, help="'': the checkpoint's"
  )
  made['evaluate'].add_argument(
    '--output', default='', help='in place of WORKDIR/evaluation'
  )
  made['evaluate'].add_argument(
    '--trust_config',
    action='store_true',
    help='read the files that a checkpoint names, though others trained it',
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
  made['convert'].epilog = _example('convert') + _FORMATS + _EPILOG
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
  made['methods'].add_argument(
    'name', nargs='?', default='', help='an entry, a row (S0-14) or a config'
  )
  made['list'].add_argument('what', choices=('configs', 'tasks', 'methods'))
  made['config'].add_argument(
    'files', nargs='*', help='diff CONFIG CONFIG, each FILE[:ARG] or a workdir'
  )
  return parser, made


def run(argv: list[str]) -> int:
  """Parses and runs; returns the exit status."""
  parser, verbs = _parser()
  if not argv:
    parser.print_help()
    return 2
  if argv[0] not in verbs and parser.parse_args(argv).version:
    print(_version())
    return 0
  verb, rest = argv[0], argv[1:]
  flags, overrides = verbs[verb].read(rest)
  flags.macros = _macros(flags)
  for name in _REQUIRED.get(verb, ()):
    if getattr(flags, name) is None:
      verbs[verb].error(f'the following arguments are required: --{name}')
  if getattr(flags, 'data_dir', ''):
    field = 'data.data_dir'
    if overrides.setdefault(field, flags.data_dir) != flags.data_dir:
      raise twice('--data_dir', flags.data_dir, overrides[field])
  if overrides and verb in ('report', 'doctor', 'methods', 'list', 'generate'):
    raise ValueError(f'`st-moe {verb}` has no config to set fields of.')
  return _RUN[verb](flags, overrides) or 0


def _version() -> str:
  """'st_moe 0.1.0, Python 3.12.1, jax 0.10.2'; imports none of them."""
  import importlib.metadata
  import platform

  found = {}
  for name in ('st_moe', 'jax'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = '(not installed)'
  return (
    f'st_moe {found["st_moe"]}, Python {platform.python_version()},'
    f' jax {found["jax"]}'
  )


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
  if getattr(flags, 'module_import', ()):
    # Behind everything else: a jax.py that lies here is not JAX.
    sys.path.append(os.getcwd())
  from st_moe import config_file

  for name in getattr(flags, 'module_import', ()):
    with config_file.blamed(f'--module_import={name}'):
      importlib.import_module(name)


# What a flag has to say, or a macro that stands for it.
_REQUIRED = {
  'train': ('workdir',), 'grid': ('workdir',), 'evaluate': ('checkpoint',)
}  # fmt: skip


def _macros(flags) -> dict:
  """Those of --gin_file and --gin.NAME; what is a flag here becomes one."""
  if not getattr(flags, 'gin_file', ()):
    if getattr(flags, 'gin', ()):
      raise ValueError(
        f'--gin.{flags.gin[0]}: a macro of which file? Add --gin_file=FILE.'
      )
    return {}
  if getattr(flags, 'config', ''):
    raise ValueError(
      f'--config={flags.config} and --gin_file={flags.gin_file[0]} both say'
      ' what to run: which?'
    )
  from st_moe import gin_file

  macros = gin_file.macros(flags.gin_file, flags.gin)
  for macro, name in gin_file.FLAGS.items():
    value, said = macros.get(macro), vars(flags).get(name)
    if name not in flags or value is None:
      continue
    value = [value] if isinstance(said, list) else value
    if said and said != value:
      raise twice(f'--{name}', said, value)
    setattr(flags, name, value)
  return macros


def _load(flags, overrides, path=''):
  path = path or flags.config
  if not path and not flags.macros:
    raise ValueError(
      'Which config? Pass --config=configs/NAME.py; `st-moe list configs` shows'
      ' them.'
    )
  from st_moe import config_file

  def base(init):
    from st_moe.interop import convert

    return config_file.to_dict(convert.open_source(init).config)

  if flags.macros:
    from st_moe import gin_file

    values = {'name': pathlib.Path(flags.gin_file[0]).stem}
    values |= gin_file.values(flags.macros)
    where = ' '.join(flags.gin_file)
    config = config_file.settle(values, overrides, base=base, where=where)
  else:
    config = config_file.load(path, overrides, base=base)
  # What stands in tables of mechanisms, which a config does not know.
  from st_moe.model import parts
  from st_moe.train import after, terms

  parts.check(config.model)
  terms.check(config.model, config.microbatches)
  after.check(config.optimizer, config.model, config.init)
  return config


@_lasting()
def _train(flags, overrides):
  _start(flags)
  with _hosts(flags, preemptible=True):
    config = _load(flags, overrides)
    from st_moe.run import loop

    loop.train(
      config,
      flags.workdir,
      config_path=flags.config,
      profile=flags.profile,
      modules=flags.module_import,
    )


@_lasting()
def _grid(flags, overrides):
  _start(flags)
  with _hosts(flags, preemptible=True):
    from st_moe.run import grid

    def make(cell):
      if 'config' in cell and (flags.config or flags.gin_file):
        said = flags.config or ' '.join(flags.gin_file)
        raise twice('--config', said, cell['config'])
      for field in overrides.keys() & cell:
        raise twice(f'--config.{field}', overrides[field], cell[field])
      fields = {**overrides, **cell}
      return _load(flags, fields, fields.pop('config', ''))

    grid.run(
      make,
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
  from st_moe.data import mixture, pipeline, vocabulary

  show = lambda name, done, total: terminal.say(
    f'{name}: part {done} of {total}'
  )
  library = mixture.Library(config.data, progress=show)
  library.check()
  if config.data.vocabulary:
    vocab = vocabulary.load(config.data.vocabulary)
  else:
    path = flags.vocabulary or f'{config.name}.model'
    vocab = library.train_vocabulary(path)
    terminal.say(
      f'wrote {path}: {vocab.size} ids; use --config.data.vocabulary={path}'
    )
  counts = pipeline.prepare(library.read_by(vocab), note=terminal.say)
  for name, splits in counts.items():
    for split, count in splits.items():
      terminal.say(
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
      trust_config=flags.trust_config,
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
  terminal.say('\n'.join(lines))


def _plan(flags, overrides):
  def load():
    _start(flags)
    return _load(flags, overrides)

  return plan_flags.run(flags, load)


def _report(flags, overrides):
  from st_moe.run import compare

  compare.compare(flags.workdirs, baseline=flags.baseline)
  if flags.curves:
    runs = [*flags.workdirs, *filter(None, [flags.baseline])]
    compare.draw_curves(runs, flags.curves)


def _doctor(flags, overrides):
  _start(flags)
  from st_moe import doctor

  return doctor.examine(flags.workdir)


def _methods(flags, overrides):
  _start(flags)
  from st_moe import methods

  if flags.name:
    terminal.say('\n\n\n'.join(methods.cards(flags.name)))
    return
  at_terminal = sys.stdout.isatty()  # Who pipes it on has all the room.
  columns = shutil.get_terminal_size().columns if at_terminal else 0
  terminal.say(methods.listed(columns))


def _list(flags, overrides):
  from st_moe import config_file, gin_file, shipped

  if flags.what == 'configs':
    rows = []
    for path in config_file.shipped():
      arguments = config_file.arguments(path)
      shown = ', '.join(f'{k}={v}' for k, v in arguments.items())
      text = f'{config_file.summary(path)}\narguments: {shown or "none"}'
      inside = path.relative_to(shipped.folder('configs')).as_posix()
      rows.append((f'configs/{inside}', text))
    for path in gin_file.files():
      name = '/'.join(path.parts[-4:])
      rows.append((name, path.read_text().split('\n')[0].lstrip('# ')))
    _print_columns(rows)
  elif flags.what == 'tasks':
    _start(flags)
    from st_moe.data import registry

    terminal.say('\n'.join(registry.names()))
    if not registry.has_seqio():
      terminal.say(registry.HOW_TO_SEQIO)
  else:
    _start(flags)
    from st_moe import methods

    tables = methods.entries()
    _print_columns(dict.fromkeys((m.kind, m.name, m.summary) for m in tables))


def _print_columns(rows) -> None:
  """Columns as wide as they need; the last goes on below itself."""
  from rich import table

  columns = table.Table.grid(padding=(0, 2, 0, 0))
  *names, texts = zip(*rows, strict=True)
  for _ in names:
    columns.add_column(no_wrap=True)
  for row in zip(*names, texts, strict=True):
    columns.add_row(*row)
  terminal.console().print(columns)


def _config(flags, overrides):
  from st_moe import config_file

  if flags.files and flags.files[0] == 'diff' and len(flags.files) == 3:
    a, b = (config_file.read(name) for name in flags.files[1:])
    for line in config_file.diff(a, b):
      terminal.say(line)
  elif flags.files:
    raise ValueError(
      f'`st-moe config {" ".join(flags.files)}`: only `config diff A B`, or'
      ' `config --config=FILE` to see one whole.'
    )
  else:
    values = config_file.to_dict(_load(flags, overrides))
    print(config_file.to_json(values))


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
  'methods': _methods,
  'list': _list,
  'config': _config,
}

if __name__ == '__main__':
  if not sys.flags.safe_path:
    # `python -m` looks into the current folder first, where a jax.py that came
    # with a checkpoint would be taken for JAX. That of a clone stays, as last.
    first = sys.path.pop(0)
    if first == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
      sys.path.append(first)
  main()
