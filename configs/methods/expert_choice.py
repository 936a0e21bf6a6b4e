"""Expert choice (S0-14, arXiv:2202.09368): experts pick tokens.

Claim: loads are even by construction, so no balance loss is needed, and a loss
is reached in fewer steps than with top-2. In the encoder alone, since it looks
ahead; the decoder keeps top-2. To compare: steps to reach a loss; experts per
token; k of 0.5, 1 and 2 (`--config.model.encoder.moe.selector.k=1`).
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.encoder.moe = dict(
      selector=dict(name='expert_choice', k=2),
      train_capacity=dict(factor=1.0, times_k=True, rounding='ceil', minimum=1),
      losses=dict(router_z=1e-3))
  return c
