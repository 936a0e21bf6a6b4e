"""Our model as T5X calls it; `tests/test_t5x_runs.py` has what needs T5X."""

import dataclasses
import functools
import inspect
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
from flax import core, traverse_util
from gin import config_parser

from st_moe import sharding, t5x_bridge
from st_moe.config import Config, LossConfig, OptimizerConfig, Part, StackConfig
from st_moe.model.transformer import Transformer
from st_moe.train.state import init_params
from tests.helpers import examples, jit, padded_batch, tiny

GIN = pathlib.Path(__file__).parents[1] / 'configs' / 'gin' / 't5x'
MODEL = dataclasses.replace(tiny(), scan_layers=False)
# Nobody is dropped, or an answer depends on its neighbours.
LOOSE = dataclasses.replace(MODEL.moe.eval_capacity, dropless=True)
ATTENTION = {
  'query': ((16, 16), ('embed', 'joined_kv')),
  'key': ((16, 16), ('embed', 'joined_kv')),
  'value': ((16, 16), ('embed', 'joined_kv')),
  'out': ((16, 16), ('joined_kv', 'embed')),
}
FFN = {
  'wi_0': ((16, 24), ('mlp_embed', 'mlp')),
  'wi_1': ((16, 24), ('mlp_embed', 'mlp')),
  'wo': ((24, 16), ('mlp', 'mlp_embed')),
}
SPARSE = {
  'router/router_weights/w': ((16, 4), ('embed', 'unmodeled')),
  'expert/wi_0': ((4, 16, 24), ('expert', 'mlp_embed', 'expert_mlp')),
  'expert/wi_1': ((4, 16, 24), ('expert', 'mlp_embed', 'expert_mlp')),
  'expert/wo': ((4, 24, 16), ('expert', 'expert_mlp', 'mlp_embed')),
}
# T5X's rules of its MoE partitioner, in their order, whose first fit counts;
# read from a run of T5X (docs/t5x.md).
RULES = (
  ('batch', ('expert', 'data')), ('vocab', 'model'), ('mlp', 'model'),
  ('heads', 'model'), ('kv', None), ('joined_kv', 'model'), ('embed', 'model'),
  ('relpos_buckets', None), ('abspos_buckets', None), ('length', None),
  ('layers', None), ('stack', None), ('mlp_activations', None),
  ('expert', 'expert'), ('expert_mlp', 'model'), ('expert_replicas', 'data'),
  ('unmodeled', None),
)  # fmt: skip


def flaxformer_tree(model) -> dict:
  """(shape, axes) of all parameters of its ST-MoE of this size, by path."""
  v, d, h = model.vocab_size, model.embed_dim, model.num_heads
  found = {
    'token_embedder/embedding': ((v, d), ('vocab', 'embed')),
    'decoder/logits_dense/kernel': ((d, v), ('embed', 'vocab')),
  }
  mixers = {
    'encoder': {'attention': 'attention'},
    'decoder': {
      'self_attention': 'self_attention',
      'cross_attention': 'encoder_decoder_attention',
    },
  }
  for stack, named in mixers.items():
    table = f'{stack}/relpos_bias/rel_embedding'
    found[table] = (h, 32), ('heads', 'relpos_buckets')
    norms = [f'{stack}/{stack}_norm']
    for i in range(2):
      here = f'{stack}/layers_{i}'
      parts = {name: ATTENTION for name in named.values()}
      parts |= {'mlp': SPARSE, 'extra_mlp': FFN} if i % 2 else {'mlp': FFN}
      for part, kernels in parts.items():
        for name, leaf in kernels.items():
          found[f'{here}/{part}/{name}/kernel'] = leaf
      norms += [f'{here}/pre_{name}_layer_norm' for name in (*named, 'mlp')]
      norms += [f'{here}/pre_extra_mlp_layer_norm'] * (i % 2)
    found |= {f'{norm}/scale': ((d,), ('embed',)) for norm in norms}
  return found


@pytest.fixture(scope='module')
def module():
  return t5x_bridge.module(Config(model=tiny()))


@pytest.fixture(scope='module')
def variables(module):
  """As T5X makes them: of float tokens."""
  ones = lambda *shape: np.ones(shape, np.float32)
  made = jit(
    lambda key: module.init(
      key,
      ones(2, 8),
      ones(2, 6),
      ones(2, 6),
      encoder_positions=None,
      decoder_positions=None,
      encoder_segment_ids=None,
      decoder_segment_ids=None,
      decode=False,
      enable_dropout=False,
    )
  )
  return made(jax.random.key(3))


@pytest.fixture(scope='module')
def ours():
  """Our own parameters, from the same key."""
  return sharding.unbox(
    jit(lambda key: init_params(Transformer(MODEL), key))(jax.random.key(3))
  )


@pytest.fixture(scope='module')
def batch():
  return padded_batch(MODEL, examples(MODEL))


def _flat(tree) -> dict:
  return traverse_util.flatten_dict(core.unfreeze(tree), sep='/')


def test_parameters_and_axes_are_those_of_flaxformer(variables):
  assert variables.keys() == {'params', 'params_axes'}
  params, axes = map(_flat, (variables['params'], variables['params_axes']))
  assert axes.keys() == {f'{path}_axes' for path in params}
  found = {
    path: (leaf.shape, axes[f'{path}_axes'].names)
    for path, leaf in params.items()
  }
  assert found == flaxformer_tree(MODEL)


def test_they_begin_as_ours_do(variables, ours):
  theirs = _flat(variables['params'])
  kernel = ours['encoder']['layers_0']['self_attention']['query']['kernel']
  np.testing.assert_array_equal(
    theirs['encoder/layers_0/attention/query/kernel'], kernel.reshape(16, 16)
  )
  bank = ours['decoder']['layers_1']['moe']['experts']['wo']['kernel']
  np.testing.assert_array_equal(
    theirs['decoder/layers_1/mlp/expert/wo/kernel'], bank
  )


def test_every_axis_has_a_rule_of_t5x(variables):
  """Of all but one: Flaxformer's own name for what is never split."""
  axes = _flat(variables['params_axes'])
  used = set().union(*(each.names for each in axes.values()))
  assert used - {name for name, _ in RULES} == {'mlp_embed'}
  spec = lambda names: [dict(RULES).get(name) for name in names]
  bank = 'encoder/layers_1/mlp/expert/wo/kernel'
  assert spec(axes[f'{bank}_axes'].names) == ['expert', 'model', None]
  # By this pattern T5X's partitioner knows which slots lie along `expert`.
  sparse = [path for path in flaxformer_tree(MODEL) if '/expert/' in path]
  assert all(re.match('.*expert.*/kernel/v_.*', f'{p}/v_row') for p in sparse)


def test_the_calls_of_t5x_fit(module):
  seen = inspect.signature(module.__call__)
  stacks, each = ('encoder', 'decoder'), ('segment_ids', 'positions')
  packed = [f'{stack}_{what}' for stack in stacks for what in each]
  seen.bind(
    *'abc',
    **dict.fromkeys(packed),
    decode=False,
    enable_dropout=True,
  )
  seen.bind(
    encoder_input_tokens=0,
    decoder_input_tokens=0,
    decoder_target_tokens=0,
    decode=True,
    enable_dropout=False,
  )  # fmt: skip
  inspect.signature(module.encode).bind(0, enable_dropout=False)
  decode = inspect.signature(module.decode)
  decode.bind(*'abcd', enable_dropout=False, decode=True, max_decode_length=6)
  # Or T5X would fill the cache by a call that there is none of.
  assert 'prefill' not in decode.parameters
  # Or it would look for the batch at the second axis of a cache.
  assert not getattr(module, 'scan_layers', False)


def test_a_token_at_a_time_as_all_at_once_as_ours(variables, ours, batch):
  model = MODEL.with_moe(eval_capacity=LOOSE)
  module = t5x_bridge.Module(model)
  params = {'params': core.freeze(variables['params'])}  # As T5X has them.
  both = (module, params), (Transformer(model), {'params': ours})
  whole, want = (
    jit(lambda p, m=m: m.apply(p, **batch, enable_dropout=False))(p)
    for m, p in both
  )
  np.testing.assert_allclose(whole, want, atol=1e-6)

  inputs, targets = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  ones = np.ones_like
  _, made = jit(
    lambda p: module.apply(
      p,
      encoder_input_tokens=ones(inputs),
      decoder_input_tokens=ones(targets),
      decoder_target_tokens=ones(targets),
      mutable=['cache'],
      decode=True,
      enable_dropout=False,
    )
  )(params)
  cache = made['cache']
  shapes = {path: leaf.shape for path, leaf in _flat(cache).items()}
  # T5X moves beams along the first axis of all but `cache_index`.
  assert shapes.pop('decoder/cache_index') == ()
  assert shapes == {
    f'decoder/layers_{i}/self_attention/cached_{what}': (4, 2, 6, 8)
    for i in range(2)
    for what in ('key', 'value')
  }
  encode = functools.partial(module.apply, method=module.encode)
  encoded = jit(lambda p: encode(p, inputs, enable_dropout=False))(params)

  @jit
  def step(cache, tokens):
    logits, new = module.apply(
      {**params, 'cache': cache},
      encoded,
      inputs,
      tokens,
      tokens,
      enable_dropout=False,
      decode=True,
      max_decode_length=6,
      mutable=['cache'],
      method=module.decode,
    )
    return logits[:, 0], new['cache']

  for i in range(6):
    logits, cache = step(cache, targets[:, i : i + 1])
    real = batch['decoder_target_tokens'][:, i] > 0
    np.testing.assert_allclose(logits[real], whole[real, i], atol=1e-5)


def _slow_metrics(moe, record, seats, deterministic):
  """Flaxformer's definitions, counted route by route."""
  place, weight = np.asarray(seats.place), np.asarray(seats.weight)
  groups, n = place.shape
  tokens = n // seats.k
  behind = routes = total = 0
  there = record['gauges']['dropped_tokens'][1]
  for g in range(groups):
    for t in range(tokens):
      mine = range(t * seats.k, (t + 1) * seats.k)
      sitting = [i for i in mine if place[g, i] >= 0]
      asks = any(seats.asked[g, i] for i in mine)
      behind += asks and not sitting
      routes += len(sitting)
      total += sum(weight[g, i] for i in sitting)
  places = groups * moe.num_experts * moe.slots(tokens, deterministic)
  return {
    'fraction_tokens_left_behind': behind / there,
    'expert_usage': routes / places,
    'router_confidence': total / routes,
  }


@pytest.mark.parametrize('dropout', [False, True])
def test_five_metrics_of_each_sparse_layer(
  module, variables, ours, batch, dropout
):
  told = dict(enable_dropout=dropout, rngs={'dropout': jax.random.key(1)})

  def sow(model, params, *mutable):
    call = lambda p: model.apply(
      {'params': p}, **batch, **told, mutable=mutable
    )
    return jit(call)(params)[1]

  sown = sow(module, variables['params'], 'intermediates')
  assert sown.keys() == {'intermediates'}
  found = _flat(sown['intermediates'])
  assert found.keys() == {
    f'{stack}/layers_1/mlp/{name}'
    for stack in ('encoder', 'decoder')
    for name in t5x_bridge.METRICS
  }
  assert {value.shape for (value,) in found.values()} == {(1, 1)}
  own = sow(Transformer(MODEL), ours, 'intermediates', 'routing')
  for stack in ('encoder', 'decoder'):
    record = own['intermediates'][stack]['layers_1']['moe']['record']
    seats = own['routing'][stack]['layers_1']['moe']['seats']
    sums = record['losses']
    want = {
      'auxiliary_loss': sums['load_balance'][0] / sums['load_balance'][1],
      'router_z_loss': sums['router_z'][0] / sums['router_z'][1],
      **_slow_metrics(MODEL.moe, record, seats, not dropout),
    }
    got = {n: found[f'{stack}/layers_1/mlp/{n}'][0].item() for n in want}
    want = {name: float(value) for name, value in want.items()}
    assert got == pytest.approx(want, rel=1e-5)


def test_a_dense_model_has_each_name_once(batch):
  """T5X's MoE model raises for a metric it never finds."""
  dense = tiny(encoder=StackConfig(1, 0, 0), decoder=StackConfig(1, 0, 0))
  config = Config(model=dense)
  module = t5x_bridge.module(config)

  def sow():
    made = module.init(jax.random.key(0), **batch, enable_dropout=False)
    params = {'params': made['params']}
    told = dict(enable_dropout=False, mutable=['intermediates'])
    return module.apply(params, **batch, **told)[1]

  sown = jit(sow)()
  found = {name: each.item() for name, (each,) in sown['intermediates'].items()}
  assert found == dict.fromkeys(t5x_bridge.METRICS, 0.0)
  assert t5x_bridge.loss_factor(config, 'auxiliary_loss') == 0


def test_what_a_config_says_of_losses():
  """T5X takes the mean over layers; we the sum, or the mean."""
  mean = Config(model=tiny(), loss=LossConfig(layers='mean'))
  total = Config(model=tiny())  # One sparse layer in each of two stacks.
  factor = t5x_bridge.loss_factor
  assert factor(mean, 'auxiliary_loss') == 0.01
  assert factor(mean, 'router_z_loss') == 0.001
  assert factor(total, 'auxiliary_loss') == 0.02
  without = tiny(moe=dict(losses=(Part.of('load_balance', weight=0.5),)))
  assert factor(Config(model=without, loss=mean.loss), 'router_z_loss') == 0
  assert t5x_bridge.value(total, 'loss.z_loss') == 1e-4
  lengths = {'inputs': 512, 'targets': 114}
  assert t5x_bridge.feature_lengths(total) == lengths


RISING = Part.of('linear', start=0.0, end=1.0, steps=5)
MORE = tuple(map(Part, ('load_balance', 'entropy', 'router_z')))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: t5x_bridge.loss_factor(
        Config(model=tiny(moe=dict(losses=MORE))), 'router_z_loss'
      ),
      'one of balance and router_z; config.model.moe.losses has load_balance,',
    ),
    (
      lambda: t5x_bridge.loss_factor(
        Config(
          model=tiny(moe=dict(losses=(Part.of('router_z', weight=RISING),)))
        ),
        'router_z_loss',
      ),
      'one weight, a number.',
    ),
    (
      lambda: t5x_bridge.module(
        Config(model=tiny(moe=dict(gate=Part.of('hash'))))
      ),
      "Flaxformer has no such parts: gate 'hash'.",
    ),
    (
      lambda: t5x_bridge.module(Config(model=tiny(decoder=None))),
      'T5X has names for encoder-decoders only.',
    ),
    (
      lambda: t5x_bridge.module(
        Config(
          model=tiny(),
          optimizer=OptimizerConfig(after=(Part('loss_free'),)),
        )
      ),
      'T5X has no rules after the update.',
    ),
    (
      lambda: t5x_bridge.optimizer(
        Config(optimizer=OptimizerConfig(train='non_moe'))
      ),
      "train = 'non_moe': T5X cannot go on with a run that freezes",
    ),
    (
      lambda: t5x_bridge.value(Config(), 'loss.z_los'),
      "Did you mean 'z_loss'?",
    ),
    (
      lambda: t5x_bridge.load_config('st_moe_tiny'),
      'data.vocabulary is not set; give a SentencePiece model',
    ),
    (
      lambda: t5x_bridge.load_config('st_moe_tin'),
      "'st_moe_tin'. Did you mean",
    ),
  ],
)
def test_what_t5x_cannot_do_ends_in_a_sentence(call, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    call()


def test_without_t5x_one_sentence(monkeypatch, capsys):
  for name in ('airio', 'airio.core'):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 't5x', None)
  assert t5x_bridge.main(['train', '--gin_file=a.gin']) == 1
  said = capsys.readouterr().err
  assert 'T5X cannot be imported' in said and 'scripts/install_t5x.sh' in said
  assert 'Traceback' not in said
  for name in ('airio', 'airio.core'):
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_verbs_are_told(capsys):
  for words in ([], ['tran']):
    assert t5x_bridge.main(words) == 2
    assert '{train,eval,infer}' in capsys.readouterr().err


class _Names(config_parser.ParserDelegate):
  def configurable_reference(self, name, evaluate):
    return f'@{name}'

  def macro(self, name):
    return f'%{name}'


def _statements(path):
  return list(config_parser.ConfigParser(path.read_text(), _Names()))


@pytest.mark.parametrize('name', sorted(p.name for p in GIN.glob('*.gin')))
def test_a_gin_file_binds_what_is_there(name):
  """Functions of the bridge by their names, their parameters by theirs."""
  called = re.compile(r'@(?:\w+/)?t5x_bridge\.(\w+)')
  for statement in _statements(GIN / name):
    if isinstance(statement, config_parser.IncludeStatement):
      included = statement.filename
      ours = included.startswith('gin/t5x/')
      assert ours == (GIN.parents[1] / included).is_file()
      assert ours or included.startswith('t5x/contrib/moe/configs/runs/')
    if not isinstance(statement, config_parser.BindingStatement):
      continue
    for function in called.findall(str(statement.value)):
      assert callable(getattr(t5x_bridge, function))
    if statement.selector.startswith('t5x_bridge.'):
      function = getattr(t5x_bridge, statement.selector.split('.')[1])
      assert statement.arg_name in inspect.signature(function).parameters
    if statement.arg_name == 'field':
      t5x_bridge.value(Config(), statement.value)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_experts_lie_along_the_mesh_of_t5x(variables, ours, batch, monkeypatch):
  """Inside the model our rules hold: tokens travel to experts and back."""
  from jax.interpreters import pxla

  stand_in = types.SimpleNamespace(pxla=pxla)  # Where T5X itself looks.
  monkeypatch.setitem(sys.modules, 't5x.partitioning', stand_in)
  devices = np.array(jax.devices()[:4]).reshape(1, 4, 1)
  mesh = jax.sharding.Mesh(devices, ('data', 'expert', 'model'))
  module = t5x_bridge.Module(MODEL)
  rows = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(('expert', 'data'))
  )
  apply = jax.jit(
    lambda params, batch: module.apply(
      {'params': params}, **batch, enable_dropout=False
    ),
    in_shardings=(None, rows),
    compiler_options={'xla_backend_optimization_level': 0},
  )
  with mesh:
    program = apply.lower(variables['params'], batch).compile()
    logits = apply(variables['params'], batch)
  # There and back, in the sparse layer of either stack.
  assert program.as_text().count('all-to-all(') >= 4
  want = jit(
    lambda p: Transformer(MODEL).apply(
      {'params': p}, **batch, enable_dropout=False
    )
  )(ours)
  np.testing.assert_allclose(logits, want, atol=1e-5)
