"""Activated gate (S2-17, arXiv:2401.13875): an activation before the softmax.

Claim: with a temperature alone, what it does can be undone by the weights, and
estimates converge more slowly than any power of the sample; an activation parts
the two. To compare: errors of fitted mixtures of linear experts as the sample
grows, and the loss here, by `act` and with `learned` temperatures.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.gate = dict(
      name='activated', act='sigmoid',
      temperature=dict(name='linear', start=2.0, end=0.2, steps=c.total_steps))
  return c
