"""A checkpoint as something to use: `st_moe.load(path)` needs nothing else."""

import dataclasses
import functools

import jax
from jax.sharding import Mesh

from st_moe import paths, sharding
from st_moe.analysis import trace
from st_moe.config import Config, ModelConfig
from st_moe.data import vocabulary as vocabulary_lib
from st_moe.interop import convert
from st_moe.model import parts
from st_moe.model.layers import activation_dtype
from st_moe.model.transformer import Transformer
from st_moe.train.state import abstract_params


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model with its parameters and the run they come from."""

  model: Transformer
  params: dict
  config: Config
  vocabulary: vocabulary_lib.Vocabulary | None
  path: str  # Of the checkpoint.
  step: int
  mesh: Mesh
  modules: tuple[str, ...] = ()  # Imported for its tasks when it was trained.

  @functools.cached_property
  def generator(self):
    """An `infer.generate.Generator` with the defaults; made once."""
    return self.serve()

  @functools.cached_property
  def _reader(self):
    """What encodes: an encoder alone can."""
    config = self.model.config
    return self._prepared() if not config.decoder else self.generator

  def serve(self, *, max_inputs: int = 0, batch_size: int = 16):
    """A Generator for prompts of up to `max_inputs` tokens (0: as trained).

    It holds a copy of the parameters, unless they were loaded `for_answers`.
    """
    check_answers(self.path, self.model.config)
    return self._prepared(max_inputs, batch_size)

  def _prepared(self, max_inputs: int = 0, batch_size: int = 16):
    from st_moe.infer.generate import Generator

    if self.vocabulary is None:
      raise ValueError(no_vocabulary(self.path))
    return Generator(
      self.model.config,
      self.params,
      self.vocabulary,
      max_inputs=max_inputs or self.config.data.inputs_length,
      mesh=self.mesh,
      batch_size=batch_size,
      tasks=self._tasks(),
    )

  def _tasks(self) -> list[str]:
    """Sources by number, if the model routes by them."""
    if not parts.by_task(self.model.config):
      return []  # It takes seconds to find out.
    from st_moe.data.mixture import Library

    return Library(self.config.data, self.vocabulary).sources()

  def generate(self, prompts: list[str], **options) -> list:
    """A text for each prompt, or a list of `num_return` texts.

    Warns if the model's logits are no numbers, as of weights that hold NaN.

    Args:
      options: fields of `infer.generate.Options` and `decode.methods.Method`:
        max_length, temperature, top_k, top_p, seed, num_beams, stop, ...

    Raises:
      ValueError: an option that breaks its rule, a prompt that is no text.
    """
    from st_moe.infer.generate import Options

    wanted = Options.of(**options)
    found = [
      [answer.text for answer in answers]
      for answers in self.generator.answers(prompts, wanted)
    ]
    alone = wanted.method.num_return == 1
    return [texts[0] for texts in found] if alone else found

  def score(
    self, prompts: list[str], targets: list[str], **options
  ) -> list[float]:
    """Log-probability of each target after its prompt, in nats.

    Args:
      options: of `infer.generate.Options` those that are not of answering:
        off, on and k of experts, task, long.
    """
    from st_moe.infer.generate import Options

    found = self.generator.scored(prompts, targets, Options.of(**options))
    return [each.score for (each,) in found]

  def inspect(
    self,
    texts: list[str],
    targets: list[str] | None = None,
    *,
    scores: bool = False,
    **options,
  ) -> trace.Trace:
    """What the routers decide of each token of `texts`, the EOS included.

    Nothing is dropped, as in `generate`.

    Args:
      targets: what the decoder says to each text; None asks the encoder alone.
      scores: whether the trace has probabilities and logits of all experts.
      options: as of `score`.

    Raises:
      ValueError: the model is dense, or what `score` raises.
    """
    from st_moe.infer.generate import Options

    reader = self._reader if targets is None else self.generator
    return reader.routed(texts, targets, Options.of(**options), scores=scores)

  def encode(self, prompts: list[str], *, task: str = '') -> list:
    """What the encoder makes of each prompt, float [tokens, embed]."""
    return self._reader.encode(prompts, task=task)

  def fill(self, texts: list[str], **options) -> list[str]:
    """Texts with <extra_id_0>, <extra_id_1>, ... replaced by what belongs."""
    from st_moe.infer.generate import Options, texts_of

    texts = texts_of('texts', texts)
    answers = self.generator.answers(texts, Options.of(**options))
    return [
      self.generator.fill(text, found[0])
      for text, found in zip(texts, answers, strict=True)
    ]


def _as_used(model):
  """Weights in the dtype they are multiplied in: what moves no number.

  Routers, norms, position biases and logits are float32 whatever the rest is.
  """
  dtype = activation_dtype(model.dtype)
  return lambda path, leaf: (
    leaf.update(dtype=dtype) if paths.is_cast(path) else leaf
  )


def check_answers(path: str, config: ModelConfig) -> None:
  """Raises if a model has not what it takes to answer a text."""
  if not (config.encoder and config.decoder):
    raise ValueError(
      f'{path} has no {"decoder" if config.encoder else "encoder"}:'
      ' texts are answered by an encoder and a decoder.'
    )


def no_vocabulary(path: str) -> str:
  return (
    f'{path} has no vocabulary: give the SentencePiece model it was trained'
    " with (--vocabulary=FILE), or 'bytes'."
  )


def load(
  path, *, mesh=None, vocabulary: str = '', for_answers: bool = False
) -> Loaded:
  """Loads WORKDIR (its newest intact checkpoint) or WORKDIR/checkpoints/STEP.

  Args:
    path: or a checkpoint of another code as FORMAT:PLACE, 'hf:DIR' say.
    mesh: where parameters go; None is one device.
    vocabulary: a SentencePiece model or 'bytes'; '': the checkpoint's.
    for_answers: restore what a Generator holds and nothing else: layers
      unrolled, weights in the dtype they are multiplied in.

  Raises:
    ValueError: there is no checkpoint, or it is damaged.
  """
  name, where = convert.split(path)
  if not where:
    raise ValueError(
      f'{path!r} names no checkpoint: give a workdir of `st-moe train`, its'
      ' checkpoints/STEP, or FORMAT:PLACE as hf:DIR.'
    )
  source = convert.open_source(path)
  if name == 'st_moe':
    where = source.where
  if for_answers:
    unrolled = dataclasses.replace(source.config.model, scan_layers=False)
    source.config = dataclasses.replace(source.config, model=unrolled)
  config = source.config
  if for_answers:
    check_answers(where, config.model)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  model = Transformer(config.model)
  with sharding.use(mesh):
    abstract = abstract_params(model, mesh)
    if for_answers:
      abstract = paths.map_by_path(_as_used(config.model), abstract)
    params = source.load(abstract)
  own = None
  if vocabulary == 'bytes' and name == 'hf' and source.vocabulary != b'':
    vocabulary = 'byt5'  # The bytes of HuggingFace are those of ByT5.
  if vocabulary:
    own = vocabulary_lib.load(vocabulary)
  elif source.vocabulary is not None:
    own = vocabulary_lib.checked(where, source.vocabulary)
  if own:
    own.check_fits(config.model.vocab_size)
  number = where.rstrip('/').rpartition('/')[2]
  return Loaded(
    model=model,
    params=params,
    config=config,
    vocabulary=own,
    path=where,
    step=int(number) if name == 'st_moe' and number.isdigit() else 0,
    mesh=mesh,
    modules=getattr(source, 'modules', ()),
  )
