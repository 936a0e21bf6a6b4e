"""Our seqio tasks: what comes out of them, registered once or again."""

import itertools
import json

import pytest
import sentencepiece
import seqio

from st_moe.config import DataConfig
from st_moe.data import (
  catalogue,
  seqio_shards,
  superglue,
  tasks,
  tiny_world,
  vocabulary,
)
from st_moe.data.mixture import Library
from st_moe.data.registry import Registry

BYTES = seqio.ByteVocabulary(extra_ids=100)
EOS, SENTINEL = 1, 358
# Before any test registers anything.
AT_IMPORT = seqio.get_mixture_or_task('tiny_glue')
LENGTHS = {'inputs': 256, 'targets': 16}
TINY = ('tiny_boolq', 'tiny_cb', 'tiny_copa')


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


# ---- Names ------------------------------------------------------------------


def test_every_task_and_mixture_is_registered():
  super_glue = [f'super_glue_{name}' for name in superglue.TASKS]
  names = {
    *TINY,
    *super_glue,
    *(f'{name}_1_sentinel' for name in super_glue),
    *('anli_r1', 'anli_r2', 'anli_r3', 'arc_easy', 'arc_challenge'),
    *('winogrande', 'squad_v1', 'squad_v2'),
    *('natural_questions_open', 'trivia_qa_open', 'web_questions_open'),
    *('xsum', 'cnn_dailymail'),
    *('glue_cola', 'glue_sst2', 'glue_mrpc', 'glue_qqp', 'glue_stsb'),
    *('glue_mnli', 'glue_mnli_mismatched', 'glue_qnli', 'glue_rte'),
    'glue_wnli',
  }
  assert len(super_glue) == 10
  assert names <= set(seqio.TaskRegistry.names())
  sentinels = {n for n in names if n.endswith(tasks.SENTINEL)}
  assert names - sentinels == tasks.TASKS.keys()
  mixtures = {'tiny_glue', 'super_glue', 'super_glue_sentinel', 'glue'}
  assert mixtures == tasks.MIXTURES.keys()
  assert mixtures <= set(seqio.MixtureRegistry.names())
  # And a name means one thing.
  assert not mixtures & set(seqio.TaskRegistry.names())


def test_text_task_knows_ours_with_a_sentinel_or_without():
  cb = superglue.TASKS['cb']
  assert catalogue.text_task('super_glue_cb') is cb
  assert catalogue.text_task('super_glue_cb_1_sentinel') is cb
  assert catalogue.text_task('tiny_cb') is tiny_world.TASKS['cb']
  assert catalogue.text_task('cb') is None
  assert catalogue.text_task('super_glue') is None  # A mixture.


def test_splits_are_those_of_the_task():
  for name, task in tasks.TASKS.items():
    assert tuple(seqio.TaskRegistry.get(name).splits) == task.splits
  # Of files it is not known how many examples they make.
  cb, tiny = map(seqio.TaskRegistry.get, ('super_glue_cb', 'tiny_cb'))
  assert cb.num_input_examples('train') is None
  assert tiny.num_input_examples('train') == 9600
  assert tiny.num_input_examples('validation') == 600


# ---- The embedded tasks -----------------------------------------------------


@pytest.mark.parametrize('name', TINY)
def test_examples_are_the_tokens_of_the_rows(name):
  task = tasks.TASKS[name]
  rows = tiny_world.generate(name.removeprefix('tiny_'), 'validation')
  found, count = set(), 0
  for row, example in zip(rows, examples(name), strict=True):
    (expected,) = task.examples(row, 'validation')
    for feature in ('inputs', 'targets'):
      *ids, last = example[feature].tolist()
      assert last == EOS and EOS not in ids
      assert BYTES.decode(ids) == expected[feature]
    assert example['idx'] == row['idx']
    found.add(expected['targets'])
    count += 1
  assert count == 600
  assert found == set(task.labels)


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


def evaluate(name, say, split='validation'):
  """The metrics of what `say(number, target)` answers, as SeqIO finds them."""
  task, found = seqio.TaskRegistry.get(name), {}
  vocabulary_ = task.output_features['targets'].vocabulary
  targets, predictions = [], []
  for n, example in enumerate(examples(name, split, lengths=None)):
    target = vocabulary_.decode(example['targets'].tolist())
    value = lambda text, told, e=example: task.postprocess_fn(
      text, example=e, is_target=told
    )
    targets.append(value(target, True))
    predictions.append(value(say(n, target), False))
  assert task.metric_fns == task.predict_metric_fns  # None asks for scores.
  for metric in task.metric_fns:
    found |= metric(targets, predictions)
  return found


def test_scores_of_the_embedded_tasks():
  right = lambda n, target: target
  first = {'tiny_boolq': 'False', 'tiny_cb': 'entailment'}
  for name in TINY:
    assert set(evaluate(name, right).values()) == {100.0}
  always = lambda name: evaluate(name, lambda n, target: first[name])
  assert always('tiny_boolq') == {'accuracy': 50.0}
  # One class of three: precision 1/3, recall 1, F1 1/2, over 3 classes.
  assert always('tiny_cb') == {
    'accuracy': pytest.approx(100 / 3),
    'mean_3class_f1': pytest.approx(50 / 3),
  }
  # An answer in four is none.
  said = evaluate('tiny_copa', lambda n, target: target * bool(n % 4))
  assert said == {'accuracy': 75.0}


# ---- SuperGLUE --------------------------------------------------------------

CB = [
  {'premise': 'It rains.', 'hypothesis': 'It is wet', 'label': y, 'idx': i}
  for i, y in enumerate(('entailment', 'neutral', 'contradiction', 'neutral'))
]
MULTIRC = {
  'idx': 3,
  'passage': {
    'text': 'Ann ran.',
    'questions': [
      {
        'question': 'Who?',
        'idx': 8,
        'answers': [
          {'text': 'Ann', 'idx': 40, 'label': 1},
          {'text': 'Ben', 'idx': 41, 'label': 0},
        ],
      },
      {
        'question': 'And?',
        'idx': 9,
        'answers': [{'text': 'ran', 'idx': 42, 'label': 1}],
      },
    ],
  },
}
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
WSC = [
  {
    'text': 'Ann fed the big dog as it was hungry.',
    'target': {
      'span1_text': noun,
      'span1_index': 0,
      'span2_text': 'it',
      'span2_index': 6,
    },
    'label': label,
    'idx': idx,
  }
  for idx, (noun, label) in enumerate((('the big dog', True), ('Ann', False)))
]
AXG = [
  {
    'premise': f'The cook met {whose} guest.',
    'hypothesis': 'The guest met the cook.',
    'label': 'entailment',
    'idx': i,
  }
  for i, whose in enumerate(('his', 'her', 'his', 'her'))
]
FLAT = {
  'boolq': {'passage': 'p', 'question': 'q', 'label': True, 'idx': 0},
  'copa': {
    **{'premise': 'p', 'choice1': 'a', 'choice2': 'b', 'question': 'cause'},
    **{'label': 1, 'idx': 0},
  },
  'rte': {'premise': 'p', 'hypothesis': 'h', 'label': 'entailment', 'idx': 0},
  'wic': {
    **{'sentence1': 'a', 'sentence2': 'b', 'word': 'w'},
    **{'label': True, 'idx': 0},
  },
}
ROWS = {
  **{name: [row] for name, row in FLAT.items()},
  **{'cb': CB, 'multirc': [MULTIRC], 'record': [RECORD], 'wsc': WSC},
}


def put(root, name, split, rows):
  path = root / superglue.TASKS[name].files[split][0]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def folder(tmp_path):
  """Every task's file of a few rows, in both splits."""
  for name, rows in (ROWS | {'axg': AXG, 'axb': []}).items():
    for split in ('train', 'validation'):
      if split in superglue.TASKS[name].splits:
        put(tmp_path, name, split, rows)
  tasks.register(BYTES, str(tmp_path))
  return tmp_path


def test_scores_are_t5s(folder):
  said = lambda *texts: lambda n, target: texts[n]
  assert evaluate(
    'super_glue_cb', said('entailment', 'neutral', 'neutral', 'garbage')
  ) == {
    # F1 1 of entailment, 0 of contradiction; of neutral 1 of 2, 1 of 2.
    'mean_3class_f1': pytest.approx(50.0),
    'accuracy': 50.0,
  }
  # The first question is all right; of all answers 1 true of 2 was found.
  assert evaluate('super_glue_multirc', said('True', 'False', 'no')) == {
    'f1': pytest.approx(200 / 3),
    'exact_match': 50.0,
  }
  # The queries have 2 and 1 examples; said at the first of each counts.
  assert evaluate('super_glue_record', said('the zoë', 'x', 'Ann')) == {
    'em': 50.0,
    'f1': 50.0,
  }
  # Names the dog, though not the big one; and Ann where Ann is wrong.
  assert evaluate('super_glue_wsc', said('a dog', 'Ann')) == {'accuracy': 50.0}
  yes, no = 'entailment', 'not_entailment'
  assert evaluate('super_glue_axg', said(yes, yes, yes, no)) == {
    'accuracy': 75.0,
    'gender_parity': 50.0,
  }


@pytest.mark.parametrize('name', [*ROWS, 'axg'])
def test_answers_that_are_the_targets_are_right(folder, name):
  found = evaluate(f'super_glue_{name}', lambda n, target: target)
  if name == 'wsc':  # One of its two nouns is not whom the pronoun means.
    assert found == {'accuracy': 50.0}
  elif name == 'axg':
    assert found == {'accuracy': 100.0, 'gender_parity': 100.0}
  else:
    assert found == dict.fromkeys(superglue.COUNTED[name], 100.0)


def test_what_metrics_need_goes_with_an_example(folder):
  found = list(examples('super_glue_record'))
  assert [e['idx/query'] for e in found] == [5, 5, 6]
  assert [a.decode() for a in found[0]['answers']] == ['Ann', 'Zoë']
  assert [a.decode() for a in found[2]['answers']] == ['Zoë']
  assert [c.decode() for c in found[2]['choices']] == ['Ann', 'Zoë']
  found = list(examples('super_glue_multirc'))
  assert [e['idx/question'] for e in found] == [8, 8, 9]
  assert [e['label'] for e in examples('super_glue_wsc')] == [1, 0]
  # For training only the right noun is of use.
  assert [e['label'] for e in examples('super_glue_wsc', 'train')] == [1]


def test_the_mixture_has_t5s_rates():
  mixture = seqio.get_mixture_or_task('super_glue')
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert rates == {
    'super_glue_boolq': 9427,
    'super_glue_cb': 250,
    'super_glue_copa': 400,
    'super_glue_multirc': 27243,
    'super_glue_record': 138854,
    'super_glue_rte': 2490,
    'super_glue_wic': 5428,
    'super_glue_wsc': 259,
    'super_glue_axb': 0,
    'super_glue_axg': 0,
  }
  marked = seqio.get_mixture_or_task('super_glue_sentinel')
  assert {t.name: marked.get_rate(t) for t in marked.tasks} == {
    f'{name}_1_sentinel': rate for name, rate in rates.items()
  }


@pytest.mark.parametrize('name', ['super_glue', 'super_glue_sentinel'])
def test_the_mixture_trains_on_what_has_a_rate(folder, name):
  found = [
    BYTES.decode(example['inputs'].tolist()).split()[0].strip(':')
    for example in itertools.islice(examples(name, 'train'), 200)
  ]
  # ReCoRD is three quarters of it, MultiRC 1 in 7.
  assert abs(found.count('record') - 150) <= 25
  assert 10 <= found.count('multirc') <= 50
  assert set(found) <= {*ROWS}


# ---- Sentinels --------------------------------------------------------------


def ids(text):
  return [byte + 3 for byte in text.encode()]


def test_a_sentinel_ends_the_inputs_and_begins_the_targets(folder):
  plain = list(examples('super_glue_cb'))
  marked = list(examples('super_glue_cb_1_sentinel'))
  assert len(plain) == len(marked) == 4
  text = 'cb hypothesis: It is wet premise: It rains.'
  assert plain[1]['inputs'].tolist() == [*ids(text), EOS]
  assert marked[1]['inputs'].tolist() == [*ids(text), SENTINEL, EOS]
  assert plain[1]['targets'].tolist() == [*ids('neutral'), EOS]
  assert marked[1]['targets'].tolist() == [SENTINEL, *ids('neutral'), EOS]
  for key in ('idx', 'inputs_pretokenized', 'targets_pretokenized'):
    assert marked[1][key] == plain[1][key]


def test_a_sentinel_is_kept_when_an_example_is_trimmed(folder):
  lengths = {'inputs': 10, 'targets': 5}
  example = list(examples('super_glue_cb_1_sentinel', lengths=lengths))[1]
  assert example['inputs'].tolist() == [*ids('cb hypot'), SENTINEL, EOS]
  # SeqIO keeps the last of the targets as well: 'ne' and the 'l'.
  assert example['targets'].tolist() == [SENTINEL, *ids('nel'), EOS]


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  """A vocabulary in which a sentinel is a piece of text, as in T5's."""
  path = str(tmp_path_factory.mktemp('tasks') / 'v.model')
  text = itertools.islice(tiny_world.text(), 500)
  return vocabulary.train(text, path, size=300)


def test_a_sentinel_is_taken_off_before_scoring(folder, pieces):
  tasks.register(pieces.to_seqio(), str(folder))
  (first, *_) = examples('super_glue_cb_1_sentinel')
  assert first['inputs'].tolist()[-2:] == [pieces.sentinel(0), EOS]
  assert first['targets'].tolist()[0] == pieces.sentinel(0) == 299
  task = seqio.TaskRegistry.get('super_glue_cb_1_sentinel')
  value = lambda text: task.postprocess_fn(text, example={}, is_target=False)
  assert value('<extra_id_0> neutral') == value('<extra_id_0>neutral') == 2
  assert value('neutral') == 2  # A model may leave it out.
  assert value('<extra_id_1> neutral') == value('<extra_id_0> neutra') == -1
  # As a model says it, the scores are those of the plain task.
  for name in ('cb', 'multirc', 'record', 'wsc'):
    say = lambda n, target: target if n % 2 else 'garbage'
    plain = evaluate(f'super_glue_{name}', say)
    marked = evaluate(f'super_glue_{name}_1_sentinel', say)
    assert plain == marked and plain


@pytest.mark.parametrize(
  ('kind', 'lengths'),
  [('bytes', (256, 16)), ('pieces', (24, 4)), ('behind', (24, 4))],
)
def test_ours_and_seqios_records_are_one(
  folder, pieces, tmp_path, kind, lengths
):
  """What is trained on without SeqIO is to the byte what SeqIO makes of it."""
  ours = pieces if kind == 'pieces' else vocabulary.load('bytes')
  if kind == 'behind':  # Its sentinels are ids behind all pieces, as in T5's.
    plain = str(tmp_path / 'plain.model')
    text = itertools.islice(tiny_world.text(), 500)
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=text, model_prefix=plain[:-6], vocab_size=200,
      pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    ours = vocabulary.load(plain)
  tasks.register(ours.to_seqio(), str(folder))
  theirs = seqio_shards.Tasks(ours)
  registry = Registry(ours, str(folder))
  how = dict(inputs_length=lengths[0], targets_length=lengths[1])
  marked = {f'super_glue_{name}_1_sentinel' for name in ('cb', 'wsc', 'record')}
  names = {*(f'super_glue_{name}' for name in superglue.TASKS), *marked}
  names |= {'tiny_copa'} if kind == 'bytes' else set()
  compared = 0
  for name in sorted(names):
    for split in registry.splits(name):
      if split == 'test' or name == 'super_glue_axb':  # Not in the folder.
        continue
      one = registry.write(name, split, cache_dir=str(tmp_path / 'a'), **how)
      other = theirs.write(name, split, cache_dir=str(tmp_path / 'b'), **how)
      assert list(one) == list(other), name
      assert one.summary == other.summary and one.cut == other.cut
      compared += len(one)
    assert registry.labels(name) == catalogue.text_task(name).labels
    assert registry.metric_fns(name) == theirs.metric_fns(name)
    assert registry.splits(name) == theirs.splits(name)
  assert compared >= 40
  for name in tasks.MIXTURES:
    assert registry.tasks(name) == theirs.tasks(name)


# ---- Registrations ----------------------------------------------------------


def test_registering_again_replaces():
  before = seqio.get_mixture_or_task('tiny_cb')
  tasks.register(seqio.ByteVocabulary(extra_ids=7))
  marked = [name + tasks.SENTINEL for name in tasks.WITH_SENTINEL]
  for name in (*tasks.TASKS, *marked, *tasks.MIXTURES):
    features = seqio.get_mixture_or_task(name).output_features
    for feature in ('inputs', 'targets'):
      assert features[feature].vocabulary.extra_ids == 7
      assert features[feature].add_eos
  assert before.output_features['inputs'].vocabulary.extra_ids == 100


def test_files_are_those_of_the_folder(tmp_path, monkeypatch):
  for name, rows in (('a', CB[:1]), ('b', CB[1:])):
    put(tmp_path / name, 'cb', 'validation', rows)
  count = lambda: len(list(examples('super_glue_cb')))
  tasks.register(BYTES, str(tmp_path / 'a'))
  assert count() == 1
  tasks.register(BYTES, str(tmp_path / 'b'))
  assert count() == 3
  assert len(list(examples('super_glue_cb_1_sentinel'))) == 3
  tasks.register(BYTES)
  monkeypatch.setenv('ST_MOE_DATA', str(tmp_path / 'a'))
  assert count() == 1


def test_a_folder_does_not_change_the_embedded_tasks(folder):
  row = tiny_world.generate('cb', 'validation')[0]
  example = next(examples('tiny_cb'))
  assert row['premise'] in example['inputs_pretokenized'].decode()
  assert b'It rains.' in next(examples('super_glue_cb'))['inputs_pretokenized']


def test_a_missing_file_is_an_error_at_first_use(tmp_path):
  tasks.register(BYTES, str(tmp_path))
  for name in ('super_glue_cb', 'super_glue_cb_1_sentinel'):
    with pytest.raises(ValueError, match='has none of superglue/CB/val.jsonl'):
      next(examples(name))


def test_a_wrong_row_is_an_error_at_first_use(tmp_path):
  put(tmp_path, 'cb', 'validation', [*CB, CB[0] | {'label': 'maybe'}])
  tasks.register(BYTES, str(tmp_path))
  with pytest.raises(ValueError, match="val.jsonl, line 5: label 'maybe' is"):
    next(examples('super_glue_cb'))


def test_an_import_registers_t5s_vocabulary_and_reads_nothing():
  for feature in AT_IMPORT.output_features.values():
    assert feature.vocabulary.sentencepiece_model_file == tasks.T5_VOCABULARY


# ---- Text -------------------------------------------------------------------


def test_a_text_source_is_a_task_of_span_corruption(tmp_path):
  """Whole again, inputs and targets are the text that they were made of."""
  (tmp_path / 'a.txt').write_text('the cat sat on the mat. ' * 40)
  config = DataConfig(
    mixture={'mine': 1.0},
    files={'mine': {'train': f'{tmp_path}/a.txt'}},
    inputs_length=32,
    targets_length=16,
    cache_dir=str(tmp_path / 'cache'),
  )
  library = Library(config, vocabulary.load('bytes'))
  try:
    tasks.register_text(library, 'mine')
    lengths = {'inputs': 32, 'targets': 16}
    found = list(examples('mine', 'train', lengths))
    assert found and seqio.TaskRegistry.get('mine').splits == ('train',)
    again = list(examples('mine', 'train', lengths))
  finally:
    seqio.TaskRegistry.remove('mine')
  for example, other in zip(found, again, strict=True):
    inputs, targets = example['inputs'].tolist(), example['targets'].tolist()
    assert inputs == other['inputs'].tolist()  # In each epoch.
    assert inputs.pop() == targets.pop() == EOS
    assert targets[0] == SENTINEL  # Of 259 to 358 the first.
    spans = {}
    for token in targets:
      if token >= 259:
        spans[token] = []
      else:
        spans[max(spans, key=list(spans).index)].append(token)
    whole = [t for i in inputs for t in spans.get(i, [i])]
    assert bytes(t - 3 for t in whole) in b'the cat sat on the mat. ' * 40
