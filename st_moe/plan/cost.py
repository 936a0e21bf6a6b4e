"""What a model costs, from shapes and arithmetic: nothing is allocated."""

import collections
import math

from rich.console import Console
from rich.table import Table

from st_moe import counts
from st_moe.config import Config
from st_moe.model import layout
from st_moe.model.transformer import Transformer
from st_moe.train import step


def count_params(config: Config) -> dict[str, int]:
  """Parameters by role, of the model as it would be initialised."""
  abstract = step.abstract_params(Transformer(config.model))
  found = collections.Counter()
  for path, leaf in layout.by_path(abstract).items():
    found[layout.role(path)] += math.prod(leaf.shape)
  return {role: found[role] for role, _ in layout.ROLES if found[role]}


def report_count(config: Config) -> None:
  """Prints parameters by role, those a token meets, and forward FLOPs."""
  roles = count_params(config)
  total = sum(roles.values())
  table = Table('parameters', 'count', 'share', title=config.name)
  for column in table.columns[1:]:
    column.justify = 'right'
  for role, n in sorted(roles.items(), key=lambda item: -item[1]):
    table.add_row(role, f'{n:,}', f'{n / total:.1%}')
  table.add_section()
  table.add_row('all', f'{total:,}', f'{total / 1e9:,.3f}B')
  active = counts.active_params(config.model)
  table.add_row('met by a token', f'{active:,}', f'{active / total:.1%}')
  if config.paper_params:
    paper = config.paper_params
    table.add_row('its paper', f'{paper:,.0f}', f'{total / paper - 1:+.2%}')
  console = Console()
  console.print(table)
  data = config.data
  flops = counts.forward_flops(
    config.model, data.inputs_length, data.targets_length
  )
  console.print(
    f'{flops:.4g} forward FLOPs for {data.inputs_length} input and'
    f' {data.targets_length} target tokens, {3 * flops:.4g} in training'
  )
