"""CMR (S1-14, arXiv:2212.07571): each token a dense FFN, experts, or both.

Claim: a gate that may give a token to a dense FFN, with a budget for experts,
closes the gap between training and validation loss of small tasks and leaves
the large ones as they are: it learns which tokens need experts.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      beside=dict(name='conditional', dropout=0.2),
      losses=dict(
          load_balance=1e-2, router_z=1e-3, budget=dict(share=0.8, weight=0.1)),
      extra_ffn='none')
  return c
