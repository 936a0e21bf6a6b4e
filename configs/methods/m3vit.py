"""M3ViT (S2-12, arXiv:2210.14793): a router for each task over one bank.

Claim: routers of their own let tasks part ways where their gradients conflict,
and one task at a time needs only the experts that its router asks. The
experiment compares accuracies of tasks, and which experts each of them asks,
with `:base` on `--config.data.mixture="{'tiny_glue': 1.0}"`.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      gate=dict(name='per_task', tasks=3), shaping=dict(noise=dict(std=1.0)),
      selector=dict(name='top_k', k=4, normalize=False, train_policy='all'),
      losses=dict(importance=1e-2, load=1e-2))
  return c
