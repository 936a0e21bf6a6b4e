"""What the names in a mixture stand for, and how often each is drawn.

A name is, in this order: a text source of `data.files`, the embedded corpus,
pairs of `data.pairs`, a task or mixture of ours, of SeqIO.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

from st_moe.config import DataConfig, unknown
from st_moe.data import (
  pairs,
  shards,
  sources,
  span_corruption,
  text_shards,
  tiny_world,
)
from st_moe.data import vocabulary as vocabulary_lib
from st_moe.data.registry import HOW_TO_SEQIO, Registry, has_seqio
from st_moe.data.task import tell_once
from st_moe.data.vocabulary import SENTINELS, Vocabulary


class Library:
  """What the names of a config stand for, and their shards.

  Args:
    vocabulary: None, as long as nobody reads: names, files and texts need none.
  """

  def __init__(
    self,
    config: DataConfig,
    vocabulary: Vocabulary | None = None,
    progress: shards.Progress | None = None,
  ):
    self.config, self._progress = config, progress
    self.vocabulary = vocabulary or vocabulary_lib.load('bytes')
    self._pairs = pairs.tasks(config.pairs, config.files)

  def read_by(self, vocabulary: Vocabulary) -> 'Library':
    """The same in the pieces of `vocabulary`."""
    return Library(self.config, vocabulary, self._progress)

  @functools.cached_property
  def registry(self):
    """Tasks. SeqIO's take seconds: asked for names unknown so far."""
    return Registry(self.vocabulary, self.config.data_dir, self._pairs)

  def check(self, splits: Sequence[str] = ('train',)) -> None:
    """Looks at every name and file of the mixture, before work starts.

    Raises:
      ValueError: an unknown name, a split that a source does not have, lengths
        that span corruption cannot fill, a missing, empty or broken file.
    """
    config = self.config
    used = {n: config.files[n] for n in config.drawn if n in config.files}
    sources.check(used, config.text_field)
    for name in config.pairs.keys() - config.drawn:
      tell_once(
        f'data.pairs.{name} is not in data.mixture: nothing is made of it.'
      )
    for name in self.sources():
      self.check_splits(name, splits)
      if self.is_text(name):
        self.raw_tokens(SENTINELS)
      self.check_files(name, splits)

  def texts(self) -> Iterator[str]:
    """The training text of the mixture, and `data.vocabulary_extra`.

    Tasks have text only once there is a vocabulary to read them with: what they
    should add to one is that extra.
    """
    config = self.config
    for name in config.drawn:
      if name in self._pairs:
        for example in self._pairs[name].load('train'):
          yield f'{example["inputs"]} {example["targets"]}'
      elif name in config.files:
        yield from sources.documents(
          config.files[name]['train'], config.text_field
        )
      elif name == sources.EMBEDDED:
        yield from sources.embedded_corpus('train')
    if config.vocabulary_extra == 'tiny_world':
      yield from tiny_world.text()
    elif config.vocabulary_extra:
      yield from sources.documents(config.vocabulary_extra, config.text_field)

  def train_vocabulary(self, path, size: int = 0) -> Vocabulary:
    """Trains one on `texts`, into a file; `size` 0: `data.vocabulary_size`."""
    size, seed = size or self.config.vocabulary_size, self.config.seed
    return vocabulary_lib.train(self.texts(), path, size=size, seed=seed)

  def is_text(self, name: str) -> bool:
    return name in self.config.files or name == sources.EMBEDDED

  def members(self, name: str) -> dict[str, float | None]:
    """The sources behind a name and their shares: a mixture has several."""
    if self.is_text(name):
      return {name: 1.0}
    if not self.registry.has(name):
      known = {*self.config.files, sources.EMBEDDED, *self.registry.names()}
      error = unknown('data source', name, known)
      raise error if has_seqio() else ValueError(f'{error} {HOW_TO_SEQIO}')
    return self.registry.tasks(name)

  def sources(self) -> list[str]:
    """Every source that is trained on, once, in the order of the config."""
    if not self.config.drawn:
      raise ValueError(
        'data.mixture is empty; name what to train on, for example'
        f' --config.data.mixture.{sources.EMBEDDED}=1'
      )
    return list(
      dict.fromkeys(
        member
        for name in self.config.drawn
        for member, share in self.members(name).items()
        if share != 0
      )
    )

  def splits(self, name: str) -> list[str]:
    if name in self.config.files:
      return list(self.config.files[name])
    if name == sources.EMBEDDED:
      return ['train', 'validation']
    return self.registry.splits(name)

  def check_splits(self, name: str, splits: Sequence[str]) -> None:
    """Raises for a split that the source `name` does not have."""
    there = sorted(self.splits(name))
    for split in splits:
      if split not in there:
        ways = [
          f'; add --config.data.{kind}.{name}.{split}=GLOB'
          for kind in ('files', 'pairs')
          if name in getattr(self.config, kind)
        ]
        raise ValueError(
          f'{name!r} has no split {split!r}, only {there}' + (*ways, '.')[0]
        )

  def check_files(self, name: str, splits: Sequence[str]) -> None:
    """Raises where a file of a task is missing; text was looked at already."""
    if not self.is_text(name):
      for split in splits:
        self.registry.check_files(name, split)

  def open(self, name: str, split: str) -> shards.Shards:
    """The shards of a split, written now if they are not there."""
    self.check_splits(name, (split,))
    config = self.config
    if not self.is_text(name):
      return self.registry.write(
        name,
        split,
        inputs_length=config.inputs_length,
        targets_length=config.targets_length,
        cache_dir=config.cache_dir,
        progress=self._progress,
      )
    embedded = f'{sources.EMBEDDED}:{split}'
    return text_shards.write_text(
      name,
      split,
      config.files[name][split] if name in config.files else embedded,
      vocabulary=self.vocabulary,
      raw_tokens=self.raw_tokens(len(self.vocabulary.sentinels)),
      text_field=config.text_field,
      cache_dir=config.cache_dir,
      workers=config.workers,
      progress=self._progress,
    )

  def raw_tokens(self, num_sentinels: int) -> int:
    """The length of raw chunks, if their targets fit into `targets_length`."""
    config = self.config
    noise = dict(density=config.noise_density, mean_span=config.mean_span)
    tokens, needed = span_corruption.chunk_lengths(
      config.inputs_length, **noise
    )
    if config.targets_length < needed:
      raise ValueError(
        f'data.targets_length {config.targets_length} is too short: span'
        f' corruption of inputs_length {config.inputs_length} at noise_density'
        f' {config.noise_density} and mean_span {config.mean_span} needs'
        f' {needed}.'
      )
    span_corruption.check_sentinels(
      tokens, **noise, num_sentinels=num_sentinels
    )
    return tokens

  def rates(self, sizes: Mapping[str, int]) -> dict[str, float]:
    """The rate of every source; `sizes` are their training examples.

    'size' is T5's rule: the size, cut off at `size_cap`, to the power of
    1 / `temperature`. A number given to a mixture is shared out among its tasks
    as the mixture has it; 'size' is counted for each of them.
    """
    config, total = self.config, dict.fromkeys(sizes, 0.0)
    for name, rate in config.drawn.items():
      shares = {m: s for m, s in self.members(name).items() if s != 0}
      if not shares:
        raise ValueError(
          f'data.mixture.{name}: all of its tasks have the rate 0, for'
          ' evaluation only.'
        )
      if rate == 'size':
        for member in shares:
          size = min(sizes[member], config.size_cap or sizes[member])
          total[member] += size ** (1 / config.temperature)
      else:
        if None in shares.values():
          raise ValueError(
            f'The rates of mixture {name!r} are counts of examples that its'
            f" tasks do not know; set data.mixture.{name} to 'size'."
          )
        for member, share in shares.items():
          total[member] += rate * share / sum(shares.values())
    return total
