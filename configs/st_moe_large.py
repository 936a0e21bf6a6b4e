r"""ST-MoE-L (arXiv:2202.08906): 4.1B parameters, the size of its studies.

  st-moe plan --config=configs/st_moe_large.py --count

Text and vocabulary are yours to name: `--config.data.mixture`,
`--config.data.files`, `--config.data.vocabulary`. `:dense` is the dense twin.
"""

from ml_collections import config_dict

from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, dense=False, seed=0)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 500_000
  c.paper_params = 0.0 if arg.dense else 4.1e9

  c.data = dict(inputs_length=512, targets_length=114, batch_size=2048, seed=arg.seed)
  c.model = dict(
      embed_dim=1024, num_heads=16, head_dim=64, mlp_dim=2816, dense=arg.dense)
  c.model.encoder = dict(num_layers=24, group_size=2048)
  c.model.decoder = dict(num_layers=24, group_size=456)
  c.model.moe = dict(num_experts=32)
  return c
