"""How good a model is: teacher-forced loss, rank classification, decoding."""

import functools

import jax
import numpy as np

from st_moe import hosts, sharding
from st_moe.config import Config
from st_moe.data import superglue
from st_moe.data.task import SENTINEL
from st_moe.infer.questions import Asker, Question
from st_moe.model import parts
from st_moe.routing.selectors import dropless
from st_moe.train import step


class Evaluator:
  """Measures parameters on evaluation data; compiled once per shape.

  Text has a teacher-forced loss, under `moe.eval_capacity` as in the paper. A
  task is answered in two ways: `rank`, the likeliest of the answers there are,
  and `decoding`, what the model says by itself. Nobody is dropped, so that an
  answer depends on its own question alone, unless `evaluate.dropless` is false.
  """

  def __init__(self, model, config: Config, vocabulary, mesh):
    self._config, self._vocabulary, self._mesh = config, vocabulary, mesh
    self._terms = jax.jit(
      lambda params, batch: step.forward(
        model, config.loss, params, batch, rng=None
      )[0],
      out_shardings=jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec()
      ),
    )
    self._by_task = parts.by_task(model.config)
    asked = config.evaluate
    # Another name: the lambda above looks at `model` when it is traced.
    answers = model
    if asked.dropless:
      answers = model.clone(config=dropless(model.config))
    self._asker = Asker(
      answers,
      mesh,
      batch_size=self._batch_size,
      longest=config.data.inputs_length,
      eos=vocabulary.eos,
    )

  def __call__(
    self, params, sources, *, progress=lambda done: None
  ) -> dict[str, float]:
    """Metrics 'eval/SOURCE/NAME' of every source, an `EvalData`."""
    found = self.measure(params, sources, progress=progress, read=progress)
    return flat(found)

  def measure(
    self,
    params,
    sources,
    *,
    progress=lambda done: None,
    read=lambda done: None,
  ) -> dict[str, tuple[dict, list[dict]]]:
    """Source -> its metrics and, of a task, what was predicted.

    Args:
      progress: told after every batch how many more questions were answered.
      read: told how many more examples of text were read.
    """
    found, tasks = {}, []
    for source in sources:
      if source.is_text:
        loss = self._text_loss(params, source, read)
        found[source.name] = {'loss': loss}, []
      else:
        tasks.append((source, *self._questions(source)))
        found[source.name] = None  # Keeps the order.
    questions = [q for _, _, asked in tasks for q in asked]
    replies = iter(self._asker.ask(params, questions, progress=progress))
    for source, examples, asked in tasks:
      mine = [next(replies) for _ in asked]
      found[source.name] = self._scored(source, examples, asked, mine)
    return found

  def size(self, source) -> int:
    """How many of its examples are measured."""
    return min(len(source), self._most() or len(source))

  def _most(self) -> int:
    """Examples of a source at most; 0: all."""
    return self._config.evaluate.batches * self._batch_size

  @property
  def _batch_size(self) -> int:
    return self._config.evaluate.batch_size or self._config.data.batch_size

  def _text_loss(self, params, source, read) -> float:
    """Nats per target token."""
    asked, terms = self._config.evaluate, []
    for n, batch in enumerate(source.batches(self._batch_size)):
      if asked.batches and n == asked.batches:
        break
      real = int(batch['valid'].sum())
      del batch['valid']
      batch['task'] = np.full_like(batch['task'], self._task(source))
      with sharding.use(self._mesh):
        batch = hosts.spread_whole(batch, sharding.batch_sharding(self._mesh))
        terms.append(jax.device_get(self._terms(params, batch)))
      read(real)
    loss = [t['cross_entropy'] for t in terms]
    total, weight = np.sum(loss, axis=0, dtype=float)
    return total / max(weight, 1)

  def _examples(self, source):
    return source.examples[: self._most() or None]

  def _questions(self, source):
    """The examples that are asked about, and the questions."""
    room = self._room(source)
    ids = functools.cache(functools.partial(self._ids, source))
    examples, questions = self._examples(source), []
    for e in examples:
      answers = [ids(text) for text in source.choices(e)]
      # The target is scored in any case, for the loss.
      if source.told(e) and tuple(e.targets) not in answers:
        answers.append(tuple(e.targets))
      questions.append(Question(e.inputs, answers, room, self._task(source)))
    return examples, questions

  def _task(self, source) -> int:
    """Its number, if the model wants to know."""
    return source.task if self._by_task else 0

  def _ids(self, source, text: str) -> tuple[int, ...]:
    ids = self._vocabulary.encode(text)
    return (*source.begins, *ids, self._vocabulary.eos)

  def _room(self, source) -> int:
    """Tokens of an own answer at most: what is longer than every label errs."""
    if 'decoding' not in self._ways(source):
      return 0
    if source.labels:
      return max(len(self._ids(source, text)) for text in source.labels)
    return self._config.data.targets_length

  def _ways(self, source) -> list[str]:
    """How a task is answered: 'rank', 'decoding' or both."""
    if source.is_text:
      return []
    ranks = any(source.choices(e) for e in source.examples)
    compares = source.metric_fns or source.aux_fns or not source.score_fns
    decodes = self._config.evaluate.decode or compares and not ranks
    return ['rank'] * ranks + ['decoding'] * decodes

  def _scored(self, source, examples, questions, replies):
    """Metrics and predictions of one task."""
    targets = [
      float(reply.scores[question.answers.index(tuple(e.targets))])
      if source.told(e)
      else 0.0
      for e, question, reply in zip(examples, questions, replies, strict=True)
    ]
    found, rows = self._loss(source, examples, targets), []
    found |= source.target_scores(examples, targets)
    for way in self._ways(source):
      said = [
        self._said(source, way, *each)
        for each in zip(examples, questions, replies, strict=True)
      ]
      found |= _named(way, source.scores(examples, *zip(*said, strict=True)))
      rows += [
        {
          'idx': e.idx,
          'by': way,
          'input': e.inputs_text or self._vocabulary.decode(e.inputs),
          'target': e.targets_text,
          'prediction': text,
          'score': score,
        }
        for e, (text, score) in zip(examples, said, strict=True)
      ]
    majority = source.majority(examples).items()
    found |= {f'majority_{k}': v for k, v in majority}
    return found | {'examples': len(examples)}, rows

  def _said(self, source, way, example, question, reply) -> tuple[str, float]:
    """One answer and its log-probability; per token, if that was asked."""
    normalized = self._config.evaluate.length_normalized
    if way == 'decoding':
      tokens, begins = reply.tokens, source.begins
      text = self._vocabulary.decode(
        tokens[len(begins) :] if tokens[: len(begins)] == begins else tokens
      )
      return text, reply.score / (max(len(tokens), 1) if normalized else 1)
    choices = source.choices(example)
    if not choices:
      return '', 0.0
    scores = reply.scores[: len(choices)]
    if normalized:
      scores = scores / [len(a) for a in question.answers[: len(choices)]]
    best = int(np.argmax(scores))
    return choices[best], float(scores[best])

  def _loss(self, source, examples, scores) -> dict[str, float]:
    """Nats per target token; nothing where all targets are hidden."""
    tokens = sum(len(e.targets) for e in examples if source.told(e))
    return {'loss': -sum(scores) / tokens} if tokens else {}

  def names(self, sources) -> list[str]:
    """The metrics that `__call__` finds, before there are any."""
    return list(flat({s.name: (self._names(s), []) for s in sources}))

  def _names(self, source) -> dict[str, float]:
    """The metrics of a source had a perfect model answered a few questions."""
    if source.is_text:
      return {'loss': 0.0}
    examples = self._examples(source)
    few = [e for e in examples if source.told(e)][:50]
    targets = [e.targets_text for e in few]
    found = {'loss': 0.0} if few else {}
    found |= source.target_scores(few, [0.0] * len(few))
    for way in self._ways(source):
      found |= _named(way, source.scores(few, targets))
    majority = {f'majority_{k}': v for k, v in source.majority(few).items()}
    return {**found, **majority, 'examples': len(examples)}


def _named(way: str, metrics: dict) -> dict:
  prefix = 'decoded_' if way == 'decoding' else ''
  return {prefix + name: value for name, value in metrics.items()}


def flat(measured: dict) -> dict[str, float]:
  """What `Evaluator.measure` found as 'eval/SOURCE/NAME', with averages."""
  found = {
    f'eval/{source}/{name}': value
    for source, (metrics, _) in measured.items()
    for name, value in metrics.items()
  }
  return found | _averages(found)


def _averages(found: dict[str, float]) -> dict[str, float]:
  """SuperGLUE's, where all of its tasks are: 'eval/super_glue/average'.

  Ranked answers count where there are such; 'decoded_average' is of decoded
  ones, 'majority_average' what the most frequent answers would get.
  """
  averages = {}
  for suffix in ('', SENTINEL):
    kinds = {'decoded_': {}, 'majority_': {}, '': {}}
    for name, value in found.items():
      _, task, metric = name.split('/', 2)
      bare = task.removeprefix('super_glue_').removesuffix(SENTINEL)
      if task == f'super_glue_{bare}{suffix}':
        kind = next(k for k in kinds if metric.startswith(k))
        kinds[kind][f'{bare}/{metric.removeprefix(kind)}'] = value
    kinds[''] = kinds['decoded_'] | kinds['']  # Some tasks are decoded alone.
    mixture = 'super_glue' + suffix.removeprefix('_1')
    for kind, scores in kinds.items():
      average = superglue.average(scores)
      if average is not None:
        averages[f'eval/{mixture}/{kind}average'] = average
  return averages
