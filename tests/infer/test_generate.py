"""Texts in, texts out: neighbours, order and devices move nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from st_moe import sharding
from st_moe.config import Capacity, Config, DataConfig, StackConfig
from st_moe.data import vocabulary
from st_moe.decode import decoding
from st_moe.decode.methods import Contrast, Method
from st_moe.infer import generate
from st_moe.infer.generate import Generator, Options
from st_moe.infer.load import Loaded
from st_moe.model.transformer import Transformer
from st_moe.routing.selectors import dropless
from tests.helpers import random_params, tiny

BYTES = vocabulary.load('bytes')
# One place an expert: a model that dropped tokens would not be used for this.
CONFIG = tiny(
  vocab_size=BYTES.size + 1,
  encoder=StackConfig(1, 1, 0, group_size=16),
  decoder=StackConfig(1, 1, 0, group_size=16),
  moe={'eval_capacity': Capacity(0.5, minimum=1), 'extra_ffn': 'none'},
)
PROMPTS = [
  'the cat sat on a mat'[n % 7 : n % 7 + 1 + n * 5 % 14] for n in range(20)
]


@functools.cache
def _params():
  one = np.ones((1, 1), np.int32)
  return random_params(Transformer(CONFIG), one, one, one, seed=3)


@functools.cache
def _generator(batch_size=4, devices=1, max_inputs=64):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  return Generator(
    CONFIG, _params(), BYTES, max_inputs=max_inputs, mesh=mesh,
    batch_size=batch_size,
  )  # fmt: skip


def _ask(generator, prompts=PROMPTS, numbers=None, **options):
  options = {'max_length': 8, **options}
  found = generator.answers(prompts, Options.of(**options), numbers=numbers)
  return list(found)


def _equal(got, want):
  for a, b in zip(got, want, strict=True):
    assert [x.tokens for x in a] == [x.tokens for x in b]
    for x, y in zip(a, b, strict=True):
      np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)


@pytest.mark.parametrize('options', [{}, {'temperature': 1.0, 'num_return': 2}])
def test_an_answer_depends_on_its_prompt_alone(options):
  together = _ask(_generator(), **options)
  assert len({str(a[0].tokens) for a in together}) > 10
  _equal(_ask(_generator(20), **options), together)
  backwards = _ask(
    _generator(), PROMPTS[::-1], numbers=range(20)[::-1], **options
  )
  _equal(backwards[::-1], together)
  alone = _ask(_generator(), PROMPTS[7:8], numbers=[7], **options)
  _equal(alone, together[7:8])


def test_eight_devices_answer_as_one():
  # Eleven rows would be twelve, but eight devices share sixteen.
  some = PROMPTS[:11]
  _equal(_ask(_generator(16, devices=8), some), _ask(_generator(), some))


def test_it_is_what_decoding_says():
  text = PROMPTS[11]
  ids = np.array([[*BYTES.encode(text), BYTES.eos]], np.int32)
  # Scanned, not padded, compiled for itself.
  run = functools.partial(
    decoding.generate,
    Transformer(dropless(CONFIG)),
    method=Method(max_length=8),
  )
  found = jax.jit(run)(_params(), ids)
  (((answer,),),) = [_ask(_generator(), [text])]
  assert answer.tokens == found.tokens[0, 0, : len(answer.tokens)].tolist()
  assert answer.score == pytest.approx(float(found.scores[0, 0]), abs=1e-4)
  assert answer.text == BYTES.decode(answer.tokens)


def test_few_shapes_are_compiled():
  generator = _generator(max_inputs=48)
  lengths = [3, 17, 30, 47, 46, 5, 9, 2, 1]
  _ask(generator, ['x' * n for n in lengths])
  # Of 4, 4 and 1 prompts, by length: 16, 32 (of 10 to 31 tokens) and 48.
  run = generator._answer(Options.of(max_length=8).method)
  assert run._cache_size() == 3
  _ask(generator, ['y' * n for n in lengths])
  assert run._cache_size() == 3


def test_scores_are_those_of_each_alone():
  targets = [text[::-1] for text in PROMPTS]
  generator = _generator()
  found = list(generator.scored(PROMPTS, targets))
  for n in (0, 13):
    ids = np.array([[*BYTES.encode(PROMPTS[n]), 1]], np.int32)
    want = [*BYTES.encode(targets[n]), 1]
    run = functools.partial(
      decoding.token_logprobs, Transformer(dropless(CONFIG))
    )
    alone = jax.jit(run)(_params(), ids, np.array([want], np.int32))[0]
    (answer,) = found[n]
    assert answer.tokens == want
    np.testing.assert_allclose(answer.logprobs, alone, atol=1e-4)
    assert answer.score == pytest.approx(float(alone.sum()), abs=1e-4)


def test_what_is_encoded_is_as_long_as_its_prompt():
  generator = _generator()
  found = generator.encode(PROMPTS)
  assert [f.shape for f in found] == [(len(p) + 1, 16) for p in PROMPTS]
  (alone,) = generator.encode(PROMPTS[3:4])
  np.testing.assert_allclose(alone, found[3], atol=1e-5)


def test_spans_are_filled_in():
  s = BYTES.sentinel
  said = [s(0), *BYTES.encode(' big dog '), s(1), *BYTES.encode('ran'), s(2), 1]
  answer = generate.Answer('', said, [], 0.0)
  text = 'A <extra_id_0> and <extra_id_1> away <extra_id_5>.'
  assert _generator().fill(text, answer) == 'A big dog and ran away .'
  assert _generator().fill('a\n  b <extra_id_9> c', answer) == 'a\n  b c'


def test_a_prompt_may_hold_sentinels():
  ids = _generator().ids('a<extra_id_0>b<extra_id_12>')
  assert ids == [100, BYTES.sentinel(0), 101, BYTES.sentinel(12)]
  assert BYTES.decode(_generator().ids('<extra_id_100>')) == '<extra_id_100>'


def test_stop_prefix_and_forbid():
  ((free,),) = _ask(_generator(), PROMPTS[:1])
  letter = free.text[3]
  ((cut,),) = _ask(_generator(), PROMPTS[:1], stop=letter)
  assert cut.text == free.text[: free.text.index(letter)]
  assert cut.tokens == free.tokens
  token = free.tokens[2]
  ((without,),) = _ask(_generator(), PROMPTS[:1], forbid=[token])
  assert token in free.tokens and token not in without.tokens
  ((led,),) = _ask(_generator(), PROMPTS[:1], prefix='so')
  assert led.text.startswith('so')


def test_experts_are_steered():
  off = ['decoder.0.0', 'encoder.0.2']
  assert _ask(_generator(), off=off) != _ask(_generator())


@pytest.mark.parametrize(
  ('prompts', 'options', 'message'),
  [
    (['a', ''], {}, 'Prompt 2 is empty'),
    (
      ['a' * 70],
      {'long': 'refuse'},
      "Prompt 1 has 70 tokens, of 63 that the model takes .*long='cut' cuts",
    ),
    (['a'], {'prefix': 'x' * 8}, 'has 8 tokens: an answer of 8 .* has no room'),
    (['a'], {'long': 'cutt'}, "'cutt'. Did you mean 'cut'"),
    (['a'], {'temperatur': 1}, "'temperatur'. Did you mean 'temperature'"),
    (['a'], {'forbid': ['ab']}, "'ab' is 2 tokens; only single tokens"),
    (['a'], {'forbid': [999]}, 'Token 999 is not among 0 ... 359'),
    (['a'], {'off': ['decoder.0.9']}, 'decoder.0.9: the experts are 0, 1, 2'),
  ],
)
def test_what_cannot_be_asked(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    _ask(_generator(), prompts, **options)


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'max_length': 0}, 'max_length 0 must be at least 1'),
    ({'max_length': 2.5}, 'max_length 2.5 must be a whole number below'),
    ({'max_length': True}, 'max_length True must be a whole number'),
    (
      {'temperature': NAN},
      r'temperature nan must be a number, 0 \(greedy\)',
    ),
    ({'temperature': INF}, 'temperature inf must be a number'),
    ({'temperature': 'hot'}, "temperature 'hot' must be a number"),
    ({'temperature': 1.0, 'top_k': -1}, r'top_k -1 must be 0 \(all\) or more'),
    ({'temperature': 1.0, 'top_p': 2}, 'top_p 2 must be above 0 and at most 1'),
    ({'num_beams': 0}, 'num_beams 0 must be at least 1'),
    (
      {'num_beams': 2, 'length_penalty': NAN},
      'length_penalty nan must be a',
    ),
    ({'early_stopping': 1}, "early_stopping 1 must be true, false or 'never'"),
    ({'num_return': None}, 'num_return None must be a whole number'),
    ({'repetition_penalty': INF}, 'repetition_penalty inf must be a number'),
    ({'forbidden': (1.5,)}, r'forbidden \(1.5,\) must be a tuple of token ids'),
    ({'contrast': NAN}, 'contrast nan must be a Contrast'),
    ({'seed': 10**20}, '00 must be a whole number from 0 to 2'),
    ({'seed': -1}, 'seed -1 must be a whole number from 0'),
    ({'max_length': 10**11}, '00 must be a whole number below 2'),
    ({'seed': 0.5}, 'seed 0.5 must be a whole number'),
    ({'prefix': None}, 'prefix None must be a text'),
    ({'stop': ['']}, r"stop \(''\,\) must be texts that are not empty"),
    ({'stop': None}, r'stop \(None,\) must be texts'),
    ({'forbid': [1.5]}, r'forbid \(1.5,\) must be ids of tokens, or their'),
    ({'off': 3}, r'off \(3,\) must be names of experts'),
    ({'k': 1.0}, 'k 1.0 must be a whole number, or None'),
    ({'k': 0}, '0 experts per token: there are 4'),
    ({'long': None}, "long 'None'"),
  ],
)
def test_an_option_that_breaks_its_rule(options, message):
  with pytest.raises(ValueError, match=message):
    _loaded().generate(['a'], **options)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'beta': NAN}, 'beta nan must be a number, 0 or more'),
    ({'alpha': NAN}, 'alpha nan must be a number, above 0 and at most 1'),
    ({'alpha': 2}, 'alpha 2 must be above 0 and at most 1'),
    ({'rank': 1.5}, 'rank 1.5 must be a whole number below'),
  ],
)
def test_a_contrast_that_breaks_its_rule(fields, message):
  with pytest.raises(ValueError, match=message):
    Contrast(**fields)


def test_numbers_may_be_those_of_numpy():
  given = {'max_length': np.int64(4), 'temperature': np.float32(0.5)}
  method = Options.of(**given).method
  assert (method.max_length, method.temperature) == (4, 0.5)


def test_prompts_are_texts():
  model = _loaded()
  assert model.generate([]) == model.score([], []) == model.encode([]) == []
  ways = (
    model.generate,
    model.encode,
    model.fill,
    lambda prompts: model.score(prompts, prompts),
    lambda targets: model.score(['a'], targets),
  )
  for way in ways:
    for wrong, message in {
      'hello': 's is a str: give a list of texts',
      None: 's is a NoneType: give a list of texts',
      ('a', 5): 'number 2 is 5, which is no text',
      (b'a',): "number 1 is b'a', which is no text",
      ('\ud83d',): r"'.ud83d', which is no text \(half a surrogate pair",
    }.items():
      with pytest.raises(ValueError, match=message):
        way(wrong)


def test_what_is_too_large_says_what_to_make_smaller():
  model = _loaded()

  def full(*_):  # As a device says it; one might as well grant the memory.
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Out of memory allocating 90400003120 bytes.'
    )

  model.generator._answer = lambda method: full
  with pytest.raises(ValueError, match='memory with 1 prompts of 16 .*batch_s'):
    model.generate(['a'])


def test_weights_that_are_no_numbers_are_told():
  """Greedy decoding takes the first of NaNs, and would say so calmly."""
  params = jax.tree.map(lambda a: np.full_like(a, np.nan), _params())
  broken = _loaded(params=params)
  with pytest.warns(UserWarning, match='logits of this model are no numbers'):
    broken.generate(['a'], max_length=2)
  with pytest.warns(UserWarning, match='scores made of them mean nothing'):
    broken.score(['a'], ['b'])


def test_scores_follow_no_options_of_answering():
  generator = _generator()
  with pytest.raises(ValueError, match='A score depends on no method'):
    generator.scored(['a'], ['b'], Options.of(num_beams=2))
  with pytest.raises(ValueError, match='1 prompts and 2 targets'):
    generator.scored(['a'], ['b', 'c'])
  with pytest.raises(ValueError, match='batch_size 0 must be at least 1'):
    Generator(CONFIG, _params(), BYTES, max_inputs=8, batch_size=0)


def test_a_prompt_that_is_cut_is_told():
  with pytest.warns(UserWarning, match='longer than 63 tokens were cut: 2.$'):
    ((_,), (cut,)) = _ask(_generator(), ['a', 'b' * 80])
  ((whole,),) = _ask(_generator(), ['b' * 63])
  assert cut.tokens == whole.tokens


# As `st_moe.load` hands it out.


def _loaded(**changes):
  fields = dict(
    model=Transformer(CONFIG),
    params=_params(),
    config=Config(model=CONFIG, data=DataConfig(inputs_length=64)),
    vocabulary=BYTES,
    path='here',
    step=0,
    mesh=sharding.make_mesh(devices=jax.devices()[:1]),
  )
  return Loaded(**{**fields, **changes})


def test_a_loaded_model_answers():
  model = _loaded()
  texts = model.generate(PROMPTS[:3], max_length=8)
  assert texts == [a.text for (a,) in _ask(_generator(), PROMPTS[:3])]
  several = model.generate(PROMPTS[:2], max_length=8, num_beams=2, num_return=2)
  assert [len(texts) for texts in several] == [2, 2]
  (score,) = model.score(PROMPTS[:1], ['yes'])
  assert score == next(model.generator.scored(PROMPTS[:1], ['yes']))[0].score
  assert model.encode(PROMPTS[:1])[0].shape == (len(PROMPTS[0]) + 1, 16)
  (filled,) = model.fill(['a <extra_id_0>'], max_length=8)
  assert filled.startswith('a') and '<' not in filled


def test_routes_are_those_of_the_sown_seats():
  """Of prompts in whatever batch, nobody dropped, padding left out."""
  model, targets = _loaded(), [text[::-1] for text in PROMPTS]
  trace = model.inspect(PROMPTS, targets, scores=True)
  assert [str(layer) for layer in trace.layers] == ['encoder.0', 'decoder.0']
  # With an EOS each, in either stack.
  tokens = [2 * len(text) + 2 for text in PROMPTS]
  assert np.bincount(trace.example).tolist() == tokens
  assert trace.kept.all() and trace.expert.shape[1] == 2
  n = 13
  ids = np.array([[*BYTES.encode(PROMPTS[n]), BYTES.eos]], np.int32)
  wanted = np.array([[*BYTES.encode(targets[n]), BYTES.eos]], np.int32)
  run = functools.partial(decoding.routes, Transformer(dropless(CONFIG)))
  sown = jax.device_get(jax.jit(run)(_params(), ids, wanted))
  for stack, said in (('encoder', ids), ('decoder', np.roll(wanted, 1))):
    if stack == 'decoder':
      said[0, 0] = 0
    alone, one = sown[stack]['layers']['layer_0']['moe'], trace.at(stack)
    one = one.of_example(n)
    assert one.token.tolist() == said[0].tolist()
    assert one.position.tolist() == list(range(said.size))
    s, seats = said.size, alone['seats']
    experts = np.array(seats.expert[0, 0]).reshape(-1, 2)[:s]
    np.testing.assert_array_equal(one.expert, experts)
    weights = np.array(seats.weight[0, 0]).reshape(-1, 2)[:s]
    np.testing.assert_allclose(one.weight, weights, atol=1e-4)
    np.testing.assert_allclose(
      one.logits, alone['scores'].logits[0, 0, :s], atol=1e-4
    )
  inputs = model.inspect(PROMPTS)
  assert len(inputs) == len(trace) // 2 and inputs.probs is None
  np.testing.assert_array_equal(inputs.expert, trace.at('encoder').expert)


def test_an_expert_that_is_forced_is_met_by_all():
  model = _loaded()
  trace = model.inspect(PROMPTS, on='encoder.0.2', off='encoder.0.1')
  assert (trace.expert[:, 0] == 2).all() and not (trace.expert == 1).any()
  told = model.inspect(PROMPTS, PROMPTS, on='decoder.0.3')
  assert (told.at('decoder').expert[:, 0] == 3).all()
  assert (told.at('encoder').expert[:, 0] != 3).any()
  (score,), (without,) = (
    model.score(PROMPTS[:1], ['yes'], **options)
    for options in ({}, {'off': 'decoder.0.2'})
  )
  assert score != without


def test_who_has_no_routes_says_so():
  with pytest.raises(ValueError, match='dense: it has no routers to look at'):
    dense = dataclasses.replace(CONFIG, dense=True)
    _loaded(model=Transformer(dense)).inspect(['a'])
  with pytest.raises(ValueError, match='A route depends on no method'):
    _loaded().inspect(['a'], num_beams=2)
  with pytest.raises(ValueError, match='2 prompts and 1 targets'):
    _loaded().inspect(['a', 'b'], ['c'])
  with pytest.raises(ValueError, match='no text to look at'):
    _loaded().inspect([])


def test_who_cannot_answer_says_why():
  with pytest.raises(ValueError, match='here has no vocabulary: give the Sent'):
    _loaded(vocabulary=None).generate(['a'])
  alone = Transformer(dataclasses.replace(CONFIG, decoder=None))
  with pytest.raises(ValueError, match='here has no decoder'):
    _loaded(model=alone).generate(['a'])
