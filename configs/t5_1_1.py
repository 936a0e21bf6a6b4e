r"""T5 1.1: GEGLU, separate output projection; `:mt5` with mT5's vocabulary.

  st-moe plan --config=configs/t5_1_1.py:size=base --count

Sizes: small, base, large, xl, xxl. Text and vocabulary are yours to name:
`--config.data.mixture`, `--config.data.files`, `--config.data.vocabulary`.
"""

from ml_collections import config_dict

from st_moe.config_file import choose, parse_arg

SIZES = {  # embed, heads, mlp, layers of each stack
    'small': (512, 6, 1024, 8),
    'base': (768, 12, 2048, 12),
    'large': (1024, 16, 2816, 24),
    'xl': (2048, 32, 5120, 24),
    'xxl': (4096, 64, 10240, 24),
}


def get_config(arg=None):
  arg = parse_arg(arg, size='base', mt5=False, seed=0)
  embed, heads, mlp, layers = choose('size', arg.size, SIZES)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 1_000_000
  c.paper_params = {'xxl': 11.1e9}.get(arg.size, 0.0) if not arg.mt5 else 0.0

  c.data = dict(inputs_length=512, targets_length=114, batch_size=2048, seed=arg.seed)
  c.model = dict(
      vocab_size=250_112 if arg.mt5 else 32_128,
      embed_dim=embed, num_heads=heads, head_dim=64, mlp_dim=mlp, init_scale=1.0)
  c.model.encoder = dict(num_layers=layers, sparse_every=0)
  c.model.decoder = dict(num_layers=layers, sparse_every=0)
  return c
