"""The flags of `st-moe plan`, and what they lead to."""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--count', action='store_true', help='parameters by role, and FLOPs'
  )
  parser.add_argument(
    '--topology',
    metavar='CHIP:SHAPE',
    default='',
    help='compile the train step for TPUs, as v5p:4x4x8; takes jax[tpu]',
  )
  parser.add_argument(
    '--output', metavar='FILE.json', default='plan.json', help='all figures'
  )


def run(flags, load: Callable) -> int:
  """Prints a plan and writes it down; 1 if the step does not fit.

  Args:
    load: makes the config, once the environment is set.
  """
  if not (flags.count or flags.topology):
    raise ValueError(
      'What of the plan? --count for parameters and FLOPs, --topology=v5p:4x4x8'
      ' to compile the train step for so many chips.'
    )
  # No accelerator is needed, and none should be waited for.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if flags.count:
    from st_moe.plan import cost

    cost.report_count(load())
    return 0
  prepare()
  from st_moe.plan import topology

  compiled = topology.compile_step(load(), flags.topology)
  topology.report(compiled, flags.topology)
  found = {'topology': flags.topology, 'compiled': dataclasses.asdict(compiled)}
  pathlib.Path(flags.output).write_text(json.dumps(found, indent=2))
  return 0


def prepare() -> None:
  """Sets what libtpu looks for where there is no TPU, before JAX reads it.

  Raises:
    ValueError: it is not installed.
  """
  found = importlib.util.find_spec('libtpu')
  if not found:
    raise ValueError(
      'To compile for a TPU takes its compiler: pip install "jax[tpu]". To'
      ' count parameters and FLOPs takes none: --count instead of --topology.'
    )
  library = pathlib.Path(found.submodule_search_locations[0]) / 'libtpu.so'
  os.environ.update(
    TPU_LIBRARY_PATH=str(library),
    TPU_SKIP_MDS_QUERY='1',  # Of a machine in Google's cloud.
    TPU_ACCELERATOR_TYPE='v5litepod-1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_STDERR_LOG_LEVEL='3',
    TPU_MIN_LOG_LEVEL='3',
    # Nothing is run: other processes may compile at the same time.
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  )
