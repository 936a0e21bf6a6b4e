"""What one value may be."""

import typing

import numpy as np
import pytest

from st_moe import fields
from st_moe.config import DataConfig, ModelConfig, MoEConfig, Part
from st_moe.fields import Above0, Count, Rate, Seed, check

Word = typing.Literal['up', 'down']


def test_what_is_right_comes_back_in_its_type():
  assert check(3, Count, 'n') == 3
  assert repr(check(1, Above0, 'x')) == '1.0'  # A whole number is a fine float.
  assert type(check(np.int64(3), Count, 'n')) is int
  assert check(None, Rate | None, 'x') is None
  assert check('up', Word, 'w') == 'up'
  assert check(
    {'a': 1, 'b': 'up'}, typing.Mapping[str, Above0 | Word], 'm'
  ) == {
    'a': 1.0,
    'b': 'up',
  }
  assert check(2**32 - 1, Seed, 'seed') == 2**32 - 1


@pytest.mark.parametrize(
  ('value', 'hint', 'message'),
  [
    (0, Count, 'x = 0 should be a int, at least 1 and at most 2,147,483,647.'),
    (True, Count, 'x = True should be a int'),
    (1.0, Count, 'x = 1.0 should be a int'),
    (float('nan'), Above0, 'x = nan should be a float, above 0, finite.'),
    (float('inf'), Above0, 'x = inf should be a float, above 0, finite.'),
    (10**400, Above0, 'should be a float'),  # More than a float holds.
    (1, Rate, 'x = 1 should be a float, at least 0 and below 1 (10 percent'),
    (2**32, Seed, 'at most 4,294,967,295'),  # JAX would make it 0.
    ('upp', Word, "Unknown x 'upp'. Did you mean 'up'? Known: ['down', 'up']"),
    (3, Word, "x = 3 should be 'up' or 'down'."),
    (
      -1,
      Above0 | Word,
      "x = -1 should be a float, above 0, finite, or 'up' or",
    ),
    ('', fields.Text, "x = '' should be a str, not empty."),
    ('a\0', str, "x = 'a\\x00' should be a str."),
    ('\udce9', str, 'should be a str.'),
  ],
)
def test_what_is_wrong_is_named_with_its_rule(value, hint, message):
  with pytest.raises(ValueError) as e:
    check(value, hint, 'x')
  assert message in str(e.value)


def test_configs_made_in_python_are_looked_at():
  with pytest.raises(ValueError, match='MoEConfig.num_experts = 0 should be'):
    MoEConfig(num_experts=0)
  with pytest.raises(ValueError, match='gate = 3 should be a Part'):
    MoEConfig(gate=3)
  # A word is what it is in a config file.
  assert MoEConfig(dispatcher='mask').dispatcher == Part('mask')
  with pytest.raises(ValueError, match='ModelConfig.dropout = 10 should be'):
    ModelConfig(dropout=10)
  with pytest.raises(ValueError, match="mixture.a = 'sise' should be a float"):
    DataConfig(mixture={'a': 'sise'})
  with pytest.raises(ValueError, match='selector.k=3 experts per token; .* 2'):
    ModelConfig(moe=MoEConfig(num_experts=2, selector=Part.of('top_k', k=3)))


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(relpos_buckets=3), 'relpos_buckets = 3 should be at least 4'),
    (dict(relpos_max_distance=16), 'relpos_max_distance = 16 .* above 16'),
    (
      dict(embed_dim=2**24, mlp_dim=2**24, moe=MoEConfig(num_experts=2**24)),
      'numbers in one array should be at most',
    ),
  ],
)
def test_sizes_that_do_not_go_together(sizes, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig(**sizes)


def test_options_of_a_mechanism_by_annotation_or_default():
  def noisy(x, *, std: Rate = 0.1, times=1, words='a', need: Count):
    return x * std * times * need

  choose = lambda **kw: Part.of('noisy', **kw).choose(
    'a.gate', {'noisy': noisy}
  )
  assert choose(need=2, std=0)(3) == 0
  for options, message in {
    (('need', 2), ('std', 1.5)): 'a.gate.std = 1.5 should be a float',
    (('need', 2), ('times', 'x')): "a.gate.times = 'x' should be a int",
    (('need', 2), ('words', 3)): 'a.gate.words = 3 should be a str',
    (('need', 0),): 'a.gate.need = 0 should be a int, at least 1',
    (): "a.gate = 'noisy' needs need: set a.gate.need to a int, at least 1",
  }.items():
    with pytest.raises(ValueError) as e:
      choose(**dict(options))
    assert message in str(e.value)
