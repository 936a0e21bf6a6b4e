r"""ST-MoE-32B (arXiv:2202.08906): 269B parameters, the FLOPs of a dense 32B.

  st-moe plan --config=configs/st_moe_32b.py --count
  st-moe plan --config=configs/st_moe_32b.py --topology=v5p:4x4x8

Text and vocabulary are yours to name: `--config.data.mixture`,
`--config.data.files`, `--config.data.vocabulary`. `:dense` is the dense twin. The
mesh is for 128 chips, an expert on two of them.
"""

from ml_collections import config_dict

from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, dense=False, seed=0)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 1_430_000
  c.paper_params = 0.0 if arg.dense else 269e9

  c.data = dict(inputs_length=512, targets_length=114, batch_size=2048, seed=arg.seed)
  c.model = dict(
      embed_dim=5120, num_heads=64, head_dim=128, mlp_dim=20480, dense=arg.dense)
  c.model.encoder = dict(num_layers=24, group_size=4096)
  c.model.decoder = dict(num_layers=24, group_size=912)
  c.model.moe = dict(num_experts=64)
  c.model.remat = 'full'
  c.mesh = dict(fsdp=2, expert=1 if arg.dense else 64)
  return c
