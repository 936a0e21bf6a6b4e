r"""Switch Transformers (arXiv:2101.03961) as they were released: top-1 routing.

  st-moe plan --config=configs/switch.py:size=base,experts=8 --count

base with 8, 16, 32, 64, 128 or 256 experts, large and xxl with 128, c with
2048. Routing is that of the code they were trained with (see ROUTINGS in
st_moe/config.py). `:dense` is the dense twin.
"""

from ml_collections import config_dict

from st_moe.config_file import choose, parse_arg

# embed, heads, mlp, layers of each stack, one sparse layer in so many,
# experts, group size, capacity in training and evaluation, minimum capacity
SIZES = {
    'base': (768, 12, 3072, 12, 2, 128, 8192, 1.25, 2.0, 4),
    'large': (1024, 16, 4096, 24, 2, 128, 4096, 1.25, 2.0, 4),
    'xxl': (4096, 64, 10240, 24, 2, 128, 4096, 1.25, 4.0, 2),
    'c': (2080, 30, 6144, 15, 1, 2048, 2048, 1.0, 2.0, 2),
}
PAPER = {
    ('base', 128): 7.4e9, ('base', 256): 14.7e9, ('large', 128): 26.3e9,
    ('xxl', 128): 395e9, ('c', 2048): 1571e9,
}


def get_config(arg=None):
  arg = parse_arg(arg, size='base', experts=0, dense=False, seed=0)
  (embed, heads, mlp, layers, every, experts, group, train, evaluate,
   minimum) = choose('size', arg.size, SIZES)
  experts = arg.experts or experts
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 550_000
  if not arg.dense:
    c.paper_params = PAPER.get((arg.size, experts), 0.0)

  c.data = dict(inputs_length=512, targets_length=114, batch_size=2048, seed=arg.seed)
  c.model = dict(
      embed_dim=embed, num_heads=heads, head_dim=64, mlp_dim=mlp,
      activation='geglu' if arg.size == 'xxl' else 'relu',
      tie_embeddings=arg.size in ('base', 'large'), dense=arg.dense)
  stack = dict(num_layers=layers, sparse_every=every, sparse_offset=every - 1,
               group_size=group)
  c.model.encoder, c.model.decoder = stack, dict(stack)
  c.model.moe = dict(
      num_experts=experts, selector=dict(name='top_k', k=1), extra_ffn='none',
      train_capacity=dict(factor=train, minimum=minimum),
      eval_capacity=dict(factor=evaluate, minimum=minimum),
      losses=dict(load_balance=1e-2))
  c.routing = 'flaxformer'
  return c
