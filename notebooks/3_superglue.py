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
# # Fine-tune on SuperGLUE
#
# Fine-tunes a small model on the tasks of SuperGLUE, finds the best step of each
# task, and writes the zip that the leaderboard takes. Without the official data
# it takes toys in files of the same form: BoolQ, CB and COPA about a tiny world.
# Their scores say nothing about SuperGLUE. Two minutes on two CPU cores.

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
# Where `st-moe prepare superglue --data_dir=DIR` put the official files. With
# them so small a model scores like guessing: take a larger one, more steps and
# an accelerator.
data_dir = 'runs/data'
steps = 600
pretraining_steps = 600

# %%
import json
import pathlib

import st_moe
from st_moe import history
from st_moe.analysis import figures
from st_moe.data import tiny_world
from st_moe.infer import submission
from st_moe.run import compare

# %% [markdown]
# ## Data
#
# The official archive has a folder for each task. If it is not there the toys are
# written in its place; their test files have no answers, as the official ones.

# %%
superglue = pathlib.Path(data_dir) / 'superglue'
official = (superglue / 'MultiRC').exists()
if not official:
  tiny_world.write(superglue)
  for validation in superglue.glob('*/val.jsonl'):
    rows = [json.loads(row) for row in validation.read_text().splitlines()]
    asked = [{k: v for k, v in r.items() if k != 'label'} for r in rows[:60]]
    test = '\n'.join(map(json.dumps, asked))
    validation.with_name('test.jsonl').write_text(test)
sorted(str(path.relative_to(superglue)) for path in superglue.glob('*/*'))

# %%
print((superglue / 'COPA' / 'val.jsonl').read_text().splitlines()[0])

# %% [markdown]
# ## A model to start from
#
# That of the first notebook; it is trained here if it is not there.

# %%
pretraining = st_moe.load_config(
  'st_moe_tiny',
  {
    'total_steps': pretraining_steps,
    'model.encoder.sparse_every': 1,
    'model.encoder.sparse_offset': 0,
    'evaluate.every': 100,
  },
)
float(
  st_moe.train(pretraining, 'runs/first_hour')['eval/python_reference/loss']
)

# %% [markdown]
# ## Fine-tune
#
# `finetune_superglue` is the protocol of the ST-MoE paper, `:mini` its small
# form. The checkpoint of each task's best step is kept. For toys: short inputs,
# no dropout, tasks in equal parts.

# %%
fields = {
  'init': 'runs/first_hour',
  'data.data_dir': data_dir,
  'total_steps': steps,
  'evaluate.every': 100,
  'checkpoint.every': 100,
}
if not official:
  tasks = 'super_glue_boolq', 'super_glue_cb', 'super_glue_copa'
  fields |= {
    'data.mixture': dict.fromkeys(tasks, 1.0),
    'data.inputs_length': 51,
    'data.targets_length': 8,
    'data.batch_size': 40,
    'model.dropout': 0.0,
    'model.moe.expert_dropout': 0.0,
    'evaluate.batches': 5,
  }
config = st_moe.load_config('finetune_superglue:mini', fields)
last = st_moe.train(config, 'runs/superglue')

# %%
compare.curves(['runs/superglue'], 'eval/*/accuracy', '% right')

# %% [markdown]
# ## The best of each task

# %%
measured = history.measured('runs/superglue')
best = {
  name.split('/')[1]: found
  for name, found in history.best_steps(measured).items()
  if name.endswith('/accuracy')
}
majority = {
  task: measured[step][f'eval/{task}/majority_accuracy']
  for task, (step, _) in best.items()
}
figures.bars(
  {
    f'{task.removeprefix("super_glue_")}\nstep {step}': (majority[task], value)
    for task, (step, value) in best.items()
  },
  '% right on validation',
  names=('the most frequent answer', 'best of the run'),
)

# %% [markdown]
# ## What it says
#
# A prompt is text, and so is the answer: here each of the best of its task.

# %%
prompts = {
  'super_glue_copa': 'copa choice1: hot cup choice2: cold cup premise: Tom'
  ' heated the cup. question: effect',
  'super_glue_boolq': 'boolq passage: Anna soaked the new phone. Ben is calm.'
  ' question: is the new phone dry',
}
for task, prompt in prompts.items():
  model = st_moe.load(f'runs/superglue/checkpoints/{best[task][0]}')
  print(prompt, '->', *model.generate([prompt], max_length=5))

# %% [markdown]
# ## The submission
#
# The leaderboard wants ten files in a zip, named after the tasks, with an answer
# to each row of the test files.

# %%
scores = st_moe.evaluate(
  'runs/superglue',
  mixture=list(config.data.mixture),
  submission=True,
  output='runs/submission',
)

# %% [markdown]
# What it would refuse: with toys only that seven tasks are missing.

# %%
zipped = 'runs/submission/superglue.zip'
problems = submission.problems(zipped, data_dir)
problems

# %% tags=["result"]
{
  'best': {task: round(value, 1) for task, (_, value) in best.items()},
  'majority': {task: round(value, 1) for task, value in majority.items()},
  'problems': len(problems),
}
