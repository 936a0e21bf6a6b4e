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
# # Pre-train on your text
#
# A vocabulary made from your text, a sparse model and its dense twin trained on
# it, and their curves side by side. Two minutes on two CPU cores.

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
# Globs of .txt, .jsonl or .json, plain or .gz, on a disk or in gs://; '' takes
# the Python reference manual.
train_text = ''
validation_text = ''
steps = 200  # Thousands, on an accelerator.
vocabulary_size = 2048  # 32,000 is usual, where there is text enough.
sentence = 'An asynchronous generator is an iterator, too.'

# %%
import json
import pathlib
from pydoc_data import topics

import st_moe
from st_moe import paths
from st_moe.data import sources, vocabulary
from st_moe.run import compare

# %% [markdown]
# ## Text
#
# A row `{"text": ...}` a document, or a .txt with blank lines between documents.
# Without text of your own: every 20th chapter of the manual is for validation.

# %%
folder = pathlib.Path('runs/text')
folder.mkdir(parents=True, exist_ok=True)
if not train_text:
  documents = [json.dumps({'text': text}) for text in topics.topics.values()]
  (folder / 'validation.jsonl').write_text('\n'.join(documents[::20]))
  del documents[::20]
  (folder / 'train.jsonl').write_text('\n'.join(documents))
  train_text = 'runs/text/train.jsonl'
  validation_text = 'runs/text/validation.jsonl'

# %% [markdown]
# ## Vocabulary
#
# SentencePiece, as T5 has it, with 100 sentinels behind the pieces. A run trains
# one by itself; made beforehand, several runs can share it.

# %%
vocab = vocabulary.train(
  sources.documents(train_text),
  'runs/text/vocabulary.model',
  size=vocabulary_size,
)
' '.join(map(vocab.piece, vocab.encode(sentence)))

# %% [markdown]
# ## Sparse and dense
#
# The dense twin has the same layers, each sparse one replaced by a feed-forward
# layer as wide as the hidden units that the experts compute per token: the same
# work, fewer parameters.

# %%
fields = {
  'total_steps': steps,
  'data.mixture': {'mine': 1.0},
  'data.files.mine.train': train_text,
  'data.files.mine.validation': validation_text,
  'data.vocabulary': 'runs/text/vocabulary.model',
  'evaluate.every': 50,
  'log.every': 25,
}
sparse = st_moe.load_config('st_moe_tiny', fields)
last_sparse = st_moe.train(sparse, 'runs/sparse')

# %%
dense = st_moe.load_config('st_moe_tiny:dense', fields)
last_dense = st_moe.train(dense, 'runs/dense')

# %% [markdown]
# ## Curves

# %%
compare.curves(['runs/sparse', 'runs/dense'])

# %%
compare.compare(['runs/sparse', 'runs/dense'])

# %% [markdown]
# So short a run of so small a model is no verdict on sparse models. Longer
# comparisons, good and bad, are in EXPERIMENTS.md of the repository.
#
# ## Are the routers well?
#
# Tokens that no expert had a place for, in training, and the entropy of a
# router's probabilities: ln 8 = 2.08 nats is no preference at all.

# %%
compare.curves(['runs/sparse'], '*/dropped_tokens', 'share of tokens')

# %%
compare.curves(['runs/sparse'], '*/router_entropy', 'nats')

# %% tags=["result"]
models = {name: st_moe.load(f'runs/{name}') for name in ('sparse', 'dense')}
{
  'loss': {
    'sparse': round(float(last_sparse['eval/mine/loss']), 2),
    'dense': round(float(last_dense['eval/mine/loss']), 2),
  },
  'parameters': {
    name: sum(paths.count(model.params).values())
    for name, model in models.items()
  },
  'vocabulary': vocab.size,
}
