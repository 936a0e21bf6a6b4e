r"""T5 1.0: ReLU, output projection tied to the embedding.

  st-moe plan --config=configs/t5_1_0.py:size=base --count

Sizes: small, base, large, xl ("3B"), xxl ("11B").
"""

from ml_collections import config_dict

from st_moe.config_file import choose, parse_arg

SIZES = {  # embed, heads, head, mlp, layers of each stack, paper's parameters
    'small': (512, 8, 64, 2048, 6, 60e6),
    'base': (768, 12, 64, 3072, 12, 220e6),
    'large': (1024, 16, 64, 4096, 24, 770e6),
    'xl': (1024, 32, 128, 16384, 24, 2.8e9),
    'xxl': (1024, 128, 128, 65536, 24, 11e9),
}


def get_config(arg=None):
  arg = parse_arg(arg, size='base', seed=0)
  embed, heads, head, mlp, layers, paper = choose('size', arg.size, SIZES)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 1_000_000
  c.paper_params = paper

  c.data = dict(inputs_length=512, targets_length=114, batch_size=128, seed=arg.seed)
  c.model = dict(
      embed_dim=embed, num_heads=heads, head_dim=head, mlp_dim=mlp,
      activation='relu', tie_embeddings=True, init_scale=1.0)
  c.model.encoder = dict(num_layers=layers, sparse_every=0)
  c.model.decoder = dict(num_layers=layers, sparse_every=0)
  return c
