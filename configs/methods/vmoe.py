"""V-MoE (S1-03, arXiv:2106.05974): places go to the surest tokens first.

Claim: with Batch Prioritised Routing the loss stays nearly flat where experts
have places for few of the tokens, as those who find none matter least. To
compare: eval_capacity.factor from 0.1 to 2 with `evaluate.dropless` off, the
encoder's priority 'score' against 'position'. In a decoder it would look ahead.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  capacity = dict(factor=1.05, times_k=True, rounding='ceil')
  c.model.moe.update(
      shaping=dict(noise=dict(std=1.0)),
      selector=dict(name='top_k', k=2, train_policy='all', normalize=False),
      train_capacity=capacity, eval_capacity=capacity,
      losses=dict(importance=dict(weight=5e-3, by='logits'), load=dict(weight=5e-3, exclude=False)),
      extra_ffn='none')
  c.model.encoder.moe = dict(selector=dict(priority='score'))
  return c
