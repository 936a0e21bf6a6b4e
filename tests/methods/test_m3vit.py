"""A router for each task: it alone changes with the task, and learns of it."""

import functools

import jax
import numpy as np
import pytest

from st_moe import config_file, sharding
from st_moe.config import Part, StackConfig
from st_moe.data import vocabulary
from st_moe.data.eval_data import EvalData
from st_moe.decode import decoding
from st_moe.infer.evaluator import Evaluator
from st_moe.infer.generate import Generator, Options
from st_moe.infer.questions import Asker, Question
from st_moe.model.transformer import Transformer
from tests.helpers import jit, random_params, slow_softmax, tiny
from tests.methods.tasks import ROWS, SparseLayer, moe_of

GATE = Part.of('per_task', tasks=3)


@pytest.fixture(scope='module')
def layer():
  return SparseLayer(moe_of(GATE))


def test_each_row_is_routed_by_the_router_of_its_task(layer):
  kernels = layer.params['router']['kernel']
  assert kernels.shape == (3, 16, 4)
  tasks = [2, 0, 1, 9]  # Of 9 nobody knows: that of the last.
  for task, x, weights in zip(
    tasks, layer.x, layer.weights(tasks), strict=True
  ):
    probs = slow_softmax(x.astype(float) @ kernels[min(task, 2)])
    kept = np.where(probs >= np.sort(probs)[:, [-2]], probs, 0)
    expected = kept / kept.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


def test_another_task_is_another_routing_and_nothing_else(layer):
  a, b = layer([0, 1, 2, 0]), layer([0, 1, 1, 0])
  np.testing.assert_array_equal(a[[0, 1, 3]], b[[0, 1, 3]])
  assert np.abs(a[2] - b[2]).max() > 0.1
  # With equal routers a task makes no difference.
  kernel = layer.params['router']['kernel']
  same = {'kernel': np.stack([kernel[0]] * 3)}
  params = {**layer.params, 'router': same}
  np.testing.assert_array_equal(
    layer([0, 1, 2, 0], params), layer([2, 2, 0, 1], params)
  )


def test_a_router_learns_of_its_own_task_alone(layer):
  slope = layer.slopes([0, 2, 2, 0])['router/kernel']
  assert (slope[0] != 0).any() and (slope[2] != 0).any()
  assert (slope[1] == 0).all()


def test_one_task_needs_only_the_experts_it_asks():
  layer = SparseLayer(moe_of(GATE, k=1))
  kernel = layer.params['router']['kernel'].copy()
  # Task 1 never asks expert 3: the mean of three is below their largest.
  kernel[1][:, 3] = kernel[1][:, :3].mean(-1)
  params = {**layer.params, 'router': {'kernel': kernel}}
  whole = layer([1] * ROWS, params)
  pruned = jax.tree.map(np.copy, params['experts'])
  for name in pruned:
    pruned[name]['kernel'][3] = np.nan
  without = layer([1] * ROWS, {**params, 'experts': pruned})
  np.testing.assert_array_equal(whole, without)
  other = layer([0] * ROWS, {**params, 'experts': pruned})
  assert np.isnan(other).any()  # Whose experts those are.


def test_texts_are_answered_by_the_router_of_their_task():
  bytes_ = vocabulary.load('bytes')
  stack = StackConfig(1, 1, 0, 16)
  sizes = dict(vocab_size=bytes_.size, scan_layers=False)
  make = lambda gate: tiny(
    encoder=stack, decoder=stack, moe=moe_of(gate), **sizes
  )
  token = np.ones((4, 4), 'i4')
  model = Transformer(make(GATE))
  params = random_params(model, token, token, token, task=token[0])
  serve = lambda model, params, *tasks: Generator(
    model, params, bytes_, max_inputs=8, batch_size=4, tasks=tasks
  )
  one = serve(model.config, params, 'boolq', 'cb')
  say = lambda task: [
    (found[0].tokens, found[0].score)
    for found in one.answers(['abc', 'de'], Options.of(task=task, max_length=2))
  ]
  told = {task: say(task) for task in ('boolq', 'cb', 'other')}
  assert len({str(answers) for answers in told.values()}) == 3
  # Of a number as the model has it.
  scores = {
    task: next(one.scored(['abc'], ['xy'], Options(task=task)))[0].score
    for task in told
  }
  ids = (
    np.array([[*bytes_.encode(text), bytes_.eos]] * 3) for text in ('abc', 'xy')
  )
  asked = decoding.of_task(model, np.arange(3))
  expected = jit(functools.partial(decoding.token_logprobs, asked))(
    params, *ids
  )
  np.testing.assert_allclose([*scores.values()], expected.sum(-1), rtol=1e-4)
  whole, other = (one.encode(['abc'], task=t)[0] for t in ('boolq', 'cb'))
  assert np.abs(whole - other).max() > 1e-3
  with pytest.raises(ValueError, match='task= one of boolq, cb, other'):
    one.answers(['abc'])
  with pytest.raises(ValueError, match="task 'bolq'. Did you mean 'boolq'"):
    say('bolq')
  with pytest.raises(ValueError, match="not route by task: leave task='cb'"):
    serve(make(Part('linear')), {}).answers(['abc'], Options(task='cb'))


def test_questions_of_several_tasks_share_a_batch():
  """And each is answered as by its own task."""
  stack = StackConfig(1, 1, 0, 16)
  model = Transformer(tiny(encoder=stack, decoder=stack, moe=moe_of(GATE)))
  token = np.ones((4, 4), 'i4')
  params = random_params(model, token, token, token, task=token[0])
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  asker = Asker(model, mesh, batch_size=4, longest=8, eos=99)
  answers = ((5, 6, 7), (8, 9))
  ask = lambda *tasks: asker.ask(
    params, [Question((3, 4, 5), answers, 4, task) for task in tasks]
  )
  mixed = ask(0, 1, 2, 1)
  scores = [reply.scores for reply in mixed]
  np.testing.assert_allclose(scores[1], scores[3], rtol=1e-6)
  assert np.abs(scores[0] - scores[1]).max() > 0.1
  assert np.abs(scores[1] - scores[2]).max() > 0.1
  for task in range(3):
    alone = ask(task, task, task, task)[0]
    np.testing.assert_allclose(alone.scores, scores[task], rtol=1e-5)
    assert alone.tokens == mixed[task].tokens
  assert len({tuple(reply.tokens) for reply in mixed}) > 1


def test_what_is_measured_has_the_number_it_had_in_training():
  class Library:
    def sources(self):
      return ['boolq', 'cb', 'copa']

  def number(name, by_task=True):
    source = EvalData.__new__(EvalData)
    source.name, source._library = name, Library() if by_task else None
    evaluator = Evaluator.__new__(Evaluator)
    evaluator._by_task = by_task
    return evaluator._task(source)

  assert [number(name) for name in ('boolq', 'copa', 'cb')] == [0, 2, 1]
  assert number('wic') == 3  # Of no task that was seen.
  assert number('copa', by_task=False) == 0  # Nobody asks the library.


def test_the_config_is_its_base_with_routers_and_their_losses():
  name = 'configs/methods/m3vit.py:{}runlocal'
  method, base = (
    config_file.load(name.format(word), {}) for word in ('', 'base,')
  )
  lines = config_file.diff(*map(config_file.to_dict, (base, method)))
  assert {line.split(':')[0].removeprefix('model.moe.') for line in lines} == {
    'gate.name',
    'gate.tasks',
    'losses.importance',
    'losses.load',
    'losses.load_balance',
    'losses.router_z',
    'selector.k',
    'selector.normalize',
    'selector.train_policy',
    'shaping.noise',
  }
