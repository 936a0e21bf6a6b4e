"""What a sparse layer is made of: a table of mechanisms for each field.

A mechanism enters by its line in the table of its kind; nothing else knows
them by name.
"""

from st_moe import about
from st_moe.config import ModelConfig, MoEConfig, Part, checked_option
from st_moe.model import layers
from st_moe.model.beside import BESIDE
from st_moe.model.dispatch import DISPATCHERS
from st_moe.model.experts import EXPERTS
from st_moe.model.gates import GATES
from st_moe.routing.losses import LOSSES
from st_moe.routing.selectors import SELECTORS
from st_moe.routing.shaping import SHAPING
from st_moe.routing.weighing import WEIGHING
from st_moe.schedules import Positive

# Field of `MoEConfig` -> what it chooses from.
TABLES = {
  'gate': GATES,
  'shaping': SHAPING,
  'selector': SELECTORS,
  'weighing': WEIGHING,
  'losses': LOSSES,
  'experts': EXPERTS,
  'beside': BESIDE,
  'dispatcher': DISPATCHERS,
}


_PLAIN = about.About()


def choose(field: str, part: Part, causal: bool = False):
  """The mechanism that `part` of a field of `MoEConfig` chooses.

  Raises:
    ValueError: there is none such, an option does not fit, or it looks ahead
      where tokens must not hear of later ones.
  """
  where = f'config.model.moe.{field}'
  looks_ahead = getattr(TABLES[field].get(part.name), 'about', _PLAIN).causal
  # For us to read, and not for it.
  also = ('weight',) * (field == 'losses') + ('force',) * (
    looks_ahead is not True
  )
  found = part.choose(where, TABLES[field], also)
  if causal and not about.of(found).causal and not part.kwargs.get('force'):
    raise ValueError(
      f'{where} = {part.name!r} looks ahead: in a decoder a token would hear of'
      ' later ones, which generation does not have. Use it in the encoder'
      ' (config.model.encoder.moe), or set its option force=True.'
    )
  return found


def of(moe: MoEConfig):
  """(field, part) of every mechanism of a layer."""
  for field in TABLES:
    found = getattr(moe, field)
    for part in (found,) if isinstance(found, Part) else found:
      if (field, part.name) != ('dispatcher', 'auto'):
        yield field, part


def needs(moe: MoEConfig) -> set[str]:
  """What else of a context its parts look at."""
  every = (about.of(choose(*each)).needs for each in of(moe))
  return {need for needs in every for need in needs}


def by_task(model: ModelConfig) -> bool:
  """Whether a sparse layer wants to know whose a token is."""
  sparse = [s for s in model.stacks if model.plan(s).num_sparse]
  return any('task' in needs(model.moe_of(stack)) for stack in sparse)


def check(model: ModelConfig) -> None:
  """Raises for a part, or an option of one, that cannot be."""
  layers.activation(model.activation)
  for stack in model.stacks:
    moe, sparse = model.moe_of(stack), model.plan(stack).num_sparse > 0
    for field, part in of(moe):
      found = choose(field, part, causal=sparse and stack == 'decoder')
      if sparse and (fits := about.of(found).fits):
        fits(model, moe, **found.keywords)
      if field == 'losses':
        where = f'config.model.moe.losses.{part.name}.weight'
        checked_option(part.kwargs.get('weight', 1.0), Positive, where)
