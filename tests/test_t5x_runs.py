"""T5X itself, on our model: skipped where it cannot be imported.

With checkouts of t5x and flaxformer on PYTHONPATH: python -m pytest -m t5x
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import st_moe
from st_moe import sharding, t5x_bridge
from st_moe.interop import convert
from st_moe.interop import t5x as format
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer
from st_moe.train.state import abstract_params, init_state, parameter_axes
from st_moe.train.step import make_train_step


def _lacks(*names: str) -> list[str]:
  return [name for name in names if not importlib.util.find_spec(name)]


NEEDS = 'put a checkout on PYTHONPATH (docs/t5x.md)'
pytestmark = [
  pytest.mark.t5x,
  pytest.mark.skipif(bool(_lacks('t5x')), reason=f'T5X is not there: {NEEDS}'),
]
flaxformer = pytest.mark.skipif(
  bool(_lacks('flaxformer', 'aqt')),
  reason=f'Flaxformer or its aqtp are not there: {NEEDS}',
)

CONFIG = 'st_moe_tiny'
STEPS = 30
OVERRIDES = {
  'data.vocabulary': 'bytes',
  'data.batch_size': 8,
  'total_steps': STEPS,
  # No noise in routing: T5X draws other numbers from other keys.
  'routing': 'flaxformer',
}
TRAIN = {
  'MIXTURE_OR_TASK_NAME': 'python_reference',
  'SHUFFLE_TRAIN_EXAMPLES': False,
  'RANDOM_SEED': 7,
  'train.stats_period': 1,
  'train.eval_steps': 2,
  'train.eval_period': 15,
  'utils.SaveCheckpointConfig.period': 15,
}


def program(*words, devices: int = 1) -> str:
  """Output of a Python program on so many CPU devices."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-m', *map(str, words)],
    capture_output=True,
    text=True,
    env=env,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout + done.stderr


def t5x(verb: str, gin_file, values: dict, devices: int = 1) -> str:
  flags = [f'--gin.{name}={value!r}' for name, value in values.items()]
  said = program(
    'st_moe.t5x_bridge', verb, f'--gin_file={gin_file}', *flags, devices=devices
  )
  assert 'airio is not installed' in said or not _lacks('airio')
  return said


def shipped(name: str) -> str:
  return f'configs/gin/t5x/{name}.gin'


def logged(folder, metric: str) -> dict[int, float]:
  """step -> value, of TensorBoard's files."""
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  found = event_accumulator.EventAccumulator(
    str(folder), size_guidance={'tensors': 0}
  )
  found.Reload()
  return {
    event.step: float(tensor_util.make_ndarray(event.tensor_proto))
    for event in found.Tensors(metric)
  }


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  own = {'data.cache_dir': str(tmp_path_factory.mktemp('cache'))}
  return t5x_bridge.load_config(CONFIG, OVERRIDES | own)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """The folders of a run on one device, and of the same on four."""
  places = {}
  for devices in (1, 4):
    places[devices] = where = tmp_path_factory.mktemp('run') / f'{devices}'
    values = {'CONFIG': CONFIG, 'OVERRIDES': OVERRIDES, **TRAIN}
    values['MODEL_DIR'] = str(where)
    t5x('train', shipped('pretrain'), values, devices)
  return places


def _batches(config):
  """As T5X makes them of a task whose examples are not shuffled: packed."""
  import seqio

  assert t5x_bridge.tasks(config) == 'st_moe.data.tasks'
  found = seqio.get_dataset(
    TRAIN['MIXTURE_OR_TASK_NAME'],
    t5x_bridge.feature_lengths(config),
    dataset_split='train',
    shuffle=False,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
  )
  return found.batch(config.data.batch_size).as_numpy_iterator()


def test_the_first_losses_are_those_of_our_own_trainer(runs, config):
  model = Transformer(config.model)
  made = optimizer.make(config.optimizer, parameter_axes(model))
  source = convert.open_source(f't5x:{runs[1]}/checkpoint_0')
  assert source.unused == []
  state = sharding.unbox(init_state(model, made, jax.random.key(0)))
  state = state.replace(params=source.load(abstract_params(model)))
  step = jax.jit(make_train_step(model, made, config))
  ours = []
  for batch in itertools.islice(_batches(config), 5):
    state, metrics = step(state, batch)
    ours.append(float(metrics['loss']))
  theirs = logged(runs[1] / 'train', 'loss')
  off = np.abs(np.array(ours) - [theirs[i + 1] for i in range(5)])
  print('off by', off, 'of', ours)
  assert off.max() < 1e-4


def test_four_devices_train_as_one(runs):
  one, four = (logged(runs[n] / 'train', 'loss') for n in (1, 4))
  assert one.keys() == four.keys() == set(range(1, STEPS + 1))
  assert one[STEPS] < 0.7 * one[1]
  off = [abs(one[i] - four[i]) for i in range(1, 6)]
  print('first losses', off, 'last', one[STEPS], four[STEPS])
  assert max(off) < 1e-4
  names = ('auxiliary_loss', 'router_z_loss', 'expert_usage')
  names += ('fraction_tokens_left_behind', 'router_confidence')
  for name in names:
    assert len(logged(runs[4] / 'train', f'experts/{name}')) == STEPS
  # The experts, and what Adafactor keeps of them, lie along the mesh.
  info = (runs[4] / 'model-info.txt').read_text()
  bank = [line for line in info.splitlines() if '/expert/wi_0/kernel ' in line]
  assert all("('expert', None, 'model')" in line for line in bank) and bank
  slots = [line for line in info.splitlines() if 'kernel/v_row' in line]
  assert any("('expert',)" in line for line in slots)


def test_a_run_goes_on(runs):
  values = {'CONFIG': CONFIG, 'OVERRIDES': OVERRIDES, **TRAIN}
  values |= {'MODEL_DIR': str(runs[4]), 'TRAIN_STEPS': STEPS + 4}
  t5x('train', shipped('pretrain'), values, devices=4)
  losses = logged(runs[4] / 'train', 'loss')
  assert max(losses) == STEPS + 4
  assert losses[STEPS + 4] < 0.8 * losses[1]  # It did not begin anew.


@pytest.fixture(scope='module')
def asked(runs):
  """What `eval` and `infer` are told of the checkpoint."""
  return {
    'CONFIG': CONFIG,
    'OVERRIDES': OVERRIDES,
    'MIXTURE_OR_TASK_NAME': 'tiny_copa',
    'CHECKPOINT_PATH': str(runs[1] / f'checkpoint_{STEPS}'),
    'BATCH_SIZE': 16,
  }


def test_t5x_scores_it(asked, tmp_path):
  values = asked | {'EVAL_OUTPUT_DIR': str(tmp_path)}
  values['seqio.Evaluator.num_examples'] = 32
  t5x('eval', shipped('eval'), values, devices=4)
  (found,) = tmp_path.rglob('*metrics.jsonl')
  metrics = json.loads(found.read_text().splitlines()[-1])
  assert metrics['step'] == STEPS and 0 <= metrics['accuracy'] <= 100


def test_t5x_asks_it(asked, tmp_path):
  values = asked | {'INFER_OUTPUT_DIR': str(tmp_path)}
  t5x('infer', shipped('infer'), values)
  (found,) = tmp_path.glob('*.jsonl-00000-of-00001')
  rows = [json.loads(line) for line in found.read_text().splitlines()]
  assert len(rows) == 600 and all('prediction' in row for row in rows)


# Flaxformer's ST-MoE-base, small, in both directions.

FLAXFORMER = """
from __gin__ import dynamic_registration
import seqio

include '{run}'
include 'flaxformer/t5x/configs/moe/models/st_moe_base.gin'

VOCABULARY = @seqio.ByteVocabulary()
seqio.ByteVocabulary.extra_ids = 100
NUM_EMBEDDINGS = 384
EMBED_DIM = 32
MLP_DIM = 48
NUM_HEADS = 2
HEAD_DIM = 16
NUM_ENCODER_LAYERS = 4
NUM_DECODER_LAYERS = 4
NUM_ENCODER_SPARSE_LAYERS = 1
NUM_DECODER_SPARSE_LAYERS = 1
NUM_EXPERTS = 4
NUM_EXPERT_PARTITIONS = 4
NUM_MODEL_PARTITIONS = None
MODEL_PARALLEL_SUBMESH = (1, 1, 1, 1)
ACTIVATION_DTYPE = 'float32'
MOE_TRUNCATED_DTYPE = 'float32'
"""


GROUPS = {'encoder': 16, 'decoder': 8}


@pytest.fixture(scope='module')
def their_run(tmp_path_factory):
  """(gin file of the model alone, folder of a run of a few steps)."""
  where = tmp_path_factory.mktemp('flaxformer')
  files = {
    'train.gin': 'gin/t5x/pretrain.gin',
    'model.gin': 'gin/t5x/data.gin',
  }
  for name, run in files.items():
    (where / name).write_text(FLAXFORMER.format(run=run))
  values = {'CONFIG': CONFIG, 'OVERRIDES': OVERRIDES, **TRAIN}
  values |= {'MODEL_DIR': str(where / 'run'), 'TRAIN_STEPS': 5}
  t5x('train', where / 'train.gin', values)
  return where / 'model.gin', where / 'run'


def _questions(vocab: int) -> dict:
  rng = np.random.default_rng(0)
  inputs = rng.integers(3, vocab, (4, 16), dtype=np.int32)
  targets = rng.integers(3, vocab, (4, 8), dtype=np.int32)
  # Of targets none: behind the last one Flaxformer routes one token more.
  inputs[1, 9:] = 0
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
  }


def _their_logits(gin_file, checkpoint, batch, tmp_path):
  np.savez(tmp_path / 'batch.npz', **batch)
  out = tmp_path / 'logits.npy'
  program('tests.t5x_logits', gin_file, checkpoint, tmp_path / 'batch.npz', out)
  return np.load(out)


@flaxformer
def test_a_checkpoint_of_flaxformer_is_ours_and_back(their_run, tmp_path):
  gin_file, run = their_run
  batch = _questions(384)
  want = _their_logits(gin_file, run / 'checkpoint_5', batch, tmp_path)

  # It cuts tokens into as many groups as experts at least; 64 and 32 of them.
  groups = {f'model.{n}.group_size': s for n, s in GROUPS.items()}
  lines = convert.convert(
    f't5x:{run}/checkpoint_5', f'{tmp_path}/ours', overrides=groups
  )
  assert any('0 tied, 0 unused' in line for line in lines)
  found = st_moe.load(f'{tmp_path}/ours')
  assert found.config.model.moe.num_experts == 4
  logits = lambda params: found.model.apply(
    {'params': params}, **batch, enable_dropout=False
  )
  off = np.abs(logits(found.params) - want).max()

  # And theirs of ours, of other numbers than they have seen.
  shaken = jax.tree.map(lambda a: a * 1.25, found.params)
  format.save(f'{tmp_path}/back', shaken, found.config, None)
  theirs = _their_logits(gin_file, tmp_path / 'back', batch, tmp_path)
  back = np.abs(logits(shaken) - theirs).max()
  print('logits off by', off, 'and back', back, 'of', np.abs(want).max())
  assert max(off, back) < 1e-4


@flaxformer
def test_the_bridge_goes_on_with_a_run_of_flaxformer(their_run):
  """The trees are one: T5X restores into either what the other saved."""
  values = {
    'CONFIG': CONFIG,
    'OVERRIDES': OVERRIDES
    | {
      'model.embed_dim': 32,
      'model.mlp_dim': 48,
      'model.num_heads': 2,
      'model.head_dim': 16,
      'model.moe.num_experts': 4,
      **{
        f'model.{stack}.{field}': value
        for stack in ('encoder', 'decoder')
        for field, value in (
          ('num_layers', 4), ('sparse_every', 4), ('sparse_offset', 3),
        )
      },
    },
    **TRAIN,
    'MODEL_DIR': str(their_run[1]),
    'TRAIN_STEPS': 8,
  }  # fmt: skip
  t5x('train', shipped('pretrain'), values)
  losses = logged(their_run[1] / 'train', 'loss')
  assert max(losses) == 8 and losses[6] < losses[1]
