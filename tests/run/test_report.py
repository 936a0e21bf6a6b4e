"""Rows of numbers: on a disk, in an object store, and beside failing logs."""

import errno
import io
import json
import resource
import struct
import sys
import types

import matplotlib
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from tensorboardX import event_file_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from st_moe import config_file
from st_moe.config import Config, LogConfig
from st_moe.history import Rows, read_rows
from st_moe.run import compare, report
from st_moe.run.report import Report

_PLAIN = Config(total_steps=8, log=LogConfig(tensorboard=False))


def _write(workdir, *steps, start=0):
  """A run that wrote these steps, and was then cut off."""
  rows = Rows(epath.Path(workdir), start=start)
  for step in steps:
    rows.write({'step': step, 'loss': step / 8})
  return rows


def _steps(workdir):
  return [row['step'] for row in read_rows(workdir)]


def _lines(workdir):
  return (workdir / 'metrics.jsonl').read_text().splitlines()


# metrics.jsonl


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
  _write(tmp_path, 1, 2)
  assert _lines(tmp_path) == [
    '{"step": 1, "loss": 0.125}',
    '{"step": 2, "loss": 0.25}',
  ]


def test_rows_past_the_checkpoint_are_written_again(tmp_path):
  # Killed after step 5; the last checkpoint is that of step 2.
  _write(tmp_path, 1, 2, 3, 4, 5)
  _write(tmp_path, 3, 4, start=2)
  assert _steps(tmp_path) == [1, 2, 3, 4]
  assert len(_lines(tmp_path)) == 4


def test_a_new_run_leaves_no_row(tmp_path):
  _write(tmp_path, 1, 2)
  _write(tmp_path, start=0)
  assert _steps(tmp_path) == []


def test_a_last_row_cut_short_is_dropped(tmp_path):
  _write(tmp_path, 1, 2)
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"step": 3, "lo')
  assert _steps(tmp_path) == [1, 2]
  # It does not run into the next one either.
  _write(tmp_path, 3, start=3)
  assert _steps(tmp_path) == [1, 2, 3]
  assert json.loads(_lines(tmp_path)[-1]) == {'step': 3, 'loss': 0.375}


_BROKEN = [b'{"step": 2, "lo', b'\x00\x00\xff\x00', b'7', b'{"loss": 2.0}']


def test_a_broken_line_takes_no_other_along(tmp_path, caplog):
  """As a crash of a machine leaves them: half a row, zeros, things that are
  no rows."""
  _write(tmp_path, 1, 2, 3)
  first, *rest = (tmp_path / 'metrics.jsonl').read_bytes().splitlines()
  lines = [first, *_BROKEN, b'', *rest]
  (tmp_path / 'metrics.jsonl').write_bytes(b'\n'.join([*lines, b'{"step"']))
  assert _steps(tmp_path) == [1, 2, 3]
  where = f'{tmp_path}/metrics.jsonl, line 2 and 3 more: no row of numbers'
  assert caplog.messages == [f'{where}: left out.']
  # A run that goes on keeps them apart, and says so.
  said, aside = [], tmp_path / 'damaged' / 'metrics.jsonl'
  Rows(epath.Path(tmp_path), start=3, note=said.append)
  assert said == [f'{where}: moved to {aside}.']
  assert aside.read_bytes().splitlines() == _BROKEN
  assert len(_lines(tmp_path)) == 3
  Rows(epath.Path(tmp_path), start=3, note=said.append)
  assert len(said) == 1


def test_a_full_disk_stops_no_run_and_tears_no_row(tmp_path):
  """A row has 12 bytes, and there is room for one and five bytes more."""
  said = []
  rows = Rows(epath.Path(tmp_path), start=0, note=said.append)
  rows.write({'step': 1})
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (17, before[1]))
  try:
    rows.write({'step': 2})
    rows.write({'step': 3})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert said == [
    f'Going on without {tmp_path}/metrics.jsonl, until it works:'
    ' [Errno 27] File too large'
  ]
  assert _lines(tmp_path) == ['{"step": 1}']
  rows.write({'step': 4})
  assert _steps(tmp_path) == [1, 2, 3, 4]
  assert len(said) == 1


def test_a_store_that_does_not_answer_stops_no_run(bucket, monkeypatch):
  (bucket / 'runs' / 'a').mkdir(parents=True)
  made, said = _report('gs://runs/a')
  made.write(1, {'loss': 0.5})
  with monkeypatch.context() as patch:

    def away(self, data):
      raise ConnectionError('no network')

    patch.setattr(epath.Path, 'write_bytes', away)
    made.flush()
  assert 'Going on without gs://runs/a/metrics-00000.jsonl' in said.getvalue()
  made.close()
  assert _steps('gs://runs/a') == [1]


def test_rows_in_a_folder(tmp_path):
  (tmp_path / 'metrics.jsonl').mkdir()
  with pytest.raises(
    ValueError, match='metrics.jsonl is a folder, where a run'
  ):
    read_rows(tmp_path)


def test_an_object_store_gets_numbered_parts(bucket):
  # It can append nothing: rows wait until there are 100, or a checkpoint.
  (bucket / 'runs' / 'a').mkdir(parents=True)
  rows = _write('gs://runs/a', *range(1, 151))
  names = lambda: sorted(p.name for p in (bucket / 'runs' / 'a').iterdir())
  assert names() == ['metrics-00000.jsonl']
  assert _steps('gs://runs/a') == list(range(1, 101))
  rows.flush()
  assert names() == ['metrics-00000.jsonl', 'metrics-00001.jsonl']
  rows.flush()  # Nothing new, no new part.
  assert len(names()) == 2
  assert _steps('gs://runs/a') == list(range(1, 151))

  # Started again at step 120: its rows become one part.
  rows = _write('gs://runs/a', 121, 122, start=120)
  assert names() == ['metrics-00000.jsonl']
  rows.flush()
  assert _steps('gs://runs/a') == list(range(1, 123))


def test_a_run_that_ends_in_an_object_store_leaves_no_row_behind(bucket):
  (bucket / 'runs' / 'a').mkdir(parents=True)
  made, _ = _report('gs://runs/a')
  made.write(1, {'loss': 0.5})
  assert _steps('gs://runs/a') == []
  made.close()
  assert _steps('gs://runs/a') == [1]


def _report(workdir, config=_PLAIN, start=0):
  """A report, and where it talks to instead of a terminal."""
  made = Report(workdir, config.log, config_file.to_dict(config), start=start)
  said = io.StringIO()
  made.console = Console(file=said, width=200)
  return made, said


def test_numbers_keep_seven_digits_and_no_nan(tmp_path):
  made, _ = _report(tmp_path)
  made.write(
    3,
    {
      'loss': np.float32(1 / 3),
      'grads': np.float32('nan'),
      'updates': np.array([1.5, -np.inf], np.float32),
      'load': np.array([[5, 7]], np.int32),
      'tokens': 2**40,
    },
  )
  made.close()
  text = (tmp_path / 'metrics.jsonl').read_text()
  # NaN and Infinity are no JSON: other readers would refuse the whole file.
  row = json.loads(text, parse_constant=pytest.fail)
  assert row == {
    'step': 3,
    'loss': 0.3333333,
    'grads': 'nan',
    'updates': [1.5, '-inf'],
    'load': [[5, 7]],
    'tokens': 2**40,
  }


_TENSORBOARD = Config(total_steps=8)


def _events(folder):
  """(step, session starts here, name, value) of every event, in order."""
  found = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:  # Length, its checksum, an event, its checksum.
      (size,) = struct.unpack('<Q', data[:8])
      event = Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      for value in event.summary.value:
        found.append((event.step, False, value.tag, value.simple_value))
      if event.session_log.status == SessionLog.START:
        found.append((event.step, True, '', 0.0))
  return found


def test_tensorboard_gets_the_scalars(tmp_path):
  made, said = _report(tmp_path, _TENSORBOARD, start=2)
  made.write(3, {'loss': 2.5, 'encoder/load': np.ones((2, 4))})
  expected = [(3, True, '', 0.0), (3, False, 'loss', 2.5)]
  assert _events(tmp_path / 'tensorboard') == expected  # At once.
  made.write(4, {'loss': 1.5})
  made.close()
  expected.append((4, False, 'loss', 1.5))
  assert _events(tmp_path / 'tensorboard') == expected
  assert said.getvalue() == ''


def test_tensorboard_in_an_object_store(bucket):
  (bucket / 'runs' / 'a').mkdir(parents=True)
  made, said = _report('gs://runs/a', _TENSORBOARD)
  made.write(1, {'loss': 2.5})
  made.flush()  # As before each checkpoint.
  expected = [(1, True, '', 0.0), (1, False, 'loss', 2.5)]
  assert _events(bucket / 'runs' / 'a' / 'tensorboard') == expected
  made.write(2, {'loss': 1.5})
  made.close()
  expected.append((2, False, 'loss', 1.5))
  assert _events(bucket / 'runs' / 'a' / 'tensorboard') == expected
  assert said.getvalue() == ''


def test_a_tensorboard_that_fails_stops_no_run(tmp_path, monkeypatch):
  made, said = _report(tmp_path, _TENSORBOARD)

  def full(writer):
    writer._py_recordio_writer.close()
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(event_file_writer.EventsWriter, 'flush', full)
  for step in range(1, 31):  # More than its own writer would let wait.
    made.write(step, {'loss': 1.0})
  made.close()
  assert _steps(tmp_path) == list(range(1, 31))
  message = 'Going on without TensorBoard: [Errno 28] No space left on device'
  assert said.getvalue() == f'{message}\n'


# Weights & Biases


_WANDB = Config(total_steps=8, log=LogConfig(tensorboard=False, wandb=True))


def _fake_wandb(monkeypatch, fails=(), **more):
  """A wandb that fails where it is told to; returns what it was told."""
  told = []

  def part(name):
    def call(*args, **kwargs):
      told.append((name, *args))
      if name in fails:
        raise ConnectionError(f'no network in {name}')
      return run

    return call

  run = types.SimpleNamespace(
    id='abc123', log=part('log'), finish=part('finish'), **more
  )
  module = types.SimpleNamespace(init=part('init'))
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return told


def _run(workdir):
  """A whole run in short; returns what the reader was told."""
  said = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    console = Console(file=said, width=200)
    patch.setattr('rich.console.Console', lambda **_: console)
    made = Report(workdir, _WANDB.log, config_file.to_dict(_WANDB), start=0)
    made.write(1, {'loss': 2.5, 'load': np.ones(3)})
    made.write(2, {'loss': 1.5})
    made.close()
  assert _steps(workdir) == [1, 2]
  return said.getvalue()


def test_wandb_is_told_the_scalars(tmp_path, monkeypatch):
  told = _fake_wandb(monkeypatch)
  assert _run(tmp_path) == ''
  rows = [('log', {'loss': 2.5}), ('log', {'loss': 1.5})]
  assert told == [('init',), *rows, ('finish',)]
  # The next start goes on in the same run.
  assert (tmp_path / 'wandb_id').read_text() == 'abc123'


def test_a_missing_wandb_stops_no_run(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  said = _run(tmp_path)
  assert 'Going on without a log: config.log.wandb needs' in said
  assert "pip install 'st_moe[wandb]'" in said


def test_a_wandb_that_fails_stops_no_run(tmp_path, monkeypatch):
  told = _fake_wandb(monkeypatch, fails=('init',))
  said = _run(tmp_path)
  assert said == 'Going on without a log: no network in init\n'

  # The first failure is the last row it is sent.
  told = _fake_wandb(monkeypatch, fails=('log',))
  said = _run(tmp_path)
  assert said == 'Going on without Wandb: no network in log\n'
  assert [name for name, *_ in told] == ['init', 'log']

  told = _fake_wandb(monkeypatch, fails=('finish',))
  said = _run(tmp_path)
  assert said == 'Going on without Wandb: no network in finish\n'
  assert told[-1] == ('finish',)


# The reader


def test_notes_are_taken_literally(tmp_path):
  made, said = _report(tmp_path)
  made.note('runs/[red]/x [/] 7')  # Markup of rich; the second is a mistake.
  assert said.getvalue() == 'runs/[red]/x [/] 7\n'


def test_progress_is_a_line_where_there_is_no_terminal(tmp_path):
  made, said = _report(tmp_path)
  row = {
    'loss': np.float32(4.25),
    'tokens_per_second': 12_345.6,
    'seconds_per_step': 1600.0,
  }
  made.progress(1, {**row, 'seconds_per_step': 12.4})
  made.progress(5, row)
  # Three steps of 1600 s are 1 h 20 min.
  assert said.getvalue() == (
    'step 1/8  loss 4.250  compiled in 12 s\n'
    'step 5/8  loss 4.250  12,346 tokens/s  ETA 1:20:00\n'
  )


def test_a_clock_counts_between_looks(monkeypatch):
  now = iter([100.0, 104.0, 106.0])
  monkeypatch.setattr(report.time, 'perf_counter', lambda: next(now))
  clock = report.Clock()
  clock.tick(300)
  clock.tick(500)
  found = clock.read()
  assert found == {'tokens_per_second': 200.0, 'seconds_per_step': 2.0}
  clock.tick(50)
  found = clock.read()
  assert found == {'tokens_per_second': 25.0, 'seconds_per_step': 2.0}


# `st-moe report`


def _finished(workdir, scores, losses=('nan', 2.0), load=((1, 3), (2, 2))):
  workdir.mkdir()
  (workdir / 'config.json').write_text('{}')
  rows = Rows(epath.Path(workdir), start=0)
  for step, loss in enumerate(losses, 1):
    row = {'step': step, 'loss': loss, 'tokens_per_second': 100.0 * step}
    row |= {'encoder/load': [list(load[step - 1])]}
    rows.write({**row, 'encoder/dropped_tokens': 0.25})
  rows.write({'step': len(losses), **scores})
  return str(workdir)


def test_runs_side_by_side(tmp_path, monkeypatch):
  said = io.StringIO()
  console = Console(file=said, width=200)
  monkeypatch.setattr('rich.console.Console', lambda **_: console)
  scores = {
    'eval/cb/loss': 1.0,
    'eval/cb/accuracy': 70.0,
    'eval/cb/majority_accuracy': 40.0,
    'eval/cb/examples': 56,
  }
  tuned = _finished(tmp_path / 'tuned', scores, load=((4, 4), (1, 3)))
  untrained = {**scores, 'eval/cb/accuracy': 35.5}
  scratch = _finished(tmp_path / 'scratch', untrained)
  compare.compare([tuned], baseline=scratch)
  rows = [
    line.replace('│', ' ').split() for line in said.getvalue().split('\n')
  ]
  # A first loss that was not finite; loads of 1 and 3 where 2 is even.
  stage = ['tuned', '2', '200', 'nan', '2.000', '0.50..1.50', '25.0', '%']
  assert stage in rows
  # Measured once, at step 2, of which there is no checkpoint.
  assert ['cb', 'accuracy', '56', '40.0', '35.5', '70.0', '70.0', '(2)'] in rows
  assert any('metrics.jsonl' in line and tuned in line for line in
             said.getvalue().split('\n'))  # fmt: skip


def test_two_runs_of_one_task_are_told_apart(tmp_path, monkeypatch, capsys):
  """In 80 columns, nothing cut; losses of text are in a table of their own."""
  monkeypatch.setenv('COLUMNS', '80')
  task = 'eval/super_glue_multirc_1_sentinel'
  scores = {
    f'{task}/loss': 1.0,
    f'{task}/f1': 70.0,
    f'{task}/majority_f1': 40.0,
    f'{task}/examples': 4848,
  }
  runs = []
  for name in ('a/tuned', 'b/tuned', 'optimizer.train=non_moe,seed=11'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    other = {**scores, f'{task}/f1': 70.0 + len(runs)}
    runs.append(_finished(tmp_path / name, other))
  text = _finished(tmp_path / 'text', {'eval/news/loss': 3.25})
  compare.compare([*runs, text], baseline=_finished(tmp_path / 'new', scores))
  said = capsys.readouterr().out
  assert all(len(line) <= 80 for line in said.split('Files:')[0].splitlines())
  assert '\u2026' not in said  # What is cut ends in three dots.
  rows = [line.split() for line in said.splitlines()]
  ends = {
    row[0]: row[-2] for row in rows if row[-1:] == ['(2)'] and '4848' in row
  }
  assert ends['a/tuned'] == '70.0' and ends['b/tuned'] == '71.0'
  assert ['text', 'news', '3.250', '3.250', '3.250', '(2)'] in rows


def test_a_damaged_config_has_no_part_in_a_report(tmp_path, capsys):
  run = _finished(tmp_path / 'run', {'eval/news/loss': 3.25})
  (tmp_path / 'run' / 'config.json').write_bytes(b'\xff{')
  compare.compare([run])
  assert '3.250' in capsys.readouterr().out


def test_curves_are_drawn(tmp_path, monkeypatch):
  monkeypatch.setitem(matplotlib.rcParams, 'svg.fonttype', 'none')
  first = _finished(tmp_path / 'first', {'eval/cb/loss': 1.0})
  scores = {'eval/cb/loss': 2.0, 'eval/news/loss': 'nan', 'eval/cb/f1': 9.0}
  second = _finished(tmp_path / 'second', scores)
  picture = tmp_path / 'curves.svg'
  compare.draw_curves([first, second], str(picture))
  drawn = picture.read_text()
  for text in ('>cb<', '>news<', '>first<', '>second<', '>step<'):
    assert drawn.count(text) == 1, text
  assert '>f1<' not in drawn
  with pytest.raises(ValueError, match="kind of picture 'pgn'. Did you mean"):
    compare.draw_curves([first], str(tmp_path / 'curves.pgn'))


def test_curves_of_any_metric(tmp_path):
  runs = [
    _finished(tmp_path / name, {f'eval/{task}/accuracy': value})
    for name, task, value in (('a', 'cb', 60.0), ('b', 'copa', 50.0))
  ]
  picture = compare.curves(runs, 'eval/*/accuracy', '% right')
  assert [axes.get_title() for axes in picture.axes] == ['cb', 'copa']
  # A run that the first panel has nothing of is named too.
  (legend,) = picture.legends
  assert [text.get_text() for text in legend.get_texts()] == ['a', 'b']
  loads = compare.curves(runs[:1], 'encoder/dropped_tokens')
  (axes,) = loads.axes
  assert axes.get_title() == 'encoder/dropped_tokens'
  with pytest.raises(ValueError, match="metric 'encoder/load'"):
    compare.curves(runs, 'encoder/load')  # A number for each expert.
  with pytest.raises(ValueError, match="metric 'eval/[*]/f1'"):
    compare.curves(runs, 'eval/*/f1')


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(ValueError, match='is no workdir of `st-moe train`'):
    compare.compare([str(tmp_path)])
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match='has measured nothing yet'):
    compare.compare([str(tmp_path)])
