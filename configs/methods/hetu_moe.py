"""HetuMoE (S1-13, arXiv:2203.14685): k top-1, or groups first (`:two_level`).

Claim: two experts of two prototypes cost less to find than the best two and are
as good; of one group, whose experts share a node, they cost less to reach. To
compare: the loss and the largest load of either with top-2, and of two_level
with `chosen` of 1 and 2. `model.moe.transport=two_hop` exchanges tokens among
the devices of a host first, then between hosts.
"""

from st_moe.config_file import base_of_method, own_arg


def get_config(arg=None):
  own, arg = own_arg(arg, two_level=False)
  c, base = base_of_method(arg)
  if base:
    return c
  selector = dict(name='group_top_1', k=2)
  if own.two_level:
    selector = dict(name='two_level', k=2, groups=4)
  # Of choices of equal rank all count, and not the first alone.
  c.model.moe.update(
      selector=selector, losses=dict(load_balance_all=1e-2, router_z=1e-3))
  return c
