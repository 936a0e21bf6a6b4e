"""Texts in, texts out: batches of like lengths, each shape compiled once."""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from st_moe import paths, sharding
from st_moe.analysis import trace
from st_moe.config import ModelConfig, unknown
from st_moe.data.vocabulary import Vocabulary
from st_moe.decode import decoding, methods
from st_moe.decode.batching import bucket, padded
from st_moe.decode.methods import Method
from st_moe.model.transformer import Transformer
from st_moe.routing import steering
from st_moe.routing.selectors import dropless

_SENTINEL = re.compile(r'<extra_id_\d+>')
HALF = re.compile('[\ud800-\udfff]')  # Of a surrogate pair: no character.


@dataclasses.dataclass(frozen=True)
class Answer:
  """One text and what it was worth to the model."""

  text: str
  tokens: list[int]  # EOS included, padding not.
  logprobs: list[float]  # Of each token, nats.
  score: float  # Their sum; of beams over the length, to its penalty.


@dataclasses.dataclass(frozen=True)
class Options:
  """How prompts are answered."""

  method: Method = Method()
  seed: int = 0  # Of samples; prompt n draws from (seed, n).
  prefix: str = ''  # What every answer begins with.
  stop: tuple[str, ...] = ()  # An answer ends before the first of these.
  forbid: tuple[str | int, ...] = ()  # Tokens never said: ids, or their text.
  off: tuple[str, ...] = ()  # Experts: see `steering.overrides`.
  on: tuple[str, ...] = ()
  k: int | None = None
  task: str = ''  # Source of the training mixture, of models that route by it.
  long: str = 'cut'  # Prompts longer than the model takes: 'cut' or 'refuse'.

  def __post_init__(self):
    if self.long not in ('cut', 'refuse'):
      raise unknown('long', str(self.long), ('cut', 'refuse'))
    methods.check(
      self,
      method=(methods.ANY, 'a Method', lambda v: isinstance(v, Method)),
      # JAX would take what is left of a larger one.
      seed=(
        methods.ANY,
        'a whole number from 0 to 2 ** 32 - 1',
        lambda v: methods.is_whole(v) and 0 <= v < 1 << 32,
      ),
      prefix=(methods.ANY, 'a text', _is_text),
      task=(methods.ANY, 'a text', _is_text),
      stop=_each('texts that are not empty', lambda v: _is_text(v) and v),
      forbid=_each(
        'ids of tokens, or their texts',
        lambda v: _is_text(v) or methods.is_whole(v),
      ),
      off=_each('names of experts', _is_text),
      on=_each('names of experts', _is_text),
      k=(
        methods.ANY,
        'a whole number, or None',
        lambda v: v is None or methods.is_whole(v),
      ),
    )

  @classmethod
  def of(cls, **options) -> 'Options':
    """Fields of its own and of its `Method`, told apart by name."""
    own = {f.name for f in dataclasses.fields(cls)} - {'method'}
    mine = {k: v for k, v in options.items() if k in own}
    of_method = {k: v for k, v in options.items() if k not in own}
    known = {f.name for f in dataclasses.fields(Method)}
    for name in set(of_method) - known:
      raise unknown('option', name, sorted(own | known))
    for name in ('stop', 'forbid', 'off', 'on'):
      if name in mine:
        value = mine[name]
        several = isinstance(value, Iterable) and not isinstance(value, str)
        mine[name] = tuple(value) if several else (value,)
    return cls(method=Method(**of_method), **mine)


def _is_text(value) -> bool:
  return isinstance(value, str) and not HALF.search(value)


def _each(rule: str, follows) -> tuple:
  """The rule of a field that holds several."""
  several = lambda v: isinstance(v, tuple | list) and all(map(follows, v))
  return methods.ANY, rule, several


_GREEDY = Options()
_PLAIN = dataclasses.asdict(_GREEDY)


class Generator:
  """A model with its vocabulary, ready to answer.

  Drops no token, whatever the capacity of the config. Layers are unrolled: a
  scan would copy the weights of each in every step.
  """

  def __init__(
    self,
    config: ModelConfig,
    params,
    vocabulary: Vocabulary,
    *,
    max_inputs: int,
    mesh=None,
    batch_size: int = 16,
    tasks: Sequence[str] = (),
  ):
    """Makes an own copy of scanned parameters.

    Args:
      max_inputs: the longest prompt in tokens, EOS included.
      tasks: sources of the training mixture, if the model routes by them.
      mesh: devices a batch is split over; None: where parameters are.
      batch_size: prompts at a time.

    Raises:
      ValueError: a batch of nothing, prompts without room.
    """
    whole = all(map(methods.is_whole, (batch_size, max_inputs)))
    if not whole or batch_size < 1 or max_inputs < 2:
      raise ValueError(
        f'batch_size {batch_size} must be at least 1, max_inputs {max_inputs}'
        ' at least 2: a token and the EOS.'
      )
    if config.scan_layers:
      params = paths.unroll(params, config)
      config = dataclasses.replace(config, scan_layers=False)
    self.config = dataclasses.replace(dropless(config), remat='none')
    self.vocabulary, self.max_inputs = vocabulary, max_inputs
    self.tasks = tuple(tasks)
    self._model, self._params = Transformer(self.config), params
    self._mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    self._shards = self._mesh.size // self._mesh.shape['model']
    self.batch_size = -(-batch_size // self._shards) * self._shards
    self._answer = functools.cache(self._compile_answer)
    jit = lambda f: jax.jit(lambda task, *args: f(self._asked(task), *args))
    self._encode = jit(decoding.encode)
    self._score = jit(decoding.token_logprobs)
    self._routes = jit(decoding.routes)

  # What people ask.

  def answers(
    self, prompts: Sequence[str], options: Options = _GREEDY, *, numbers=None
  ) -> Iterator[list[Answer]]:
    """The answers to each prompt, in order, as they come.

    Args:
      numbers: of the prompts, which samples are drawn from and errors name;
        None counts from 0.

    Raises:
      ValueError: an empty prompt, one that is too long, an option that this
        model cannot follow.
    """
    method, given, overrides = self.understood(options)
    prompts = texts_of('prompts', prompts)
    numbers = np.arange(len(prompts)) if numbers is None else np.array(numbers)
    rows = self._prompts(prompts, numbers, options.long)
    answer = self._answer(method)
    root = jax.random.key(options.seed)

    def run(batch, at):
      prefix = np.tile(np.array(given, np.int32), (len(batch), 1))
      keys = None
      if method.temperature:
        fold = functools.partial(jax.random.fold_in, root)
        keys = jax.vmap(fold)(numbers[at].astype(np.uint32))
      task = self._task(options, len(batch))
      found = answer(task, self._params, batch, prefix, keys, overrides)
      return jax.device_get(found)

    def each():
      for found, row in self._in_order(rows, run):
        parts = (found.tokens[row], found.logprobs[row], found.scores[row])
        yield [
          self._as_answer(*one, options.stop)
          for one in zip(*parts, strict=True)
        ]

    return each()

  def understood(self, options: Options) -> tuple:
    """The method, ids of the prefix and RouteOverrides that are asked for.

    Raises:
      ValueError: what this model cannot follow.
    """
    forbidden = self._forbidden(options)
    method = dataclasses.replace(options.method, forbidden=forbidden)
    given = self.ids(options.prefix)
    if given and len(given) >= method.max_length:
      raise ValueError(
        f'The prefix {options.prefix!r} has {len(given)} tokens: an answer of'
        f' {method.max_length} (max_length) has no room for more.'
      )
    if method.contrast:
      decoding.weakened(self.config, None, method.contrast.rank)
    overrides = steering.overrides(
      self.config, off=options.off, on=options.on, k=options.k
    )
    self._task(options, 1)
    return method, given, overrides

  def scored(
    self,
    prompts: Sequence[str],
    targets: Sequence[str],
    options: Options = _GREEDY,
    *,
    numbers=None,
  ) -> Iterator[list[Answer]]:
    """As `answers`, had the model said each target."""
    prompts, wanted = self._pairs(prompts, targets)
    overrides = self._given(options, 'A score')
    numbers = range(len(prompts)) if numbers is None else numbers
    rows = self._prompts(prompts, numbers, options.long)

    def run(batch, at):
      targets = _batch_of(wanted, at)
      task = self._task(options, len(batch))
      found = self._score(task, self._params, batch, targets, overrides)
      return jax.device_get(found)

    def each():
      for n, (found, row) in enumerate(self._in_order(rows, run)):
        logprobs = found[row, : len(wanted[n])].tolist()
        _check_numbers(logprobs)
        yield [Answer(targets[n], wanted[n], logprobs, sum(logprobs))]

    return each()

  def routed(
    self,
    prompts: Sequence[str],
    targets: Sequence[str] | None = None,
    options: Options = _GREEDY,
    *,
    scores: bool = False,
  ) -> trace.Trace:
    """What the routers decide of prompts, and of the target behind each.

    Example n of the trace is prompt n; both end in an EOS, which is routed too.

    Args:
      targets: None asks the encoder alone.
      scores: whether the trace has `probs` and `logits`.
    """
    if not trace.layers(self.config):
      raise ValueError('This model is dense: it has no routers to look at.')
    wanted = None
    if targets is not None:
      prompts, wanted = self._pairs(prompts, targets)
    overrides = self._given(options, 'A route')
    prompts = texts_of('prompts', prompts)
    rows = self._prompts(prompts, range(len(prompts)), options.long)

    def run(batch, at):
      targets = None if wanted is None else _batch_of(wanted, at)
      task = self._task(options, len(batch))
      found = self._routes(task, self._params, batch, targets, overrides)
      tokens = {'encoder': (batch, batch > 0)}
      if targets is not None:
        tokens['decoder'] = decoding.shifted(targets), targets > 0
      found, tokens = jax.device_get((found, tokens))
      return trace.read(found, self.config, tokens, scores=scores)

    return trace.join(
      [
        found.of_example(row, n)
        for n, (found, row) in enumerate(self._in_order(rows, run))
      ]
    )

  def encode(
    self, prompts: Sequence[str], *, task: str = '', long: str = 'cut'
  ) -> list[np.ndarray]:
    """What the encoder makes of each prompt, float [tokens, embed]."""
    prompts, options = texts_of('prompts', prompts), Options(task=task)
    rows = self._prompts(prompts, range(len(prompts)), long)
    run = lambda batch, _: jax.device_get(
      self._encode(self._task(options, len(batch)), self._params, batch)
    )
    return [
      found[row, : len(ids)]
      for (found, row), ids in zip(self._in_order(rows, run), rows, strict=True)
    ]

  def fill(self, text: str, answer: Answer) -> str:
    """`text` with its <extra_id_N> replaced by the spans of an answer."""
    spans, ids = {}, None
    names = {
      name: i
      for name, i in self.vocabulary.tokens.items()
      if _SENTINEL.fullmatch(name)
    }
    sentinels = set(names.values())
    for token in answer.tokens:
      if token in sentinels:
        ids = spans.setdefault(token, [])
      elif ids is not None and token != self.vocabulary.eos:
        ids.append(token)
    # Text and sentinels in turn; a number past the last is text.
    pieces = re.split(f'({"|".join(names) or "(?!)"})', text)
    filled = pieces[0]
    for name, after in zip(pieces[1::2], pieces[2::2], strict=True):
      span = self.vocabulary.decode(spans.get(names[name], [])).strip()
      # Where nothing is said, one space of two stays.
      filled += span
      filled += after.lstrip(' ') if not span and filled[-1:] == ' ' else after
    return filled

  # How it is done.

  def _pairs(self, prompts, targets) -> tuple[list[str], list[list[int]]]:
    """Prompts, and ids of the target of each, ending in an EOS."""
    prompts = texts_of('prompts', prompts)
    targets = texts_of('targets', targets)
    if len(prompts) != len(targets):
      raise ValueError(
        f'{len(prompts)} prompts and {len(targets)} targets: each needs one.'
      )
    return prompts, [[*self.ids(t), self.vocabulary.eos] for t in targets]

  def _given(self, options: Options, what: str) -> dict:
    """RouteOverrides for `what` takes texts as they are, and says nothing."""
    told = dataclasses.asdict(options)
    for name in ('method', 'prefix', 'stop', 'forbid'):
      if told[name] != _PLAIN[name]:
        raise ValueError(
          f'{what} depends on no {name}: leave the options of answering out.'
        )
    return self.understood(options)[2]

  def _asked(self, task):
    """The model, of prompts of `task`; None where it does not route by it."""
    return self._model if task is None else decoding.of_task(self._model, task)

  def _task(self, options: Options, rows: int):
    """The number of a task for each row; None where nobody asks.

    Raises:
      ValueError: it is not told, or unknown, or nobody asks.
    """
    known = [*self.tasks, 'other'] if self.tasks else []
    if not options.task and not known:
      return None
    if not known:
      raise ValueError(
        f'This model does not route by task: leave task={options.task!r} out.'
      )
    if not options.task:
      raise ValueError(
        f'This model routes by task: say whose prompts these are, by task= one'
        f' of {", ".join(known)}.'
      )
    if options.task not in known:
      raise unknown('task', options.task, known)
    return np.full(rows, known.index(options.task), np.int32)

  def _compile_answer(self, method: Method):
    def answer(task, params, prompts, prefix, keys, overrides):
      return decoding.generate(
        self._asked(task),
        params,
        prompts,
        method,
        eos=self.vocabulary.eos,
        keys=keys,
        prefix=prefix if prefix.size else None,
        overrides=overrides,
      )

    return jax.jit(answer)

  def _in_order(self, rows: list[list[int]], run) -> Iterator[tuple]:
    """(what `run` found for its batch, row in it) of each of `rows`, in order.

    Prompts of like lengths share a batch, so that little of it is padding.
    """
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    ready, due = {}, 0
    for start in range(0, len(order), self.batch_size):
      numbers = order[start : start + self.batch_size]
      length = min(bucket(len(rows[numbers[-1]])), self.max_inputs)
      each = -(-len(numbers) // self._shards)  # Rows of a device.
      size = min(bucket(each, 1) * self._shards, self.batch_size)
      filled = numbers + numbers[:1] * (size - len(numbers))
      batch = padded([rows[n] for n in filled], length)
      with sharding.use(self._mesh):
        batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
        with _told_if_large(*batch.shape):
          found = run(batch, filled)
      ready |= {n: (found, row) for row, n in enumerate(numbers)}
      while due in ready:
        yield ready.pop(due)
        due += 1

  def ids(self, text: str) -> list[int]:
    """Of a text, its <extra_id_N> and added tokens included; no EOS."""
    return self.vocabulary.encode_marked(text)

  def _prompts(self, prompts, numbers, long: str) -> list[list[int]]:
    """Ids of each prompt, ending in an EOS."""
    room = self.max_inputs - 1
    rows, too_long = [], []
    for text, number in zip(prompts, numbers, strict=True):
      ids = self.ids(text)
      if not ids:
        raise ValueError(f'Prompt {number + 1} is empty.')
      if len(ids) > room:
        too_long.append(int(number) + 1)
        if long == 'refuse':
          raise ValueError(
            f'Prompt {number + 1} has {len(ids)} tokens, of {room} that the'
            " model takes (max_inputs, less an EOS); long='cut' cuts it."
          )
      rows.append([*ids[:room], self.vocabulary.eos])
    if too_long:
      warnings.warn(
        f'Prompts longer than {room} tokens were cut: {_listed(too_long)}.',
        stacklevel=2,
      )
    return rows

  def _forbidden(self, options: Options) -> tuple[int, ...]:
    found = list(options.method.forbidden)
    for each in options.forbid:
      ids = [each] if isinstance(each, int) else self.ids(each)
      if len(ids) != 1:
        raise ValueError(
          f'{each!r} is {len(ids)} tokens; only single tokens can be forbidden.'
        )
      found += ids
    for token in found:
      if not 0 <= token < self.config.vocab_size:
        raise ValueError(
          f'Token {token} is not among 0 ... {self.config.vocab_size - 1}.'
        )
    return tuple(found)

  def _as_answer(self, tokens, logprobs, score, stop) -> Answer:
    ends = np.flatnonzero(tokens == self.vocabulary.eos)
    used = int(ends[0]) + 1 if ends.size else len(tokens)
    _check_numbers(logprobs[:used])
    ids = tokens[:used].tolist()
    text = self.vocabulary.decode(ids)
    cuts = [at for s in stop if (at := text.find(s)) >= 0]
    return Answer(
      text[: min(cuts)] if cuts else text,
      ids,
      logprobs[:used].tolist(),
      float(score),
    )


def _batch_of(rows: list[list[int]], at: Sequence[int]) -> np.ndarray:
  """int32 [len(at), length]: those of `rows`, with 0 behind."""
  wanted = [rows[n] for n in at]
  return padded(wanted, bucket(max(map(len, wanted))))


@contextlib.contextmanager
def _told_if_large(rows: int, length: int) -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    raise ValueError(
      f'Out of memory with {rows} prompts of {length} tokens at a time: make'
      ' batch_size, max_length, num_beams or num_return smaller, or max_inputs,'
      f' where prompts are cut. ({str(e).splitlines()[0]})'
    ) from e


def _check_numbers(logprobs) -> None:
  """Warns of a model that knows nothing: the likeliest of NaNs is a token."""
  if not np.isfinite(logprobs).all():
    warnings.warn(
      'The logits of this model are no numbers (NaN or infinite): answers and'
      ' scores made of them mean nothing. Look for such weights in the'
      ' checkpoint.',
      stacklevel=2,
    )


def texts_of(name: str, texts: Iterable[str]) -> list[str]:
  """Several texts, and nothing else.

  Raises:
    ValueError: one text alone, whose letters would be answered; what is none.
  """
  if isinstance(texts, str) or not isinstance(texts, Iterable):
    raise ValueError(
      f'{name} is a {type(texts).__name__}: give a list of texts, of one'
      ' [text].'
    )
  texts = list(texts)
  for number, text in enumerate(texts, 1):
    if not _is_text(text):
      raise ValueError(
        f'{name}: number {number} is {ascii(text)[:40]}, which is no text'
        + (' (half a surrogate pair).' if isinstance(text, str) else '.')
      )
  return texts


def _listed(numbers: list[int]) -> str:
  more = f' and {len(numbers) - 5} more' if len(numbers) > 5 else ''
  return ', '.join(map(str, numbers[:5])) + more
