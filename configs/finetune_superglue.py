r"""Fine-tunes a pre-trained checkpoint on SuperGLUE, as ST-MoE was.

  st-moe train --config=configs/finetune_superglue.py --workdir=runs/tuned \
      --config.init=runs/base --data_dir=DATA

DATA holds superglue/BoolQ/train.jsonl and so on (`st-moe prepare superglue`).
All tasks at once, each as often as it has examples, 65,536 at most (section 6.1
of arXiv:2202.08906). `:mini` is sized for st_moe_mini on two cores; `:sentinel`
puts a sentinel behind inputs and before targets (section 4.5); `:task=NAME` is
one task alone.
"""

from ml_collections import config_dict

from st_moe.config_file import parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, task='', sentinel=False, seed=0, mini=False, runlocal=False)
  c = config_dict.ConfigDict()
  c.seed = arg.seed
  c.total_steps = 10_000
  c.init = ...  # Yours to say: --config.init=CHECKPOINT
  c.init_slots = 'keep'  # Resetting them hurts (Table 20).

  mixture = arg.task or 'super_glue' + '_sentinel' * arg.sentinel
  c.data = dict(
      mixture={mixture: 'size'}, size_cap=65_536, inputs_length=512,
      targets_length=62, batch_size=128, seed=arg.seed)

  # Dropout 0.1 everywhere, more inside the experts (section 4.1).
  c.model = dict(dropout=0.1, moe=dict(expert_dropout=0.2))
  c.optimizer = dict(learning_rate=0.001, decay='none')
  best = 'accuracy', 'decoded_accuracy', 'f1', 'average'
  c.checkpoint = dict(every=1000, keep_best=','.join(f'eval/*/{b}' for b in best))
  c.evaluate = dict(every=1000)
  c.log = dict(every=100)

  if arg.mini or arg.runlocal:
    c.max_padding = 0.0  # Cheap, whatever it is.
    c.total_steps = 400
    c.data.update(inputs_length=256, targets_length=32, batch_size=16)
    c.optimizer.learning_rate = 0.01  # 0.003 learns slower (EXPERIMENTS.md).
    c.checkpoint.every = 100
    c.evaluate.update(every=100, batches=32)
    c.log.every = 50
  else:
    # A group is a row, so that as many devices as rows have one each. With those
    # of pre-training, 128 devices would compute 8 to 15 times the places.
    c.model.encoder, c.model.decoder = dict(group_size=512), dict(group_size=62)

  if arg.runlocal:
    c.total_steps = 8
    c.data.update(inputs_length=32, batch_size=8)
    c.checkpoint.every, c.evaluate.every, c.evaluate.batches, c.log.every = 4, 4, 1, 2
  return c
