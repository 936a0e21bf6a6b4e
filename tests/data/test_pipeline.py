"""From a config to batches: which examples, what order, what noise."""

import collections
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from st_moe.config import DataConfig
from st_moe.data import (
  catalogue,
  metrics,
  pipeline,
  rows,
  sources,
  superglue,
  task_shards,
  text_shards,
  vocabulary,
)
from st_moe.data.eval_data import EvalData, Example
from st_moe.data.mixture import Library
from st_moe.data.registry import Registry

BYTES = vocabulary.load('bytes')
SENTINEL = BYTES.sentinel(0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two text sources, of 133 and some 40 chunks; the shards lie here too."""
  folder = tmp_path_factory.mktemp('pipeline')
  for name, count in (('big', 200), ('small', 60), ('held', 11)):
    rows = [{'text': f'{name} {i} ' * 6} for i in range(count)]
    path = folder / f'{name}.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
  return folder


def config(folder, **changes):
  names = ('big', 'small')
  values = dict(
    mixture={'big': 3, 'small': 1},
    files={
      name: {
        'train': f'{folder}/{name}.jsonl',
        'validation': f'{folder}/held.jsonl',
      }
      for name in names
    },
    inputs_length=61,
    targets_length=16,
    batch_size=8,
    cache_dir=f'{folder}/cache',
  )
  return DataConfig(**{**values, **changes})


def equal(a, b):
  assert a.keys() == b.keys()
  return all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def restore(inputs, targets):
  """The chunk that a row of a batch was made of."""
  spans, tokens = {}, []
  for token in targets[targets > 0][:-1].tolist():
    if token > 258:
      span = spans.setdefault(token, [])
    else:
      span.append(token)
  for token in inputs[inputs > 0][:-1].tolist():
    tokens += spans[token] if token > 258 else [token]
  return tuple(tokens)


def chunks_of(data, rows, source=0):
  """Chunks of `source` in the first `rows` examples, in order."""
  size = len(data.batch(0)['task'])
  return [
    restore(inputs, targets)
    for n in range(rows // size)
    for batch in [data.batch(n)]
    for inputs, targets, row_source in zip(
      batch['encoder_input_tokens'],
      batch['decoder_target_tokens'],
      batch['task'],
      strict=True,
    )
    if row_source == source
  ]


def test_importing_it_is_cheap():
  heavy = ('jax', 'tensorflow', 'seqio', 'grain', 'sentencepiece')
  code = (
    'import sys, st_moe.data.pipeline;'
    f'print([m for m in {heavy} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'


def test_texts_pairs_and_tasks_of_ours_need_no_tensorflow(folder):
  """Where it is not installed, nor SeqIO: from names to scores."""
  put(folder, 'pairs', [{'inputs': 'a', 'targets': 'b'}])
  put(folder, 'superglue/CB/val', CB[:1])
  code = (
    'import sys\n'
    'sys.modules["tensorflow"] = sys.modules["seqio"] = None\n'
    'from st_moe.config import DataConfig\n'
    'from st_moe.data import pipeline, registry, vocabulary\n'
    'from st_moe.data.eval_data import EvalData\n'
    'from st_moe.data.mixture import Library\n'
    'c = DataConfig(mixture={"big": 1, "tiny_glue": 1, "asked": 1},'
    f' files={config(folder).files!r}, data_dir="{folder}",'
    f' pairs={{"asked": {{"train": "{folder}/pairs.jsonl"}}}},'
    ' inputs_length=61, targets_length=16, allow_cut=1.0, batch_size=8,'
    f' cache_dir="{folder}/cache")\n'
    'library = Library(c, vocabulary.load("bytes"))\n'
    'library.check()\n'
    'data = pipeline.TrainData(library)\n'
    'assert len(data.sources) == 5, data.sources\n'
    'data.batch(0)\n'
    'next(EvalData(library, "big").batches(2))\n'
    'for name in ("super_glue_cb", "super_glue_cb_1_sentinel"):\n'
    '  cb = EvalData(library, name)\n'
    '  assert cb.scores(cb.examples, ["entailment"])["accuracy"] == 100\n'
    'assert not registry.has_seqio()\n'
    'try:\n'
    '  library.members("super_gleu")\n'
    'except ValueError as error:\n'
    '  print(error)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(
    "Unknown data source 'super_gleu'. Did you mean 'super_glue'?"
  )
  assert "pip install 'st_moe[seqio]'" in done.stdout


def test_a_batch_of_text(folder):
  data = pipeline.TrainData(Library(config(folder), BYTES))
  assert data.sources == ('big', 'small') and data.rates == (0.75, 0.25)
  batch = data.batch(0)
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    'encoder_input_tokens': ((8, 61), 'int32'),
    'decoder_input_tokens': ((8, 16), 'int32'),
    'decoder_target_tokens': ((8, 16), 'int32'),
    'decoder_loss_weights': ((8, 16), 'float32'),
    'task': ((8,), 'int32'),
  }
  # 67 raw tokens: 10 of noise in 3 spans, so 61 inputs and 14 targets.
  first = batch['task'].tolist().index(0)
  row = {k: v[first] for k, v in batch.items()}
  assert (row['encoder_input_tokens'] > 0).all()
  assert row['encoder_input_tokens'][-1] == 1
  assert (row['decoder_target_tokens'] > 0).tolist() == [True] * 14 + [
    False
  ] * 2
  assert row['decoder_target_tokens'][0] == SENTINEL
  assert row['decoder_target_tokens'][13] == 1
  assert row['decoder_loss_weights'].tolist() == [1.0] * 14 + [0.0] * 2
  assert row['decoder_input_tokens'][0] == 0
  assert (
    row['decoder_input_tokens'][1:] == row['decoder_target_tokens'][:-1]
  ).all()
  chunk = restore(row['encoder_input_tokens'], row['decoder_target_tokens'])
  assert len(chunk) == 67 and 'big' in BYTES.decode(chunk)


def test_any_batch_in_any_order_any_way(folder):
  order = [7, 0, 300, 3, 7]
  data = pipeline.TrainData(Library(config(folder), BYTES))
  found = {n: data.batch(n) for n in order}
  fresh = pipeline.TrainData(Library(config(folder), BYTES))
  assert all(equal(fresh.batch(n), found[n]) for n in sorted(order))
  assert not equal(found[0], found[3])
  for threads in (1, 4):
    for n, batch in zip(range(9), fresh.iterate(threads=threads), strict=False):
      assert n not in found or equal(batch, found[n])
    assert equal(next(fresh.iterate(300, threads=threads)), found[300])


def test_hosts_share_a_batch(folder):
  whole = pipeline.TrainData(Library(config(folder), BYTES)).batch(5)
  # In halves, one by one, and as a mesh may lay them out.
  for shares in (
    [range(4), range(4, 8)],
    [[n] for n in range(8)],
    [[1, 2, 7], [0, 3, 4, 5, 6]],
  ):
    for mine in shares:
      data = pipeline.TrainData(Library(config(folder), BYTES), rows=mine)
      assert equal(data.batch(5), {k: v[[*mine]] for k, v in whole.items()})


def test_epochs_shuffle_and_corrupt_anew(folder):
  one = config(folder, mixture={'small': 1}, batch_size=1)
  data = pipeline.TrainData(Library(one, BYTES))
  size = data.info['small']['records']
  assert 40 < size < 100
  chunks = chunks_of(data, 2 * size)
  first, second = chunks[:size], chunks[size:]
  # Every chunk once an epoch, in an order of its own.
  stored = Library(one, BYTES).open('small', 'train')
  stored = [tuple(text_shards.tokens_of(r).tolist()) for r in stored]
  assert collections.Counter(first) == collections.Counter(stored)
  assert collections.Counter(second) == collections.Counter(stored)
  assert first != stored and first != second
  # The same chunk, other holes.
  rows = [data.batch(n)['encoder_input_tokens'][0] for n in range(2 * size)]
  again = [rows[size + second.index(chunk)] for chunk in first]
  same = [np.array_equal(a, b) for a, b in zip(rows, again, strict=False)]
  assert sum(same) <= 2


def test_the_seed_is_in_everything(folder):
  a = pipeline.TrainData(Library(config(folder), BYTES))
  b = pipeline.TrainData(Library(config(folder, seed=1), BYTES))
  assert chunks_of(a, 80) != chunks_of(b, 80)
  # Not even a source with one chunk has the same holes.
  one = {
    'mixture': {'small': 1},
    'batch_size': 4,
    'files': {'small': {'train': f'{folder}/one.txt'}},
  }
  (folder / 'one.txt').write_text('one chunk of text ' * 3)
  rows = [
    pipeline.TrainData(Library(config(folder, seed=s, **one), BYTES)).batch(0)
    for s in (0, 1)
  ]
  assert not np.array_equal(*[r['encoder_input_tokens'] for r in rows])


def test_sources_do_not_share_their_noise(folder):
  # The same text under two names.
  files = {n: {'train': f'{folder}/small.jsonl'} for n in ('a', 'b')}
  data = pipeline.TrainData(
    Library(
      config(folder, mixture={'a': 1, 'b': 1}, files=files, batch_size=40),
      BYTES,
    )
  )
  assert chunks_of(data, 40, 0)[:9] != chunks_of(data, 40, 1)[:9]


@pytest.mark.parametrize(
  'rates', [(0.9, 0.1), (0.07, 0.93), (1, 1), (2, 3), (1, 1.99)]
)
def test_examples_are_drawn_at_the_rates(folder, rates):
  mix = dict(zip(('big', 'small'), rates, strict=True))
  data = pipeline.TrainData(
    Library(config(folder, mixture=mix, batch_size=100), BYTES)
  )
  drawn = np.concatenate([data.batch(n)['task'] for n in range(10)])
  expected = rates[0] / sum(rates)
  assert (drawn == 0).mean() == pytest.approx(expected, abs=0.01)
  assert data.rates[0] == pytest.approx(expected)
  # Not in blocks: any hundred in a row are mixed alike.
  assert (drawn[300:400] == 0).mean() == pytest.approx(expected, abs=0.03)


def test_no_source_has_rows_of_its_own(folder):
  """Rows are devices, and turns: seats go to the left of a group first."""
  names = 'abcd'
  files = {n: {'train': f'{folder}/small.jsonl'} for n in names}
  c = config(folder, mixture=dict.fromkeys(names, 1), files=files)
  data = pipeline.TrainData(Library(c, BYTES))
  batches = 150
  seen, seated = np.zeros((4, 8), int), np.zeros(4, int)
  for n in range(batches):
    sources = data.batch(n)['task']
    # The mixture is exact in every batch: two rows a source.
    assert sorted(sources) == [0, 0, 1, 1, 2, 2, 3, 3]
    seen[sources, range(8)] += 1
    for group in sources.reshape(2, 4):  # With room for two rows of four.
      np.add.at(seated, group[:2], 1)
  # A quarter of all in each row, within five standard deviations.
  assert abs(seen - batches / 4).max() < 5 * (batches * 3 / 16) ** 0.5
  assert abs(seated / (2 * batches) - 0.5).max() < 0.1
  # Another seed, another order; the same batch whoever asks for it.
  other = pipeline.TrainData(Library(dataclasses.replace(c, seed=1), BYTES))
  orders = [
    [each.batch(n)['task'].tolist() for n in range(20)]
    for each in (data, other, pipeline.TrainData(Library(c, BYTES)))
  ]
  assert orders[0] == orders[2] != orders[1]


def test_no_target_ends_before_its_end(tmp_path):
  """An EOS between documents would get into spans, where decoding stops."""
  lines = ''.join(f'short text {i:02d}\n\n' for i in range(99))
  (tmp_path / 'short.txt').write_text(lines)
  files = {'short': {'train': f'{tmp_path}/short.txt'}}
  data = pipeline.TrainData(
    Library(config(tmp_path, mixture={'short': 1}, files=files), BYTES)
  )
  for n in range(4):
    batch = data.batch(n)
    for key in ('encoder_input_tokens', 'decoder_target_tokens'):
      # Once, behind the last token.
      assert (batch[key] == BYTES.eos).sum(-1).tolist() == [1] * 8
      last = (batch[key] > 0).sum(-1) - 1
      assert (batch[key][range(8), last] == BYTES.eos).all()


def rates_of(mix, sizes, **changes):
  files = {name: {'train': '-'} for name in sizes}
  c = DataConfig(mixture=mix, files=files, **changes)
  return Library(c, BYTES).rates(sizes)


def test_rates_by_hand():
  sizes = {'a': 100, 'b': 400}
  by_size = {'a': 'size', 'b': 'size'}
  assert rates_of(by_size, sizes) == {'a': 100, 'b': 400}
  assert rates_of(by_size, sizes, size_cap=200) == {'a': 100, 'b': 200}
  assert rates_of(by_size, sizes, temperature=2) == {'a': 10, 'b': 20}
  assert rates_of(by_size, sizes, size_cap=144, temperature=2) == {
    'a': 10,
    'b': 12,
  }
  # Numbers stay as they are.
  assert rates_of({'a': 0.5, 'b': 'size'}, sizes, temperature=2) == {
    'a': 0.5,
    'b': 20,
  }


@pytest.mark.parametrize('rate', [0, -1, 'all', None])
def test_rates_that_are_none(rate):
  with pytest.raises(ValueError, match="mixture.a = .* above 0, .*or 'size'"):
    rates_of({'a': rate}, {'a': 100})


def test_names_that_are_none(folder):
  with pytest.raises(ValueError, match='data.mixture is empty; name what to'):
    pipeline.TrainData(Library(config(folder, mixture={}), BYTES))
  with pytest.raises(ValueError, match="'smal'. Did you mean 'small'.*tiny_cb"):
    pipeline.TrainData(Library(config(folder, mixture={'smal': 1}), BYTES))
  with pytest.raises(
    ValueError, match='no split .test., only.*--config.data.files.big.test='
  ):
    EvalData(Library(config(folder), BYTES), 'big', 'test')
  with pytest.raises(ValueError, match="'tiny_cb' has no split 'test'"):
    EvalData(Library(config(folder), BYTES), 'tiny_cb', 'test')


def test_lengths_that_do_not_fit(folder):
  c = config(folder, inputs_length=512, targets_length=113)
  with pytest.raises(ValueError, match='targets_length 113 .* needs 114.'):
    pipeline.TrainData(Library(c, BYTES))
  c = config(folder, inputs_length=4096, targets_length=2000)
  with pytest.raises(ValueError, match='spans, but there are 100 sentinels'):
    pipeline.TrainData(Library(c, BYTES))


def test_evaluation_of_text(folder):
  data = EvalData(Library(config(folder), BYTES), 'big')
  batches = list(data.batches(4))
  assert data.is_text and len(data) > 4 and len(data) % 4
  last = batches.pop()
  assert all(b['valid'].all() for b in batches)
  real = len(data) % 4
  assert last['valid'].tolist() == [True] * real + [False] * (4 - real)
  for key in last.keys() - {'valid'}:
    assert not last[key][real:].any() and last[key].shape[0] == 4
  assert last['decoder_loss_weights'][:real].any(-1).all()
  # In the order of the files, each chunk once.
  stored = Library(config(folder), BYTES).open('big', 'validation')
  rows = [
    restore(*pair)
    for b in [*batches, last]
    for pair in zip(
      b['encoder_input_tokens'], b['decoder_target_tokens'], strict=True
    )
  ]
  assert rows[: len(data)] == [
    tuple(text_shards.tokens_of(r).tolist()) for r in stored
  ]
  # The same holes whatever the seed, so losses of runs compare.
  other = EvalData(Library(config(folder, seed=5), BYTES), 'big')
  assert equal(next(iter(other.batches(4))), batches[0])
  with pytest.raises(ValueError, match="'big' is text: it has a loss"):
    _ = data.examples


def test_prepare_counts_and_checks_first(folder):
  seen = []
  c = config(folder, cache_dir=f'{folder}/fresh')
  counts = pipeline.prepare(
    Library(c, BYTES, progress=lambda *args: seen.append(args))
  )
  assert list(counts) == ['big', 'small']
  assert counts['big'].keys() == {'train', 'validation'}
  assert counts['big']['train']['documents'] == 200
  text = (folder / 'big.jsonl').read_text().splitlines()
  tokens = sum(len(json.loads(row)['text']) for row in text)
  assert counts['big']['train']['tokens'] == tokens
  assert tokens == 133 * 67 + 29  # And 29 tokens are too few for a chunk.
  assert counts['big']['train']['records'] == 133
  assert seen[:2] == [('big-train', 0, 1), ('big-train', 1, 1)]
  # A typo in the last file is found before the first is read.
  files = {**c.files, 'small': {'train': f'{folder}/smal.jsonl'}}
  c = config(folder, cache_dir=f'{folder}/fresher', files=files)
  with pytest.raises(ValueError, match='smal.jsonl: no such file'):
    pipeline.prepare(Library(c, BYTES))
  assert not pathlib.Path(c.cache_dir).exists()


def test_check_looks_at_what_is_used_only(folder):
  unused = {'other': {'train': f'{folder}/none.jsonl'}}
  c = config(folder, files={**config(folder).files, **unused})
  Library(c).check()
  with pytest.raises(ValueError, match='none.jsonl: no such file'):
    Library(dataclasses.replace(c, mixture={'other': 1})).check()


def test_the_embedded_corpus_and_a_vocabulary_of_it(tmp_path):
  c = DataConfig(
    mixture={sources.EMBEDDED: 1},
    inputs_length=128,
    targets_length=30,
    batch_size=4,
    cache_dir=str(tmp_path),
  )
  v = Library(c).train_vocabulary(str(tmp_path / 'v.model'), 400)
  assert v.size == 400
  counts = pipeline.prepare(Library(c, v))[sources.EMBEDDED]
  assert counts['train']['records'] > 1000 > counts['validation']['records'] > 9
  batch = pipeline.TrainData(Library(c, v)).batch(0)
  assert (batch['decoder_target_tokens'][:, 0] == 399).all()


def test_a_vocabulary_learns_from_files_and_extra_text(folder, tmp_path):
  train = lambda extra: Library(
    config(folder, mixture={'big': 1}, vocabulary_extra=extra)
  ).train_vocabulary(str(tmp_path / f'{len(extra)}.model'), 210)
  plain = train('')
  (folder / 'extra.txt').write_text('ğ ' * 2000)
  assert plain.unk in plain.encode('ğ')
  assert plain.unk not in train(f'{folder}/extra.txt').encode('ğ')
  # The embedded tasks say 'choice' more often than anything.
  assert len(train('tiny_world').encode('choice')) < len(plain.encode('choice'))


# Tasks. SeqIO is imported from here on.


@pytest.fixture(scope='module')
def weather():
  """A user's tasks of 7 examples, and mixtures of them."""
  import seqio
  import tensorflow as tf

  rows = [(f'rain {i}', 'wet' if i % 2 else 'dry') for i in range(7)]

  def dataset(split, shuffle_files, seed=None):
    inputs, targets = map(list, zip(*rows, strict=True))
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': inputs, 'targets': targets, 'idx': [[i, 9] for i in range(7)],
       'answers': [['a', 'b']] * 7}
    )  # fmt: skip

  # A vocabulary that must give way to the one of the config.
  feature = seqio.Feature(seqio.PassThroughVocabulary(9), add_eos=True)

  # What is compared: a number; of an example, with what it has besides.
  def degrees(text, example=None, is_target=False):
    assert example['inputs_pretokenized'].startswith('rain ')
    value = {'dry': 30, 'wet': 10}.get(text, 0)
    return (value, example['answers'], example['idx']) if is_target else value

  def off_by(targets, predictions):
    pairs = list(zip(targets, predictions, strict=True))
    assert all(answers == ['a', 'b'] for (_, answers, _), _ in pairs)
    return {'off_by': sum(abs(t - p) for (t, _, _), p in pairs) / len(pairs)}

  own = {
    'weather': {'metric_fns': [metrics.accuracy]},
    'climate': {'postprocess_fn': degrees, 'metric_fns': [off_by]},
  }
  for name in ('weather', 'climate'):
    seqio.TaskRegistry.add(
      name,
      **own[name],
      source=seqio.FunctionDataSource(dataset, splits=('train', 'validation')),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.preprocessors.append_eos_after_trim,
      ],
      output_features={'inputs': feature, 'targets': feature},
    )
  seqio.MixtureRegistry.add('outdoors', [('weather', 3), ('climate', 1)])
  seqio.MixtureRegistry.add('dropped', [('weather', 3), ('climate', 0)])
  seqio.MixtureRegistry.add(
    'uncounted', ['weather'], default_rate=seqio.mixing_rate_num_examples
  )
  yield
  for name in ('weather', 'climate'):
    seqio.TaskRegistry.remove(name)
  for name in ('outdoors', 'dropped', 'uncounted'):
    seqio.MixtureRegistry.remove(name)


def of_tasks(tmp_path, mix, **changes):
  values = dict(inputs_length=8, targets_length=6, batch_size=7)
  return DataConfig(
    mixture=mix, cache_dir=str(tmp_path), **{**values, **changes}
  )


@pytest.fixture
def scored(weather, tmp_path):
  """Metric functions -> evaluation data of the weather with these."""
  import seqio

  def opened(*fns, **more):
    task = seqio.TaskRegistry.get('weather')
    made = task.replace(name='scored', metric_fns=fns, **more)
    seqio.TaskRegistry.remove('scored')
    seqio.TaskRegistry.add_provider('scored', made)
    return EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'scored')

  yield opened
  seqio.TaskRegistry.remove('scored')


def test_metrics_that_are_no_numbers_are_left_out(scored, caplog):
  from seqio.metrics import Histogram, Scalar, Text

  def several(targets, predictions):
    right = np.array(
      [t == p for t, p in zip(targets, predictions, strict=True)], 'f4'
    )
    return {
      'right': right.mean(),
      'scalar': Scalar(np.float32(0.5)),
      'text': Text('all is well'),
      'bars': Histogram(right),
      'each': right,
    }

  def silent(targets, predictions):
    return None

  data = scored(several, silent)
  found = data.scores(data.examples, ['dry'] * 7)
  assert found == {'right': pytest.approx(4 / 7), 'scalar': 0.5}
  assert {type(value) for value in found.values()} == {float}
  assert data.majority(data.examples) == found
  for name, kind in (
    ('text', 'Text'), ('bars', 'Histogram'), ('each', 'ndarray'),
    ('silent', 'NoneType'),
  ):  # fmt: skip
    told = f"scored: the metric '{name}' is left out, as it is no number:"
    assert caplog.text.count(f'{told} {kind}') == 1


def test_metrics_of_scores(scored, caplog):
  def mean_score(targets, scores):
    assert len(targets) == len(scores)
    return {'mean_score': np.mean(scores)}

  def confidence(targets, predictions, aux_values):
    return {'confidence': np.exp(aux_values['scores']).mean()}

  def lengths(targets, predictions, aux_values):
    return {'length': np.mean(aux_values['lengths'])}

  data = scored(mean_score, confidence, lengths)
  three = data.examples[:3]
  assert data.target_scores(three, [-1.0, -2.0, -6.0]) == {'mean_score': -3.0}
  said = ['dry', 'wet', 'dry']
  assert data.scores(three, said) == {'confidence': 1.0}
  assert data.scores(three, said, [-np.log(2)] * 3) == {
    'confidence': pytest.approx(0.5)
  }
  assert caplog.text.count("'lengths' is left out, as it asks for aux") == 1
  # Scores of rows whose answer nobody knows are none.
  hidden = dataclasses.replace(three[0], targets_text='<unk>')
  found = data.target_scores([hidden, *three[1:]], [-1.0, -2.0, -6.0])
  assert found == {'mean_score': -4.0}


def test_metric_objects_are_named_as_left_out(scored):
  from seqio.metrics import PassthroughLegacyMetric

  made = PassthroughLegacyMetric.from_metric_fn(metrics.accuracy)
  data = scored(metrics.accuracy, metric_objs=[made])
  assert data.scores(data.examples[:1], ['dry']) == {'accuracy': 100.0}
  (line,) = data.notes()
  assert line.startswith('scored: the metric ') and 'is left out' in line


def test_targets_that_are_no_answers_have_no_majority(weather, tmp_path):
  data = EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'climate')
  assert data.majority(data.examples) == {}


def test_a_batch_of_a_task_by_hand(weather, tmp_path):
  data = EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'weather')
  batches = list(data.batches(4))
  rain = [117, 100, 108, 113, 35]
  assert batches[0]['encoder_input_tokens'][:2].tolist() == [
    [*rain, 51, 1, 0],
    [*rain, 52, 1, 0],
  ]
  dry, wet = [103, 117, 124], [122, 104, 119]
  assert batches[0]['decoder_target_tokens'][:2].tolist() == [
    [*dry, 1, 0, 0],
    [*wet, 1, 0, 0],
  ]
  assert batches[0]['decoder_input_tokens'][1].tolist() == [0, *wet, 1, 0]
  assert batches[0]['decoder_loss_weights'][1].tolist() == [1, 1, 1, 1, 0, 0]
  assert batches[1]['valid'].tolist() == [True, True, True, False]
  assert data.labels == () and data.begins == []
  assert data.examples[5] == Example(
    inputs=[*rain, 56, 1],
    targets=[*wet, 1],
    inputs_text='rain 5',
    targets_text='wet',
    idx=[5, 9],
    fields={'answers': ['a', 'b']},
  )
  assert data.examples[5].features == {
    'inputs_pretokenized': 'rain 5',
    'targets_pretokenized': 'wet',
    'idx': [5, 9],
    'answers': ['a', 'b'],
  }
  # Training does not carry what it does not read.
  data = EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'weather', 'train')
  assert data.examples[5].inputs_text == ''
  assert data.examples[5].targets_text == 'wet'


def test_long_examples_keep_their_eos(weather, tmp_path):
  c = of_tasks(tmp_path, {}, inputs_length=4, targets_length=2)
  batch = next(EvalData(Library(c, BYTES), 'weather').batches(7))
  assert batch['encoder_input_tokens'][0].tolist() == [117, 100, 108, 1]
  assert batch['decoder_target_tokens'][0].tolist() == [103, 1]
  assert batch['decoder_loss_weights'][0].tolist() == [1, 1]
  # Cut examples are not taken for whole ones.
  c = of_tasks(tmp_path, {}, inputs_length=9, targets_length=3)
  batch = next(EvalData(Library(c, BYTES), 'weather').batches(7))
  assert batch['encoder_input_tokens'][0].tolist()[5:] == [51, 1, 0, 0]
  # What a task did not cut itself is cut when it is read.
  fit = lambda ids: rows.fit(ids, 3, 1).tolist()
  assert fit([5, 6, 7, 1]) == [5, 6, 1] and fit([5, 1]) == [5, 1, 0]
  assert fit([5, 6, 1]) == [5, 6, 1] and fit([5, 6, 7, 8]) == [5, 6, 7]


def test_what_is_cut_is_counted_when_it_is_written(moods, tmp_path):
  """Inputs of 8 tokens and targets of 6, each with its EOS."""
  rows = [
    *({'inputs': 'i' * n, 'targets': 't'} for n in (6, 7, 8, 20)),
    *({'inputs': 'i', 'targets': 't' * n} for n in (4, 5, 6)),
  ]
  data = moods(*rows, labels=())
  assert data.notes() == [
    'mood validation: 2 of 7 inputs (28.6%) are longer than'
    ' data.inputs_length=8 and cut at their end; the longest has 21 tokens.',
    'mood validation: 1 of 7 targets (14.3%) are longer than'
    ' data.targets_length=6 and cut at their end; the longest has 7 tokens.',
  ]
  # Nothing is read again to know it.
  (info,) = (
    json.loads(p.read_text()) for p in tmp_path.glob('cache/*/info.json')
  )
  counts = 'cut_inputs', 'longest_inputs', 'cut_targets', 'longest_targets'
  assert [info[key] for key in counts] == [2, 21, 1, 7]
  # What fits to the last token is not cut.
  assert moods(*rows[:2], labels=()).notes() == []


def test_a_sentinel_takes_a_place(tmp_path):
  put(tmp_path / 'data', 'CB/val', CB)
  longest = len('cb hypothesis: It is wet premise: It rains.') + 1
  for lengths, cut in (((longest, 14), 0), ((longest - 1, 14), 4)):
    for suffix, more in (('', 0), ('_1_sentinel', 1)):
      inputs, targets = (length + more for length in lengths)
      c = of_tasks(
        tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'),
        inputs_length=inputs, targets_length=targets,
      )  # fmt: skip
      notes = EvalData(Library(c, BYTES), f'super_glue_cb{suffix}').notes()
      assert len(notes) == (cut > 0)
      assert all(f': {cut} of 4 inputs' in line for line in notes)


def test_training_on_cut_targets_has_to_be_asked_for(moods, tmp_path):
  rows = [
    {'inputs': 'i' * 9, 'targets': 't' * (7 if n == 0 else 3)}
    for n in range(50)
  ]
  moods(*rows, labels=(), split='train')
  c = of_tasks(tmp_path / 'cache', {'mood': 1}, data_dir=str(tmp_path / 'data'))
  told = r'1 of 50 targets \(2.0%\) .* learn to stop there: set data.targets_le'
  told += r'ngth=8, or data.allow_cut=0.02 '
  for begin in (pipeline.TrainData, pipeline.prepare):
    with pytest.raises(ValueError, match=told):
      begin(Library(c, BYTES))
  for change in ({'targets_length': 8}, {'allow_cut': 0.02}):
    lines = []
    changed = dataclasses.replace(c, **change)
    pipeline.prepare(Library(changed, BYTES), note=lines.append)
    assert lines == pipeline.TrainData(Library(changed, BYTES)).notes
    # Cut inputs are told, and no reason to stop.
    assert lines[0].startswith('mood train: 50 of 50 inputs (100.0%)')


def test_tasks_and_mixtures_train(weather, tmp_path):
  mix = {'outdoors': 2, 'weather': 'size'}
  data = pipeline.TrainData(Library(of_tasks(tmp_path, mix), BYTES))
  assert Library(of_tasks(tmp_path, mix), BYTES).sources() == (
    list(data.sources)
  )
  # 2 to 'outdoors' as 3 to 1, and 7 examples to 'weather'.
  assert dict(zip(data.sources, data.rates, strict=True)) == {
    'climate': pytest.approx(0.5 / 9),
    'weather': pytest.approx(8.5 / 9),
  }
  data = pipeline.TrainData(Library(of_tasks(tmp_path, {'dropped': 1}), BYTES))
  assert data.sources == ('weather',)
  # An epoch of a task is each example once.
  data = pipeline.TrainData(Library(of_tasks(tmp_path, {'weather': 1}), BYTES))
  for n in range(3):
    inputs = data.batch(n)['encoder_input_tokens']
    assert sorted(inputs[:, 5].tolist()) == list(range(51, 58))
  assert not equal(data.batch(0), data.batch(1))


def test_a_mixture_of_uncounted_tasks_goes_by_size(weather, tmp_path):
  with pytest.raises(ValueError, match="set data.mixture.uncounted to 'size'"):
    pipeline.TrainData(Library(of_tasks(tmp_path, {'uncounted': 1}), BYTES))
  data = pipeline.TrainData(
    Library(of_tasks(tmp_path, {'uncounted': 'size'}), BYTES)
  )
  assert data.sources == ('weather',)


def test_a_mixture_is_not_evaluated_as_one(weather, tmp_path):
  with pytest.raises(ValueError, match="by one: \\['climate', 'weather'\\]"):
    EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'outdoors')


# Scores.


def test_a_task_of_ones_own_is_scored_as_it_says(weather, tmp_path):
  data = EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'climate')
  assert data.choices(data.examples[0]) == ()
  three = data.examples[:3]  # Dry, wet, dry: 30, 10, 30.
  said = ['dry', 'dry', 'snow']  # 30, 30, 0.
  assert data.scores(three, said) == {'off_by': (0 + 20 + 30) / 3}
  # Without a postprocessor texts are compared.
  data = EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'weather')
  assert data.scores(three, said) == {'accuracy': pytest.approx(100 / 3)}
  assert data.scores(data.examples, ['wet'] * 7) == {
    'accuracy': pytest.approx(300 / 7)
  }
  assert data.majority(data.examples) == {'accuracy': pytest.approx(400 / 7)}


CB = [
  {'premise': 'It rains.', 'hypothesis': 'It is wet', 'label': y, 'idx': i}
  for i, y in enumerate(('entailment', 'neutral', 'neutral', 'contradiction'))
]


def put(root, name, rows):
  path = root / f'{name}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)))


def test_scores_and_majority_of_a_task_of_ours(tmp_path):
  put(tmp_path / 'data', 'CB/val', CB)
  c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'))
  data = EvalData(Library(c, BYTES), 'super_glue_cb')
  labels = superglue.TASKS['cb'].labels
  assert data.choices(data.examples[0]) == data.labels == labels
  assert data.comparable('neutral') == 2 and data.comparable('none') == -1
  # Entailment F1 1; neutral 1 of 1, 1 of 2: 2/3; contradiction 0.
  said = ['entailment', 'neutral', 'none', 'entailments']
  assert data.scores(data.examples, said) == {
    'mean_3class_f1': pytest.approx(100 * (1 + 2 / 3) / 3),
    'accuracy': 50.0,
  }
  # Neutral: 2 of 4, 2 of 2.
  assert data.majority(data.examples) == {
    'mean_3class_f1': pytest.approx(100 * (2 / 3) / 3),
    'accuracy': 50.0,
  }


def test_what_a_test_split_hides_is_not_scored(tmp_path):
  rows = [{k: v for k, v in row.items() if k != 'label'} for row in CB]
  put(tmp_path / 'data', 'CB/test', rows)
  c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'))
  data = EvalData(Library(c, BYTES), 'super_glue_cb', 'test')
  assert [e.targets_text for e in data.examples] == ['<unk>'] * 4
  assert data.scores(data.examples, ['neutral'] * 4) == {}
  assert data.majority(data.examples) == {}


@pytest.fixture
def moods(tmp_path, monkeypatch):
  """Rows of examples -> the validation split of a task that yields them."""
  from st_moe.data import task

  def opened(*rows, labels=('sad', 'happy'), split='validation'):
    put(tmp_path / 'data', 'mood', rows)
    files = {split: ('mood.jsonl',)}
    made = task.TextTask(
      lambda row, _: [row], (metrics.accuracy,), labels, files=files
    )
    monkeypatch.setitem(catalogue.TASKS, 'mood', made)
    c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'))
    return EvalData(Library(c, BYTES), 'mood', split)

  return opened


@pytest.mark.parametrize(
  'values',
  [
    (1234567890123456789, -(2**31) - 1),
    (2**64, 1),
    (0.1, 2.5),
    (1, 0.5),
    (True, False),
    ('a', 7),
    (None, 'a'),
    (None, None),
    ([1, 2], []),
    ([0.5], [1.5, 2]),
    ([], []),
    (['a'], None),
    ([['a']], [[1], None]),
    ({'a': 1}, {'b': [2]}),
    ('', 'half a pair: \\ud83d'),
    (..., 'only here'),
    (..., 0),
  ],
)
def test_an_example_keeps_what_json_can_hold(moods, values):
  rows = [
    {'inputs': 'a', 'targets': 'sad'} | ({} if v is ... else {'note': v})
    for v in values
  ]
  found = [e.fields for e in moods(*rows).examples]
  assert found == [{} if v is ... else {'note': v} for v in values]
  assert [type(f.get('note')) for f in found] == [
    type(None if v is ... else v) for v in values
  ]


def test_an_index_may_be_a_large_number(moods):
  ids = [1234567890123456789, 2**31, 3]
  rows = [{'inputs': 'a', 'targets': 'sad', 'idx': i} for i in ids]
  assert [e.idx for e in moods(*rows).examples] == ids


def test_rows_without_an_answer_are_left_out_of_the_scores(moods):
  say = lambda *targets: [{'inputs': 'a', 'targets': t} for t in targets]
  data = moods(*say('sad', '<unk>', 'happy', 'sad'))
  assert [data.told(e) for e in data.examples] == [True, False, True, True]
  said = ['sad', 'sad', 'sad', 'happy']
  assert data.scores(data.examples, said) == {
    'accuracy': pytest.approx(100 / 3)
  }
  assert data.majority(data.examples) == {'accuracy': pytest.approx(200 / 3)}
  assert data.notes() == [
    'mood: 1 of 4 rows have no answer; they are not scored.'
  ]


def test_a_label_of_minus_one_hides_no_answer_that_is_told(moods):
  rows = [
    {'inputs': 'a', 'targets': 'sad', 'label': -1},
    {'inputs': 'b', 'targets': 'happy', 'label': 1},
  ]
  for labels in (('sad', 'happy'), ()):
    data = moods(*rows, labels=labels)
    assert data.scores(data.examples, ['sad', 'sad']) == {'accuracy': 50.0}


def test_a_query_of_record_without_answers_is_not_scored(tmp_path):
  silent = {'idx': 7, 'query': 'who @placeholder', 'answers': []}
  rows = [{**RECORD, 'qas': [*RECORD['qas'], silent]}]
  put(tmp_path / 'data', 'ReCoRD/val', rows)
  c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'))
  data = EvalData(Library(c, BYTES), 'super_glue_record')
  assert len(data) == 4
  found = data.scores(data.examples, ['Ann', 'Zoë', 'x', 'Ann'])
  assert found == {'em': 50.0, 'f1': 50.0}


RECORD = {
  'idx': 3,
  'passage': {
    'text': 'Ann met Zoë.',
    'entities': [{'start': 0, 'end': 2}, {'start': 8, 'end': 10}],
  },
  'qas': [
    {
      'idx': 5,
      'query': '@placeholder met',
      'answers': [{'text': 'Ann'}, {'text': 'Zoë'}],
    },
    {'idx': 6, 'query': 'met @placeholder', 'answers': [{'text': 'Zoë'}]},
  ],
}


def test_an_example_may_have_choices_of_its_own(tmp_path):
  put(tmp_path / 'data', 'ReCoRD/val', [RECORD])
  c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'))
  data = EvalData(Library(c, BYTES), 'super_glue_record')
  assert data.labels == ()
  assert [data.choices(e) for e in data.examples] == [['Ann', 'Zoë']] * 3
  # An index of several parts is told as one; metrics find it as T5's do.
  assert data.examples[1].idx == {'passage': 3, 'query': 5}
  assert data.examples[1].features['idx/query'] == 5
  assert data.examples[1].features['answers'] == ['Ann', 'Zoë']
  # Queries count once, with what is said to their first example.
  found = data.scores(data.examples, ['Zoë', 'x', 'Ann'])
  assert found == {'em': 50.0, 'f1': 50.0}
  # Zoë is an answer to every query.
  assert data.majority(data.examples) == {'em': 100.0, 'f1': 100.0}


def test_answers_of_a_task_with_sentinels_begin_with_one(tmp_path):
  put(tmp_path / 'data', 'CB/val', CB)
  c = of_tasks(
    tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'), targets_length=32
  )
  plain, marked = (
    EvalData(Library(c, BYTES), f'super_glue_cb{suffix}')
    for suffix in ('', '_1_sentinel')
  )
  assert plain.begins == [] and marked.begins == [SENTINEL] == [358]
  for a, b in zip(plain.examples, marked.examples, strict=True):
    assert b.targets == [SENTINEL, *a.targets]
    assert b.inputs[-2:] == [SENTINEL, 1]
    assert b.targets_text == a.targets_text  # As it is written and scored.
  assert marked.labels == plain.labels
  said = ['entailment', 'neutral', 'none', '']
  scores = plain.scores(plain.examples, said)
  assert marked.scores(marked.examples, said) == scores
  assert marked.majority(marked.examples) == plain.majority(plain.examples)


# Files of tasks.


def test_our_tasks_read_their_files(tmp_path):
  put(tmp_path / 'data', 'CB/val', CB[:2])
  c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / 'data'))
  data = EvalData(Library(c, BYTES), 'super_glue_cb')
  assert [e.targets_text for e in data.examples] == ['entailment', 'neutral']
  assert [e.idx for e in data.examples] == [0, 1]
  assert len(data.metric_fns) == 2
  # Another file, another cache.
  put(tmp_path / 'data', 'CB/val', CB[1:])
  data = EvalData(Library(c, BYTES), 'super_glue_cb')
  assert [e.idx for e in data.examples] == [1, 2, 3]
  assert len(list((tmp_path / 'cache').iterdir())) == 2
  # A file of a better name too.
  put(tmp_path / 'data', 'superglue/CB/val', CB)
  assert len(EvalData(Library(c, BYTES), 'super_glue_cb')) == 4


def test_check_looks_for_the_files_of_tasks(tmp_path, monkeypatch):
  monkeypatch.delenv('ST_MOE_DATA', raising=False)
  Library(of_tasks(tmp_path, {'tiny_glue': 1})).check()  # They need none.
  mix = {'super_glue_cb': 1, 'tiny_cb': 1}
  with pytest.raises(ValueError, match=r'Where is superglue/CB/train.jsonl\?'):
    Library(of_tasks(tmp_path, mix)).check()
  c = of_tasks(tmp_path / 'cache', mix, data_dir=str(tmp_path / 'data'))
  missing = 'data has none of superglue/CB/{}.jsonl'
  with pytest.raises(ValueError, match=missing.format('train')):
    Library(c).check()
  put(tmp_path / 'data', 'superglue/CB/train', CB)
  Library(c).check()
  with pytest.raises(ValueError, match=missing.format('val')):
    Library(c).check(('train', 'validation'))
  put(tmp_path / 'data', 'superglue/CB/val', CB)
  Library(c).check(('train', 'validation'))
  # Nothing was made of them yet.
  assert not (tmp_path / 'cache').exists()


def test_what_is_not_trained_on_needs_no_training_file(tmp_path):
  c = of_tasks(tmp_path, {'super_glue': 1}, data_dir=str(tmp_path))
  library = Library(c, BYTES)
  shares = library.members('super_glue')
  assert shares['super_glue_cb'] == 250 and shares['super_glue_record'] > 1e5
  assert shares['super_glue_axb'] == shares['super_glue_axg'] == 0
  eight = [f'super_glue_{name}' for name in superglue.COUNTED]
  assert sorted(library.sources()) == sorted(eight)
  for name in eight:
    folder = superglue.TASKS[name[11:]].files['train'][0]
    put(tmp_path, folder.removesuffix('.jsonl'), [{}])
  Library(c).check()
  # Rates: shares of what is trained on.
  rates = library.rates(dict.fromkeys(eight, 10))
  assert rates['super_glue_cb'] == pytest.approx(250 / 184_351)
  assert sum(rates.values()) == pytest.approx(1)
  # An evaluation names all ten.
  with pytest.raises(ValueError, match='one by one: .*super_glue_axb.*_wsc'):
    EvalData(Library(c, BYTES), 'super_glue')


@pytest.mark.parametrize(
  'name, module, stale',
  [
    ('super_glue_cb', 'superglue', True),
    ('super_glue_cb_1_sentinel', 'superglue', True),
    ('super_glue_cb', 'sources', True),  # Reads the lines.
    ('tiny_cb', 'tiny_world', True),
    ('tiny_cb', 'superglue', True),
    # Other tasks have other code.
    ('super_glue_cb', 'tiny_world', False),
    ('super_glue_cb', 'squad', False),
    ('squad_v1', 'squad', True),
  ],
)
def test_changed_code_makes_a_task_stale(monkeypatch, name, module, stale):
  task = catalogue.text_task(name)
  before = task_shards._code(task)
  source = inspect.getsource
  assert before == task_shards._code(task)
  edited = f'st_moe.data.{module}'
  monkeypatch.setattr(
    inspect,
    'getsource',
    lambda module: source(module) + '# edited' * (module.__name__ == edited),
  )
  assert (before != task_shards._code(task)) is stale


def test_changed_code_makes_a_task_of_ones_own_stale(weather, monkeypatch):
  import seqio

  from st_moe.data import seqio_shards

  task = seqio.TaskRegistry.get('weather')
  before = seqio_shards._code(task)
  source = inspect.getsource
  monkeypatch.setattr(
    inspect,
    'getsource',
    lambda module: source(module) + '# edited' * (module.__name__ == __name__),
  )
  assert before != seqio_shards._code(task)


# Stale tasks: what a task read and did may have changed since.


@pytest.fixture
def remade(weather, tmp_path):
  """Changes to the weather task -> the inputs that are read from its shards."""
  import seqio

  def read(**changes):
    made = seqio.TaskRegistry.get('weather').replace(name='remade', **changes)
    seqio.TaskRegistry.remove('remade')
    seqio.TaskRegistry.add_provider('remade', made)
    c = of_tasks(tmp_path / 'cache', {}, inputs_length=32)
    data = EvalData(Library(c, BYTES), 'remade', 'train')
    return [BYTES.decode(e.inputs) for e in data.examples]

  yield read
  seqio.TaskRegistry.remove('remade')


def _written(folder):
  found = folder.glob('cache/*/info.json')
  return sorted((path, path.stat().st_mtime_ns) for path in found)


def _begun(word):
  """Preprocessors that put a word before inputs, the last two as usual."""
  import seqio

  @seqio.map_over_dataset
  def begin(x):
    return x | {'inputs': word + ' ' + x['inputs']}

  usual = seqio.preprocessors
  return [begin, usual.tokenize, usual.append_eos_after_trim]


def _begun_by(dataset, *, word):
  return dataset.map(lambda x: x | {'inputs': word + x['inputs']})


def test_an_argument_of_a_preprocessor_changed(remade, tmp_path):
  import seqio

  usual = _begun('')[1:]
  by = lambda word: [functools.partial(_begun_by, word=word), *usual]
  for made in (_begun, by):
    old = remade(preprocessors=made('It will'))
    before = _written(tmp_path)
    assert remade(preprocessors=made('It will')) == old
    assert _written(tmp_path) == before  # The same is not done twice.
    new = remade(preprocessors=made('Heavy'))
    assert [x.removeprefix('Heavy') for x in new] == [
      x.removeprefix('It will') for x in old
    ]
  # A place for SeqIO's own cache is no step.
  held = lambda word: [*by(word)[:1], seqio.CacheDatasetPlaceholder(), *usual]
  assert remade(preprocessors=held('Heavy')) == new
  assert remade(preprocessors=held('It will')) == old


def test_the_module_of_a_preprocessor_was_edited(remade, tmp_path, monkeypatch):
  """Though it has it from another: `from helpers import word`."""
  monkeypatch.syspath_prepend(tmp_path)
  steps = 'import helpers_of_mine as h\nfrom helpers_of_mine import word\n'
  (tmp_path / 'steps_of_mine.py').write_text(
    f'{steps}def begin(ds):\n'
    "  return ds.map(lambda x: x | {'inputs': word() + x['inputs']})\n"
  )
  found = []
  for word in ('old ', 'renewed '):
    (tmp_path / 'helpers_of_mine.py').write_text(f'def word(): return {word!r}')
    for name in ('helpers_of_mine', 'steps_of_mine'):
      sys.modules.pop(name, None)
    begin = importlib.import_module('steps_of_mine').begin
    found.append(remade(preprocessors=[begin, *_begun('')[1:]]))
  assert [x[:8] for x in (found[0][0], found[1][0])] == ['old rain', 'renewed ']


def test_a_file_behind_a_function_was_replaced(remade, tmp_path):
  import seqio
  import tensorflow as tf

  path = tmp_path / 'rows'

  def rows(split, shuffle_files, seed=None):
    lines = path.with_suffix('.txt').read_text().split()
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': lines, 'targets': lines}
    )

  source = seqio.FunctionDataSource(rows, splits=('train',))
  for text in ('one two', 'six ten', 'one'):  # Of the same size, too.
    path.with_suffix('.txt').write_text(text)
    assert remade(source=source) == text.split()
    before = _written(tmp_path)
    assert remade(source=source) == text.split()
    assert _written(tmp_path) == before


def test_the_files_of_a_source_were_replaced(remade, tmp_path, monkeypatch):
  import seqio
  import tensorflow as tf

  monkeypatch.chdir(tmp_path)
  feature = {
    k: tf.io.FixedLenFeature([], tf.string) for k in ('inputs', 'targets')
  }
  both = lambda ds: ds.map(lambda x: {'inputs': x, 'targets': x})
  usual = _begun('')[1:]

  def lines(texts):
    pathlib.Path('a').write_text('\n'.join(texts))

  def protos(texts):
    with tf.io.TFRecordWriter('b.tfrecord') as writer:
      for text in texts:
        value = tf.train.Feature(
          bytes_list=tf.train.BytesList(value=[text.encode()])
        )
        features = tf.train.Features(feature=dict.fromkeys(feature, value))
        writer.write(tf.train.Example(features=features).SerializeToString())

  # Names without a folder, as they are written where the data lie.
  by_line = {
    'source': seqio.TextLineDataSource({'train': 'a'}),
    'preprocessors': [both, *usual],
  }
  by_proto = {
    'source': seqio.TFExampleDataSource({'train': 'b.tfrecord'}, feature),
    'preprocessors': usual,
  }
  for write, asked in ((lines, by_line), (protos, by_proto)):
    for texts in (['one', 'two'], ['six', 'ten'], ['one']):
      write(texts)
      assert remade(**asked) == texts
      before = _written(tmp_path)
      assert remade(**asked) == texts
      assert _written(tmp_path) == before


def test_what_cannot_be_known_is_written_anew(remade, tmp_path, caplog):
  usual, words = _begun('')[1:], (word for word in 'ab')

  def begin(dataset):
    word = next(words)
    return dataset.map(lambda x: x | {'inputs': word + x['inputs']})

  for word in 'ab':
    assert remade(preprocessors=[begin, *usual])[0] == f'{word}rain 0'
  assert len(_written(tmp_path)) == 1
  assert caplog.text.count('<genexpr> (TypeError) changed cannot be told') == 1


def test_all_of_our_tasks_can_be_told_apart():
  for task in catalogue.TASKS.values():
    assert task_shards._code(task)[1] == []


@pytest.mark.parametrize('name', ['tiny_cb', 'tiny_glue', 'weather'])
def test_pairs_have_a_name_of_their_own(weather, name):
  """Neither that of a task of ours nor of one that somebody registered."""
  own = {name: catalogue.TASKS['tiny_cb']}
  with pytest.raises(ValueError, match=f'data.pairs.{name}: there is a task'):
    Registry(BYTES, own=own)


def test_a_task_without_inputs_is_refused(tmp_path):
  import seqio

  task = seqio.TaskRegistry.get('tiny_cb')
  features = {'targets': task.output_features['targets']}
  seqio.TaskRegistry.add(
    'only_targets', source=task.source, output_features=features,
    preprocessors=task.preprocessors,
  )  # fmt: skip
  try:
    with pytest.raises(
      ValueError, match=r"makes \['targets'\], but an encoder"
    ):
      EvalData(Library(of_tasks(tmp_path, {}), BYTES), 'only_targets')
  finally:
    seqio.TaskRegistry.remove('only_targets')


def test_iterate_stops_its_threads(folder):
  data = pipeline.TrainData(Library(config(folder), BYTES))
  before = threading.active_count()
  iterator = data.iterate(threads=4)
  assert equal(next(iterator), data.batch(0))
  assert threading.active_count() > before
  iterator.close()
  for _ in range(100):  # They end when they next look up from their work.
    if threading.active_count() <= before:
      break
    time.sleep(0.05)
  assert threading.active_count() <= before


def test_configs_are_values(folder):
  # Nothing of a run is kept in the config.
  c = config(folder)
  copy = dataclasses.replace(c)
  list(itertools.islice(pipeline.TrainData(Library(c, BYTES)).iterate(), 2))
  assert c == copy


def test_check_finds_what_no_file_shows():
  good = DataConfig(mixture={sources.EMBEDDED: 1})
  Library(good).check(('train', 'validation'))
  bad = {
    'mixture': ({'python_referense': 1}, "Did you mean 'python_reference'"),
    'targets_length': (100, 'needs 114'),
  }
  for field, (value, message) in bad.items():
    with pytest.raises(ValueError, match=message):
      Library(dataclasses.replace(good, **{field: value})).check()
  with pytest.raises(ValueError, match="no split 'test'"):
    Library(good).check(('train', 'test'))


def test_the_test_split_of_wsc_has_no_scores(tmp_path):
  """Its targets are nouns, told or not; the label is what is hidden."""
  row = {
    'text': 'Ann ran and she won.', 'idx': 0,
    'target': {
      'span1_text': 'Ann', 'span1_index': 0,
      'span2_text': 'she', 'span2_index': 3,
    },
  }  # fmt: skip
  put(tmp_path, 'superglue/WSC/test', [row])
  c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path))
  source = EvalData(Library(c, BYTES), 'super_glue_wsc', 'test')
  assert source.examples[0].targets_text == 'Ann'
  assert source.scores(source.examples, ['Ann']) == {}
  assert source.majority(source.examples) == {}


def test_two_libraries_in_turn_read_their_own_files(tmp_path):
  row = {'premise': 'a', 'hypothesis': 'b', 'label': 'neutral', 'idx': 0}
  libraries = []
  for n in (1, 3):
    put(tmp_path / str(n), 'superglue/CB/val', [row] * n)
    c = of_tasks(tmp_path / 'cache', {}, data_dir=str(tmp_path / str(n)))
    libraries.append(Library(c, BYTES))
  for library in libraries:
    assert library.registry
  for library, n in zip(libraries, (1, 3), strict=True):
    found = EvalData(library, 'super_glue_cb', 'validation')
    assert len(found) == n


def test_a_mixture_that_is_only_evaluated_trains_nothing(tmp_path):
  import seqio

  seqio.MixtureRegistry.add('only_diagnostics', [('tiny_cb', 0)])
  try:
    c = of_tasks(tmp_path, {'only_diagnostics': 1})
    library = Library(c, BYTES)
    with pytest.raises(ValueError, match='all of its tasks have the rate 0'):
      library.rates({})
  finally:
    seqio.MixtureRegistry.remove('only_diagnostics')


def test_prepare_looks_for_all_files_before_it_writes(tmp_path):
  row = {'premise': 'a', 'hypothesis': 'b', 'label': 'neutral', 'idx': 0}
  put(tmp_path, 'superglue/CB/train', [row])
  cache = tmp_path / 'cache'
  c = of_tasks(cache, {'super_glue_cb': 1}, data_dir=str(tmp_path))
  with pytest.raises(ValueError, match='none of superglue/CB/val.jsonl'):
    pipeline.prepare(Library(c, BYTES))
  assert not cache.exists()
