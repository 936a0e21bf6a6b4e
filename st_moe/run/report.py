"""Where a run's numbers go: metrics.jsonl, TensorBoard, W&B, the terminal."""

import logging
import math
import tempfile
import time
from collections.abc import Mapping

import numpy as np
from etils import epath

from st_moe import history, terminal
from st_moe.config import LogConfig
from st_moe.data import files


class Report:
  """Writes rows of numbers and draws progress; nothing here may stop a run."""

  def __init__(self, workdir, log: LogConfig, said: Mapping, *, start: int):
    """`said`: the config of the run in plain values."""
    self.console = terminal.console()
    self._workdir = epath.Path(workdir)
    self._rows = history.Rows(self._workdir, start=start, note=self.note)
    self._others = []
    if log.tensorboard:
      self._try(lambda: _TensorBoard(self._workdir, start))
    if log.wandb:
      self._try(lambda: _Wandb(log.wandb_project, said, self._workdir))
    self._progress = None
    self._total = said['total_steps']
    self.first = start + 1  # The step that waits for the compiler.

  def _try(self, make):
    try:
      self._others.append(make())
    except Exception as e:  # A missing package, no network, no permission.
      self.note(f'Going on without a log: {e}')

  def note(self, text: str):
    """One line for the reader."""
    self.console.print(
      terminal.shown(text), highlight=False, markup=False, soft_wrap=True
    )
    logging.debug(text)

  def write(self, step: int, row: dict):
    """A row of metrics: scalars, and arrays such as the load per expert."""
    row = {k: np.asarray(v) for k, v in row.items()}
    self._rows.write({'step': step, **{k: _plain(v) for k, v in row.items()}})
    scalars = {k: float(v) for k, v in row.items() if v.ndim == 0}
    self._tell_others(lambda writer: writer.write(step, scalars))

  def _tell_others(self, tell):
    for writer in list(self._others):
      try:
        tell(writer)
      except Exception as e:
        self.note(f'Going on without {type(writer).__name__[1:]}: {e}')
        self._others.remove(writer)

  def progress(self, step: int, row: dict):
    """Moves the bar; a line each time where there is no terminal."""
    loss, rate = float(row['loss']), float(row['tokens_per_second'])
    if step == self.first:
      compiled = f'compiled in {row["seconds_per_step"]:.0f} s'
      self.note(f'step {step}/{self._total}  loss {loss:.3f}  {compiled}')
      return
    if not self.console.is_terminal:
      left = _clock(row['seconds_per_step'] * (self._total - step))
      self.note(
        f'step {step}/{self._total}  loss {loss:.3f}  {rate:,.0f} tokens/s'
        f'  ETA {left}'
      )
      return
    if self._progress is None:
      self._progress, self._task = _bar(self.console, self._total, step)
    self._progress.update(self._task, completed=step, loss=loss, rate=rate)

  def flush(self):
    """Before a checkpoint: rows up to it are not written again after a kill."""
    self._rows.flush()
    self._tell_others(lambda writer: writer.flush())

  def close(self):
    if self._progress is not None:
      self._progress.stop()
    self.flush()
    self._tell_others(lambda writer: writer.close())


class Silence:
  """The report of a process that does not speak."""

  def __init__(self, start: int):
    self.first = start + 1

  def nothing(self, *_):
    pass

  note = write = progress = flush = close = nothing


def _bar(console, total, step):
  from rich import progress as bars

  bar = bars.Progress(
    bars.TextColumn('step'),
    bars.MofNCompleteColumn(),
    bars.BarColumn(),
    bars.TextColumn('loss {task.fields[loss]:.3f}'),
    bars.TextColumn('{task.fields[rate]:,.0f} tokens/s'),
    bars.TimeRemainingColumn(),
    console=console,
  )
  bar.start()
  return bar, bar.add_task('', total=total, completed=step, loss=0.0, rate=0.0)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def _plain(value: np.ndarray):
  """For JSON, which knows no NaN: what is not finite becomes a string."""
  if value.ndim:
    return [_plain(v) for v in value]
  value = value.item()
  if isinstance(value, float):
    return float(f'{value:.7g}') if math.isfinite(value) else str(value)
  return value


class _TensorBoard:
  """An event file; made here and copied, where nothing can be appended to."""

  def __init__(self, workdir, start):
    # Not its SummaryWriter: that has a thread which a full disk ends, and the
    # run would wait for it for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._event, self._to = Event, workdir / 'tensorboard'
    self._remote = files.is_remote(workdir)
    self._here = epath.Path(tempfile.mkdtemp()) if self._remote else self._to
    self._here.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(self._here / 'events'))
    # Readers leave out what a killed run wrote past its last checkpoint.
    self._add(start + 1, session_log=SessionLog(status=SessionLog.START))

  def _add(self, step, **what):
    event = self._event(wall_time=time.time(), step=step, **what)
    self._writer.write_event(event)

  def write(self, step, scalars):
    from tensorboardX.summary import scalar

    for name, value in scalars.items():
      self._add(step, summary=scalar(name, value))
    self._writer.flush()

  def flush(self):
    if self._remote:
      self._writer.flush()
      self._to.mkdir(parents=True, exist_ok=True)
      for path in self._here.iterdir():
        files.copy(path, self._to / path.name)

  def close(self):
    self._writer.close()
    if self._remote:
      self._here.rmtree()


class _Wandb:
  def __init__(self, project: str, said: Mapping, workdir):
    try:
      import wandb
    except ImportError:
      raise RuntimeError(
        "config.log.wandb needs the package: pip install 'st_moe[wandb]'"
      ) from None
    identity = workdir / 'wandb_id'
    self._run = wandb.init(
      project=project,
      name=workdir.name,
      id=identity.read_text() if identity.exists() else None,
      resume='allow',
      config=said,
    )
    identity.write_text(self._run.id)

  def write(self, step, scalars):
    self._run.log(scalars, step=step)

  def flush(self):
    pass

  def close(self):
    self._run.finish()


class Clock:
  """Seconds and tokens between two looks."""

  def __init__(self):
    self._since = time.perf_counter()
    self._tokens = self._steps = 0

  def tick(self, tokens: int):
    self._tokens += tokens
    self._steps += 1

  def read(self) -> dict[str, float]:
    now = time.perf_counter()
    seconds = now - self._since
    found = {
      'tokens_per_second': self._tokens / seconds,
      'seconds_per_step': seconds / max(self._steps, 1),
    }
    self._since, self._tokens, self._steps = now, 0, 0
    return found
