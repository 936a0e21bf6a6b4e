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
from st_moe.infer.load import load
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
    answers = self._answers(source.labels)
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
      if answers is not None:
        scores = np.asarray(self._score(params, prompts, answers))[valid]
        ranked += [source.labels[i] for i in scores.argmax(-1)]
      if not source.is_text and (asked.decode or answers is None):
        ids = np.asarray(self._greedy(params, prompts))[valid]
        decoded += [self._vocabulary.decode(row) for row in ids]
    loss = [t['cross_entropy'] for t in terms]
    total, weight = np.sum(loss, axis=0, dtype=float)
    found, rows = {'loss': total / max(weight, 1)}, []
    for by, way, texts in (
      ('rank', '', ranked),
      ('decoding', 'decoded_', decoded),
    ):
      if not texts:
        continue
      examples = source.examples[: len(texts)]
      targets = [e.targets_text for e in examples]
      for metric in source.metric_fns:
        scores = metric(targets, texts).items()
        found |= {f'{way}{k}': v for k, v in scores}
      baseline = majority_baseline(targets, source.metric_fns).items()
      found |= {f'majority_{k}': v for k, v in baseline}
      found['examples'] = len(texts)
      rows += [
        {'idx': e.idx, 'by': by, 'target': t, 'prediction': p}
        for e, t, p in zip(examples, targets, texts, strict=True)
      ]
    return found, rows

  def _answers(self, labels) -> np.ndarray | None:
    """The label texts as ids [labels, length], padded."""
    if not labels:
      return None
    ids = [[*self._vocabulary.encode(t), self._vocabulary.eos] for t in labels]
    answers = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, each in zip(answers, ids, strict=True):
      row[: len(each)] = each
    return answers


def evaluate(
  path, *, mixture=(), output: str = '', overrides: dict | None = None
) -> dict[str, float]:
  """Scores the checkpoint at `path`; writes metrics.json and predictions.

  Args:
    mixture: names of tasks or text sources; none: what it was trained on.
    output: a directory; '': 'evaluation' in the workdir.
    overrides: fields of its config to set, as on a command line.
  """
  loaded = load(path)
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
