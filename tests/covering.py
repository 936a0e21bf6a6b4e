"""One device and eight say the same, over a table in which every pair meets.

  python -m tests.covering --output=runs/covering.jsonl

A case is a mesh of eight devices and a way to run the model on it: how many
experts, scanned or not, which dispatcher and transport, how many microbatches,
padded or packed rows, places for few or for all. Each two of these choices
that go together meet in some case. Three steps of SGD by `make_train_step`, and
one of Adafactor from where they begin, are compared with those of one device,
unrolled, undivided, with the masks of the oracle: every metric, gradient,
parameter, update and slot by ||a - b|| / ||b||, the load of every expert to the
token.

Each case ends as a line of JSON; those in the file already are not run again.
The exit status is 1 where a case differs.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import random
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from st_moe import paths, sharding
from st_moe.config import (
  Capacity,
  Config,
  DataConfig,
  OptimizerConfig,
  Part,
  StackConfig,
)
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer, sizes, step
from st_moe.train.state import parameter_axes, starting
from tests.helpers import (
  distance,
  examples,
  jit,
  packed_batch,
  padded_batch,
  random_params,
  tiny,
)

TOLERANCE = 2e-5
MARGIN = 1e-4  # Wider than rounding, of what it could turn over.
STEPS, SGD_RATE = 3, 0.5


@dataclasses.dataclass(frozen=True)
class Case:
  mesh: tuple[int, int, int, int]  # Along `sharding.AXES`.
  experts: str  # 'fewer', 'equal' or 'more' than the expert axis is long.
  scan: bool
  transport: str
  dispatcher: str
  microbatches: int
  rows: str  # 'padded' or 'packed'.
  capacity: str  # One of `CAPACITIES`.

  @property
  def axes(self) -> dict[str, int]:
    return dict(zip(sharding.AXES, self.mesh, strict=True))

  @property
  def num_experts(self) -> int:
    axis = self.axes['expert']
    return {'fewer': axis // 2, 'equal': axis, 'more': 4 * axis}[self.experts]

  def __str__(self) -> str:
    return ' '.join(
      [
        *(f'{axis} {size}' for axis, size in self.axes.items() if size > 1),
        f'experts {self.num_experts}',
        'scan' if self.scan else 'unrolled',
        self.dispatcher,
        self.transport,
        f'microbatches {self.microbatches}',
        self.rows,
        self.capacity,
      ]
    )


CAPACITIES = {
  'tight': Capacity(0.75, minimum=1),
  'dropless': Capacity(dropless=True),
}
LEVELS = {
  'mesh': [
    mesh
    for mesh in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
    if math.prod(mesh) == 8
  ],
  'experts': ['fewer', 'equal', 'more'],
  'scan': [True, False],
  'transport': ['gspmd', 'shard_map'],
  'dispatcher': ['index', 'grouped'],
  'microbatches': [1, 4],
  'rows': ['padded', 'packed'],
  'capacity': list(CAPACITIES),
}
# What is compared of each step; the last two of the first one.
KINDS = ('metrics', 'gradients', 'sgd', 'adafactor', 'slots')


def valid_cases() -> list[Case]:
  cases = (Case(*levels) for levels in itertools.product(*LEVELS.values()))
  return [case for case in cases if case.num_experts]


def pairs(case: Case) -> set:
  """Each two choices of `case`, a mesh being one and each of its axes another.

  How many experts there are meets the axes only: with 20 meshes that would be
  ten cases more, for meshes that `make_mesh` turns into others of the table.
  """
  both = itertools.combinations({**vars(case), **case.axes}.items(), 2)
  return {(a, b) for a, b in both if {a[0], b[0]} != {'mesh', 'experts'}}


def uncovered(cases) -> set:
  """Pairs of valid cases that meet in none of `cases`."""
  return set().union(*map(pairs, valid_cases())).difference(*map(pairs, cases))


@functools.cache
def table() -> tuple[Case, ...]:
  """Cases that cover every pair, by greed: always the one with most new.

  Of equals one drawn at random, of those with a choice of experts if it can be.
  """
  cases = valid_cases()
  random.Random(0).shuffle(cases)
  cases.sort(key=lambda case: case.num_experts == 1)
  new = {case: pairs(case) for case in cases}
  left, chosen = uncovered([]), []
  while left:
    chosen.append(max(new, key=lambda case: len(new[case] & left)))
    left -= new[chosen[-1]]
  return tuple(chosen)


# What runs.

# The encoder has 256 tokens, the decoder 192: with groups of 16 a microbatch is
# whole groups, and 12 of the decoder's need 4 empty ones on eight shards.
ROWS, LENGTHS, GROUP = 32, (8, 6), 16


def _config(case: Case) -> Config:
  experts = case.num_experts
  model = tiny(
    num_heads=8,
    head_dim=4,
    encoder=StackConfig(2, 1, 0, GROUP),
    decoder=StackConfig(2, 1, 0, GROUP),
    scan_layers=case.scan,
    moe={
      'num_experts': experts,
      'selector': Part.of('top_k', k=min(2, experts), train_policy='all'),
      'train_capacity': CAPACITIES[case.capacity],
      'dispatcher': case.dispatcher,
      'transport': case.transport,
    },
  )
  return Config(
    model=model,
    microbatches=case.microbatches,
    data=DataConfig(
      batch_size=ROWS, inputs_length=LENGTHS[0], targets_length=LENGTHS[1]
    ),
    optimizer=OptimizerConfig(min_dim_to_factor=8),
  )


def _batch(config: Config, packed: bool, seed: int) -> dict:
  """Rows of one example, or of two half as long; the last four are empty."""
  rng, parts = np.random.default_rng(seed), 2 if packed else 1
  length = lambda n: rng.integers(1, n // parts, endpoint=True)
  lengths = [tuple(map(length, LENGTHS)) for _ in range(parts * (ROWS - 4))]
  rows = examples(config.model, [*lengths, *[(0, 0)] * (4 * parts)], seed)
  batch = packed_batch if packed else padded_batch
  batch = batch(config.model, rows, LENGTHS)
  real = batch['decoder_target_tokens'] > 0
  return {**batch, 'decoder_loss_weights': real.astype(np.float32)}


def _params(model: Transformer, inputs: dict, seed: int) -> dict:
  """Weights as an untrained model has them, and routers that are sure.

  Larger ones saturate attention: rounding is then a hundred times as loud in
  the gradients, and each step of SGD makes it ten times louder.
  """

  def calm(path, leaf):
    if path.endswith('scale'):
      return leaf
    bold = {'token_embedder': 3, 'router': 2}
    return leaf * next((n for part, n in bold.items() if part in path), 0.5)

  return paths.map_by_path(calm, random_params(model, **inputs, seed=seed))


def _sgd_beside(adafactor) -> optax.GradientTransformation:
  """SGD that keeps its gradients, and what `adafactor` would make of them.

  So one program, which is the costly part of a case, shows both.
  """

  def init(boxed):
    zeros = jax.tree.map(jnp.zeros_like, boxed)
    return zeros, zeros, *adafactor.init(boxed)

  def update(gradients, state, params):
    updates, slots = adafactor.update(gradients, state[2:], params)
    steps = jax.tree.map(lambda g: -SGD_RATE * g, gradients)
    return steps, (gradients, updates, *slots)

  return optax.GradientTransformation(init, update)


def _stepper(config: Config, mesh):
  """`(params, batches) -> a tree of each of `KINDS` a step`, compiled once.

  Parameters come, and trees go, in the layout of the unrolled model.
  """
  model, scanned = Transformer(config.model), config.model.scan_layers
  sizes.check(config, mesh)
  with sharding.use(mesh):
    adafactor = optimizer.make(config.optimizer, parameter_axes(model))
    tx = _sgd_beside(adafactor)
    plan = starting(model, tx, mesh)
  train_step = jit(
    step.make_train_step(model, tx, config),
    donate_argnums=0,
    out_shardings=(plan.shardings, None),
  )

  def trees(state, metrics):
    gradients, updates, slots, *_ = state.opt_state
    found = (gradients, state.params, updates, slots.moments)
    if scanned:
      found = (paths.unroll(tree, config.model) for tree in found)
    return dict(zip(KINDS, (metrics, *found), strict=True))

  def run(params, batches):
    params = paths.roll(params, config.model) if scanned else params
    with sharding.use(mesh):
      params = jax.device_put(params, plan.shardings.params)
      state, found = plan.begin(params), []
      for batch in batches:
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, metrics = train_step(state, batch)
        found.append(trees(*jax.device_get((state, metrics))))
    for later in found[1:]:  # Where SGD has gone, not Adafactor.
      del later['adafactor'], later['slots']
    return found

  return run


# One device.


@dataclasses.dataclass(frozen=True)
class Reference:
  """What one device says, and how far it is from being decided by rounding."""

  seed: int
  params: dict
  batches: list[dict]
  steps: list[dict]
  route_margin: float
  sign_margin: float


@functools.cache
def _reference(plain: Case) -> Reference:
  """That of the first seed whose margins are wide enough."""
  config = _config(plain)
  model = Transformer(config.model)
  run = _stepper(config, sharding.make_mesh(devices=jax.devices()[:1]))
  route = jit(
    lambda params, inputs: model.apply(
      {'params': params}, **inputs, mutable='routing'
    )[1]['routing']
  )
  packed = plain.rows == 'packed'
  for seed in range(100):
    batches = [_batch(config, packed, STEPS * seed + i) for i in range(STEPS)]
    inputs = [step.inputs_of(batch, config.model) for batch in batches]
    params = _params(model, inputs[0], seed)
    steps = run(params, batches)
    before = [params, *(found['sgd'] for found in steps)]
    routed = map(route, before[:-1], inputs)
    margins = min(map(_route_margin, routed)), _sign_margin(steps[0])
    _check_drops(plain, steps)
    if min(margins) > MARGIN:
      return Reference(seed, params, batches, steps, *margins)
  raise AssertionError(f'No seed below 100 is clear enough for {plain}.')


def _check_drops(plain: Case, steps) -> None:
  """Asserts that tokens are dropped in both stacks where places are few."""
  for metrics in (found['metrics'] for found in steps):
    for stack in ('encoder', 'decoder'):
      dropped = metrics[f'{stack}/dropped_routes'] > 0
      assert dropped == (plain.capacity == 'tight'), (plain, stack, metrics)


def reference(case: Case) -> Reference:
  """One device, unrolled, undivided, by the oracle; many cases share it."""
  same = dict(mesh=(1, 1, case.num_experts, 1), experts='equal')
  plain = dict(scan=False, transport='gspmd', dispatcher='mask', microbatches=1)
  return _reference(dataclasses.replace(case, **same, **plain))


def _route_margin(routing) -> float:
  """The least gap between neighbours among the best k + 1 scores of a token.

  Between the first and the second too: first choices are seated first.
  """
  flat = paths.by_path(jax.device_get(routing))
  least = np.inf
  for path in flat:
    if path.endswith('scores/select'):
      asked = flat[path.replace('scores/select', 'seats/asked')]
      g, s, _ = flat[path].shape
      valid = asked.reshape(g, s, -1)
      best = -np.sort(-flat[path])[valid[..., 0]]
      gaps = -np.diff(best[:, : valid.shape[-1] + 1])
      least = gaps.min(initial=least)
  return float(least)


def _sign_margin(found) -> float:
  """The least gradient, over their root mean square, whose sign matters.

  Where it keeps a second moment per weight, Adafactor's first step is the sign.
  """
  gradients, least = paths.by_path(found['gradients']), np.inf
  for path in paths.by_path(found['slots']):
    name, _, moment = path.rpartition('/')
    if moment == 'full':
      g = np.abs(gradients[name])
      least = (g[g > 0] / np.sqrt((g**2).mean())).min(initial=least)
  return float(least)


# Both.


def differences(found, expected) -> dict[str, tuple[float, str]]:
  """For each of `KINDS` the largest relative difference, and of what.

  Whole numbers, the loads of experts among them, differ by 0 or infinity.
  """
  found, expected = paths.by_path(found), paths.by_path(expected)
  assert found.keys() == expected.keys()
  worst = dict.fromkeys(KINDS, (0.0, ''))
  for name, b in expected.items():
    _, kind, *_ = name.split('/')
    a, exact = found[name], np.issubdtype(b.dtype, np.integer)
    off = distance(a, b)
    if np.isnan(off) or exact and (a != b).any():
      off = float('inf')
    worst[kind] = max(worst[kind], (off, name))
  return worst


def compare(case: Case) -> dict:
  """Runs `case`; how it differs from one device, as a line of the report."""
  started, one = time.monotonic(), reference(case)
  mesh = sharding.make_mesh(**case.axes, num_experts=case.num_experts)
  found = _stepper(_config(case), mesh)(one.params, one.batches)
  worst = differences(found, one.steps)
  return {
    'seed': one.seed,
    'route_margin': one.route_margin,
    'sign_margin': one.sign_margin,
    'worst': worst,
    'passed': all(off < TOLERANCE for off, _ in worst.values()),
    'seconds': round(time.monotonic() - started, 1),
  }


# The command.


def _read(path: pathlib.Path) -> dict[Case, dict]:
  """What was found before; a line that a kill cut short leaves the file."""
  if not path.exists():
    return {}
  whole = path.read_text().rpartition('\n')[0]
  path.write_text(whole and f'{whole}\n')
  rows = map(json.loads, whole.splitlines())
  fields = [field.name for field in dataclasses.fields(Case)]
  case = lambda row: Case(
    **{name: row[name] for name in fields} | {'mesh': tuple(row['mesh'])}
  )
  return {case(row): row for row in rows}


def _tried(case: Case) -> dict:
  try:
    return compare(case)
  except Exception as e:  # One that cannot be run is not the end of the others.
    traceback.print_exc()
    return {'passed': False, 'error': f'{type(e).__name__}: {e}'}


def _show(rows: dict[Case, dict]) -> None:
  grid = Table('case', 'seed', *KINDS, 's', '')
  for case, row in rows.items():
    number = lambda kind, row=row: f'{row["worst"][kind][0]:.1e}'
    found = ['-'] * (len(KINDS) + 2)
    if 'worst' in row:
      found = [str(row['seed']), *map(number, KINDS), f'{row["seconds"]:.0f}']
    grid.add_row(str(case), *found, '' if row['passed'] else 'FAILED')
  console = Console(width=160)  # A line a case, in a file too.
  console.print(grid)
  for case, row in rows.items():
    if not row['passed']:
      console.print(f'{case}: {row.get("error") or row["worst"]}', style='red')


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=pathlib.Path, required=True)
  path = parser.parse_args(arguments).output
  path.parent.mkdir(parents=True, exist_ok=True)
  found = _read(path)
  with path.open('a') as out:
    left = [case for case in table() if case not in found]
    for case in track(left, 'cases'):
      found[case] = {**dataclasses.asdict(case), **_tried(case)}
      out.write(json.dumps(found[case]) + '\n')
      out.flush()
      jax.clear_caches()  # Programs that will not run again: 0.3 GB a case.
  found = {case: found[case] for case in table()}
  _show(found)
  return int(not all(row['passed'] for row in found.values()))


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  sys.exit(main())
