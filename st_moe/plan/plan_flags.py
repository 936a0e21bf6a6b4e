"""The flags of `st-moe plan`, and what they lead to."""

import argparse
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable

from st_moe.fields import SizeOr0


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--count', action='store_true', help='parameters by role, and FLOPs'
  )
  parser.add_argument(
    '--chip', default='', help='by arithmetic, for v4, v5e, v5p, v6e, h100, ...'
  )
  parser.add_argument(
    '--devices', rule=SizeOr0, default=0, help='how many of them'
  )
  parser.add_argument(
    '--search', action='store_true', help='rank all meshes of --devices'
  )
  parser.add_argument(
    '--topology',
    metavar='CHIP:SHAPE',
    default='',
    help='compile the train step for TPUs, as v5p:4x4x8; takes jax[tpu]',
  )
  parser.add_argument(
    '--output', metavar='FILE.json', default='', help='for all figures'
  )


def run(flags, load: Callable) -> int:
  """Prints a plan and writes it down; 1 if the step does not fit.

  Args:
    load: makes the config, once the environment is set.

  Raises:
    ValueError: flags that say too little, or what cannot be.
  """
  asked = [flags.count, bool(flags.chip), bool(flags.topology)]
  if sum(asked) != 1:
    raise ValueError(
      'What of the plan? One of --count for parameters and FLOPs, --chip=v5p'
      ' --devices=128 for what a step costs by arithmetic (--search ranks all'
      ' meshes), --topology=v5p:4x4x8 to compile the step for so many chips.'
    )
  if flags.chip and flags.devices < 1:
    raise ValueError(
      f'--devices={flags.devices}: of how many chips is the plan?'
    )
  if flags.search and not flags.chip:
    raise ValueError('--search needs --chip and --devices.')
  # No accelerator is needed, and none should be waited for.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if flags.topology:
    prepare()
  _check_output(flags.output)
  if flags.count:
    make = _counted
  elif flags.topology:
    make = _compiled
  else:
    make = _searched if flags.search else _reckoned
  from st_moe.data import files
  from st_moe.plan import cost

  try:
    found, fits = make(flags, load)
  except cost.DoesNotFit as e:
    print(e)
    found, fits = {'fits': False, 'why': str(e)}, False
  if flags.output:
    files.write_whole(flags.output, files.as_json(found, indent=2).encode())
  return 0 if fits else 1


def _check_output(output: str) -> None:
  """Refuses what could not be written after minutes of work."""
  from st_moe.data import files

  if not output:
    return
  parent = pathlib.Path(output).parent
  if not files.is_remote(output) and not parent.is_dir():
    raise ValueError(f'--output={output}: there is no {parent}.')
  files.check_free(output, _is_plan)


def _is_plan(path) -> bool:
  from st_moe.data import files

  found = files.json_in(path).keys()
  kinds = (
    ('parameters', 'met_by_a_token'),
    ('fits', 'why'),
    ('fits', 'cost'),
    ('fits', 'compiled'),
    ('tried', 'ranked'),
  )
  return any({*kind} <= found for kind in kinds)


def _counted(flags, load):
  from st_moe.plan import tables, topology

  return tables.count(topology.resolved(load())), True


def _reckoned(flags, load):
  from st_moe import sharding
  from st_moe.plan import chips, cost, tables, topology
  from st_moe.train import sizes as sizes_lib

  config, chip = topology.resolved(load()), chips.named(flags.chip)
  cost.check_room(config, flags.devices, chip)
  asked = dataclasses.asdict(config.mesh)
  asked.pop('across_slices')
  sizes = sharding.mesh_sizes(flags.devices, config.model.num_experts, **asked)
  mesh = sharding.abstract_mesh(sizes)
  sizes_lib.check(config, mesh)
  notes = sizes_lib.check_padding(config, mesh)
  found = cost.cost(config, sizes)
  title = f'{flags.devices} {flags.chip}: {tables.mesh_name(sizes)}'
  tables.estimated(found, chip, sizes, title, notes)
  fits = found.peak <= chip.memory
  if not fits:
    print(
      f'The step does not fit: a device would hold {found.peak / 2**30:.1f} GiB'
      f' and has {chip.memory / 2**30:.1f}. {cost.WAYS_OUT} --search tries'
      ' them all.'
    )
  seconds = cost.seconds(found.work, chip, sizes)
  return {
    'chip': flags.chip,
    'sizes': sizes,
    'fits': fits,
    'notes': notes,
    'peak': found.peak,
    'cost': dataclasses.asdict(found),
    'seconds': dataclasses.asdict(seconds) | {'step': seconds.step},
  }, fits


def _searched(flags, load):
  from rich.console import Console
  from rich.progress import track

  from st_moe.plan import chips, search, tables, topology

  config, chip = topology.resolved(load()), chips.named(flags.chip)
  console = Console(stderr=True)

  def watch(meshes):
    said = f'{len(meshes)} meshes of {flags.devices} {flags.chip}'
    print(f'{said}, several ways to train on each')
    quiet = not console.is_terminal
    return track(meshes, said, console=console, transient=True, disable=quiet)

  ranked = search.candidates(config, flags.devices, chip, watch=watch)
  with console.status(f'which of {len(ranked):,} ways fit, the fastest first'):
    found = list(search.fitting(config, ranked, chip, count=10))
  if not found:
    print(
      f'Nothing fits on {flags.devices} {flags.chip}: of {len(ranked)} ways to'
      f' run this, every one needs more than {chip.memory / 2**30:.1f} GiB a'
      ' device. Take more devices, or less of a model.'
    )
  else:
    tables.ranked(found, chip)
  return {
    'chip': flags.chip,
    'devices': flags.devices,
    'tried': len(ranked),
    'ranked': [
      {
        'sizes': candidate.sizes,
        'dispatcher': candidate.config.model.moe.dispatcher.name,
        'groups': {
          s: candidate.config.model.stack(s).group_size
          for s in candidate.config.model.stacks
        },
        'microbatches': candidate.config.microbatches,
        'remat': candidate.config.model.remat,
        'seconds': dataclasses.asdict(candidate.seconds)
        | {'step': candidate.seconds.step},
        'peak': held.peak,
      }
      for candidate, held in found
    ],
  }, bool(found)


def _compiled(flags, load):
  from st_moe.plan import chips, tables, topology

  chip = chips.named(flags.topology.partition(':')[0])
  found = topology.compile_step(load(), flags.topology)
  tables.compiled(found, chip, f'train step on {flags.topology}, a device')
  fits = found.memory['peak'] <= chip.memory
  return {
    'topology': flags.topology,
    'fits': fits,
    'compiled': dataclasses.asdict(found),
  }, fits


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
