"""How good a model is: teacher-forced loss, rank classification, decoding."""

import functools
import json

import jax
import numpy as np
from etils import epath

from st_moe import config_file, sharding
from st_moe.config import Config
from st_moe.data import pipeline
from st_moe.data.metrics import majority_baseline
from st_moe.infer import decoding
from st_moe.infer.load import load, no_vocabulary
from st_moe.train import step


class Evaluator:
  """Measures parameters on evaluation data; compiled once per shape.

  Teacher-forced loss uses `moe.eval_capacity`, as the paper does. Whatever
  answers a question (ranking, decoding) drops nothing, so that an answer
  depends on its own prompt alone.
  """

  def __init__(self, model, config: Config, vocabulary, mesh):
    self._config, self._vocabulary, self._mesh = config, vocabulary, mesh
    open_model = model.clone(config=model.config.dropless())
    self._terms = jax.jit(
      lambda params, batch: step.forward(
        model, config, params, batch, rng=None
      )[0]
    )
    self._score = jax.jit(functools.partial(decoding.score, open_model))
    self._greedy = jax.jit(
      functools.partial(
        decoding.greedy, open_model, max_length=config.data.targets_length
      )
    )

  def __call__(self, params, sources) -> dict[str, float]:
    """Metrics 'eval/SOURCE/NAME' of every source (`pipeline.EvalData`)."""
    found = {}
    for source in sources:
      metrics, _ = self.measure(params, source)
      found |= {f'eval/{source.name}/{k}': v for k, v in metrics.items()}
    return found

  def measure(self, params, source) -> tuple[dict, list[dict]]:
    """Metrics of one source and, of a task, what was predicted."""
    asked = self._config.evaluate
    answers, ways = self._answers(source.labels), self._ways(source)
    terms, ranked, decoded = [], [], []
    size = asked.batch_size or self._config.data.batch_size
    for n, batch in enumerate(source.batches(size)):
      if asked.batches and n == asked.batches:
        break
      valid = batch.pop('valid')
      batch.pop('source')
      batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
      terms.append(jax.device_get(self._terms(params, batch)))
      prompts = batch['encoder_input_tokens']
      if 'rank' in ways:
        scores = np.asarray(self._score(params, prompts, answers))[valid]
        best = scores[:, : len(source.labels)].argmax(-1)
        ranked += [source.labels[i] for i in best]
      if 'decoding' in ways:
        ids = np.asarray(self._greedy(params, prompts))[valid]
        decoded += [self._vocabulary.decode(row) for row in ids]
    loss = [t['cross_entropy'] for t in terms]
    total, weight = np.sum(loss, axis=0, dtype=float)
    found, rows = {'loss': total / max(weight, 1)}, []
    for by, texts in (('rank', ranked), ('decoding', decoded)):
      if texts:
        found |= _metrics(source, by, texts)
        rows += [
          {'idx': e.idx, 'by': by, 'target': e.targets_text, 'prediction': p}
          for e, p in zip(source.examples, texts, strict=False)
        ]
    return found, rows

  def names(self, source) -> list[str]:
    """The metrics that `__call__` finds in a source, before there are any."""
    found = ['loss']
    for by in self._ways(source):
      found += _metrics(source, by, [source.examples[0].targets_text])
    return [f'eval/{source.name}/{name}' for name in found]

  def _ways(self, source) -> list[str]:
    """How a task is answered: 'rank', 'decoding' or both."""
    if source.is_text:
      return []
    ranks = bool(source.labels)
    decodes = self._config.evaluate.decode or not ranks
    return ['rank'] * ranks + ['decoding'] * decodes

  def _answers(self, labels) -> np.ndarray | None:
    """The label texts as ids [labels, length], padded with rows of zeros.

    Padded to multiples, so that tasks share one compiled function.
    """
    if not labels:
      return None
    ids = [[*self._vocabulary.encode(t), self._vocabulary.eos] for t in labels]
    longest = max(map(len, ids))
    answers = np.zeros((-(-len(ids) // 4) * 4, -(-longest // 8) * 8), np.int32)
    for row, each in zip(answers, ids, strict=False):
      row[: len(each)] = each
    return answers


def _metrics(source, by: str, texts) -> dict[str, float]:
  """Metrics of the answers to the first examples, and of the best constant."""
  targets = [e.targets_text for e in source.examples[: len(texts)]]
  way = 'decoded_' if by == 'decoding' else ''
  found = {}
  for metric in source.metric_fns:
    found |= {f'{way}{k}': v for k, v in metric(targets, texts).items()}
  baseline = majority_baseline(targets, source.metric_fns).items()
  found |= {f'majority_{k}': v for k, v in baseline}
  return found | {'examples': len(texts)}


def evaluate(
  path,
  *,
  mixture=(),
  output: str = '',
  vocabulary: str = '',
  overrides: dict | None = None,
) -> dict[str, float]:
  """Scores the checkpoint at `path`; writes metrics.json and predictions.

  Args:
    mixture: names of tasks or text sources; none: what it was trained on.
    output: a directory; '': 'evaluation' in the workdir.
    vocabulary: a SentencePiece model or 'bytes'; '': the checkpoint's.
    overrides: fields of its config to set, as on a command line.
  """
  loaded = load(path, vocabulary=vocabulary)
  if loaded.vocabulary is None:
    raise ValueError(no_vocabulary(loaded.path))
  values = config_file.to_dict(loaded.config)
  for field, value in (overrides or {}).items():
    values = config_file.set_field(values, field, value)
  config = config_file.from_dict(values)
  model = loaded.model.clone(config=config.model)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  names = mixture or pipeline.source_names(config.data, loaded.vocabulary)
  checkpoint = epath.Path(loaded.path)
  beside = checkpoint.parent
  if beside.name == 'checkpoints':
    beside = beside.parent
  to = epath.Path(output or beside / 'evaluation').expanduser()
  to.mkdir(parents=True, exist_ok=True)
  capacity = config.model.moe.eval_capacity
  print(
    f'{loaded.path}, teacher-forced with'
    f' {"no limit" if capacity.dropless else f"capacity {capacity.factor}"},'
    ' answers with no limit'
  )
  found = {}
  with sharding.use(mesh):
    measure = Evaluator(model, config, loaded.vocabulary, mesh).measure
    for name in names:
      source = pipeline.open_eval(
        config.data, loaded.vocabulary, name, config.evaluate.split
      )
      metrics, rows = measure(loaded.params, source)
      found |= {f'eval/{name}/{k}': v for k, v in metrics.items()}
      print(name, '  '.join(f'{k} {v:.4g}' for k, v in metrics.items()))
      if rows:
        lines = ''.join(f'{json.dumps(row)}\n' for row in rows)
        (to / f'predictions-{name}.jsonl').write_text(lines)
  about = {'checkpoint': loaded.path, 'step': loaded.step, 'metrics': found}
  (to / 'metrics.json').write_text(json.dumps(about, indent=2))
  print(f'wrote {to}')
  return found
