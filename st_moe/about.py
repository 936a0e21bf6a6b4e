"""What a mechanism says of itself: read by `st-moe methods` and the tests.

It stands above the mechanism:

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
  # Draws numbers in training; likewise.
  noisy: bool | Callable[..., bool] = False
  # The options at which it is what stands there without it, or why there are
  # none. A loss has its weight.
  neutral: dict | str | None = None
  # State that is a parameter no optimizer moves: its name, its axes as letters
  # ('e': one number an expert).
  keeps: tuple[tuple[str, str], ...] = ()
  # What else of a context: 'task', 'before'; likewise.
  needs: tuple[str, ...] | Callable[..., tuple[str, ...]] = ()
  # Of a loss: which parts of a layer its gradient reaches; of a rule after the
  # update: which state.
  moves: tuple[str, ...] = ('router',)
  # Of a loss that needs the batch in one piece: no microbatches; likewise.
  whole: bool | Callable[..., bool] = False
  # Of a loss that layers do not have one by one: (sums, weights), each
  # [layers], to what is minimised. It is `whole`.
  joins: Callable | None = None
  # fits(model, moe, *, ...) raises a ValueError for a model it is not made for.
  fits: Callable | None = None


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
  settled = {
    name: value(**options)
    for name in ('causal', 'noisy', 'needs', 'whole')
    if callable(value := getattr(found, name))
  }
  return dataclasses.replace(found, **settled) if settled else found
