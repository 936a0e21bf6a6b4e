"""Quantile balancing (https://kexue.fm/archives/11619; Kimi K3, section 2.3.3).

Claim: with a threshold for each expert that k / e of the tokens pass, solved
for at each step and kept to the next, loads are even from the first steps on,
without a balance loss and without its rate to tune. The experiment compares
losses, dropped routes and the largest load by step of `:base`, of this, and of
the shaping `balanced` with the rule `rebalanced`.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      shaping=dict(quantile=dict(k=2)), losses=dict(router_z=1e-3))
  c.optimizer.after = dict(averaged=dict(rate=0.5))
  return c
