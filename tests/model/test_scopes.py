"""A profile of the model can be read: every part has its name."""

import re

import jax
import jax.numpy as jnp
import pytest

from st_moe.model.transformer import Transformer
from tests.helpers import random_params, tiny

PARTS = {'router', 'dispatch', 'experts', 'combine', 'attention'}


@pytest.mark.parametrize('dispatcher', ['index', 'mask', 'grouped'])
def test_every_part_has_its_name_there_and_back(dispatcher):
  model = Transformer(tiny(moe={'dispatcher': dispatcher}))
  tokens = jnp.ones((2, 8), jnp.int32)

  def loss(params):
    logits = model.apply(
      {'params': params}, *3 * [tokens], enable_dropout=False
    )
    return jax.nn.logsumexp(logits).sum()

  params = random_params(model, *3 * [tokens])
  text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
  there, back = set(), set()
  joined = re.findall(r'op_name="(.*?)"', text)  # Merged ones by semicolons.
  for name in {name for names in joined for name in names.split(';')}:
    words = {*re.split('[/()]', name)}
    # Parts do not overlap, so that their times add up.
    assert len(PARTS & words) <= 1, name
    (back if 'transpose(' in name else there).update(PARTS & words)
  assert there == back == PARTS
