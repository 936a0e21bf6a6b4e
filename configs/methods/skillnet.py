"""SkillNet (S2-26, arXiv:2203.03312): each task lists the experts it takes.

Claim: with experts as named skills, of which a task activates some and nobody
learns to route, multi-task fine-tuning beats a dense model and learned routing,
and a new task starts better from skills that are there. The experiment trains
this and `:base` on `--config.data.mixture="{'tiny_glue': 1.0}"`, the latter at
k = 4, then both on one task left out.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  # Of questions 0 and 1, of inference 2 and 3, of causes 4 and 5, of pairs of
  # texts 6, of all 7; by the order of tasks in the mixture, then any other.
  table = ((0, 1, 6, 7), (2, 3, 6, 7), (4, 5, 6, 7), (0, 2, 4, 7))
  c.model.moe.update(
      gate=dict(name='skills', table=table),
      selector=dict(name='top_k', k=4, train_policy='all'),
      losses=dict(load_balance=None, router_z=None),
      train_capacity=dict(dropless=True), eval_capacity=dict(dropless=True))
  return c
