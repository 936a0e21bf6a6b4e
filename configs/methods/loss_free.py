"""Loss-free balance (S2-30, arXiv:2408.15664): a bias for each expert.

Claim: biases that count in the choice alone, moved a little after each step,
keep the load as even as a loss does, and no gradient but that of the text
reaches the router. An experiment would compare `dropped_routes` and the loss of
the text with those of the base.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      shaping=dict(balanced={}), losses=dict(load_balance=None))
  c.optimizer.after = dict(rebalanced=dict(rate=1e-3))
  return c
