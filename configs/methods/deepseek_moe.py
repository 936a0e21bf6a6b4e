"""DeepSeekMoE (S2-30, arXiv:2401.06066): finer experts, one of them shared.

Claim: experts cut into `m` parts, m times as many of them asked, one of these
always, are better at the same parameters and FLOPs per token; loss falls from
m = 1 to 2 to 4. Without the shared expert it rises, and masking the best routed
experts hurts finer ones more. Balance is a loss, or with `:bias` a bias for
each expert that a rule moves (arXiv:2408.15664). Variants: `:m=1`, `:shared=0`;
`:devices=4` balances groups of experts too.
"""

from st_moe.config_file import base_of_method, own_arg


def get_config(arg=None):
  own, rest = own_arg(arg, m=4, shared=1, devices=0, bias=False)
  c, base = base_of_method(rest)
  if base:
    return c
  c.model.moe.update(
      num_experts=8 * own.m, hidden_dim=c.model.mlp_dim // own.m,
      selector=dict(
          name='top_k', k=2 * own.m - own.shared, train_policy='all', normalize=False),
      losses=dict(load_balance_all=dict(weight=1e-2, normalized=True)),
      train_capacity=dict(dropless=True), eval_capacity=dict(dropless=True),
      extra_ffn='none')
  if own.shared:
    c.model.moe.beside = dict(name='shared', count=own.shared)
  if own.devices:
    c.model.moe.losses.load_balance_groups = dict(groups=own.devices, weight=0.05)
  if own.bias:
    c.model.moe.losses, c.model.moe.shaping = {}, dict(balanced={})
    c.optimizer.after = dict(rebalanced={})
  return c
