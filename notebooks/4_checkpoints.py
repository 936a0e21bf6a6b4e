# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Bring a checkpoint
#
# A checkpoint of HuggingFace comes in with a report of every tensor, becomes
# sparse, and goes out again to T5X. Two minutes on two CPU cores.
#
# No network is needed, so the foreign checkpoint is not one: it is a tiny T5 1.1,
# trained here for a minute and written in HuggingFace's format by `st_moe`
# itself. With a network put `hf:google/t5-v1_1-small` in the second cell, or
# `hf:FOLDER` or `t5x:FOLDER` of yours; all cells after the first are the same.

# %% tags=["install"]
# Does nothing where st_moe is installed. Else SOURCE says from where: the folder
# of a clone, as here, or the URL of its repository, git+https://...
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get('ST_MOE', '..')
if importlib.util.find_spec('st_moe') is None:
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet', SOURCE]
  subprocess.run(pip, check=True)

# %% tags=["parameters"]
source = ''  # FORMAT:PLACE; '' makes one.
steps = 150  # Of the model that is made.
upcycled_steps = 100  # Thousands, on an accelerator.

# %%
import importlib.util
import shutil

import st_moe
from st_moe.analysis import figures
from st_moe.interop import convert
from st_moe.run import compare

# %% [markdown]
# ## A dense model of another code

# %%
text = {
  'data.mixture': {'python_reference': 1.0},
  'data.inputs_length': 128,
  'data.targets_length': 29,
  'data.batch_size': 16,
  'optimizer.learning_rate': 0.01,
  'max_padding': 0.0,
  'checkpoint.every': 50,
  'evaluate.every': 25,
  'evaluate.batches': 8,
  'log.every': 50,
}
if not source:
  small = {
    'total_steps': steps,
    'optimizer.warmup_steps': 50,
    'data.vocabulary_size': 2048,
    'model.vocab_size': 0,
    'model.embed_dim': 128,
    'model.num_heads': 4,
    'model.head_dim': 32,
    'model.mlp_dim': 256,
    'model.relpos_init_scale': 25.0,
    'model.encoder.num_layers': 2,
    'model.decoder.num_layers': 2,
  }
  dense = st_moe.load_config('t5_1_1:size=small', text | small)
  st_moe.train(dense, 'runs/parent')
  shutil.rmtree('runs/parent_hf', ignore_errors=True)
  print(*convert.convert('runs/parent', 'hf:runs/parent_hf'), sep='\n')
  source = 'hf:runs/parent_hf'

# %% [markdown]
# ## In
#
# Every tensor is accounted for: mapped, tied to another, or unused. Where
# `transformers` and `torch` are installed, the logits of both codes are compared
# too, and nothing is written if they differ by a thousandth of the largest.

# %%
verify = all(map(importlib.util.find_spec, ('transformers', 'torch')))
shutil.rmtree('runs/imported', ignore_errors=True)
report = convert.convert(source, 'st_moe:runs/imported', verify=verify)
print(*report, sep='\n')

# %% [markdown]
# Scores of the checkpoint as it is read from its own files, and of the copy:

# %%
prompts = ['The <extra_id_0> statement ends', 'A <extra_id_0> is an object']
targets = ['<extra_id_0> return', '<extra_id_0> class']
theirs = st_moe.load(source).score(prompts, targets)
ours = st_moe.load('runs/imported').score(prompts, targets)
theirs, ours

# %% [markdown]
# ## Dense into sparse
#
# `init_take='upcycle'` makes every expert of every second layer a copy of the
# feed-forward layer that was there; the routers are new
# ([Sparse Upcycling](https://arxiv.org/abs/2212.05055)). The weights of a token's
# two experts add up to 1, so where no token is dropped the new model says
# exactly what the old one says.

# %%
sparse = {
  'init': 'runs/imported',
  'init_take': 'upcycle',
  'total_steps': upcycled_steps,
  'model.dropout': 0.0,
  'model.moe.expert_dropout': 0.0,
  'model.moe.num_experts': 8,
  'model.moe.extra_ffn': 'none',
  'model.encoder.sparse_every': 2,
  'model.encoder.sparse_offset': 1,
  'model.encoder.group_size': 1024,
  'model.decoder.sparse_every': 2,
  'model.decoder.sparse_offset': 1,
  'model.decoder.group_size': 232,
}
config = st_moe.load_config('finetune:mixture=python_reference', text | sparse)
last = st_moe.train(config, 'runs/upcycled')

# %%
compare.curves(['runs/parent', 'runs/upcycled'])

# %% [markdown]
# The child begins where its parent ended. What its experts are for now, in two
# of the texts:

# %%
child = st_moe.load('runs/upcycled')
trace = child.inspect(prompts, targets)
figures.tokens(trace, child.vocabulary)

# %% [markdown]
# ## Out again
#
# T5X and Flaxformer have names for all that an ST-MoE has; HuggingFace has them
# for Switch alone, and a model with other parts is refused.

# %%
shutil.rmtree('runs/t5x', ignore_errors=True)
out = convert.convert('runs/upcycled', 't5x:runs/t5x/checkpoint_100')
print(*out, sep='\n')

# %% [markdown]
# And in. Such a checkpoint has tensors, and its gin file says how they are
# routed; without one it is taken for Flaxformer's Switch. So what is different is
# said: two experts a token, whose weights add up to 1.

# %%
shutil.rmtree('runs/back', ignore_errors=True)
routing = {'name': 'top_k', 'k': 2, 'normalize': True}
back = convert.convert(
  't5x:runs/t5x/checkpoint_100',
  'st_moe:runs/back',
  overrides={'model.moe.selector': routing},
)
print(*back, sep='\n')

# %%
before = child.score(prompts, targets)
after = st_moe.load(
  'runs/back', vocabulary='runs/upcycled/vocabulary.model'
).score(prompts, targets)
before, after

# %% tags=["result"]
{
  'in differs by': round(
    max(abs(a - b) for a, b in zip(theirs, ours, strict=True)), 6
  ),
  'out differs by': round(
    max(abs(a - b) for a, b in zip(before, after, strict=True)), 6
  ),
  'parameters': [report[0], out[0]],
  'loss': round(float(last['eval/python_reference/loss']), 2),
}
