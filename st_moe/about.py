"""What a mechanism says of itself: read by `st-moe methods` and the tests.

@about(row='S0-14', paper='arXiv:2202.09368', causal=False)
def expert_choice(scores, ctx, rng, capacity, *, k): ...
"""

import dataclasses
import functools
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class About:
  """Facts of one entry of a table."""

  row: str = ''  # Of the literature's table, 'S0-14'; '': of nobody's paper.
  paper: str = ''  # 'arXiv:2202.09368'.
  # No token hears of later ones; a function of the options where it depends.
  causal: bool | Callable[..., bool] = True
  noisy: bool = False  # Draws numbers in training.
  # State that is a parameter no optimizer moves: its name, its axes as letters
  # ('e': one number an expert).
  keeps: tuple[tuple[str, str], ...] = ()
  needs: tuple[str, ...] = ()  # What else of a context: 'task', 'before'.
  # Of a loss that layers do not have one by one: (sums, weights), each
  # [layers], to what is minimised.
  joins: Callable | None = None


def about(**said):
  """Decorator: the facts of a function or module."""

  def tell(entry):
    entry.about = About(**said)
    return entry

  return tell


def of(entry) -> About:
  """What `entry` says of itself, its options bound or not."""
  options = {}
  while isinstance(entry, functools.partial):
    options = {**entry.keywords, **options}
    entry = entry.func
  found = getattr(entry, 'about', About())
  if callable(found.causal):
    found = dataclasses.replace(found, causal=found.causal(**options))
  return found
