"""Dynamic routing (S2-23, arXiv:2403.07652): experts until they sum to p.

Claim: tokens in doubt meet more experts and easy ones fewer, which with fewer
of them on the average is better than top-2; the entropy loss keeps the router
from spreading. To compare: the loss at equal FLOPs; `active_experts` over
training, by layer and by task.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      selector=dict(name='top_p', p=0.4, expected=2.0),
      train_capacity=dict(factor=1.25, times_k=True),
      eval_capacity=dict(factor=2.0, times_k=True),
      losses=dict(load_balance_all=1e-2, router_z=1e-3, entropy=1e-4))
  return c
