"""GShard (S1-18, arXiv:2006.16668): top-2, the second by chance.

Claim: with capacity 2 tokens / experts and a second expert kept with
probability min(1, 2 g2), loss falls with the number of experts while memory
per device stays. Every second layer is sparse.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      selector=dict(name='top_k', k=2, train_policy='random', threshold=0.5),
      train_capacity=dict(factor=2.0), losses=dict(load_balance=1e-2),
      extra_ffn='none')
  return c
