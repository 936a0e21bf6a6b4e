"""Llama-SMoP (S1-12, arXiv:2505.14336): experts for each input.

Claim: of joint experts and a joint router (JEJR, `:base`), joint experts and a
router for each kind (JEDR, without the shaping) and both of their own (DEDR,
this), the last is best at equal active parameters. The experiment compares the
three on `--config.data.mixture="{'tiny_glue': 1.0}"`, where a kind is a task.
"""

from st_moe.config_file import base_of_method


def get_config(arg=None):
  c, base = base_of_method(arg)
  if base:
    return c
  c.model.moe.update(
      gate=dict(name='per_task', tasks=3),
      shaping=dict(own_experts=dict(tasks=3)))
  return c
