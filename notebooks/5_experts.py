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
# # What the experts do
#
# How evenly tokens are spread over experts, which tokens tell one expert from
# another, whether the routers are well, and what is lost without one expert.
# Half a minute on two CPU cores, and another one and a half to train a model if
# the first notebook has not left one.

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
checkpoint = 'runs/first_hour'  # A run of yours, or the one that is made here.
steps = 600
texts = (
  ''  # A glob of .txt or .jsonl; '' takes the manual that it has not seen.
)
examples = 64
pairs_for_losses = 24  # Of these; each expert is switched off for all of them.

# %%
import pathlib

import numpy as np

import st_moe
from st_moe.analysis import figures, health, specialization
from st_moe.data import sources

# %% [markdown]
# ## A model and texts
#
# As it was trained: words are taken out of a text that it has not seen, and the
# decoder says them. Here every sixth word.

# %%
if not pathlib.Path(checkpoint).exists():
  config = st_moe.load_config(
    'st_moe_tiny',
    {
      'total_steps': steps,
      'model.encoder.sparse_every': 1,
      'model.encoder.sparse_offset': 0,
      'evaluate.every': 100,
    },
  )
  st_moe.train(config, checkpoint)
model = st_moe.load(checkpoint)
vocab = model.vocabulary

# %%
if texts:
  documents = sources.documents(texts)
else:
  documents = sources.documents_of('python_reference:validation')
words = [part.split() for text in documents for part in text.split('\n\n')]
words = [some[:48] for some in words if len(some) >= 48][:examples]
prompts = [
  ' '.join(
    f'<extra_id_{n // 6}>' if n % 6 == 3 else word
    for n, word in enumerate(some)
  )
  for some in words
]
targets = [
  ' '.join(
    f'<extra_id_{n // 6}> {word}' for n, word in enumerate(some) if n % 6 == 3
  )
  for some in words
]
print(prompts[0], targets[0], sep='\n\n')

# %%
trace = model.inspect(prompts, targets, scores=True)
len(trace)

# %% [markdown]
# ## Loads
#
# Tokens that come to each expert, two experts a token, in percent of an even
# load. Nothing is dropped here; in training an expert takes only so many.

# %%
figures.load(trace)

# %% [markdown]
# ## What they are for
#
# Tokens that tell an expert from the others, with their lift: how much more
# frequent the token is there than in all of the layer. A decoder begins with
# `<pad>`. (A decoder begins with
# `<pad>`.)

# %%
layers = sorted({str(trace.layers[n]) for n in trace.layer})
for layer in layers:
  print(layer)
  for expert, tops in enumerate(
    specialization.top_tokens(trace, layer, count=6)
  ):
    said = (f'{vocab.piece(top.token)} x{top.lift:.1f}' for top in tops)
    print(f'  {expert}  ', '   '.join(said))

# %% [markdown]
# The same in one text, the first choice of each token:

# %%
figures.tokens(trace.rows(trace.position < 60), vocab)

# %% [markdown]
# The [ST-MoE paper](https://arxiv.org/abs/2202.08906) (section 7) found experts
# for sentinels in its encoder and none in its decoder; a model as small as this
# need not agree. As it measures that: the entropy of how sentinels are spread
# over experts, where ln 8 = 2.08 is evenly.

# %%
sentinel = np.isin(trace.token, vocab.sentinels)
digit = np.isin(trace.token, [vocab.encode(d)[-1] for d in '0123456789'])
spread = {
  name: specialization.entropy(specialization.load(trace.rows(which)))
  for name, which in {
    'all tokens': sentinel | True,
    'sentinels': sentinel,
    'digits': digit,
  }.items()
}
figures.bars(
  {
    str(layer): [spread[name][n] for name in spread]
    for n, layer in enumerate(trace.layers)
  },
  'entropy over experts, nats',
  names=list(spread),
)

# %% [markdown]
# ## Are they well?
#
# Entropy and confidence: how sure a router is of a token. log-Z: what the z-loss
# keeps small, as bfloat16 rounds large logits. Dead experts got no token.

# %%
print('layer       entropy  confidence  log-Z  largest  dropped  busiest  dead')
checks = health.health(trace)
for h in checks:
  print(
    f'{h.layer!s:10}  {h.entropy:7.2f}  {h.confidence:10.2f}  {h.log_z:5.2f}'
    f'  {h.largest_logit:7.1f}  {h.dropped:7.1%}  {h.busiest:7.2f}'
    f'  {list(h.dead) or "none"}'
  )

# %% [markdown]
# ## One expert less
#
# Each expert is switched off in turn (`off='encoder.0.3'`: its tokens take their
# next choice), and the loss is measured again. After so few steps the others can
# take over nearly all of it.

# %%
some, wanted = prompts[:pairs_for_losses], targets[:pairs_for_losses]
tokens = sum(len(vocab.encode_marked(text)) + 1 for text in wanted)
loss = -sum(model.score(some, wanted)) / tokens
rise = {
  f'{layer}.{expert}': -sum(model.score(some, wanted, off=f'{layer}.{expert}'))
  / tokens
  - loss
  for layer in layers
  for expert in range(trace.layers[0].experts)
}
figures.bars(
  {
    f'{expert}': [rise[f'{layer}.{expert}'] for layer in layers]
    for expert in range(trace.layers[0].experts)
  },
  'rise of the loss, nats a token',
  names=layers,
)

# %% [markdown]
# What the model says with all experts, and without the one that it misses most:

# %%
missed = max(rise, key=rise.get)
gap = ['The <extra_id_0> statement is used to <extra_id_1> a loop.']
missed, model.fill(gap), model.fill(gap, off=missed)

# %% tags=["result"]
{
  'loss': round(loss, 2),
  'missed most': missed,
  'rise': round(rise[missed], 3),
  'sentinel entropy': {
    str(layer): round(float(spread['sentinels'][n]), 2)
    for n, layer in enumerate(trace.layers)
  },
  'dead': sum(len(h.dead) for h in checks),
}
