"""Capped expert choice (S0-14, arXiv:2202.09368): a token meets few of them.

Claim: with at most 2 or 3 experts a token, expert choice is worse than without
a cap: how many a token meets should vary. In the encoder alone; the decoder
keeps top-2. To compare: the loss with `most` of 2, 3 and 8 (no cap).
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.encoder.moe = dict(
      selector=dict(name='capped_choice', k=2, most=2),
      train_capacity=dict(factor=1.0, times_k=True, rounding='ceil', minimum=1),
      losses=dict(router_z=1e-3))
  return c
