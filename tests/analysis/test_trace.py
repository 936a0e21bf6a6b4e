"""A trace is what was sown, recounted route by route."""

import dataclasses
import functools

import numpy as np
import pytest

from st_moe import paths
from st_moe.analysis import trace as trace_lib
from st_moe.config import Capacity, Part, StackConfig
from st_moe.model.transformer import Transformer
from tests.helpers import examples, jit, padded_batch, random_params, tiny

# Two places an expert, so that somebody is dropped; groups that rows share,
# the last of them filled up.
TIGHT = {'eval_capacity': Capacity(0.5, minimum=2), 'extra_ffn': 'none'}
TOP_2 = tiny(
  encoder=StackConfig(4, 2, 1, group_size=12),
  decoder=StackConfig(1, 1, 0, group_size=8),
  moe=TIGHT,
)
CHOICE = tiny(
  encoder=StackConfig(2, 1, 0, group_size=12),
  decoder=None,
  moe={**TIGHT, 'selector': Part.of('expert_choice', k=2.0)},
)


@functools.cache
def _sown(config):
  """What a model sows for four rows of different lengths, and their tokens."""
  model, batch = Transformer(config), padded_batch(config, examples(config))
  params = random_params(model, **batch)
  told = dict(enable_dropout=False, mutable=['routing'])
  _, found = jit(lambda p: model.apply({'params': p}, **batch, **told))(params)
  tokens = {}
  for stack in config.stacks:
    ids = batch[f'{stack}_input_tokens']
    real = batch.get('decoder_target_tokens') if stack == 'decoder' else ids
    tokens[stack] = ids, real > 0
  return params, found['routing'], tokens


def _slow(config, sown, tokens):
  """{(layer, row, position): [(expert, weight, kept), ...]}, by plain loops."""
  found = {}
  columns = 'token', 'expert', 'weight', 'asked', 'place'
  for stack in config.stacks:
    ids, valid = tokens[stack]
    for number in config.plan(stack).sparse:
      period = config.plan(stack).period
      of = sown[stack]['layers'][f'layer_{number % period}']['moe']['seats']
      seats = {c: np.array(getattr(of, c))[number // period] for c in columns}
      g, n = seats['token'].shape
      size = 8 if stack == 'decoder' else 12
      for i in range(g):
        for j in range(n):
          at = i * size + seats['token'][i, j]
          if at >= ids.size or not seats['asked'][i, j]:
            continue
          row, position = divmod(int(at), ids.shape[1])
          if not valid[row, position]:
            continue
          route = (
            int(seats['expert'][i, j]),
            float(seats['weight'][i, j]),
            bool(seats['place'][i, j] >= 0),
          )
          name = f'{stack}.{number}', row, position
          found.setdefault(name, []).append(route)
  return found


@pytest.mark.parametrize('config', [TOP_2, CHOICE], ids=['top_2', 'choice'])
def test_a_trace_is_what_was_sown(config):
  _, sown, tokens = _sown(config)
  trace = trace_lib.read(sown, config, tokens, scores=True)
  slow = _slow(config, sown, tokens)
  dropped, several = 0, set()
  assert len(trace) == sum(
    valid.sum() * config.plan(stack).num_sparse
    for stack, (_, valid) in tokens.items()
  )
  for n in range(len(trace)):
    layer = trace.layers[trace.layer[n]]
    row, position = trace.example[n], trace.position[n]
    assert trace.token[n] == tokens[layer.stack][0][row, position]
    said = [
      (expert, pytest.approx(weight), kept)
      for expert, weight, kept in zip(
        trace.expert[n].tolist(), trace.weight[n], trace.kept[n], strict=True
      )
      if expert >= 0
    ]
    routes = slow.pop((str(layer), row, position), [])
    if config is CHOICE:  # Best heard first.
      routes = sorted(routes, key=lambda route: -route[1])
    assert said == routes
    dropped += sum(not kept for *_, kept in routes)
    several.add(len(routes))
    assert trace.probs[n].sum() == pytest.approx(1, abs=1e-5)
  assert not slow
  # Two each and some dropped; or as many as there are experts that want it.
  assert (dropped > 0 and several == {2}) == (config is TOP_2)
  assert len(several) > 1 or config is TOP_2


def test_unrolled_layers_leave_the_same_trace():
  params, sown, tokens = _sown(TOP_2)
  scanned = trace_lib.read(sown, TOP_2, tokens)
  config = dataclasses.replace(TOP_2, scan_layers=False)
  batch = padded_batch(config, examples(config))
  told = dict(enable_dropout=False, mutable=['routing'])
  apply = lambda p: Transformer(config).apply({'params': p}, **batch, **told)
  _, found = jit(apply)(paths.unroll(params, config))
  unrolled = trace_lib.read(found['routing'], config, tokens)
  assert unrolled.layers == scanned.layers
  for name in ('layer', 'example', 'position', 'token', 'expert', 'kept'):
    one, other = getattr(unrolled, name), getattr(scanned, name)
    np.testing.assert_array_equal(one, other)


def test_rows_are_found_by_layer_and_example():
  _, sown, tokens = _sown(TOP_2)
  trace = trace_lib.read(sown, TOP_2, tokens)
  names = [str(layer) for layer in trace.layers]
  assert names == ['encoder.1', 'encoder.3', 'decoder.0']
  # 5 + 8 + 3 + 7 tokens of inputs, 4 + 6 + 6 + 2 of targets.
  assert len(trace.at('encoder')) == 2 * 23
  assert len(trace.at('encoder.3')) == 23 and len(trace.at('decoder')) == 18
  one = trace.at('decoder.0').of_example(3, 7)
  assert one.example.tolist() == [7, 7] and one.position.tolist() == [0, 1]
  with pytest.raises(ValueError, match="'encoder.2'. Did you mean 'encoder.3'"):
    trace.at('encoder.2')


def test_traces_are_joined_in_order():
  _, sown, tokens = _sown(TOP_2)
  whole = trace_lib.read(sown, TOP_2, tokens, scores=True)
  halves = [whole.rows(whole.example % 2 == n) for n in (1, 0)]
  # One that asked a single expert of each has a column less.
  narrow = dataclasses.replace(
    halves[0], expert=halves[0].expert[:, :1], weight=halves[0].weight[:, :1],
    kept=halves[0].kept[:, :1],
  )  # fmt: skip
  joined = trace_lib.join([narrow, halves[1]])
  for name in ('layer', 'example', 'position', 'probs'):
    one, other = getattr(joined, name), getattr(whole, name)
    np.testing.assert_array_equal(one, other)
  odd = joined.example % 2 == 1
  assert (joined.expert[odd, 1] == -1).all() and not joined.kept[odd, 1].any()
  assert (joined.weight[odd, 1] == 0).all()
  np.testing.assert_array_equal(joined.expert[~odd], whole.expert[~odd])
  with pytest.raises(ValueError, match='no text to look at'):
    trace_lib.join([])
