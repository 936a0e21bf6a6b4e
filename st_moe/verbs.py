"""The verbs of `st-moe`, their flags, and what a shell completes of them."""

import os
from collections.abc import Mapping

from st_moe.fields import Count, CountOr0
from st_moe.flags import Parser
from st_moe.infer import generate_flags
from st_moe.plan import plan_flags

VERBS = {
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

EXAMPLES = {
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


def _example(verb: str) -> str:
  return f'example:\n  st-moe {verb} {EXAMPLES[verb]}\n'


def parser() -> tuple[Parser, dict[str, Parser]]:
  """The parser of the command, and that of each verb."""
  command = Parser(
    prog='st-moe',
    description='Sparse expert encoder-decoder models in JAX.',
    epilog=_EPILOG,
  )
  command.add_argument(
    '--version', action='store_true', help='of st_moe and what it stands on'
  )
  verbs = command.add_subparsers(dest='verb', metavar='VERB')
  made = {
    name: verbs.add_parser(
      name, help=text, description=text, epilog=_example(name) + _EPILOG
    )
    for name, text in VERBS.items()
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
  return command, made


def complete(command: Parser, parsers: Mapping[str, Parser]) -> None:
  """Tells a shell that asks what may follow, and ends; else does nothing.

  `eval "$(register-python-argcomplete st-moe)"` makes bash and zsh ask.
  """
  if '_ARGCOMPLETE' not in os.environ:
    return
  import argcomplete

  from st_moe import config_file, gin_file

  configs = [path.stem for path in config_file.shipped()]
  asked = os.environ.get('COMP_LINE', '').rpartition(' ')[2]
  dotted = {'--config': config_file.leaves, '--gin': lambda: gin_file.MACROS}
  for parser in parsers.values():
    flags = parser._option_string_actions
    if '--config' in flags:
      flags['--config'].completer = argcomplete.ChoicesCompleter(configs)
    for flag, names in dotted.items():
      # They are many: not before somebody wants one.
      if flag in flags and asked.startswith(f'{flag}.'):
        for name in names():
          parser.add_argument(f'{flag}.{name}')
  argcomplete.autocomplete(command, always_complete_options='long')
