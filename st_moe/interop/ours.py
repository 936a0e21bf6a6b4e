"""Our own checkpoints, as a source and a target like the others."""

import dataclasses

import jax

from st_moe import config_file
from st_moe.config import Config
from st_moe.model import layout
from st_moe.model.transformer import Transformer
from st_moe.train import checkpoint, step


@dataclasses.dataclass
class Source:
  """One of our checkpoints, opened and not yet read."""

  where: str
  config: Config
  vocabulary: bytes | None

  def load(self, abstract):
    """Parameters in the layout of `abstract`, scanned or not."""
    own = config_file.from_dict(checkpoint.read_run(self.where)['config']).model
    model = self.config.model
    if own.scan_layers == model.scan_layers:
      return checkpoint.load_params(self.where, abstract)
    saved = step.abstract_params(Transformer(own))
    params = checkpoint.load_params(self.where, saved)
    turn = layout.roll if model.scan_layers else layout.unroll
    return jax.tree.map(_as_asked, turn(params, model), abstract)


def _as_asked(array, abstract):
  return jax.device_put(array.astype(abstract.dtype), abstract.sharding)


def open_source(where: str) -> Source:
  run = checkpoint.read_run(where)
  config = config_file.from_dict(run['config'])
  return Source(where, config, checkpoint.vocabulary_of(run))


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  run = checkpoint.describe_run(config_file.to_dict(config), vocabulary)
  checkpoint.save_params(where, params, run)
