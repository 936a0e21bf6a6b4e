r"""ST-MoE-Base: 0.7B parameters, 16 experts, as flaxformer has it.

  st-moe plan --config=configs/st_moe_base.py --count

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
      embed_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, dense=arg.dense)
  c.model.encoder = dict(num_layers=12, group_size=4096)
  c.model.decoder = dict(num_layers=12, group_size=912)
  c.model.moe = dict(
      num_experts=16, losses=dict(load_balance=1e-2, router_z=0.0001))
  return c
