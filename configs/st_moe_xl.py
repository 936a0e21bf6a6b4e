r"""ST-MoE-XL: 8.9B parameters, 16 experts, as flaxformer has it.

  st-moe plan --config=configs/st_moe_xl.py --count

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

  c.data = dict(inputs_length=512, targets_length=114, batch_size=2048, seed=arg.seed)
  c.model = dict(
      embed_dim=2048, num_heads=32, head_dim=64, mlp_dim=5120, dense=arg.dense)
  c.model.encoder = dict(num_layers=24, group_size=1024)
  c.model.decoder = dict(num_layers=24, group_size=228)
  c.model.moe = dict(
      num_experts=16, train_capacity=dict(factor=2.0), eval_capacity=dict(factor=4.0),
      losses=dict(load_balance=1e-2, router_z=0.0001))
  return c
