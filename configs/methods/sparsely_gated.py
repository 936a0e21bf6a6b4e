"""Sparsely-Gated MoE (S1-01, arXiv:1701.06538): noisy top-k gating.

Claim: without its two losses a few experts take all; each of them alone evens
what it is of, and both the most. To compare: the CV of importance and load, and
the largest load over the mean one, with each loss on and off. Nobody is
dropped.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      gate='noisy',
      selector=dict(name='top_k', k=4, train_policy='all', normalize=True),
      train_capacity=dict(dropless=True), eval_capacity=dict(dropless=True),
      losses=dict(importance=0.1, load=0.1), extra_ffn='none')
  return c
