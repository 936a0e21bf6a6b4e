"""T5X checkpoints in Orbax's layout of today; see `t5x`."""

import orbax.checkpoint as ocp

from st_moe.config import Config
from st_moe.data import files
from st_moe.interop import t5x
from st_moe.interop.links import tensors

open_source = t5x.open_source
check_export = t5x.check_export


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  """Writes the item `state` of a T5X checkpoint; whole or not at all."""
  del vocabulary
  target = {}
  links = t5x.links(config.model)
  for name, _, _, make in tensors(params, config.model, links):
    *parents, last = name.split('/')
    node = target
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = make()
  with files.directory_appearing(where) as directory:
    with ocp.PyTreeCheckpointer() as writer:
      writer.save(directory / 'state', {'target': target, 'state': {'step': 0}})
