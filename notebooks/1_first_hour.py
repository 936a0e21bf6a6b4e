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
# # First hour
#
# Trains a small ST-MoE on the text that every Python has with it, lets it fill
# gaps, and shows where its routers send the words of a sentence of yours. Two
# minutes on two CPU cores, most of it training.

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
steps = 600  # The config itself says 800.
sentence = (
  'The break statement may only occur in a for or while loop, not in 1+2.'
)

# %%
import st_moe
from st_moe.analysis import figures
from st_moe.run import compare

# %% [markdown]
# ## Train
#
# `st_moe_tiny` ships with the package: an encoder and a decoder of two layers,
# with 8 experts in each sparse one. Any field of a config can be set; here both
# layers of the encoder become sparse, so that there are two routers to compare.
# Run this cell again and it goes on where it was stopped.

# %%
config = st_moe.load_config(
  'st_moe_tiny',
  {
    'total_steps': steps,
    'model.encoder.sparse_every': 1,
    'model.encoder.sparse_offset': 0,
    'evaluate.every': 100,
  },
)
last = st_moe.train(config, 'runs/first_hour')

# %%
compare.curves(['runs/first_hour'])

# %% [markdown]
# ## Ask
#
# A checkpoint needs nothing beside it. This model was trained to put back spans
# that were taken out of a text, so it fills gaps called `<extra_id_0>`,
# `<extra_id_1>` and so on. After so few steps it knows little more than which
# words are frequent.

# %%
model = st_moe.load('runs/first_hour')
model.fill(
  [
    'The <extra_id_0> statement is used to <extra_id_1> a loop.',
    'If the object is a class <extra_id_0>, the attribute is looked up.',
  ]
)

# %% [markdown]
# ## Look inside
#
# Each token meets two of the eight experts of every sparse layer. The picture has
# the one that the router likes best: colour and number are the expert's. Look for
# words, endings, punctuation and digits that go the same way.

# %%
trace = model.inspect([sentence], scores=True)
figures.tokens(trace, model.vocabulary)

# %% [markdown]
# The second choices:

# %%
figures.tokens(trace, model.vocabulary, choice=1)

# %% [markdown]
# A trace is columns of numbers, with a row for each token in each sparse layer.
# The first five: the token, its two experts and the weights of their answers.

# %%
list(
  zip(
    map(model.vocabulary.piece, trace.token[:5].tolist()),
    trace.expert[:5].tolist(),
    trace.weight[:5].astype(float).round(2).tolist(),
    strict=True,
  )
)

# %% [markdown]
# What to try next: your own sentence in the second cell, more steps, the other
# notebooks.

# %% tags=["result"]
{
  'loss': round(float(last['eval/python_reference/loss']), 2),
  'layers': [str(layer) for layer in trace.layers],
  'tokens': len(trace.at('encoder.0')),
  'experts met': len(set(trace.expert.ravel().tolist())),
}
