"""T5X checkpoints in Orbax's layout of today; see `t5x`."""

import orbax.checkpoint as ocp
from flax import traverse_util

from st_moe.config import Config
from st_moe.data import files
from st_moe.interop import t5x
from st_moe.interop.links import tensors

open_source = t5x.open_source
check_export = t5x.check_export
names = t5x.names


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  """Writes the item `state` of a T5X checkpoint; whole or not at all."""
  del vocabulary
  theirs = tensors(params, config.model, names(config.model))
  leaves = {name: make() for name, _, _, make in theirs}
  target = traverse_util.unflatten_dict(leaves, sep='/')
  with files.directory_appearing(where) as directory:
    with ocp.PyTreeCheckpointer() as writer:
      writer.save(directory / 'state', {'target': target, 'state': {'step': 0}})
