"""Gin files say what our config files say, by the names T5X users know."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from st_moe import cli, config_file, gin_file, schedules
from st_moe.config import Config
from st_moe.model.transformer import Transformer
from st_moe.train.state import abstract_params

MODELS = {
  **{name: name for name in ('st_moe_base', 'st_moe_large', 'st_moe_xl')},
  'st_moe_32b': 'st_moe_32b',
  **{
    f'switch_{size}': f'switch.py:size={size}'
    for size in ('base', 'large', 'xxl', 'c')
  },
  **{
    f't5_1_1_{size}': f't5_1_1.py:size={size}'
    for size in ('small', 'base', 'large', 'xl', 'xxl')
  },
}
RUNS = {
  'pretrain': ("MIXTURE_OR_TASK_NAME='c4'", 'st_moe_base'),
  'finetune': ("INITIAL_CHECKPOINT_PATH='runs/base'", 'finetune_superglue'),
}


def made(*files, gin=()) -> Config:
  macros = gin_file.macros([f'configs/gin/{f}.gin' for f in files], gin)
  return config_file.settle(gin_file.values(macros))


def test_every_gin_file_is_one_of_these():
  names = {path.stem for path in gin_file.files()}
  others = {'eval', 'infer', 'st_moe', 'switch', 't5_1_1'}
  assert names == {*MODELS, *RUNS, *others}


@pytest.mark.parametrize('name', MODELS)
def test_a_model_is_that_of_its_config(name):
  ours = config_file.load(MODELS[name], {'data.mixture': {'c4': 1.0}})
  gin = made(f'models/{name}', 'runs/pretrain', gin=[RUNS['pretrain'][0]])
  assert gin.model == ours.model
  assert gin.routing == ours.routing and gin.mesh == ours.mesh
  shapes = [
    jax.tree.map(lambda x: x.shape, abstract_params(Transformer(c.model)))
    for c in (gin, ours)
  ]
  assert shapes[0] == shapes[1]
  assert gin.data == ours.data and gin.optimizer == ours.optimizer
  rates = [schedules.learning_rate(c.optimizer) for c in (gin, ours)]
  steps = (0, 1, 99, 5_000, 9_999, 10_000, 10_001, 20_000, 100_000, 499_999)
  for step in steps:
    np.testing.assert_allclose(*(float(rate(step)) for rate in rates), 1e-6)


def test_fine_tuning_is_that_of_its_config():
  given = {'init': 'runs/base'}
  ours = config_file.load('finetune_superglue', given)
  gin = made('runs/finetune', gin=[RUNS['finetune'][0]])
  assert gin.model == ours.model and gin.optimizer == ours.optimizer
  assert gin.init == ours.init and gin.init_slots == ours.init_slots
  data = dataclasses.replace(ours.data, size_cap=0, mixture=gin.data.mixture)
  assert gin.data == data


def test_every_macro_is_of_a_field():
  """No macro names a field that is not there, and none is left unread."""
  leaves = {name for name in config_file._paths(Config)}
  for name, fields in gin_file.MACROS.items():
    for field in () if callable(fields) else fields:
      known = field in leaves or field.startswith('model.moe.')
      assert known, (name, field)
  assert {*gin_file.PARAMETERS.values()} <= gin_file.MACROS.keys()


def _says(tmp_path, text, *gin):
  file = tmp_path / 'a.gin'
  file.write_text(text)
  return gin_file.values(gin_file.macros([str(file)], gin))


def test_later_bindings_win_and_macros_are_made_of_macros(tmp_path):
  text = 'EMBED_DIM = 64\nMLP_DIM = %EMBED_DIM\nEMBED_DIM = 128\n'
  assert _says(tmp_path, text)['model'] == {'embed_dim': 128, 'mlp_dim': 128}
  found = _says(tmp_path, text, 'EMBED_DIM=32', 'NUM_HEADS=2')
  assert found['model'] == {'embed_dim': 32, 'mlp_dim': 32, 'num_heads': 2}
  # A word that a shell has stripped of its quotes.
  found = _says(tmp_path, text, 'MIXTURE_OR_TASK_NAME=super_glue')
  assert found['data'] == {'mixture': {'super_glue': 1.0}}


def test_what_wires_t5x_is_passed_over(tmp_path, caplog):
  text = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import utils

MODEL = @models.EncoderDecoderModel()
NUM_MODEL_PARTITIONS = None
train_script.train:
  model = %MODEL
  total_steps = 7
  random_seed = %RANDOM_SEED
RANDOM_SEED = None
train_eval/utils.DatasetConfig.split = 'dev'
train/utils.DatasetConfig.split = 'train'
train/utils.DatasetConfig.batch_size = %BATCH_SIZE
BATCH_SIZE = 16
utils.SaveCheckpointConfig.period = 50
utils.create_learning_rate_scheduler:
  factors = 'constant * linear_warmup * rsqrt_decay'
  base_learning_rate = 2.0
  warmup_steps = 400
"""
  found = _says(tmp_path, text)
  assert 'no field here has utils.DatasetConfig.split.' in caplog.text
  assert 'seed' not in found and found['evaluate'] == {'split': 'dev'}
  assert found['total_steps'] == 7 and found['data'] == {'batch_size': 16}
  assert found['checkpoint'] == {'every': 50} and 'mesh' not in found
  # T5X: 2 x min(1, step / 400) / sqrt(max(step, 400)).
  rate = schedules.learning_rate(
    dataclasses.replace(Config().optimizer, **found['optimizer'])
  )
  for step in (99, 399, 1600):
    theirs = 2 * min(1, (step + 1) / 400) / max(step, 400) ** 0.5
    np.testing.assert_allclose(float(rate(step)), theirs, 1e-6)


@pytest.mark.parametrize(
  ('text', 'gin', 'message'),
  [
    ('EMBED_DIMS = 3', (), "line 1: Unknown macro 'EMBED_DIMS'. Did you mean"),
    ('', ('NUM_EXPERT=3',), "'NUM_EXPERT'. Did you mean 'NUM_EXPERTS'?"),
    (
      '\nutils.SaveCheckpointConfig.perod = 5',
      (),
      "line 2: Unknown parameter 'utils.SaveCheckpointConfig.perod'. Did you",
    ),
    (
      'TRAIN_STEPS = %gin.REQUIRED',
      (),
      'TRAIN_STEPS has no value: --gin.TRAIN',
    ),
    ('MLP_DIM = %EMBED_DIM', (), 'MLP_DIM = %EMBED_DIM, which has no value'),
    ('MLP_DIM = %EMBED_DIM\nEMBED_DIM = %MLP_DIM', (), 'made of itself'),
    ('MLP_DIM = [1,', (), 'no gin'),
    ('MLP_DIM = = 1', (), 'line 1: no gin'),
    ("include 'models/st_mo.gin'", (), "'models/st_mo.gin'. Did you mean"),
    (
      'NUM_ENCODER_LAYERS = 12\nNUM_ENCODER_SPARSE_LAYERS = 5',
      (),
      'SPARSE_LAYERS = 5 should be a divisor of NUM_ENCODER_LAYERS = 12.',
    ),
    (
      "LEARNING_RATE_FACTORS = 'constant * cosine'",
      (),
      "LEARNING_RATE_FACTORS = 'constant * cosine' should be one of 'constant'",
    ),
    ("MLP_ACTIVATIONS = ('tanh',)", (), 'MLP_ACTIVATIONS'),
    ("MIXTURE_OR_TASK_NAME = ['a']", (), 'should be a name.'),
    ('WARMUP_STEPS = 400', (), 'beside LEARNING_RATE_FACTORS'),
    ("include 'a.gin'", (), 'a.gin includes itself.'),
    ('TASK_FEATURE_LENGTHS = 5', (), "should be {'inputs': N, 'targets': N}."),
    ('', ('EMBED_DIM',), '--gin.EMBED_DIM needs a value'),
  ],
)
def test_what_is_wrong_ends_in_one_sentence(tmp_path, text, gin, message):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    _says(tmp_path, text, *gin)
  assert '\n' not in str(error.value)


def test_a_value_breaks_the_rule_of_its_field(tmp_path):
  with pytest.raises(ValueError, match='config.model.embed_dim'):
    config_file.settle(_says(tmp_path, "EMBED_DIM = 'wide'"))


SMALL = [
  '--gin_file=configs/gin/models/st_moe_base.gin',
  '--gin_file=configs/gin/runs/pretrain.gin',
  '--gin.MIXTURE_OR_TASK_NAME=python_reference',
  *(f'--gin.{name}=16' for name in ('EMBED_DIM', 'MLP_DIM', 'HEAD_DIM')),
  *('--gin.NUM_ENCODER_LAYERS=2', '--gin.NUM_DECODER_LAYERS=2'),
  *(f'--gin.NUM_{s}_SPARSE_LAYERS=1' for s in ('ENCODER', 'DECODER')),
  *('--gin.NUM_EXPERTS=4', '--gin.NUM_HEADS=2', '--gin.BATCH_SIZE=8'),
  "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
  *('--gin.GROUP_SIZE=32', '--gin.DECODER_GROUP_SIZE=16'),
  *('--gin.TRAIN_STEPS=2', '--gin.EVAL_STEPS=1', '--gin.NUM_EMBEDDINGS=384'),
]


def test_a_run_of_gin_files(tmp_path, capsys):
  """As T5X is called: the folder is a macro too."""
  where = tmp_path / 'run'
  flags = [
    *SMALL,
    f"--gin.MODEL_DIR='{where}'",
    '--config.data.vocabulary=bytes',
  ]
  assert cli.run(['train', *flags]) == 0
  run = config_file.of_run(where / 'config.json')
  assert run.total_steps == 2 and run.model.moe.num_experts == 4
  assert run.name == 'st_moe_base'
  evaluate = [
    'evaluate',
    '--gin_file=runs/eval.gin',
    f"--gin.CHECKPOINT_PATH='{where}'",
    '--gin.MIXTURE_OR_TASK_NAME=python_reference',
    f"--gin.EVAL_OUTPUT_DIR='{tmp_path}/scores'",
    '--config.evaluate.batches=1',
  ]
  assert cli.run(evaluate) == 0
  assert (tmp_path / 'scores' / 'metrics.json').exists()
  infer = [flag.replace('eval.gin', 'infer.gin') for flag in evaluate]
  infer = [flag.replace('EVAL_', 'INFER_') for flag in infer]
  # Its files have no such split; what is the model's own is passed over.
  more = ['--gin.SPLIT=nowhere', '--gin.EMBED_DIM=8', '--gin.NUM_HEADS=3']
  with pytest.raises(ValueError, match="'python_reference' has no .*nowhere"):
    cli.run([*infer, *more])
  again = [*evaluate, '--checkpoint=elsewhere']
  with pytest.raises(ValueError, match='--checkpoint is given twice'):
    cli.run(again)


def test_a_gin_file_for_t5x_itself_is_told_apart():
  """tests/test_t5x_bridge.py holds what they bind."""
  where = 'configs/gin/t5x/pretrain.gin'
  assert not [path for path in gin_file.files() if path.parent.name == 't5x']
  with pytest.raises(ValueError, match='python -m st_moe.t5x_bridge train'):
    cli.run(['train', '--workdir=w', f'--gin_file={where}'])


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([*SMALL, '--config=st_moe_tiny'], 'both say what to run: which?'),
    (['--gin.EMBED_DIM=3'], 'a macro of which file? Add --gin_file=FILE.'),
  ],
)
def test_flags_that_do_not_go_together(flags, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    cli.run(['train', '--workdir=w', *flags])


def test_a_grid_of_configs_is_not_one_of_gin_files(tmp_path):
  with pytest.raises(ValueError, match='--config is given twice'):
    cli.run(['grid', f'--workdir={tmp_path}', '--vary=config=a,b', *SMALL])
