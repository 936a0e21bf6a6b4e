"""The models of the papers, counted from shapes alone."""

import dataclasses

import jax
import pytest

from st_moe import cli, config_file, counts
from st_moe.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  Part,
  StackConfig,
)
from st_moe.model.transformer import Transformer
from st_moe.plan import cost, hlo
from st_moe.train.state import abstract_params
from tests.helpers import examples, jit, padded_batch, params_by_hand, tiny

# As measured on the code that trained or released them, to the parameter.
EXACT = {
  't5_1_0.py:size=small': 60_506_624,
  't5_1_0.py:size=base': 222_903_552,
  't5_1_0.py:size=large': 737_668_096,
  't5_1_0.py:size=xl': 2_851_598_336,
  't5_1_0.py:size=xxl': 11_307_321_344,
  't5_1_1.py:size=small': 76_961_152,
  't5_1_1.py:size=base': 247_577_856,
  't5_1_1.py:size=large': 783_150_080,
  't5_1_1.py:size=xl': 2_849_757_184,
  't5_1_1.py:size=xxl': 11_135_332_352,
  't5_1_1.py:size=small,mt5': 300_176_768,
  'switch.py:size=base,experts=8': 619_339_008,
  'switch.py:size=base,experts=128': 7_415_217_408,
  'switch.py:size=large': 26_309_291_008,
  'switch.py:size=xxl': 394_675_073_024,
  'switch.py:size=c': 1_571_327_875_360,
  'st_moe_base.py': 700_641_024,
  'st_moe_xl.py': 8_889_972_736,
  'st_moe_32b.py': 269_104_613_376,
}
# From the arithmetic of the papers, in billions with three decimals.
BILLIONS = {
  'st_moe_large.py': 4.105,
  'switch.py:size=base,experts=256': 14.664,
}


def load(name):
  return config_file.load(f'configs/{name}')


def total(config) -> int:
  return sum(cost.count_params(config).values())


@pytest.mark.parametrize('name', EXACT)
def test_counts_to_the_parameter(name):
  assert total(load(name)) == EXACT[name]


@pytest.mark.parametrize('name', BILLIONS)
def test_counts_of_the_papers(name):
  assert round(total(load(name)) / 1e9, 3) == BILLIONS[name]


def test_each_expert_of_switch_base_adds_as_much():
  more = [total(load(f'switch.py:size=base,experts={e}')) for e in (16, 32, 64)]
  assert more[1] - more[0] == 16 * 56_632_320
  assert more[2] - more[1] == 32 * 56_632_320


@pytest.mark.parametrize(
  ('size', 'layers', 'd', 'f', 'heads', 'experts', 'sparse', 'expected'),
  [('tiny', 2, 32, 64, 6, 8, 1, 2_462_976)],
)
def test_tokens_choose(size, layers, d, f, heads, experts, sparse, expected):
  """Flaxformer's family of the same name: top-2, no extra FFN."""
  stack = StackConfig(layers, layers // sparse, layers // sparse - 1)
  moe = MoEConfig(num_experts=experts, extra_ffn='none')
  model = ModelConfig(
    embed_dim=d, mlp_dim=f, num_heads=heads, encoder=stack, decoder=stack,
    moe=moe,
  )  # fmt: skip
  assert total(Config(model=model)) == expected


NAMES = [
  *EXACT,
  *BILLIONS,
  'st_moe_large.py:dense',
  'switch.py:dense',
]


@pytest.mark.parametrize('name', NAMES)
def test_shapes_and_arithmetic_agree(name):
  config = load(name)
  assert cost.count_params(config) == params_by_hand(config.model)
  if config.paper_params:  # Rounded; T5-Large is printed as 770M, 4 % off.
    assert total(config) / config.paper_params == pytest.approx(1, rel=0.05)


def test_a_token_meets_the_experts_it_chose():
  # 12 sparse layers x 2 of 32 experts x 3 matrices of 1024 x 2816.
  config = load('st_moe_large.py')
  roles = cost.count_params(config)
  others = sum(roles.values()) - roles['experts']
  expected = others + 12 * 2 * 3 * 1024 * 2816
  assert cost.active_params(config) == expected
  dense = dataclasses.replace(
    config, model=dataclasses.replace(config.model, dense=True)
  )
  assert cost.active_params(dense) == total(dense)


def test_forward_flops_of_the_paper():
  # 20.2T printed for ST-MoE-32B at 512 + 114 tokens.
  config = load('st_moe_32b.py')
  assert counts.forward_flops(config.model, 512, 114) == pytest.approx(
    20.2e12, rel=0.01
  )


def test_the_verb(capsys):
  cli.run(['plan', '--config=configs/st_moe_32b.py', '--count'])
  said = capsys.readouterr().out
  assert '269,104,613,376' in said and '269.105B' in said
  assert '+0.04%' in said  # Against the 269B of the paper.
  with pytest.raises(ValueError, match='--count for parameters'):
    cli.run(['plan', '--config=configs/st_moe_32b.py'])


def test_an_unknown_size():
  with pytest.raises(ValueError, match="size 'lage'. Did you mean 'large'"):
    load('switch.py:size=lage')


def test_groups_that_straddle_devices_are_counted():
  # 8 x 16 tokens in groups of 32 are 4, filled up to 8 on as many devices.
  model = tiny(encoder=StackConfig(2, 2, 1, group_size=32))
  data = DataConfig(batch_size=8, inputs_length=16, targets_length=8)
  mesh = dict(data=8, fsdp=1, expert=1, model=1)
  found = cost.work(Config(model=model, data=data), mesh)
  # As many empty places in the encoder as filled ones: 32 tokens of capacity 10
  # in each of 4 experts, once forward and twice backward, by rows of 16.
  experts = 3 * 2 * 4 * 10 * 3 * 16 * 24 // 2
  router = 3 * 2 * 16 * 4 * 16
  assert found.flops['padded groups'] == experts + router
  within = dataclasses.replace(
    model, encoder=StackConfig(2, 2, 1, group_size=16)
  )
  whole = cost.work(Config(model=within, data=data), mesh)
  assert whole.flops['padded groups'] == 0
  assert found.ideal == whole.ideal


@pytest.mark.parametrize('dispatcher', ['index', 'mask'])
@pytest.mark.parametrize('remat', ['none', 'full', 'dots'])
def test_flops_of_a_step_are_those_of_the_compiled_one(remat, dispatcher):
  # Encoder and decoder, two periods of a dense and a sparse layer each.
  model = tiny(
    encoder=StackConfig(4, 2, 1, group_size=16),
    decoder=StackConfig(4, 2, 1, group_size=8),
    moe={'dispatcher': dispatcher, 'selector': Part.of('top_k', k=1)},
    remat=remat,
  )
  batch = padded_batch(model, examples(model, [(16, 7)] * 4), (16, 8))

  def loss(params):
    logits = Transformer(model).apply({'params': params}, **batch)
    return (logits**2).sum()

  compiled = jit(jax.grad(loss)).lower(abstract_params(Transformer(model)))
  program = hlo.Program(compiled.compile().as_text())
  # Position biases are chosen by a product, once for all rows.
  chosen = 2 * 2 * model.num_heads * model.relpos_buckets * (16**2 + 8**2)
  expected = chosen + 4 * sum(counts.train_flops(model, 16, 8).values())
  assert program.flops() == pytest.approx(expected, rel=1e-3)
