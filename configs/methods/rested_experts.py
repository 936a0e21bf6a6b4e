"""Rested experts (S1-02, arXiv:2204.10598): who is used too much has a break.

Claim: ruling out overused experts for a step keeps all of them in use without a
loss of balance, and leaves each to its own kind of token more than a soft one
(`:soft`, the KL of the mean gate to uniform). Compare: experts by token and
task, the load of each, and validation loss, under either and under the base.
"""

from st_moe.config_file import base_of_method, own_arg


def get_config(arg=None):
  own, rest = own_arg(arg, soft=False)
  c, base = base_of_method(rest)
  if base:
    return c
  if own.soft:
    c.model.moe.losses = dict(kl_uniform=1e-2, router_z=1e-3)
    return c
  c.model.moe.update(
      shaping=dict(rested=dict(threshold=0.5)), losses=dict(router_z=1e-3))
  c.optimizer.after = dict(used=dict(decay=0.9))
  return c
