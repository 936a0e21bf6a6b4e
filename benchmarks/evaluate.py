"""What an evaluation costs beyond its forward passes.

  python benchmarks/evaluate.py --checkpoint=runs/mini --data_dir=DIR

Scores the validation sets of SuperGLUE, compilation included, then times the
forward pass of each shape of batch again, alone and compiled. Questions / batch
size x that time, summed over shapes, is what full batches would cost. Prints a
table of shapes and, last, one line of JSON.
"""

import argparse
import collections
import dataclasses
import json
import statistics
import time

import jax

import st_moe
from st_moe.data.eval_data import EvalData
from st_moe.data.mixture import Library
from st_moe.infer.evaluator import Evaluator


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--data_dir', default='')
  parser.add_argument('--mixture', default='super_glue')
  parser.add_argument('--inputs_length', type=int, default=256)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--decode', action='store_true')
  flags = parser.parse_args()

  start = time.perf_counter()
  loaded = st_moe.load(flags.checkpoint)
  data = dataclasses.replace(
    loaded.config.data,
    inputs_length=flags.inputs_length,
    targets_length=16,
    data_dir=flags.data_dir,
  )
  asked = dataclasses.replace(
    loaded.config.evaluate,
    batch_size=flags.batch_size,
    batches=0,
    decode=flags.decode,
  )
  config = dataclasses.replace(loaded.config, data=data, evaluate=asked)
  library = Library(data, loaded.vocabulary)
  names = library.members(flags.mixture)
  sources = [EvalData(library, n) for n in names]
  examples = sum(len(source.examples) for source in sources)
  ready = time.perf_counter()

  evaluator = Evaluator(loaded.model, config, loaded.vocabulary, loaded.mesh)
  calls = _record(evaluator)
  evaluator.measure(loaded.params, sources)
  seconds = time.perf_counter() - ready

  ideal = 0.0
  print('     prompts   answers  batches  questions  seconds a batch')
  for shape, (given, run, batches, questions) in sorted(calls.items()):
    each = _seconds(run, loaded.params, given)
    ideal += questions / shape[0][0] * each
    print(
      f'{shape[0]!s:>12}{shape[1][1:]!s:>10}{batches:9}{questions:11}{each:17.3f}'
    )
  row = {
    'examples': examples,
    'read_s': ready - start,
    'evaluate_s': seconds,
    'forward_s': ideal,
    'ratio': seconds / ideal,
  }
  print(json.dumps(row))


def _record(evaluator):
  """Shape -> one batch, what runs it, how many there were, and questions."""
  asker, calls = evaluator._asker, {}
  compiled, run = asker._compiled, asker._run
  questions = collections.deque()

  def counting(params, batch, shape, size):
    questions.append(len(batch))
    return run(params, batch, shape, size)

  def recording(room):
    step = compiled(room)

    def call(params, prompts, answers):
      shape = prompts.shape, answers.shape, room
      _, _, batches, n = calls.get(shape, (None, None, 0, 0))
      n += questions.popleft()
      calls[shape] = (prompts, answers), step, batches + 1, n
      return step(params, prompts, answers)

    return call

  asker._run, asker._compiled = counting, recording
  return calls


def _seconds(run, params, given, repeats=3):
  found = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(params, *given))
    found.append(time.perf_counter() - start)
  return statistics.median(found)


if __name__ == '__main__':
  main()
