"""Every config file that comes with the package makes a run that may begin."""

import ast
import dataclasses

import jax
import pytest

from st_moe import config_file
from st_moe.model import parts
from st_moe.model.transformer import Transformer
from st_moe.train import after, terms
from st_moe.train.state import abstract_params

FILES = {
  f'{path.parent.name}/{path.stem}': path
  for path in [*config_file.shipped(), *config_file.methods()]
}
# What a file leaves to whoever runs it.
OPEN = {'data.mixture': {'tiny_glue': 1.0}}
BASES = {name: {'init': 'w'} for name in FILES if '/finetune' in name}
BASES['configs/st_moe_mini'] = {
  'data.files': {'mine': {'train': 'a.txt'}},
  **OPEN,
}


def _load(name, argument=''):
  given = BASES.get(name, OPEN)
  said = config_file.to_dict(config_file.load('configs/st_moe_tiny.py'))
  path = f'{FILES[name]}:{argument}' if argument else FILES[name]
  return config_file.load(path, given, base=lambda init: said)


def _switches():
  """One argument of each file at a time: what is off is on."""
  for name, path in FILES.items():
    for argument, default in config_file.arguments(path).items():
      if ast.literal_eval(default) is False:
        yield name, argument


@pytest.mark.parametrize('name', FILES)
def test_a_config_is_a_model(name):
  config = _load(name)
  parts.check(config.model)
  terms.check(config.model, config.microbatches)
  after.check(config.optimizer, config.model, config.init)
  size = config.model.vocab_size or 4096  # 0: its vocabulary's.
  model = dataclasses.replace(config.model, vocab_size=size)
  shapes = abstract_params(Transformer(model))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1e6


@pytest.mark.parametrize(('name', 'argument'), [*_switches()])
def test_each_switch_of_a_config_does_something(name, argument):
  plain, other = (_load(name, argument=text) for text in ('', argument))
  parts.check(other.model)
  assert plain != other
