"""The verb `evaluate`: which data, which checkpoints, what is written."""

import dataclasses
import functools
import json
import math
import os
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from st_moe import checkpoint, config_file, sharding
from st_moe.config import Config, DataConfig, EvalConfig, StackConfig
from st_moe.data import (
  files,
  shards,
  trust,
  vocabulary,
)
from st_moe.data.metrics import accuracy
from st_moe.history import best_steps
from st_moe.infer import evaluate, submission
from st_moe.interop import ours
from st_moe.model.transformer import Transformer
from tests.helpers import random_params, tiny
from tests.infer.test_evaluator import CONFIG, ROWS, Source, Table, table

VOCABULARY = vocabulary.load('bytes')

# Hand-made sources, and checkpoints of a table.


class Shelf:
  """A library of two tasks, a text, and a mixture that only one is drawn of."""

  opened: list

  def __init__(self, config, vocab):
    assert vocab is VOCABULARY

  def sources(self):
    return ['text', 'quiz']

  def members(self, name):
    return {'quiz': 1.0, 'bool': 0.0} if name == 'both' else {name: 1.0}


def _source(library, name, split):
  assert isinstance(library, Shelf)
  Shelf.opened.append((name, split))
  if name == 'text':
    return Source(ROWS, name, is_text=True, labels=())
  if name.endswith('bool') or name.endswith('boolq'):
    rows = [(5, 'True'), (6, 'False'), (5, 'False'), (5, 'True')]
    return Source(rows, name, labels=('False', 'True'))
  half = lambda targets, predictions: {'f1/half': 50.0}
  return Source(ROWS, name, metrics=(accuracy, half))


@pytest.fixture
def run(tmp_path, monkeypatch):
  """`evaluate` of a run at 10, 20 and 40, which knows most at 20."""
  Shelf.opened = []
  config = dataclasses.replace(CONFIG, evaluate=EvalConfig(batches=1))
  places = tmp_path / 'run' / 'checkpoints'
  sharpness = {10: 0.0, 20: 1.0, 40: -1.0}

  def load(path, vocabulary, mesh):
    path = places / '40' if str(path) == str(tmp_path / 'run') else path
    return types.SimpleNamespace(
      model=Table(config.model),
      params=jnp.asarray(table() * sharpness.get(int(path.name), 1)),
      config=config,
      vocabulary=VOCABULARY,
      path=str(path),
      step=int(path.name),
      mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )

  monkeypatch.setattr(evaluate, 'load', load)
  monkeypatch.setattr(
    evaluate.checkpoint,
    'all_steps',
    lambda _: [places / f'{step}' for step in sharpness],
  )
  monkeypatch.setattr(evaluate, 'Library', Shelf)
  monkeypatch.setattr(evaluate, 'EvalData', _source)
  monkeypatch.setenv('COLUMNS', '80')
  return lambda path='run', **options: evaluate.evaluate(
    tmp_path / path, **options
  )


def test_scores_and_predictions_are_written(run, tmp_path, capsys):
  found = run('run/checkpoints/20')
  assert Shelf.opened == [('text', 'validation'), ('quiz', 'validation')]
  to = tmp_path / 'run' / 'evaluation'
  path = str(tmp_path / 'run' / 'checkpoints' / '20')
  about = json.loads((to / 'metrics.json').read_text())
  settings = about.pop('settings')
  assert about == {
    'checkpoint': path, 'step': 20, 'written': 0, 'metrics': found,
  }  # fmt: skip
  assert settings.keys() == {'vocabulary', 'evaluate', 'config'}
  assert settings['evaluate']['split'] == 'validation'
  lines = (to / 'predictions-quiz.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  # All twenty, whatever the run did; ranked, then decoded.
  assert [(r['by'], r['idx']) for r in rows] == [
    (by, f'q{i}') for by in ('rank', 'decoding') for i in range(20)
  ]
  assert {'input', 'target', 'prediction', 'score'} < rows[0].keys()
  assert {p.name for p in to.iterdir()} == {
    'metrics.json', 'predictions-quiz.jsonl',
  }  # fmt: skip
  said = capsys.readouterr().out
  # It says how many were seated: a capacity moves the loss.
  assert 'Losses of text with capacity 2.0, answers with no limit.' in said
  assert said.endswith(f'wrote {to}\n')


# Nothing is written over.


def _metrics(folder) -> dict:
  return json.loads((folder / 'metrics.json').read_text())


def _tasks(folder) -> set:
  """Those with metrics, which are those with predictions."""
  tasks = {name.split('/')[1] for name in _metrics(folder)['metrics']}
  said = {p.name for p in folder.glob('predictions-*')}
  assert said == {f'predictions-{task}.jsonl' for task in tasks}
  return tasks


def test_tasks_are_added(run, tmp_path):
  to = tmp_path / 'run' / 'evaluation'
  first, second = run(mixture=['quiz']), run(mixture=['bool'])
  assert _tasks(to) == {'quiz', 'bool'}
  assert _metrics(to)['metrics'] == {**first, **second}
  run(mixture=['quiz'])
  assert _tasks(to) == {'quiz', 'bool'} and not (to / 'earlier').exists()


def test_another_step_is_not_mixed_in(run, tmp_path, capsys):
  """Nor is a newer one lost for an older one."""
  to = tmp_path / 'run' / 'evaluation'
  late = run('run/checkpoints/40', mixture=['quiz', 'bool'])
  capsys.readouterr()
  early = run('run/checkpoints/20', mixture=['quiz'])
  assert _metrics(to)['step'] == 20 and _metrics(to)['metrics'] == early
  assert _tasks(to) == {'quiz'}
  aside = to / 'earlier' / '0'
  assert _metrics(aside)['step'] == 40 and _metrics(aside)['metrics'] == late
  assert _tasks(aside) == {'quiz', 'bool'}
  said = capsys.readouterr().out
  assert f'checkpoints/40, step 40, scored is now in {aside}\n' in said


@pytest.mark.parametrize(
  'overrides',
  [{'evaluate.split': 'test'}, {'model.moe.eval_capacity.factor': '0.5'}],
)
def test_other_settings_are_not_mixed_in(run, tmp_path, overrides):
  to = tmp_path / 'run' / 'evaluation'
  first = run(mixture=['bool'])
  run(mixture=['quiz'], overrides=overrides)
  assert _tasks(to) == {'quiz'}
  assert _metrics(to / 'earlier' / '0')['metrics'] == first
  run(mixture=['bool'], overrides=overrides)
  assert _tasks(to) == {'quiz', 'bool'}
  assert not (to / 'earlier' / '1').exists()


def test_what_moves_no_score_is_no_other_setting(run, tmp_path):
  run(mixture=['bool'], overrides={'evaluate.split': 'validation'})
  run(mixture=['quiz'], overrides={'data.workers': '2', 'evaluate.every': '5'})
  assert _tasks(tmp_path / 'run' / 'evaluation') == {'quiz', 'bool'}


def test_a_run_that_was_started_anew_is_another(run, tmp_path):
  place = tmp_path / 'run' / 'checkpoints' / '20'
  place.mkdir(parents=True)
  (place / 'files.json').write_text('{}')
  run('run/checkpoints/20', mixture=['bool'])
  os.utime(place / 'files.json', ns=(1, 1))
  run('run/checkpoints/20', mixture=['quiz'])
  assert _tasks(tmp_path / 'run' / 'evaluation') == {'quiz'}


def test_every_step_keeps_what_other_settings_found(run, tmp_path):
  to = tmp_path / 'run' / 'evaluation'
  run(every_step=True, mixture=['bool'])
  best = (to / 'best.json').read_text()
  run(every_step=True, mixture=['quiz'])
  both = {
    name.split('/')[1] for name in json.loads((to / 'best.json').read_text())
  }
  assert both == _tasks(to / '20') == {'bool', 'quiz'}
  run(every_step=True, mixture=['bool'], overrides={'data.inputs_length': '3'})
  assert _tasks(to / '20') == {'bool'}
  assert _tasks(to / '20' / 'earlier' / '0') == {'bool', 'quiz'}
  aside = json.loads((to / 'earlier' / '0' / 'best.json').read_text())
  assert aside.keys() > json.loads(best).keys()


def test_a_kill_between_files_leaves_nothing_wrong(run, tmp_path, monkeypatch):
  """At each file: what is there is whole, and of one checkpoint."""
  to = tmp_path / 'run' / 'evaluation'
  old = run('run/checkpoints/40', mixture=['quiz', 'bool'])
  for number in range(9):
    left = [number]
    original = {name: getattr(files, name) for name in ('copy', 'write_whole')}

    def killed(name, *args, original=original, left=left):
      left[0] -= 1
      if left[0] < 0:
        raise KeyboardInterrupt
      original[name](*args)

    with monkeypatch.context() as patch:
      for name in original:
        patch.setattr(files, name, functools.partial(killed, name))
      try:
        run('run/checkpoints/20', mixture=['bool', 'quiz'])
      except KeyboardInterrupt:
        done = False
      else:
        done = True
    found = [_metrics(p.parent) for p in sorted(to.rglob('metrics.json'))]
    assert sum(m['metrics'] == old for m in found) == 1
    assert {m['step'] for m in found} <= {20, 40}
    if done:
      break
  assert _metrics(to)['step'] == 20 and _tasks(to) == {'quiz', 'bool'}
  assert _tasks(to / 'earlier' / '0') == {'quiz', 'bool'}
  assert number == 3  # 1 + 2 + 3: three files were moved, three written.


def test_what_is_not_ours_is_refused_before_work(run, tmp_path, monkeypatch):
  to = tmp_path / 'results'
  to.mkdir()
  monkeypatch.setattr(evaluate, '_measure', lambda *_: pytest.fail('work'))
  for name in (
    'metrics.json', 'predictions-quiz.jsonl', 'best.json', 'superglue.zip',
  ):  # fmt: skip
    for data in (b'precious', b'{}', b'{"loss": 1.0}', b'{"idx": 1}'[:5]):
      (to / name).write_bytes(data)
      with pytest.raises(ValueError, match=f'{name} exists and it was not wri'):
        run(mixture=['quiz'], output=str(to))
      assert (to / name).read_bytes() == data
    (to / name).unlink()
  (tmp_path / 'file').write_text('precious')
  for output in ('file', 'file/deeper'):
    with pytest.raises(ValueError, match='file is a file, not a directory'):
      run(mixture=['quiz'], output=str(tmp_path / output))
  monkeypatch.setattr(os, 'access', lambda *_: False)
  with pytest.raises(ValueError, match='results cannot be written; say with'):
    run(mixture=['quiz'], output=str(to))


def test_a_model_of_no_numbers_is_told(run, tmp_path, capsys, monkeypatch):
  nothing = np.nan * table()
  monkeypatch.setattr(sys.modules[__name__], 'table', lambda: nothing)
  run(mixture=['text', 'quiz'])
  said = capsys.readouterr().out
  assert 'text, quiz: the logits of ' in said and 'scores mean nothing' in said
  strict = lambda text: pytest.fail(f'{text} is no JSON')
  for path in (tmp_path / 'run' / 'evaluation').iterdir():
    rows = [path.read_text()]
    if path.suffix == '.jsonl':
      rows = rows[0].splitlines()
    for row in rows:
      json.loads(row, parse_constant=strict)
  assert (
    _metrics(tmp_path / 'run' / 'evaluation')['metrics']['eval/text/loss']
    == 'nan'
  )


def test_where_nobody_looks_a_line_says_how_far_it_is(run, capsys, monkeypatch):
  monkeypatch.setattr(evaluate, '_PATIENCE', 0.0)
  run(mixture=['text', 'quiz'])
  said = capsys.readouterr().out
  assert 'step 40: 5 of 40 examples, 0:00:' in said
  assert 'step 40: 20 of 40 examples' in said


def test_checkpoints_of_others_do_not_share_a_place(tmp_path):
  beside = lambda uri, path: str(evaluate._beside(uri, path))
  base = str(tmp_path)
  (tmp_path / 'file').touch()
  for uri, path, place in (
    ('run', 'run/checkpoints/8', 'run/evaluation'),
    ('shared', 'shared/20', 'shared/evaluation'),
    # Converted ones have no number: each keeps its own.
    ('runs/a', 'runs/a', 'runs/a/evaluation'),
    ('hf:models/a', 'models/a', 'models/a/evaluation'),
    ('hf:models/7', 'models/7', 'models/7/evaluation'),
    ('t5x:file', 'file', 'evaluation'),
  ):
    assert beside(uri, f'{base}/{path}') == f'{base}/{place}'
  with pytest.raises(ValueError, match='hf:google/x is no directory here: say'):
    evaluate.evaluate('hf:google/x')


@pytest.mark.parametrize(
  ('field', 'message'),
  [
    (
      'model.embed_dim',
      'model.embed_dim cannot be set for an evaluation',
    ),
    ('model.activation', 'model.activation cannot be set'),
    ('model.moe.num_experts', 'cannot be set'),
    ('model.moe.train_capacity.factor', 'cannot be set'),
    ('model.encoder.num_layers', 'cannot be set'),
    ('optimizer.learning_rate', 'cannot be set'),
    ('total_steps', 'total_steps cannot be set.* evaluate, data, mesh'),
    ('init', 'cannot be set'),
    ('routing', 'cannot be set'),
    ('data.vocabulary', 'is of training; .* is --vocabulary=FILE'),
    ('data.vocabulary_size', 'is of training'),
    ('model.embed_dimm', "'embed_dimm'. Did you mean 'embed_dim'"),
  ],
)
def test_an_evaluation_makes_no_other_model(run, field, message):
  with pytest.raises(ValueError, match=message):
    run(overrides={field: '64'})
  assert not Shelf.opened


def test_a_table_has_a_line_a_metric(run, capsys):
  found = run('run/checkpoints/20')
  lines = capsys.readouterr().out.splitlines()
  cells = [[c.strip() for c in line.split('│')[1:-1]] for line in lines]
  value = lambda name: f'{found[f"eval/{name}"]:.4g}'
  assert [c for c in cells if c] == [
    ['text', 'loss', '', value('text/loss'), ''],
    ['quiz', 'loss', '', value('quiz/loss'), ''],
    [
      'quiz', 'accuracy', value('quiz/majority_accuracy'),
      value('quiz/accuracy'), value('quiz/decoded_accuracy'),
    ],
    # A name of somebody's own may have a slash.
    ['quiz', 'f1/half', '50', '50', '50'],
    ['quiz', 'examples', '', '20', ''],
  ]  # fmt: skip


def test_a_path_is_no_markup(run, capsys):
  run('runs[/a]/20', mixture=['bool'])
  title = capsys.readouterr().out.split('┏')[0]
  assert 'runs[/a]/20' in ''.join(title.split())


def test_a_mixture_is_all_its_tasks(run):
  """Those it never draws from too, each once."""
  found = run(mixture=['both', 'bool'])
  assert [name for name, _ in Shelf.opened] == ['quiz', 'bool']
  assert found['eval/bool/examples'] == 4


def test_fields_and_a_place(run, tmp_path, capsys):
  found = run(
    mixture=['quiz'],
    output=str(tmp_path / 'here'),
    overrides={
      'evaluate.split': 'test',
      'evaluate.batches': '2',
      'evaluate.decode': 'false',
      'evaluate.dropless': 'false',
      'model.moe.eval_capacity.factor': '0.5',
    },
  )
  assert Shelf.opened == [('quiz', 'test')]
  assert found['eval/quiz/examples'] == 10
  assert 'eval/quiz/decoded_accuracy' not in found
  assert (tmp_path / 'here' / 'metrics.json').exists()
  assert not (tmp_path / 'run').exists()
  said = capsys.readouterr().out
  assert 'Losses of text with capacity 0.5, answers with capacity 0.5.' in said


def test_no_limit_is_told(run, capsys):
  run(mixture=['bool'], overrides={'model.moe.eval_capacity.dropless': 'true'})
  said = capsys.readouterr().out
  assert 'Losses of text with no limit, answers with no limit.' in said
  # A stack may have places of its own.
  overrides = {'model.encoder.moe.eval_capacity.factor': '0.5'}
  run(mixture=['bool'], overrides=overrides)
  said = capsys.readouterr().out
  assert 'with capacity 0.5 (encoder) and capacity 2.0 (decoder), ans' in said


def test_a_checkpoint_that_left_its_run_is_scored_beside_it(run, tmp_path):
  run('shared/20', mixture=['bool'])
  assert (tmp_path / 'shared' / 'evaluation' / 'metrics.json').exists()


def test_every_checkpoint(run, tmp_path, capsys):
  newest = run(every_step=True, mixture=['bool'])
  to = tmp_path / 'run' / 'evaluation'
  steps = {}
  for step in (10, 20, 40):
    about = json.loads((to / f'{step}' / 'metrics.json').read_text())
    assert about['step'] == step
    assert about['checkpoint'].endswith(f'/checkpoints/{step}')
    assert (to / f'{step}' / 'predictions-bool.jsonl').exists()
    steps[step] = about['metrics']
  assert newest == steps[40]
  # Data is opened once.
  assert Shelf.opened == [('bool', 'validation')]
  # At 10 each byte is as likely as any other: 6 and 5 tokens.
  assert steps[10]['eval/bool/loss'] == pytest.approx(
    math.log(VOCABULARY.size), rel=1e-5
  )
  # At 20 all but one is right; at 40 whatever was likely is not.
  accuracy = [s['eval/bool/accuracy'] for s in steps.values()]
  assert accuracy[1] == 75 and max(accuracy[0], accuracy[2]) < 75
  best = json.loads((to / 'best.json').read_text())
  assert best.keys() == {
    f'eval/bool/{name}' for name in ('loss', 'accuracy', 'decoded_accuracy')
  }
  assert best['eval/bool/accuracy'] == [20, 75]
  assert best['eval/bool/loss'] == [20, steps[20]['eval/bool/loss']]
  said = capsys.readouterr().out
  assert 'eval/bool/accuracy: best 75 at step 20\n' in said
  assert said.count('answers with no limit') == 1
  assert not (to / 'metrics.json').exists()


def test_one_checkpoint_has_no_best(run, tmp_path):
  run(mixture=['bool'])
  assert not (tmp_path / 'run' / 'evaluation' / 'best.json').exists()


def test_a_submission_lies_beside_the_predictions(run, tmp_path, capsys):
  some = ['super_glue_boolq', 'quiz']
  run('run/checkpoints/20', mixture=some, submission=True)
  path = tmp_path / 'run' / 'evaluation' / submission.NAME
  with zipfile.ZipFile(path) as archive:
    assert archive.namelist() == ['BoolQ.jsonl']
    lines = archive.read('BoolQ.jsonl').decode().splitlines()
  labels = [json.loads(line)['label'] for line in lines]
  assert labels == ['true', 'false', 'true', 'true']
  assert f'wrote {path}\n' in capsys.readouterr().out


# The best step.


def test_best_is_highest_but_of_losses_lowest():
  by_step = {
    20: {'eval/a/accuracy': 70.0, 'eval/a/loss': 0.5},
    10: {'eval/a/accuracy': 60.0, 'eval/a/loss': 0.3},
    30: {'eval/a/accuracy': 65.0, 'eval/a/loss': 0.4},
  }
  assert best_steps(by_step) == {
    'eval/a/accuracy': (20, 70.0),
    'eval/a/loss': (10, 0.3),
  }


def test_of_equals_the_earliest_is_best():
  equal = {'eval/a/f1': 50.0, 'eval/a/loss': 1.0}
  by_step = {30: equal, 9: equal, 100: {k: v for k, v in equal.items()}}
  assert best_steps(by_step) == {
    'eval/a/f1': (9, 50.0),
    'eval/a/loss': (9, 1.0),
  }


def test_what_a_step_cannot_change_has_no_best():
  by_step = {
    1: {'eval/a/majority_f1': 3.0, 'eval/a/examples': 8, 'eval/a/f1': -2.0},
    2: {'eval/b/decoded_f1': 1.0, 'eval/super_glue/majority_average': 5.0},
  }
  # A metric that is not there at every step is the best where it is.
  assert best_steps(by_step) == {
    'eval/a/f1': (1, -2.0),
    'eval/b/decoded_f1': (2, 1.0),
  }
  assert best_steps({}) == {}


# Real checkpoints and tasks.


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run of a sparse model that reads bytes, with checkpoints at 3 and 12."""
  import seqio

  from st_moe.data import tasks

  del tasks  # Registers ours.
  seqio.MixtureRegistry.add('mostly_cb', [('tiny_cb', 2), ('tiny_copa', 0)])
  folder = tmp_path_factory.mktemp('verb')
  config = Config(
    model=tiny(
      vocab_size=VOCABULARY.size,
      encoder=StackConfig(1, 1, 0, group_size=16),
      decoder=StackConfig(1, 1, 0, group_size=8),
      moe={'extra_ffn': 'none'},
    ),
    data=DataConfig(
      mixture={'mostly_cb': 1},
      batch_size=4,
      inputs_length=16,
      targets_length=16,
      cache_dir=str(folder / 'cache'),
    ),
  )
  one = np.ones((1, 1), np.int32)
  for step in (3, 12):
    params = random_params(Transformer(config.model), one, one, one, seed=step)
    place = folder / 'run' / 'checkpoints' / f'{step}'
    ours.save(str(place), params, config, b'')
  yield folder / 'run'
  seqio.MixtureRegistry.remove('mostly_cb')


def test_a_run_from_its_files(workdir, capsys):
  from st_moe.data import tasks

  few = {'evaluate.batches': '1', 'evaluate.decode': 'false'}
  # Zero-rate tasks are none that it was trained on.
  newest = evaluate.evaluate(workdir, every_step=True, overrides=few)
  assert {name.split('/')[1] for name in newest} == {'tiny_cb'}
  best = json.loads((workdir / 'evaluation' / 'best.json').read_text())
  losses = {
    step: json.loads(path.read_text())['metrics']['eval/tiny_cb/loss']
    for step in (3, 12)
    for path in [workdir / 'evaluation' / f'{step}' / 'metrics.json']
  }
  assert losses[12] == newest['eval/tiny_cb/loss'] != losses[3]
  lowest = min(losses, key=losses.get)
  assert best['eval/tiny_cb/loss'] == [lowest, losses[lowest]]
  said = capsys.readouterr().out
  # Its bytes are cut, and it is told what would not cut them.
  assert (
    'tiny_cb validation: 600 of 600 inputs (100.0%) are longer than'
    ' data.inputs_length=16 and cut at their end; the longest has' in said
  )
  longest = max(
    len(f'{e["inputs"]}'.encode()) + 1
    for e in tasks.TASKS['tiny_cb'].load('validation')
  )
  assert f'the longest has {longest} tokens.' in said and longest > 16
  # By name it is both of its tasks. The newest checkpoint is 12, not 3.
  again = evaluate.evaluate(workdir, mixture=['mostly_cb'], overrides=few)
  assert {name.split('/')[1] for name in again} == {'tiny_cb', 'tiny_copa'}
  assert again['eval/tiny_cb/loss'] == pytest.approx(losses[12], rel=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'mixture': ['mostly_bc']}, "'mostly_bc'. Did you mean 'mostly_cb'"),
    (
      {'overrides': {'evaluate.split': 'test'}},
      r"'tiny_cb' has no split 'test', only \['train', 'validation'\]",
    ),
    ({'overrides': {'evaluate.splitt': 'test'}}, 'splitt'),
    ({'vocabulary': 'no.model'}, 'no.model: no such file'),
  ],
)
def test_what_cannot_be_evaluated(workdir, options, message):
  with pytest.raises(ValueError, match=message):
    evaluate.evaluate(workdir, **options)


def test_a_task_that_a_module_had_is_told_by_the_checkpoint(
  tmp_path, monkeypatch
):
  """And the module is not imported: anybody may have written its name."""
  config = Config(
    model=tiny(vocab_size=VOCABULARY.size),
    data=DataConfig(mixture={'mine': 1}, cache_dir=str(tmp_path / 'cache')),
  )
  one = np.ones((1, 1), np.int32)
  params = random_params(Transformer(config.model), one, one, one)
  run = checkpoint.describe_run(
    config_file.to_dict(config), b'', modules=['this', 'json']
  )
  checkpoint.save_params(tmp_path / 'run', params, run)
  monkeypatch.delitem(sys.modules, 'this', raising=False)
  with pytest.raises(ValueError) as error:
    evaluate.evaluate(tmp_path / 'run')
  assert str(error.value) == (
    "Unknown data source 'mine'. When this run was trained, it was registered"
    ' by a module: add --module_import=this, if you trust its code.'
  )
  assert 'this' not in sys.modules


def test_checkpoints_that_are_none(workdir, tmp_path):
  with pytest.raises(ValueError, match=f'No checkpoint in {tmp_path}: give a'):
    evaluate.evaluate(tmp_path)
  # A checkpoint is no workdir.
  one = workdir / 'checkpoints' / '3'
  with pytest.raises(ValueError, match='No checkpoint in .*/3: give a workdir'):
    evaluate.evaluate(one, every_step=True)


def test_a_checkpoint_without_a_vocabulary(tmp_path):
  config = Config(model=tiny(vocab_size=VOCABULARY.size))
  one = np.ones((1, 1), np.int32)
  params = random_params(Transformer(config.model), one, one, one)
  ours.save(str(tmp_path / 'bare'), params, config, None)
  with pytest.raises(ValueError, match='bare has no vocabulary: give the Sent'):
    evaluate.evaluate(tmp_path / 'bare')


# What a checkpoint may say of this machine.


@pytest.fixture
def named(tmp_path, monkeypatch):
  """Saves a checkpoint that names a text, signed with a key or not."""
  home = tmp_path / 'home'
  monkeypatch.setattr(shards, 'cache_root', lambda d: epath.Path(d or home))
  secret = tmp_path / 'secret.txt'
  secret.write_text('some words of mine\n\n' * 40)
  data = DataConfig(
    mixture={'mine': 1}, files={'mine': {'validation': str(secret)}},
    inputs_length=16, targets_length=16, cache_dir=str(tmp_path / 'elsewhere'),
  )  # fmt: skip
  config = Config(model=tiny(vocab_size=VOCABULARY.size), data=data)
  one = np.ones((1, 1), np.int32)
  params = random_params(Transformer(config.model), one, one, one)

  def save(name, **signed):
    run = checkpoint.describe_run(config_file.to_dict(config), b'', **signed)
    checkpoint.save_params(tmp_path / name, params, run)
    return tmp_path / name

  return save, data, secret


def test_files_that_a_strangers_checkpoint_names(named, tmp_path, capsys):
  save, data, secret = named
  refused = 'was not trained by you here, and says that mine is in'
  for name, signed in {'none': {}, 'forged': {'signature': 'f' * 64}}.items():
    path = save(name, **signed)
    with pytest.raises(
      ValueError, match=f'{refused} {secret}. Say so yourself'
    ):
      evaluate.evaluate(path)
    assert str(secret) not in capsys.readouterr().out
  assert not (tmp_path / 'elsewhere').exists()
  own = save('own', signature=trust.signature(data))
  stop, given = {'evaluate.split': 'validation'}, 'data.files.mine.validation'
  for path, options in (
    (tmp_path / 'none', {'trust_config': True, 'overrides': stop}),
    (tmp_path / 'none', {'overrides': {**stop, given: str(secret)}}),
    (own, {'overrides': stop}),
  ):
    # Nothing is written where a stranger says.
    assert not (tmp_path / 'elsewhere').exists()
    # All is read, and then this is found out.
    with pytest.raises(ValueError, match='mine.*none is a task of SuperGLUE'):
      evaluate.evaluate(path, submission=True, **options)
    assert capsys.readouterr().out == f'mine: {secret}\n'
  assert (tmp_path / 'elsewhere').exists()


def test_whatever_names_a_place_needs_a_signature(tmp_path, monkeypatch):
  monkeypatch.setattr(shards, 'cache_root', lambda _: epath.Path(tmp_path))
  globs = {'mine': {'validation': '/home/somebody/secret.jsonl'}}
  assert not trust.names_places(DataConfig(mixture={'tiny_copa': 1.0}))
  for said in (
    {'files': globs},
    {'pairs': globs},
    {'data_dir': '/home/somebody'},
    {'cache_dir': '/home/somebody'},
  ):
    assert trust.names_places(DataConfig(**said))
    assert not trust.is_own(DataConfig(**said), trust.signature(DataConfig()))


def test_a_signature_is_of_one_user_and_one_config(named, tmp_path):
  _, data, _ = named
  mine = trust.signature(data)
  assert trust.is_own(data, mine)
  assert not trust.is_own(dataclasses.replace(data, cache_dir='x'), mine)
  assert not trust.is_own(data, '') and not trust.is_own(data, None)
  key = tmp_path / 'home' / 'key'
  assert key.stat().st_mode & 0o777 == 0o600
  key.write_bytes(b'another user has another key, too')
  assert not trust.is_own(data, mine)  # And this one is none.
  assert trust.signature(data) == ''
