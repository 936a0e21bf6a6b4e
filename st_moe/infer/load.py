"""A checkpoint as something to use: `st_moe.load(path)` needs nothing else."""

import dataclasses

import jax

from st_moe import config_file, sharding
from st_moe.config import Config
from st_moe.data import vocabulary as vocabulary_lib
from st_moe.model.transformer import Transformer
from st_moe.train import checkpoint, step


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model with its parameters and the run they come from."""

  model: Transformer
  params: dict
  config: Config
  vocabulary: vocabulary_lib.Vocabulary
  path: str  # Of the checkpoint.
  step: int


def load(path, *, mesh=None) -> Loaded:
  """Loads WORKDIR (its newest intact checkpoint) or WORKDIR/checkpoints/STEP.

  Args:
    mesh: where parameters go; None is one device.

  Raises:
    ValueError: there is no checkpoint, or it is damaged.
  """
  directory = checkpoint.find(path)
  run = checkpoint.read_run(directory)
  config = config_file.from_dict(run['config'])
  model = Transformer(config.model)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use(mesh):
    abstract = step.abstract_params(model, mesh)
    params = checkpoint.load_params(directory, abstract)
  return Loaded(
    model=model,
    params=params,
    config=config,
    vocabulary=vocabulary_lib.Vocabulary(
      str(directory), checkpoint.vocabulary_of(run)
    ),
    path=str(directory),
    step=int(directory.name) if directory.name.isdigit() else 0,
  )
