r"""Pre-trains a 20M-parameter ST-MoE on a few million words of your own text.

  st-moe train --config=configs/st_moe_mini.py:text=PATH --workdir=runs/mini

PATH holds one folder a domain with `train-*.jsonl.gz` and `valid.jsonl.gz`, rows
{"text": ...}. Variants: `:dense`, `:seed=1`, `:runlocal`.
"""

import os

from ml_collections import config_dict

from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, text='', dense=False, seed=0, runlocal=False)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 3000

  domains = sorted(os.listdir(arg.text)) if arg.text else []
  domains = [d for d in domains if os.path.isdir(f'{arg.text}/{d}')]
  c.data = dict(
      mixture={d: 'size' for d in domains} or dict(python_reference=1.0),
      files={d: dict(train=f'{arg.text}/{d}/train-*.jsonl.gz',
                     validation=f'{arg.text}/{d}/valid.jsonl.gz')
             for d in domains},
      vocabulary_size=8192, inputs_length=128, targets_length=29, batch_size=16,
      seed=arg.seed)

  c.model = dict(
      vocab_size=0, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=512,
      init_scale=1.0, relpos_init_scale=25.0, dense=arg.dense)
  c.model.encoder = dict(num_layers=2, sparse_every=2, sparse_offset=1, group_size=2048)
  c.model.decoder = dict(num_layers=2, sparse_every=2, sparse_offset=1, group_size=464)
  c.model.moe = dict(num_experts=16)
  c.max_padding = 0.0  # One group, on however many devices: cheap, all of it.

  c.optimizer = dict(learning_rate=0.01, warmup_steps=100, constant_steps=1000)
  c.checkpoint = dict(every=250)
  c.evaluate = dict(every=250, batches=4)
  c.log = dict(every=50)

  if arg.runlocal:
    c.total_steps = 8
    c.data.update(batch_size=8, inputs_length=32, targets_length=16, vocabulary_size=1000)
    c.model.update(embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32)
    c.model.encoder.group_size, c.model.decoder.group_size = 128, 64
    c.checkpoint.every, c.evaluate.every, c.evaluate.batches, c.log.every = 4, 4, 1, 2
  return c
