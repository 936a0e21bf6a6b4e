"""`st-moe generate`: its flags, and how they are put together.

Needs nothing but the standard library until it runs: `--help` waits for none.
"""

from typing import Annotated, Literal

from st_moe.fields import Above0, AtLeast0, Range, Seed, Size, SizeOr0, Text

_Finite = Annotated[float, Range()]
# Above it each step would hold more answers than any machine has room for.
_Few = Annotated[int, Range(1, 2**16)]
_Share = Annotated[float, Range(0, 1, above=True)]

# Flag -> rule, default, help. Those of decoding have the names they have in
# `decode.methods.Method` and `infer.generate.Options`.
_ANSWER_FLAGS = {
  'max_length': (Size, 64, 'tokens of an answer at most'),
  'temperature': (AtLeast0, 0.0, 'of sampling; 0 is greedy'),
  'top_k': (SizeOr0, 0, 'sample among so many likeliest tokens; 0: all'),
  'top_p': (_Share, 1.0, 'sample among the fewest that hold this probability'),
  'seed': (Seed, 0, 'of sampling'),
  'num_beams': (_Few, 1, 'above 1: beam search'),
  'length_penalty': (_Finite, 1.0, 'beam scores are over length ** this'),
  'early_stopping': (
    Literal['true', 'false', 'never'],
    'false',
    'of beam search: true, false or never',
  ),
  'num_return': (_Few, 1, 'answers a prompt'),
  'repetition_penalty': (
    Above0,
    1.0,
    'above 1: tokens said are less likely',
  ),
  'prefix': (str, '', 'what every answer begins with'),
  'k': (Size, None, 'experts per token, in place of the config'),
  'task': (str, '', 'whose prompts these are, if the model routes by task'),
  'long': (
    Literal['cut', 'refuse'],
    'cut',
    'prompts longer than --max_inputs: cut or refuse',
  ),
}
_ANSWER_LISTS = {
  'stop': 'an answer ends before this text',
  'forbid': 'a token never said',
  'off': 'an expert switched off: STACK.LAYER.EXPERT, * is any',
  'on': 'an expert that gets every token',
}


def add(parser) -> None:
  parser.add_argument('prompts', nargs='*', metavar='PROMPT')
  parser.add_argument(
    '--checkpoint',
    required=True,
    help='a workdir, its checkpoints/STEP, or FORMAT:PLACE as hf:DIR',
  )
  for name, text in {
    'input': 'a file of prompts, one a line; without one: standard input',
    'output': 'a file that grows, and goes on growing if run again',
    'vocabulary': "a SentencePiece model or 'bytes'; '': the checkpoint's",
    'targets': 'the field whose text is scored, instead of answering',
  }.items():
    rule = str if name == 'vocabulary' else Text
    parser.add_argument(f'--{name}', default='', rule=rule, help=text)
  parser.add_argument(
    '--jsonl', action='store_true', help='lines are JSON objects'
  )
  parser.add_argument('--field', default='inputs', help='of an object: prompt')
  parser.add_argument(
    '--fill', action='store_true', help='answer by filling <extra_id_N> in'
  )
  parser.add_argument('--batch_size', rule=_Few, default=16)
  parser.add_argument(
    '--max_inputs', rule=SizeOr0, default=0, help='tokens; 0: as trained'
  )
  for name, (rule, default, text) in _ANSWER_FLAGS.items():
    parser.add_argument(f'--{name}', rule=rule, default=default, help=text)
  for name, text in _ANSWER_LISTS.items():
    parser.add_argument(
      f'--{name}', metavar='TEXT', action='append', default=[], help=text
    )
  parser.add_argument(
    '--contrast',
    metavar='BETA',
    rule=AtLeast0,
    default=None,
    help='self-contrast of strong and weak routing (0.5 is usual)',
  )
  parser.add_argument('--contrast_alpha', rule=_Share, default=0.1)
  parser.add_argument('--contrast_rank', rule=Size, default=2)


def check(flags) -> None:
  """Raises where flags contradict each other."""
  if flags.targets and not flags.jsonl:
    raise ValueError('--targets names a field of JSON objects: add --jsonl.')
  if flags.prompts and flags.input:
    raise ValueError('Prompts as arguments or in --input, not both.')


def run(flags) -> None:
  import warnings

  from st_moe.decode import methods
  from st_moe.infer import generate, load, output, stream

  words = {'true': True, 'false': False}
  given = {n: getattr(flags, n) for n in (*_ANSWER_FLAGS, *_ANSWER_LISTS)}
  given['early_stopping'] = words.get(
    flags.early_stopping, flags.early_stopping
  )
  if flags.contrast is not None:
    given['contrast'] = methods.Contrast(
      flags.contrast, flags.contrast_alpha, flags.contrast_rank
    )
  options = generate.Options.of(**given)
  warnings.formatwarning = lambda message, *_, **__: f'st-moe: {message}\n'
  form = stream.Format(flags.jsonl, flags.field, flags.targets, flags.fill)
  if flags.input:
    stream.check(flags.input, form)
  if flags.output:
    output.check_output(flags.output, flags.input)
  loaded = load.load(
    flags.checkpoint, vocabulary=flags.vocabulary, for_answers=True
  )
  generator = loaded.serve(
    max_inputs=flags.max_inputs, batch_size=flags.batch_size
  )
  stream.run(
    generator,
    options,
    form,
    source=flags.input,
    prompts=flags.prompts,
    output=flags.output,
    about={
      'checkpoint': loaded.path,
      'vocabulary': loaded.vocabulary.fingerprint,
      'max_inputs': generator.max_inputs,
    },
  )
