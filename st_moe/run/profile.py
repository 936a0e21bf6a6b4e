"""`--profile=START:STOP`: a trace of some steps, to see where time goes."""

import re
import tempfile

import jax
from etils import epath

from st_moe.data import files


def steps(asked: str, total: int) -> range:
  """'10:13' are the three steps after the tenth; '' none.

  Raises:
    ValueError: that is no range of the steps of this run.
  """
  if not asked:
    return range(0)
  found = re.fullmatch(r'(\d+):(\d+)', asked)
  if not found:
    raise ValueError(
      f'--profile={asked}: write START:STOP, as 10:13 for the three steps'
      ' after the tenth.'
    )
  start, stop = map(int, found.groups())
  if start >= stop:
    raise ValueError(f'--profile={asked}: STOP has to be more than START.')
  if stop > total:
    raise ValueError(
      f'--profile={asked}: the last step is {total}, config.total_steps.'
    )
  return range(start, stop)


class Profile:
  """Traces the steps of a range into WORKDIR/profile."""

  def __init__(self, asked: range, workdir, note, *, start: int):
    self._place = epath.Path(workdir) / 'profile'
    self._asked, self._note, self._here = asked, note, None
    if asked and start >= asked.stop:
      note(f'No trace: steps {asked.start}:{asked.stop} are done already.')
    elif asked:
      # Else a program from the cache has the names of another day.
      jax.config.update('jax_compilation_cache_include_metadata_in_key', True)

  def before(self, step: int, state):
    """Starts or ends the trace where it is time, once the steps before end."""
    if (step in self._asked) != (self._here is not None):
      jax.block_until_ready(state)
      self.close()
      if step in self._asked:
        # Of its own: JAX knows no object stores.
        self._here = epath.Path(tempfile.mkdtemp())
        options = jax.profiler.ProfileOptions()
        # Calls of Python drown the rest, and a viewer takes a million events.
        options.python_tracer_level = 0
        jax.profiler.start_trace(
          self._here, create_perfetto_trace=True, profiler_options=options
        )

  def close(self):
    """Ends the trace, if there is one, and says where it lies."""
    if self._here is None:
      return
    here, self._here = self._here, None
    jax.profiler.stop_trace()
    files.copy_tree(here, self._place)
    here.rmtree()
    self._note(
      f'The trace is in {self._place}: `pip install xprof; xprof --logdir='
      f'{self._place}`, or its perfetto_trace.json.gz at ui.perfetto.dev.'
    )
