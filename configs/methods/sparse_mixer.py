"""SparseMixer (S0-12, arXiv:2310.00811): sampled experts, honest gradients.

Claim: a router that draws its expert and learns by a midpoint estimate of what
the others would have said reaches the loss of Switch top-1 in fewer steps, at
the same cost. Compare: loss and routing entropy over steps against `k=1` of
top_k. `:k=2` is the third-order version of GRIN (arXiv:2409.12136).
"""

from st_moe.config_file import base_of_method, own_arg


def get_config(arg=None):
  own, rest = own_arg(arg, k=1)
  c, base = base_of_method(rest)
  if base:
    return c
  c.model.moe.update(
      shaping=dict(near_best=dict(jitter=0.1)),
      selector=dict(name='mixed_sampling', k=own.k),
      beside='scaled', losses=dict(load_balance=1e-2), extra_ffn='none')
  if own.k > 1:  # Each choice has its own who come near.
    c.model.moe.shaping, c.model.moe.selector.jitter = {}, 0.1
  return c
