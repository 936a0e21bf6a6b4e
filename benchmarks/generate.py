"""Greedy decoding against HuggingFace Switch: same weights, same prompts.

  python benchmarks/generate.py --experts=8,32 --batch=1,16

Needs the extra `hf`. Calls alternate in one process, after both have been run
once; what ours takes longer the first time is its compilation. Prints a table
and, last, one line of JSON.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from st_moe import paths, sharding
from st_moe.config import (
  Capacity,
  Config,
  ModelConfig,
  MoEConfig,
  Part,
  StackConfig,
)
from st_moe.decode import decoding, methods
from st_moe.interop import huggingface
from st_moe.model.transformer import Transformer
from st_moe.routing.selectors import dropless  # noqa: E402

PROMPT = 64


def model_config(experts: int) -> ModelConfig:
  """Width 256, hidden 1024, 8 heads of 32; 2 of 4 layers a stack are sparse."""
  stack = StackConfig(4, sparse_every=2, sparse_offset=1, group_size=512)
  places = Capacity(count=PROMPT)  # Theirs drops nobody either.
  return ModelConfig(
    vocab_size=4096,
    embed_dim=256,
    num_heads=8,
    head_dim=32,
    mlp_dim=1024,
    activation=Part('relu'),
    tie_embeddings=True,
    encoder=stack,
    decoder=stack,
    moe=MoEConfig(
      num_experts=experts,
      selector=Part.of('top_k', k=1),
      extra_ffn='none',
      group_by='sequence',
      train_capacity=places,
      eval_capacity=places,
    ),
    init_scale=1.0,
    dropout=0.0,
    dtype='float32',
  )


def _theirs(config, params):
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count())
  with tempfile.TemporaryDirectory() as folder:
    huggingface.save(f'{folder}/model', params, Config(model=config), None)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
      f'{folder}/model'
    ).eval()

  def generate(prompts, length):
    ids = torch.tensor(prompts, dtype=torch.long)
    with torch.no_grad():
      return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        num_beams=1,
      )[:, 1:].numpy()

  return generate


def _seconds(call) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def compare(experts: int, batch: int, length: int, repeats: int) -> dict:
  config = model_config(experts)
  scanned = Transformer(config)
  one = np.ones((1, 1), np.int32)
  init = functools.partial(scanned.init, enable_dropout=False)
  params = sharding.unbox(jax.jit(init)(jax.random.key(0), one, one, one))[
    'params'
  ]
  theirs = _theirs(config, params)

  config = dataclasses.replace(dropless(config), scan_layers=False)
  params = paths.unroll(params, scanned.config)
  # A minimum length forbids the EOS.
  method = methods.Method(max_length=length, forbidden=(1,))
  run = functools.partial(decoding.generate, Transformer(config), method=method)
  compiled = jax.jit(run)
  ours = lambda: np.asarray(compiled(params, prompts).tokens)[:, 0]

  prompts = np.random.default_rng(0).integers(
    2, 4096, (batch, PROMPT), np.int32
  )
  first = _seconds(ours)
  want = theirs(prompts, length)
  a, b = [], []
  for _ in range(repeats):
    a.append(_seconds(ours))
    b.append(_seconds(lambda: theirs(prompts, length)))
  ours_s, hf_s = statistics.median(a), statistics.median(b)
  return {
    'experts': experts,
    'batch': batch,
    'ours_tokens_per_s': batch * length / ours_s,
    'hf_tokens_per_s': batch * length / hf_s,
    'ratio': hf_s / ours_s,
    'compile_s': first - ours_s,
    'same_tokens': float((ours() == want).mean()),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  several = lambda text: [int(n) for n in text.split(',')]
  parser.add_argument('--experts', type=several, default=[8, 32])
  parser.add_argument('--batch', type=several, default=[1, 16])
  parser.add_argument('--length', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=5)
  flags = parser.parse_args()
  rows = []
  print('experts batch     ours tokens/s     hf tokens/s  ratio  compile  same')
  for experts in flags.experts:
    for batch in flags.batch:
      row = compare(experts, batch, flags.length, flags.repeats)
      rows.append(row)
      print(
        f'{experts:7} {batch:5} {row["ours_tokens_per_s"]:17,.0f}'
        f' {row["hf_tokens_per_s"]:15,.0f} {row["ratio"]:6.2f}'
        f' {row["compile_s"]:6.1f} s {row["same_tokens"]:5.1%}',
        flush=True,
      )
  print(json.dumps(rows))


if __name__ == '__main__':
  main()
