"""NLLB-200 (S1-17, arXiv:2207.04672): the second expert is drawn.

Claim: a second expert drawn by its probability, with weights that sum to 1
again after drops, holds in a model of hundreds of tasks, every fourth layer
sparse. To compare: loss by task against weights that sum to 1 before drops,
a second expert by chance (train_policy 'random', threshold 0.5) or always.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      shaping=dict(gumbel_second=dict()),
      selector=dict(name='top_k', k=2, train_policy='all', normalize=False),
      weighing=dict(renormalised=dict(), expert_output=dict(rate=0.2)),
      train_capacity=dict(factor=2.0, rounding='ceil', multiple=2, minimum=0),
      eval_capacity=dict(dropless=True), losses=dict(load_balance=1e-2),
      extra_ffn='none')
  return c
