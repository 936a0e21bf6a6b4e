r"""Fine-tunes any checkpoint on tasks; by default on the embedded toy tasks.

  st-moe train --config=configs/finetune.py --workdir=runs/tuned \
      --config.init=runs/tiny

Model and vocabulary are those of `init`. `:scratch` takes only these and starts
from random parameters, for comparison. `:mixture=NAME` is another task.
"""

from ml_collections import config_dict

from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, scratch=False, seed=0, mixture='tiny_glue', runlocal=False)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 900
  c.init = ...  # Yours to say: --config.init=CHECKPOINT
  c.init_take = 'architecture' if arg.scratch else 'params'

  c.data = dict(
      mixture={arg.mixture: 1.0}, inputs_length=512, targets_length=128,
      batch_size=32, seed=arg.seed)
  # ST-MoE: dropout 0.1 everywhere, more inside the experts (section 4.1).
  c.model = dict(dropout=0.1, moe=dict(expert_dropout=0.2))

  if arg.mixture == 'tiny_glue':
    # No example is longer. Dropout only slows these toys (EXPERIMENTS.md).
    c.data.update(inputs_length=51, targets_length=5, batch_size=40)
    c.model = dict(dropout=0.0, moe=dict(expert_dropout=0.0))
    c.max_padding = 0.0  # Cheap, whatever it is.

  c.optimizer = dict(learning_rate=0.01, decay='none')
  c.checkpoint = dict(every=300)
  c.evaluate = dict(every=300)
  c.log = dict(every=100)

  if arg.runlocal:
    c.total_steps = 8
    c.data.update(batch_size=8)
    c.checkpoint.every, c.evaluate.every, c.log.every = 4, 8, 2
    c.evaluate.batches = 1
  return c
