"""Our seqio tasks: what comes out of them, registered once or again."""

import itertools

import pytest
import seqio

from st_moe.data import superglue, tasks, tiny_world

BYTES = seqio.ByteVocabulary(extra_ids=100)
EOS = 1
# Before any test registers anything.
AT_IMPORT = seqio.get_mixture_or_task('tiny_glue')
LENGTHS = {'inputs': 256, 'targets': 16}


@pytest.fixture(autouse=True)
def registered():
  """Byte vocabulary within a test, what an import leaves after it."""
  tasks.register(BYTES)
  yield
  tasks.register(seqio.SentencePieceVocabulary(tasks.T5_VOCABULARY))


def examples(name, split='validation', lengths=LENGTHS, shuffle=False):
  task = seqio.get_mixture_or_task(name)
  dataset = task.get_dataset(lengths, split, shuffle=shuffle, seed=0)
  return dataset.as_numpy_iterator()


@pytest.mark.parametrize('name', list(tasks.TASKS))
def test_examples_are_the_tokens_of_the_rows(name):
  format = superglue.FORMATS[tasks.TASKS[name][0]]
  rows = tiny_world.generate(format.name, 'validation')
  count = 0
  for row, example in zip(rows, examples(name), strict=True):
    expected = superglue.to_text(format, row)
    for feature in ('inputs', 'targets'):
      *ids, last = example[feature].tolist()
      assert last == EOS and EOS not in ids
      assert BYTES.decode(ids) == expected[feature]
    assert example['idx'] == row['idx']
    assert expected['targets'] in tasks.LABELS[name]
    count += 1
  assert count == 600


@pytest.mark.parametrize('name', list(tasks.TASKS))
def test_labels_are_the_targets(name):
  task = seqio.get_mixture_or_task(name)
  found = {BYTES.decode(e['targets'].tolist()[:-1]) for e in examples(name)}
  assert found == set(tasks.LABELS[name])
  assert task.num_input_examples('train') == 9600
  assert task.num_input_examples('validation') == 600


def test_a_trimmed_example_still_ends():
  example = next(examples('tiny_boolq', lengths={'inputs': 10, 'targets': 4}))
  # 'boolq pas' and 'Fal' or 'Tru', in bytes shifted by the 3 special ids.
  assert example['inputs'].tolist() == [b + 3 for b in b'boolq pas'] + [EOS]
  assert example['targets'].shape == (4,) and example['targets'][-1] == EOS


def test_the_mixture_takes_twice_as_much_of_copa():
  found = [0, 0, 0]
  for example in itertools.islice(examples('tiny_glue', 'train'), 300):
    text = BYTES.decode(example['inputs'].tolist()[:-1])
    found[['boolq', 'cb', 'copa'].index(text.split()[0])] += 1
  for n, share in zip(found, (75, 75, 150), strict=True):
    assert abs(n - share) <= 35, found  # Four standard deviations.


def test_metrics_read_the_decoded_texts():
  metrics = {
    name: {
      key: value
      for fn in seqio.get_mixture_or_task(name).predict_metric_fns
      for key, value in fn(
        list(tasks.LABELS[name]),
        [tasks.LABELS[name][0]] * len(tasks.LABELS[name]),
      ).items()
    }
    for name in tasks.TASKS
  }
  assert metrics['tiny_boolq'] == {'accuracy': 50.0}
  assert metrics['tiny_copa'] == {'accuracy': 50.0}
  # Always the first of three: precision 1/3, recall 1, F1 1/2, over 3 classes.
  assert metrics['tiny_cb'] == {
    'accuracy': pytest.approx(100 / 3),
    'mean_3class_f1': pytest.approx(50 / 3),
  }


def test_registering_again_replaces():
  before = seqio.get_mixture_or_task('tiny_cb')
  tasks.register(seqio.ByteVocabulary(extra_ids=7))
  for name in (*tasks.TASKS, *tasks.MIXTURES):
    features = seqio.get_mixture_or_task(name).output_features
    for feature in ('inputs', 'targets'):
      assert features[feature].vocabulary.extra_ids == 7
      assert features[feature].add_eos
  assert before.output_features['inputs'].vocabulary.extra_ids == 100


def test_files_stand_in_for_the_generator(tmp_path):
  tiny_world.write(tmp_path, seed=5)
  tasks.register(BYTES, str(tmp_path))
  got = next(examples('tiny_copa'))
  row = tiny_world.generate('copa', 'validation', seed=5)[0]
  expected = superglue.to_text(superglue.FORMATS['copa'], row)
  assert got['inputs_pretokenized'].decode() == expected['inputs']
  assert got['targets_pretokenized'].decode() == expected['targets']


def test_a_missing_file_is_an_error_at_first_use(tmp_path):
  tasks.register(BYTES, str(tmp_path))
  with pytest.raises(ValueError, match='CB/val.jsonl'):
    next(examples('tiny_cb'))


def test_an_import_registers_t5s_vocabulary_and_reads_nothing():
  for feature in AT_IMPORT.output_features.values():
    assert feature.vocabulary.sentencepiece_model_file == tasks.T5_VOCABULARY
