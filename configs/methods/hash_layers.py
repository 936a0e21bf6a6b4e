"""Hash layers (S0-03, arXiv:2106.04426): experts by a fixed hash of the token.

Claim: without a router, and with no loss to balance one, perplexity is that of
learned top-1 routing or better; random and balanced tables are best, those by
cluster and by position worse. The experiment compares the tables
(`--config.model.moe.gate.table`; those that are stored need `gate.vocab`) with
`:base` at k = 1, at 8, 16 and 64 experts.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      gate=dict(name='hash', table='random'), selector=dict(name='top_k', k=1),
      losses=dict(load_balance=None, router_z=None))
  return c
