"""FOM (S1-14, arXiv:2212.07571): whole answers of sparse layers masked.

Claim: as `eom`, whose masks it draws for a token and not for each of its
experts: a masked token passes the layer by. It helps where `eom` does, but
less.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.weighing = dict(final_output=dict(rate=0.2))
  return c
