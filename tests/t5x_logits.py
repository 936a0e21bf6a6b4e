"""Logits of Flaxformer's model on a checkpoint, by T5X alone.

  python -m tests.t5x_logits MODEL.gin CHECKPOINT BATCH.npz LOGITS.npy

In a process of its own: gin, and what it wires, are one for a whole program.
"""

import pathlib
import sys

import numpy as np

from st_moe import shipped, t5x_bridge


def main(gin_file: str, checkpoint: str, batch: str, out: str) -> None:
  t5x_bridge.import_t5x()
  import gin
  import orbax.checkpoint as ocp
  from t5x import checkpoints
  from t5x.contrib.moe import models

  for module in ('t5x', 'flaxformer'):
    folder = pathlib.Path(sys.modules['t5x'].__path__[0])
    if module == 'flaxformer':
      import flaxformer

      folder = pathlib.Path(flaxformer.__path__[0])
    gin.add_config_file_search_path(str(folder.parent))
  gin.add_config_file_search_path(str(shipped.folder('configs')))
  gin.parse_config_file(gin_file)
  model = gin.get_configurable(models.MoeEncoderDecoderModel)()
  path = pathlib.Path(checkpoint)
  if (path / 'state').exists():
    state = ocp.PyTreeCheckpointer().restore(path / 'state')
  else:
    state = checkpoints.load_t5x_checkpoint(checkpoint)
  logits = model.module.apply(
    {'params': state['target']}, **np.load(batch), enable_dropout=False
  )
  np.save(out, logits)


if __name__ == '__main__':
  main(*sys.argv[1:])
