"""A checkpoint as something to use: `st_moe.load(path)` needs nothing else."""

import dataclasses
import functools

import jax
from jax.sharding import Mesh

from st_moe import sharding
from st_moe.config import Config
from st_moe.data import vocabulary as vocabulary_lib
from st_moe.interop import convert
from st_moe.model import layout
from st_moe.model.layers import activation_dtype
from st_moe.model.transformer import Transformer
from st_moe.train import step


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

  @functools.cached_property
  def generator(self):
    """An `infer.generate.Generator` with the defaults; made once."""
    return self.serve()

  def serve(self, *, max_inputs: int = 0, batch_size: int = 16):
    """A Generator for prompts of up to `max_inputs` tokens (0: as trained).

    It holds a copy of the parameters, unless they were loaded `for_answers`.
    """
    from st_moe.infer.generate import Generator

    config = self.model.config
    if not (config.encoder and config.decoder):
      raise ValueError(
        f'{self.path} has no {"decoder" if config.encoder else "encoder"}:'
        ' texts are answered by an encoder and a decoder.'
      )
    if self.vocabulary is None:
      raise ValueError(no_vocabulary(self.path))
    return Generator(
      config,
      self.params,
      self.vocabulary,
      max_inputs=max_inputs or self.config.data.inputs_length,
      mesh=self.mesh,
      batch_size=batch_size,
    )

  def generate(self, prompts: list[str], **options) -> list:
    """A text for each prompt, or a list of `num_return` texts.

    Args:
      options: fields of `infer.generate.Asked` and `infer.methods.Method`:
        max_length, temperature, top_k, top_p, seed, num_beams, stop, ...
    """
    from st_moe.infer.generate import asked

    wanted = asked(**options)
    found = [
      [answer.text for answer in answers]
      for answers in self.generator.answers(prompts, wanted)
    ]
    alone = wanted.method.num_return == 1
    return [texts[0] for texts in found] if alone else found

  def score(self, prompts: list[str], targets: list[str]) -> list[float]:
    """Log-probability of each target after its prompt, in nats."""
    return [each.score for (each,) in self.generator.scored(prompts, targets)]

  def encode(self, prompts: list[str]) -> list:
    """What the encoder makes of each prompt, float [tokens, embed]."""
    return self.generator.encode(prompts)

  def fill(self, texts: list[str], **options) -> list[str]:
    """Texts with <extra_id_0>, <extra_id_1>, ... replaced by what belongs."""
    from st_moe.infer.generate import asked

    answers = self.generator.answers(texts, asked(**options))
    return [
      self.generator.fill(text, found[0])
      for text, found in zip(texts, answers, strict=True)
    ]


def _as_used(model):
  """Weights in the dtype they are multiplied in: what moves no number.

  Routers, norms, position biases and logits are float32 whatever the rest is.
  """
  dtype = activation_dtype(model.dtype)
  roles = ('attention', 'mlp', 'experts')

  def used(path, leaf):
    kernel = path.endswith('/kernel') and layout.role(path) in roles
    return leaf.update(dtype=dtype) if kernel else leaf

  return used


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
  source = convert.open_source(path)
  if name == 'st_moe':
    where = source.where
  if for_answers:
    unrolled = dataclasses.replace(source.config.model, scan_layers=False)
    source.config = dataclasses.replace(source.config, model=unrolled)
  config = source.config
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  model = Transformer(config.model)
  with sharding.use(mesh):
    abstract = step.abstract_params(model, mesh)
    if for_answers:
      abstract = layout.map_by_path(_as_used(config.model), abstract)
    params = source.load(abstract)
  own = None
  if vocabulary:
    own = vocabulary_lib.load(vocabulary)
    own.check_fits(config.model.vocab_size)
  elif source.vocabulary is not None:
    own = vocabulary_lib.Vocabulary(where, source.vocabulary)
  number = where.rstrip('/').rpartition('/')[2]
  return Loaded(
    model=model,
    params=params,
    config=config,
    vocabulary=own,
    path=where,
    step=int(number) if name == 'st_moe' and number.isdigit() else 0,
    mesh=mesh,
  )
