"""The train step through the real TPU compiler, on a machine without TPUs."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from st_moe import sharding
from st_moe.config import Config
from st_moe.model.transformer import Transformer
from st_moe.plan import chips, cost, hlo
from st_moe.run import begin
from st_moe.train import optimizer, step
from st_moe.train import sizes as sizes_lib
from st_moe.train.state import parameter_axes, starting


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one train step, for each device."""

  memory: dict[str, int]  # Bytes: arguments, temporaries, code, peak.
  flops: float  # Of matrix products, loops in full.
  bytes: float  # Read and written, loops in full (estimated).
  exchanges: list[hlo.Exchange]
  expected: cost.Cost  # By arithmetic.
  warnings: list[str]  # Of tokens and copies that travel without need.
  seconds: float  # To compile.


def devices(topology: str) -> list:
  """The chips of 'v5p:4x4x8', none of them there.

  Raises:
    ValueError: there is no such topology.
  """
  from jax.experimental import topologies

  # Both cores of a chip as one device, as JAX has them on the chip itself.
  v4 = {'chip_config_name': 'megacore'} if topology.startswith('v4:') else {}
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **v4
    ).devices
  except Exception as e:
    raise ValueError(
      f'--topology={topology}: {str(e).splitlines()[0]} Write GENERATION:SHAPE,'
      ' as v5e:4x4 or v5p:4x4x8.'
    ) from None


def compile_step(config: Config, topology: str) -> Compiled:
  """Compiles the train step of `config` for a slice of TPUs.

  Raises:
    ValueError: the mesh does not fit the slice, or a dimension the mesh.
    cost.DoesNotFit: there is no room.
  """
  config, slice_ = resolved(config), devices(topology)
  chip = chips.named(topology.partition(':')[0])
  cost.check_room(config, len(slice_), chip)
  began = time.monotonic()
  with _stderr() as said:
    mesh = sharding.make_mesh(
      **dataclasses.asdict(config.mesh),
      num_experts=config.model.num_experts,
      devices=slice_,
    )
    sizes_lib.check(config, mesh)
    notes = sizes_lib.check_padding(config, mesh)
    with sharding.use(mesh):
      lowered = lower(config, mesh)
      try:
        compiled = lowered.compile()
      except jax.errors.JaxRuntimeError as e:
        raise _plainly(e, topology) from None
  return Compiled(
    **figures(compiled, mesh),
    expected=cost.cost(config, dict(mesh.shape)),
    warnings=[*notes, *_warnings(said)],
    seconds=time.monotonic() - began,
  )


def figures(compiled, mesh) -> dict:
  """What each device does in a compiled program: fields of `Compiled`."""
  program = hlo.Program(compiled.as_text())
  costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
  in_full = program.traffic() / program.traffic(once=True)
  return dict(
    memory=_memory(memory),
    flops=program.flops(),
    bytes=costs['bytes accessed'] * in_full,
    exchanges=program.exchanges(dict(mesh.shape)),
  )


def resolved(config: Config) -> Config:
  """`config` as accelerators would train it: vocabulary and dtype settled."""
  config = begin.with_vocabulary_size(config, None)
  if config.model.dtype != 'auto':
    return config
  model = dataclasses.replace(config.model, dtype='bfloat16')
  return dataclasses.replace(config, model=model)


def lower(config: Config, mesh):
  """The train step of `config` on `mesh`, lowered; nothing is allocated."""
  model, data = Transformer(config.model), config.data
  tx = optimizer.make(config.optimizer, parameter_axes(model))
  plan = starting(model, tx, mesh)
  split = sharding.batch_sharding(mesh)

  def array(stack, dtype=jnp.int32):
    shape = data.batch_size, data.length(stack)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

  last = config.model.stacks[-1]
  batch = {
    **{f'{s}_input_tokens': array(s) for s in config.model.stacks},
    f'{last}_target_tokens': array(last),
    f'{last}_loss_weights': array(last, jnp.float32),
    'task': jax.ShapeDtypeStruct((data.batch_size,), jnp.int32, sharding=split),
  }
  run = jax.jit(
    step.make_train_step(model, tx, config),
    donate_argnums=0,
    out_shardings=(plan.shardings, None),
  )
  return run.lower(sharding.placed(plan.shapes, plan.shardings), batch)


def _memory(stats) -> dict[str, int]:
  found = {
    'arguments': stats.argument_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes,
    'outputs': stats.output_size_in_bytes - stats.alias_size_in_bytes,
    'code': stats.generated_code_size_in_bytes,
  }
  return {**found, 'peak': sum(found.values())}


def _plainly(e: Exception, topology: str) -> ValueError:
  line = str(e).splitlines()[0]
  if 'RESOURCE_EXHAUSTED' not in line:
    return ValueError(f'The compiler for {topology} refused the step: {line}')
  return cost.DoesNotFit(
    f'The step does not fit on {topology}: {line.partition(": ")[2]}'
    f' {cost.WAYS_OUT}'
  )


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
  """Takes what is written to stderr, by C++ too, and lists it at the end."""
  said = []
  with tempfile.TemporaryFile() as kept:
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(kept.fileno(), 2)
    try:
      yield said
    finally:
      sys.stderr.flush()
      os.dup2(before, 2)
      os.close(before)
      kept.seek(0)
      said.extend(kept.read().decode(errors='replace').splitlines())


def _warnings(said: list[str]) -> list[str]:
  """What the partitioner could only do through whole copies, each once."""
  sign = 'Involuntary full rematerialization'
  found = (sign + line.partition(sign)[2] for line in said if sign in line)
  return sorted(set(found))
