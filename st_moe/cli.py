# PYTHON_ARGCOMPLETE_OK
"""The command `st-moe`: what its verbs do, and errors in plain words."""

import contextlib
import os
import pathlib
import shutil
import sys

from st_moe import backend, signals, stdio, terminal, verbs
from st_moe.flags import twice
from st_moe.infer import generate_flags
from st_moe.plan import plan_flags


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


def run(argv: list[str]) -> int:
  """Parses and runs; returns the exit status."""
  parser, known = verbs.parser()
  verbs.complete(parser, known)
  if not argv:
    parser.print_help()
    return 2
  if argv[0] not in known and parser.parse_args(argv).version:
    print(_version())
    return 0
  verb, rest = argv[0], argv[1:]
  flags, overrides = known[verb].read(rest)
  flags.macros = _macros(flags)
  for name in _REQUIRED.get(verb, ()):
    if getattr(flags, name) is None:
      known[verb].error(f'the following arguments are required: --{name}')
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

    said = {}
    if flags.macros:
      from st_moe import gin_file

      said = gin_file.fields(flags.macros)
      # Flags say which tasks; the model is the checkpoint's.
      passed = {'data.mixture', 'data.batch_size', 'data.seed'}
      kept = filter(evaluate.settable, said.keys() - passed)
      said = {name: said[name] for name in kept}
    evaluate.evaluate(
      flags.checkpoint,
      mixture=[name for name in flags.mixture.split(',') if name],
      output=flags.output,
      vocabulary=flags.vocabulary,
      overrides={**said, **overrides},
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
