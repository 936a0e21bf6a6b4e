"""Every task and mixture of ours, by name.

Definitions alone, which import neither SeqIO nor TensorFlow: `tasks.py` makes
SeqIO tasks of them, `task_shards.py` examples to train on.
"""

from st_moe.data import (
  anli,
  arc,
  closed_book,
  glue,
  squad,
  summarization,
  superglue,
  tiny_world,
  winogrande,
)
from st_moe.data.task import SENTINEL, TextTask

TASKS: dict[str, TextTask] = {
  **{f'tiny_{name}': task for name, task in tiny_world.TASKS.items()},
  **{f'super_glue_{name}': task for name, task in superglue.TASKS.items()},
  **anli.TASKS,
  **arc.TASKS,
  **winogrande.TASKS,
  **squad.TASKS,
  **closed_book.TASKS,
  **summarization.TASKS,
  **glue.TASKS,
}

# Tasks that exist with a sentinel too (arXiv:2202.08906, section 4.5).
WITH_SENTINEL = tuple(f'super_glue_{name}' for name in superglue.TASKS)

# Name -> rates. Those of T5 are sizes of training sets; `size` as the rate of a
# whole mixture in a config counts anew, with a cap (arXiv:2202.08906, 6.1).
MIXTURES = {
  # COPA is the last of the three to be learnt.
  'tiny_glue': {'tiny_boolq': 1.0, 'tiny_cb': 1.0, 'tiny_copa': 2.0},
  'super_glue': {f'super_glue_{k}': r for k, r in superglue.RATES.items()},
  'super_glue_sentinel': {
    f'super_glue_{k}{SENTINEL}': r for k, r in superglue.RATES.items()
  },
  'glue': {f'glue_{k}': r for k, r in glue.RATES.items()},
}


def text_task(name: str) -> TextTask | None:
  """The task of a name, with a sentinel or without; None: not one of ours."""
  plain = name.removesuffix(SENTINEL)
  return TASKS.get(plain) if name in names() else None


def names() -> set[str]:
  """All of them, those with a sentinel and the mixtures too."""
  return {*TASKS, *MIXTURES, *(name + SENTINEL for name in WITH_SENTINEL)}
