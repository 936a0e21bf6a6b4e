"""Balance over the whole batch (arXiv:2501.11873), and not in each group.

Claim: with the balance loss of all tokens of a step, experts may specialise in
what a group is about: lower perplexity at the same balance. The experiment
compares the losses and the loads by source of `:base` and of this at groups of
one sequence (`model.moe.group_by` 'sequence') and of 1,024 tokens, with places
for all.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      losses=dict(load_balance=dict(weight=1e-2, scope='batch'), router_z=1e-3))
  return c
