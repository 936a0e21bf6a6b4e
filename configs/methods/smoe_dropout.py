"""SMoE-dropout (S2-02, arXiv:2303.01610): a random router, ever more experts.

Claim: one FFN cut into 16 experts, of which a router that never learns picks 8
at first and all 16 in the end, trains as well as the dense one and can be asked
with any number of them: the loss falls with each expert more, which that of a
learned top-2 router does not. The experiment compares losses of both,
evaluated with k = 1 to 16.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  more = dict(name='linear', start=8, end=16, steps=c.total_steps)
  c.model.moe.update(
      num_experts=16, hidden_dim=c.model.mlp_dim // 16,
      gate=dict(name='linear', frozen=True),
      selector=dict(name='top_k', k=16, k_at=more, train_policy='all'),
      train_capacity=dict(dropless=True), eval_capacity=dict(dropless=True),
      losses={}, extra_ffn='none')
  return c
