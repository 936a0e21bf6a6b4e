"""Config files, their arguments and overrides, and the numbers that follow."""

import dataclasses
import json

import pytest

from st_moe import config_file
from st_moe.config import (
  Capacity,
  Config,
  DataConfig,
  LossConfig,
  ModelConfig,
  MoEConfig,
  Part,
  StackConfig,
)
from st_moe.routing.selectors import dropless

FILE = """
from ml_collections import ConfigDict
from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, dense=False, layers=4, rate=0.5, task='copy')
  config = ConfigDict()
  config.total_steps = 7
  config.model = dict(
    embed_dim=32,
    dense=arg.dense,
    encoder=dict(num_layers=arg.layers),
    moe=dict(num_experts=8, selector='top_k'),
    dropout=arg.rate,
  )
  config.data = dict(mixture={arg.task: 1, 'boolq': 'size'})
  return config
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'trial.py'
  path.write_text(FILE)
  return str(path)


def test_a_file_names_only_what_it_changes(file):
  config = config_file.load(file)
  assert config.name == 'trial'
  assert config.total_steps == 7
  assert config.model.encoder == StackConfig(num_layers=4)
  assert config.model.decoder == StackConfig(group_size=456)
  assert config.model.moe == MoEConfig(num_experts=8, selector=Part('top_k'))
  assert config.data.mixture == {'copy': 1.0, 'boolq': 'size'}
  assert config.optimizer == Config().optimizer


def test_arguments_of_the_file(file):
  config = config_file.load(f'{file}:dense,layers=2,rate=0,task=none')
  assert config.model.dense and config.model.encoder.num_layers == 2
  # A whole number is a fine float, and a word stays a word.
  assert config.model.dropout == 0.0
  assert 'none' in config.data.mixture


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    ('dens', "Unknown config argument 'dens'. Did you mean 'dense'?"),
    ('speed=1', "'speed'. Known: \\['dense', 'layers', 'rate', 'task'\\]"),
    ('layers=many', "layers='many' should be a int"),
    ('layers=true', "layers='true' should be a int"),
    ('layers', "layers='' should be a int"),
    ('dense=1', "dense='1' should be a bool"),
  ],
)
def test_a_wrong_argument(file, arg, message):
  with pytest.raises(ValueError, match=message):
    config_file.load(f'{file}:{arg}')


def test_overrides_come_as_text(file):
  config = config_file.load(
    file,
    {
      'total_steps': '20',
      'model.dropout': '0',
      'model.scan_layers': 'false',
      'model.moe.num_experts': '4',
      'model.decoder': 'none',
      'model.moe.expert_dropout': 'none',
      'model.moe.losses': "{'router_z': 0.5}",
      'name': '2024',
    },
  )
  assert config.total_steps == 20
  assert repr(config.model.dropout) == '0.0'  # A whole number is fine.
  assert config.model.scan_layers is False
  assert config.model.moe.num_experts == 4
  assert config.model.decoder is None
  assert config.model.moe.expert_dropout is None
  assert config.model.moe.losses == (Part.of('router_z', weight=0.5),)
  assert config.name == '2024'


def test_none_is_a_word_where_a_word_stands(file):
  config = config_file.load(
    file,
    {
      'model.remat': 'none',
      'model.moe.extra_ffn': 'none',
      'optimizer.decay': 'none',
      'model.moe.selector.eval_policy': 'none',
    },
  )
  assert config.model.remat == config.model.moe.extra_ffn == 'none'
  assert config.optimizer.decay == 'none'
  assert config.model.moe.selector.kwargs['eval_policy'] == 'none'


def test_options_of_a_part(file):
  load = lambda **kw: (
    config_file.load(
      file, {k.replace('__', '.'): v for k, v in kw.items()}
    ).model.moe
  )
  # The file gives the selector by its name alone; the name stays.
  assert load(model__moe__selector__k='1').selector == Part.of('top_k', k=1)
  # The file says nothing of the gate, so it is the default one.
  gate = load(model__moe__gate__jitter='0.1').gate
  assert gate == Part.of('linear', jitter=0.1)
  assert load(model__moe__gate='noisy').gate == Part('noisy')


def test_a_field_the_file_does_not_name_keeps_its_neighbours(file):
  config = config_file.load(file, {'model.decoder.num_layers': '2'})
  # Not StackConfig's own default of 2048.
  assert config.model.decoder == StackConfig(2, group_size=456)
  config = config_file.load(file, {'model.moe.eval_capacity.minimum': '1'})
  assert config.model.moe.eval_capacity == Capacity(2.0, minimum=1)


def test_experts_follow_the_width_of_the_dense_ffn(tmp_path):
  path = tmp_path / 'bare.py'
  path.write_text(
    'import ml_collections\n'
    'def get_config(arg=None):\n'
    '  return ml_collections.ConfigDict()\n'
  )
  config = config_file.load(str(path), {'model.mlp_dim': '64'})
  width = lambda model: model.expert_dim(model.moe)
  assert width(config.model) == 64
  assert width(dataclasses.replace(config.model, mlp_dim=32)) == 32
  wide = config_file.load(str(path), {'model.moe.hidden_dim': '48'}).model
  assert (width(wide), wide.mlp_dim) == (48, 2048)


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    (
      'total_step',
      1,
      "field of config 'total_step'. Did you mean 'total_steps'",
    ),
    ('modle.dropout', 1, "'modle'. Did you mean 'model'?"),
    (
      'model.moe.num_expert',
      1,
      "Unknown field of config.model.moe 'num_expert'. Did you mean 'num_exp",
    ),
    ('total_steps', '1.5', r'config.total_steps = 1.5 should be a int'),
    ('total_steps', 'many', "config.total_steps = 'many' should be a int"),
    ('model.dropout', 'a', "config.model.dropout = 'a' should be a float"),
    ('model.dense', '1', 'config.model.dense = 1 should be a bool'),
    ('model.encoder', '3', 'config.model.encoder = 3 should be a dict'),
    ('model.moe.gate', '3', 'config.model.moe.gate = 3 needs a name'),
    ('total_steps.x', '1', "config.total_steps = 7 has no field 'x'"),
    ('data.mixture', '3', 'config.data.mixture = 3 should be a dict'),
    (
      'model.moe.extra_ffn',
      'no',
      "extra_ffn 'no'. Did you mean 'none'",
    ),
    ('model.encoder.sparse_offset', '4', 'sparse_offset 4 is never reached'),
    (
      'model.moe.train_capacity.factor',
      '0',
      'train_capacity.factor = 0 .* ab',
    ),
    ('loss.layers', 'max', "Unknown config.loss.layers 'max'"),
  ],
)
def test_a_wrong_override_says_where(file, field, value, message):
  with pytest.raises(ValueError, match=message):
    config_file.load(file, {field: value})


@pytest.mark.parametrize(
  ('field', 'meant'),
  [
    ('model.num_experts', "'model.moe.num_experts'"),
    ('moe.num_experts', "'model.moe.num_experts'"),
    ('model.selector.k', "'model.moe.selector.k'"),
    ('model.optimizer.learning_rate', "'optimizer.learning_rate'"),
    ('learning_rate', "'optimizer.learning_rate'"),
    ('training.warmup-steps', "'optimizer.warmup_steps'"),
    ('batch_size', "'data.batch_size' or 'evaluate.batch_size'"),
    ('Embed-Dim', "'model.embed_dim'"),
    ('total-steps', "'total_steps'"),
    ('modle.num_experts', "'model'"),
    ('model.embed_dimm', "'embed_dim'"),
  ],
)
def test_a_field_in_the_wrong_place_leads_to_the_right_one(file, field, meant):
  with pytest.raises(ValueError) as e:
    config_file.load(file, {field: '1'})
  assert f'Did you mean {meant}?' in str(e.value)


def test_a_plain_dict_is_a_config(tmp_path):
  path = tmp_path / 'plain.py'
  path.write_text('def get_config(arg=None):\n  return {"seed": 3}\n')
  assert config_file.load(str(path)).seed == 3


def test_an_error_of_a_file_is_its_line(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('x = 1\n\ndef get_config(arg=None):\n  return {}["a"]\n')
  with pytest.raises(ValueError) as e:
    config_file.load(str(path))
  assert str(e.value) == f"{path}, line 4: KeyError: 'a'."
  path.write_text('x = 1\ny = (\n')
  with pytest.raises(ValueError, match="mine.py, line 2: SyntaxError: '.' was"):
    config_file.load(str(path))


def test_only_their_own_names_mean_the_shipped_files(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('finetune.py', 'configs/finetune.py'):
    assert config_file.load(name).name == 'finetune'
  for name in ('/typo/finetune.py', './x/finetune.py', '/configs/finetune.py'):
    with pytest.raises(ValueError, match=f'config file {name!r}. Did you mean'):
      config_file.load(name)


def test_what_a_file_leaves_open_must_be_said():
  base = lambda init: config_file.to_dict(Config(name=init))
  for given in ({}, {'init': ''}):  # As of a shell without that variable.
    with pytest.raises(
      ValueError, match='finetune.py leaves config.init to you'
    ):
      config_file.load('configs/finetune.py', given, base=base)
  found = config_file.load('configs/finetune.py', {'init': 'w'}, base=base)
  assert found.init == 'w'
  # To look at it, or to compare, needs none.
  assert config_file.read('configs/finetune.py')['init'] == ''


def test_one_field_of_a_stack_leaves_the_rest_of_init_alone():
  """Not the depth of the defaults, with a dense layer as with a sparse one."""
  model = dict(encoder=dict(num_layers=3), decoder=dict(num_layers=5))
  base = lambda init: {'name': init, 'model': model}
  fields = {
    'init': 'w', 'model.encoder.group_size': '64',
    'model.moe.selector.k': '1', 'model.moe.expert_dropout': '0.5',
  }  # fmt: skip
  found = config_file.load('configs/finetune.py', fields, base=base).model
  assert found.encoder == StackConfig(num_layers=3, group_size=64)
  assert found.decoder.num_layers == 5
  # What is asked for goes before what the file says.
  assert found.moe.k == 1 and found.moe.expert_dropout == 0.5


def test_a_stored_config_that_breaks_a_rule_is_named(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text('{"model": {"dropout": 7.0}}')
  with pytest.raises(ValueError) as e:
    config_file.of_run(path)
  assert str(e.value).startswith(f'{path} is no config of this version (')
  assert 'config.model.dropout = 7.0 should be' in str(e.value)
  path.write_text('{"model": {"dropo')
  with pytest.raises(ValueError, match='config.json is damaged: move it away'):
    config_file.of_run(path)


def test_a_model_without_stacks_is_refused():
  with pytest.raises(ValueError, match='needs an encoder, a decoder, or both'):
    ModelConfig(encoder=None, decoder=None)


def test_an_unknown_file_lists_the_known_ones():
  with pytest.raises(ValueError, match="Unknown config file 'nothing.py'"):
    config_file.load('nothing.py')


def test_an_unknown_part_or_option():
  def noisy(x, *, std=1.0):
    return x * std

  table = {'noisy': noisy}
  assert Part.of('noisy', std=2.0).choose('gate', table)(3) == 6
  with pytest.raises(ValueError, match="gate 'nosy'. Did you mean 'noisy'?"):
    Part('nosy').choose('gate', table)
  with pytest.raises(
    ValueError, match="option of gate 'noisy' 'x'. Known: .'std'"
  ):
    Part.of('noisy', x=1).choose('gate', table)
  with pytest.raises(ValueError, match="option of gate 'noisy' 'sdt'. Did you"):
    Part.of('noisy', sdt=1).choose('gate', table)


FULL = Config(
  name='all of it',
  total_steps=3,
  model=ModelConfig(
    encoder=None,
    moe=MoEConfig(
      gate=Part.of('linear', jitter=0.01),
      selector=Part.of('top_k', k=3, eval_policy='none'),
      eval_capacity=Capacity(dropless=True),
      expert_dropout=0.4,
      losses=(Part.of('router_z', weight=1e-3),),
      shaping=(
        Part.of('b', std=dict(name='linear', start=1.0, end=0.5, steps=9)),
        Part.of('a', table=[1, [2, 'x'], {'name': 'inner', 'p': 1}]),
      ),
    ),
  ),
  data=DataConfig(
    mixture={'copy': 1.0, 'boolq': 'size'}, files={'books': {'train': '*.txt'}}
  ),
  loss=LossConfig(z_loss=0.0),
)


@pytest.mark.parametrize('config', [Config(), FULL], ids=['default', 'full'])
def test_round_trip(config):
  as_dict = config_file.to_dict(config)
  assert config_file.from_dict(as_dict) == config
  text = config_file.to_json(config_file.to_dict(config))
  assert config_file.from_dict(json.loads(text)) == config


def test_a_run_of_before_reads_as_it_was():
  """Router losses stood in `loss`, the dispatcher was a word."""
  config = Config(
    model=ModelConfig(moe=MoEConfig(losses=(Part.of('router_z', weight=0.5),)))
  )
  then = config_file.to_dict(config)
  then['loss']['router'] = {'router_z': 0.5}
  moe = then['model']['moe']
  for name in ('losses', 'shaping', 'weighing', 'experts', 'beside'):
    del moe[name]
  moe['dispatcher'] = 'auto'
  then['optimizer'].pop('after', None)
  for stack in ('encoder', 'decoder'):
    del then['model'][stack]['moe']
  assert config_file.from_dict(then) == config
  # And what a file of before sets is told where it stands today.
  with pytest.raises(ValueError, match="Did you mean 'model.moe.losses.z'?"):
    config_file.load('configs/st_moe_tiny.py', {'loss.router.z': '0.5'})


def test_the_order_of_a_chain_is_part_of_it():
  chain = lambda *names: config_file.to_dict(
    Config(model=ModelConfig(moe=MoEConfig(shaping=tuple(map(Part, names)))))
  )
  a, b = chain('noise', 'bias'), chain('bias', 'noise')
  assert config_file.diff(a, a) == []
  (line,) = config_file.diff(a, b)
  assert line == "model.moe.shaping: ['noise', 'bias'] -> ['bias', 'noise']"
  text = json.loads(
    config_file.to_json(config_file.to_dict(config_file.from_dict(b)))
  )
  assert [*text['model']['moe']['shaping']] == ['bias', 'noise']


def test_a_stack_of_its_own_begins_as_the_model(tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(
    'def get_config(arg=None):\n'
    '  moe = dict(num_experts=8, selector=dict(name="top_k", k=2))\n'
    '  own = dict(selector=dict(k=1))\n'
    '  return dict(model=dict(moe=moe, encoder=dict(moe=own)))\n'
  )
  model = config_file.load(str(path)).model
  assert model.moe_of('encoder').selector == Part.of('top_k', k=1)
  assert model.moe_of('encoder').num_experts == 8
  assert model.moe_of('decoder') is model.moe
  assert model.num_experts == 8
  # What is set later for the model holds for the stack, of a stored run too.
  stored = config_file.to_dict(config_file.load(str(path)))
  assert stored['model']['encoder']['moe'] == {
    'selector': {'name': 'top_k', 'k': 1}
  }
  changed = config_file.set_field(stored, 'model.moe.transport', 'shard_map')
  changed = config_file.from_dict(changed).model
  assert changed.moe_of('encoder').transport == 'shard_map'
  assert changed.moe_of('encoder').selector == Part.of('top_k', k=1)


def test_diff():
  a, b = (config_file.to_dict(c) for c in (Config(), FULL))
  assert config_file.diff(a, a) == []
  lines = config_file.diff(a, b)
  assert "name: '' -> 'all of it'" in lines
  assert 'total_steps: 0 -> 3' in lines
  assert 'model.moe.selector.k: 2 -> 3' in lines
  assert 'model.moe.gate.jitter: None -> 0.01' in lines
  assert not any(line.startswith('optimizer') for line in lines)


# Capacity: facts 2.3 and 2.8.


@pytest.mark.parametrize(
  ('group', 'experts', 'factor', 'slots'),
  [
    (2048, 32, 1.25, 80),
    (456, 32, 1.25, 17),  # 17.8 rounded down.
    (4096, 64, 1.25, 80),
    (4096, 64, 2.0, 128),
    (1024, 2048, 1.25, 4),  # The minimum.
    (3, 32, 1.25, 3),  # Never more than there are tokens.
    (100, 5, 1.15, 23),  # Exactly: 1.15 * 100 / 5 is 22.99... in floats.
  ],
)
def test_capacity_of_the_paper(group, experts, factor, slots):
  assert Capacity(factor).slots(group, experts) == slots
  # Whatever the experts per token.
  assert Capacity(factor).slots(group, experts, k=2) == slots


def test_capacity_of_others():
  ours = Capacity(1.25)
  flaxformer = Capacity(1.25, rounding='round')
  vmoe = Capacity(1.05, times_k=True, rounding='ceil', minimum=0, multiple=4)
  gshard = Capacity(2.0, minimum=0)  # 2 S / E.
  switch = Capacity(1.25, minimum=0, rounding='ceil')
  # 1.25 * 456 / 32 = 17.81
  assert ours.slots(456, 32) == 17
  assert flaxformer.slots(456, 32) == 18
  assert switch.slots(456, 32) == 18
  # 1.05 * 2 * 400 / 8 = 105, made a multiple of 4; 54 for top-1: 52.5.
  assert vmoe.slots(400, 8, k=2) == 108
  assert vmoe.slots(400, 8, k=1) == 56
  assert gshard.slots(1024, 128) == 16
  assert Capacity(count=64).slots(2048, 8) == 64  # HuggingFace.
  assert Capacity(count=2).slots(2048, 8) == 2  # Though the minimum is 4.
  assert Capacity(dropless=True).slots(2048, 8) == 2048


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rounding': 'up'}, "Capacity.rounding 'up'. Known: ..ceil', 'floor'"),
    ({'factor': 0.0}, 'Capacity.factor = 0.0 should be a float, above 0'),
    ({'count': -1}, 'Capacity.count = -1 should be a int, at least 0'),
    ({'multiple': 0}, 'Capacity.multiple = 0 should be a int, at least 1'),
  ],
)
def test_capacity_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    Capacity(**fields)


def test_training_and_evaluation_have_capacities_of_their_own():
  moe = MoEConfig(num_experts=32)
  assert moe.slots(2048, deterministic=False) == 80
  assert moe.slots(2048, deterministic=True) == 128
  free = dropless(ModelConfig(moe=moe)).moe
  assert free.slots(2048, deterministic=True) == 2048
  assert free.slots(2048, deterministic=False) == 80


# Which layers are sparse.


def _sparse(stack, **changes):
  plan = ModelConfig(encoder=stack, **changes).plan('encoder')
  kinds = [[s.kind for s in layer] for layer in plan.layers]
  return plan, [i for i, k in enumerate(kinds) if 'moe' in k]


@pytest.mark.parametrize(
  ('stack', 'sparse', 'period'),
  [
    (StackConfig(24, 4, 3), [3, 7, 11, 15, 19, 23], 4),  # ST-MoE.
    (StackConfig(12, 2, 1), [1, 3, 5, 7, 9, 11], 2),  # HuggingFace Switch.
    (StackConfig(6, 2, 0), [0, 2, 4], 2),
    (StackConfig(3, 1, 0), [0, 1, 2], 1),  # Switch-C.
    (StackConfig(12, 0, 0), [], 1),
    (StackConfig(3, 4, 3), [], 1),
    (StackConfig(5, 2, 1), [1, 3], 2),
    (StackConfig(5, 4, 3), [3], 4),
    (StackConfig(1, 1, 0), [0], 1),
  ],
)
def test_sparse_positions_and_periods(stack, sparse, period):
  plan, found = _sparse(stack)
  assert found == sparse
  assert plan.num_sparse == len(sparse)
  assert plan.period == period


@pytest.mark.parametrize(
  ('where', 'kinds'),
  [
    ('after', ['self_attention', 'moe', 'mlp']),
    ('before', ['self_attention', 'mlp', 'moe']),
    ('none', ['self_attention', 'moe']),
  ],
)
def test_the_extra_ffn(where, kinds):
  plan, _ = _sparse(StackConfig(2, 2, 1), moe=MoEConfig(extra_ffn=where))
  assert [s.kind for s in plan.layers[0]] == ['self_attention', 'mlp']
  assert [s.kind for s in plan.layers[1]] == kinds
  names = [s.name for s in plan.layers[1]]
  assert len(set(names)) == len(names)


def test_a_decoder_attends_to_an_encoder_if_there_is_one():
  kinds = lambda c: [s.kind for s in c.plan('decoder').layers[0]]
  assert kinds(ModelConfig()) == ['self_attention', 'cross_attention', 'mlp']
  assert kinds(ModelConfig(encoder=None)) == ['self_attention', 'mlp']


def test_the_dense_twin_is_as_wide_as_what_the_sparse_one_computes():
  config = ModelConfig(moe=MoEConfig(num_experts=32), dense=True)
  widths = lambda stack: [s.dim for s in config.plan(stack).layers[3]][-2:]
  # The encoder executes 32 * 80 places for 2048 tokens: 1.25 experts a token.
  assert widths('encoder') == [2560, 2048]
  # The decoder 32 * 17 for 456: 1.19.
  assert widths('decoder') == [round(2048 * 32 * 17 / 456), 2048]
  assert config.plan('encoder').num_sparse == 0
  # The rest stays: layers keep their positions, and with them the period.
  assert config.plan('encoder').period == 4


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('model.dtype', 'float3', "Unknown config.model.dtype 'float3'.*'float32'"),
    ('model.remat', 'ful', "Unknown config.model.remat 'ful'.*'full'"),
    ('model.encoder.group_size', '0', 'group_size = 0 .* at least 1'),
  ],
)
def test_a_wrong_word_or_size_is_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    config_file.load('configs/st_moe_tiny.py', {field: value})


# Routing as other codes do it


def _switch(**overrides):
  return config_file.load('configs/switch.py:size=base,experts=8', overrides)


def test_a_preset_fills_what_the_file_leaves_open():
  moe = _switch().model.moe
  assert moe.selector == Part.of(
    'top_k', k=1, normalize=False, train_policy='all'
  )
  # The preset would have said k = 2; 2.0 is the default of evaluation alone.
  assert moe.eval_capacity == Capacity(2.0, rounding='round')
  assert moe.train_capacity == Capacity(1.25, rounding='round')
  assert moe.padding == 'zeroed'
  assert _switch().loss.layers == 'mean'
  assert moe.losses == (Part.of('load_balance', weight=0.01),)


def test_another_preset_by_flag():
  config = _switch(routing='huggingface')
  assert config.model.moe.group_by == 'sequence'
  assert config.model.moe.padding == 'routed'
  assert config.model.moe.eval_capacity.slots(512, 8) == 64
  assert config.model.encoder.sparse_offset == 1
  paper = _switch(routing='paper').model.moe
  assert paper.padding == 'ignored' and paper.selector.kwargs == {'k': 1}
  with pytest.raises(ValueError, match="routing 'hf'. Known: ..flaxformer"):
    _switch(routing='hf')


@pytest.mark.parametrize('code', config_file.ROUTINGS)
def test_every_preset_makes_a_config(code):
  for file in ('st_moe_base', 'st_moe_tiny:runlocal', 't5_1_1'):
    name, _, arg = file.partition(':')
    config = config_file.load(f'configs/{name}.py:{arg}', {'routing': code})
    assert config.routing == code
    assert config_file.from_dict(config_file.to_dict(config)) == config


def test_a_part_of_a_default_keeps_the_rest(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(
    'from ml_collections import config_dict\n'
    'def get_config(arg=None):\n'
    '  return config_dict.ConfigDict(dict(model=dict(\n'
    '      decoder=dict(num_layers=3),\n'
    '      moe=dict(eval_capacity=dict(minimum=1)))))\n'
  )
  model = config_file.load(str(file)).model
  assert model.decoder == StackConfig(3, group_size=456)
  assert model.encoder == StackConfig()
  assert model.moe.eval_capacity == Capacity(2.0, minimum=1)
