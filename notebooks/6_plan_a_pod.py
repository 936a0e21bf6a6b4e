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
# # Plan a pod
#
# What a training step of ST-MoE-32B (269 billion parameters) costs on 128 chips
# that you do not own: every mesh is tried by arithmetic, the fastest that fit are
# ranked, and the mesh is drawn. One minute on two CPU cores; no accelerator is
# used, however many there are.

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
config_name = 'st_moe_32b'  # Any config; `st-moe list configs` shows them.
chip_name = 'v5p'  # v4, v5e, v5p, v6e, a100, h100, h200
devices = 128

# %%
import st_moe
from st_moe.plan import chips, figures, search, tables, topology

# %% [markdown]
# ## The model

# %%
config = topology.resolved(st_moe.load_config(config_name))
counted = tables.count(config)

# %% [markdown]
# ## Every mesh
#
# All ways to split the devices into `data`, `fsdp`, `expert` and `model`, with
# several dispatchers, microbatches and ways to compute activations again. Of each
# mesh the fastest way that fits is kept.

# %%
chip = chips.named(chip_name)
candidates = search.candidates(config, devices, chip)
found = list(search.fitting(config, candidates, chip, count=6))
tables.ranked(found, chip)

# %% [markdown]
# What takes the time, at peak rates: the black line is the step if products,
# memory and exchanged weights all go on at once.

# %%
figures.seconds(found)

# %% [markdown]
# What a chip holds:

# %%
figures.memory(found, chip)

# %% [markdown]
# ## The fastest, drawn
#
# A square is a chip with the experts it holds. Tokens travel within a block to
# their experts. The blocks take different examples; along `fsdp` each keeps a
# part of the weights and gets the rest from the other.

# %%
fastest, held = found[0]
figures.mesh(fastest.sizes, config.model.num_experts)

# %% [markdown]
# And another one further down the list:

# %%
figures.mesh(found[-1][0].sizes, config.model.num_experts)

# %% [markdown]
# To train with it: `--config.mesh.expert=64 --config.mesh.fsdp=2`, whatever the
# ranking says. The same arithmetic against the real TPU compiler is
# `st-moe plan --config=st_moe_32b --topology=v5p:4x4x8`, which takes `jax[tpu]`
# and no TPU.

# %% tags=["result"]
{
  'parameters': counted['all'],
  'ways tried': len(candidates),
  'fastest': tables.mesh_name(fastest.sizes),
  'ms at best': round(1e3 * fastest.seconds.step),
  'GiB': round(held.peak / 2**30, 1),
}
