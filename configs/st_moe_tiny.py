r"""Pre-trains a very small ST-MoE on the Python reference manual, on a laptop.

  st-moe train --config=configs/st_moe_tiny.py --workdir=runs/tiny

Text: `pydoc_data.topics`, which every CPython ships. No network is needed.
Variants: `:dense` (the dense twin), `:runlocal` (seconds), `:seed=1`.
"""

from ml_collections import config_dict

from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, dense=False, seed=0, runlocal=False)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 800

  c.data = dict(
      mixture=dict(python_reference=1.0),
      vocabulary_size=2048, vocabulary_extra='tiny_world',
      inputs_length=128, targets_length=29, batch_size=16, seed=arg.seed)

  c.model = dict(
      vocab_size=0, embed_dim=128, num_heads=4, head_dim=32, mlp_dim=256,
      init_scale=1.0, relpos_init_scale=25.0, dense=arg.dense)
  c.model.encoder = dict(num_layers=2, sparse_every=2, sparse_offset=1, group_size=1024)
  c.model.decoder = dict(num_layers=2, sparse_every=2, sparse_offset=1, group_size=232)
  c.model.moe = dict(num_experts=8)
  c.max_padding = 0.0  # Two groups, on however many devices: cheap, all of it.

  c.optimizer = dict(learning_rate=0.01, warmup_steps=50, constant_steps=800)
  c.checkpoint = dict(every=200)
  c.evaluate = dict(every=400, batches=8)
  c.log = dict(every=100)

  if arg.runlocal:
    c.total_steps = 8
    c.data.update(batch_size=8, inputs_length=32, targets_length=16)
    c.model.update(embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32)
    c.model.encoder.group_size, c.model.decoder.group_size = 128, 64
    c.checkpoint.every, c.evaluate.every, c.evaluate.batches, c.log.every = 4, 4, 1, 2
  return c
