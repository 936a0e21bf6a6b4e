"""What a run is made of: frozen dataclasses and the numbers derived from them.

Defaults live here and nowhere else. A config file (`configs/*.py`) names only
what its experiment changes; `config_file.load` turns it into a `Config`.
"""

import dataclasses
import fractions
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from st_moe import fields, layer_plan
from st_moe.fields import (
  Above0,
  AtLeast0,
  Checked,
  Count,
  CountOr0,
  Length,
  Range,
  Rate,
  Seed,
  Size,
  SizeOr0,
  Text,
  shown,
  unknown,
)
from st_moe.layer_plan import LayerPlan

# Numbers in one array: beyond lies a slip of a digit, and beyond 2 ** 63 the
# compiler ends the whole process.
_MOST = 2**52

# Keywords that every module of Linen has.
_OF_LINEN = ('name', 'parent')
_MISSING = inspect.Parameter.empty
_ROUND = {'floor': math.floor, 'round': round, 'ceil': math.ceil}


def _check_room(arrays: Mapping[str, int]) -> None:
  """Raises for the array that nothing could hold; `arrays` by their sides."""
  for sides, size in arrays.items():
    if size > _MOST:
      raise ValueError(
        f'{sides} = {size:,} numbers in one array should be at most {_MOST:,}:'
        ' does one of them have a digit too many?'
      )


def options(mechanism: Callable) -> dict[str, object]:
  """The options of a function or module, and what each may be.

  They are its keywords; what stands before these the layer gives.
  """
  return {
    name: fields.hint(parameter)
    for name, parameter in inspect.signature(mechanism).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _OF_LINEN
  }


@dataclasses.dataclass(frozen=True)
class Part:
  """A mechanism chosen by name from a table, with its options."""

  name: str
  # Numbers, words, Parts (a schedule, an inner mechanism), tuples of these.
  options: tuple[tuple[str, object], ...] = ()

  @classmethod
  def of(cls, name: str, **options) -> 'Part':
    """Options as config files have them: a dict with a `name` is a Part."""
    return cls(name, tuple(sorted((k, option(v)) for k, v in options.items())))

  @property
  def kwargs(self) -> dict:
    return dict(self.options)

  def choose(
    self, what: str, table: Mapping[str, Callable], also: tuple[str, ...] = ()
  ) -> Callable:
    """The entry of `table` with this name, its options bound.

    What an option may be says its annotation, or else its default.

    Args:
      what: the field that chooses, for errors: 'config.model.moe.selector'.
      also: options that are for who chooses, and not handed on.

    Raises:
      ValueError: an unknown name or option, with the known ones; one that is
        missing, or cannot be what it is.
    """
    if self.name not in table:
      raise unknown(what, self.name, table)
    given = {k: v for k, v in self.options if k not in also}
    known = options(table[self.name])
    for name in given:
      if name not in known:
        kind = what.rpartition('.')[2]
        raise unknown(f'option of {kind} {self.name!r}', name, [*known, *also])
    bound = {
      name: checked_option(value, known[name], f'{what}.{name}')
      for name, value in given.items()
    }
    parameters = inspect.signature(table[self.name]).parameters
    for name, hint in known.items():
      if name not in bound and parameters[name].default is _MISSING:
        raise ValueError(
          f'{what} = {self.name!r} needs {name}: set {what}.{name} to'
          f' {fields.described(hint)}.'
        )
    return functools.partial(table[self.name], **bound)


Parts = tuple[Part, ...]

# Hidden units of a dense FFN that stands beside the experts, by its name; the
# others have none.
_BESIDE_DIM = {
  'conditional': lambda model, moe: model.mlp_dim,
  'shared': lambda model, moe: (
    moe.beside.kwargs.get('count', 1) * model.expert_dim(moe)
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class From:
  """The rule of an option that is a Part: one of a table.

  `tried` raises a ValueError for options that do not go together.
  """

  table: Mapping[str, Callable]
  tried: Callable[[Part], object] = lambda part: None

  def __contains__(self, part: Part) -> bool:
    return part.name in self.table

  def __str__(self) -> str:
    return 'one of ' + ', '.join(self.table)


def option(value):
  """An option as values that compare and hash: Parts and tuples."""
  if isinstance(value, Mapping):
    if not isinstance(value.get('name'), str):
      raise ValueError(f'The option {shown(dict(value))} needs a name.')
    return Part.of(**{str(k): v for k, v in value.items()})
  if isinstance(value, list | tuple):
    return tuple(option(each) for each in value)
  return value


def checked_option(value, hint, where: str):
  """`fields.check` of an option; a Part also finds its own options fit."""
  rules = [
    rule
    for each in fields.alternatives(hint)
    for rule in fields.base(each)[1]
    if isinstance(rule, From)
  ]
  if isinstance(value, Part) and rules:
    value.choose(where, rules[0].table)
    try:
      rules[0].tried(value)
    except ValueError as e:
      raise ValueError(f'{where}: {e}') from None
  return fields.check(value, hint, where)


@dataclasses.dataclass(frozen=True)
class Capacity(Checked):
  """How many tokens of one group an expert can seat.

  The default is the rule of the paper and of Mesh-TensorFlow: `factor` * tokens
  / experts, rounded down, at least 4, NOT multiplied by the experts per token.
  Other codes differ in exactly the fields below (see `slots`).
  """

  factor: Above0 = 1.25
  count: CountOr0 = 0  # So many places, whatever the rest says; 0: by `factor`.
  times_k: bool = False  # V-MoE multiplies by the experts per token.
  # Flaxformer: 'round'; V-MoE: 'ceil'.
  rounding: Literal['floor', 'round', 'ceil'] = 'floor'
  minimum: CountOr0 = 4
  multiple: Count = 1
  dropless: bool = False  # Everyone sits; all of the above is moot.

  def slots(self, group_size: int, num_experts: int, k: float = 1) -> int:
    """Places per expert in a group of `group_size` tokens, never more."""
    if self.dropless:
      return group_size
    if self.count:
      return min(self.count, group_size)
    # Fractions, because floor(1.15 * 100 / 5) must not depend on float noise.
    share = fractions.Fraction(str(self.factor)) * group_size / num_experts
    share *= fractions.Fraction(str(k)) if self.times_k else 1
    slots = _ROUND[self.rounding](share)
    slots = max(slots, self.minimum)
    slots = -(-slots // self.multiple) * self.multiple
    return min(slots, group_size)


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
  """One sparse feed-forward layer. Defaults: ST-MoE (arXiv:2202.08906).

  Routing is a chain: the gate scores, shapings change scores, the selector
  seats, weighings change weights, the dispatcher asks the experts, and what
  stands beside them answers too.
  """

  num_experts: Size = 32
  hidden_dim: SizeOr0 = 0  # 0: as wide as the dense FFN.
  train_capacity: Capacity = Capacity(1.25)
  eval_capacity: Capacity = Capacity(2.0)
  gate: Part = Part.of('linear')
  shaping: Parts = ()
  selector: Part = Part.of('top_k', k=2)
  weighing: Parts = ()
  # Each with its `weight`: coefficients of Eq. 6 of arXiv:2202.08906.
  losses: Parts = (
    Part.of('load_balance', weight=1e-2),
    Part.of('router_z', weight=1e-3),
  )
  experts: Part = Part.of('ffn')
  beside: Part = Part.of('nothing')  # What else answers.
  # 'auto': `index` where places are limited; where nothing drops, `grouped`,
  # or what suits few tokens (see `MoE`).
  dispatcher: Part = Part.of('auto')
  # How tokens reach the devices of their experts: 'gspmd', as the compiler
  # finds best, or 'shard_map', to the letter: by all-to-alls, or for `grouped`
  # gathered by all who share the experts. 'auto': the latter for `grouped`
  # alone, where the compiler would gather in every turn of its loop. 'two_hop':
  # to the letter, among the devices of a host first and then between hosts.
  transport: Literal['auto', 'gspmd', 'shard_map', 'two_hop'] = 'auto'
  multiplicative_bias: bool = False  # On the expert's hidden units, Table 17.
  expert_dropout: Rate | None = None  # None: the model's dropout.
  # Dense FFN 'before' or 'after' a sparse one; 'none'.
  extra_ffn: Literal['none', 'before', 'after'] = 'after'
  # Who competes for places: `group_size` neighbours of the flattened batch
  # ('tokens'), or each 'sequence' by itself.
  group_by: Literal['tokens', 'sequence'] = 'tokens'
  # 'ignored': asks for no place. 'routed': as any token. 'zeroed': as any token
  # whose activations are 0.
  padding: Literal['ignored', 'routed', 'zeroed'] = 'ignored'

  def __post_init__(self):
    for name in ('gate', 'selector', 'experts', 'beside', 'dispatcher'):
      if isinstance(word := getattr(self, name), str):  # As in config files.
        object.__setattr__(self, name, Part(word))
    super().__post_init__()

  @property
  def k(self) -> float:
    """Experts that a token may ask at most; where these choose, the mean."""
    given = self.selector.kwargs
    return given.get('most') or given.get('k') or self.num_experts

  @property
  def expected_k(self) -> float:
    """Experts that a token asks, on the average."""
    given = self.selector.kwargs
    return given.get('expected') or given.get('k') or self.k

  def capacity(self, deterministic: bool) -> Capacity:
    return self.eval_capacity if deterministic else self.train_capacity

  def slots(self, group_size: int, deterministic: bool) -> int:
    return self.capacity(deterministic).slots(
      group_size, self.num_experts, self.expected_k
    )

  @property
  def computes_places(self) -> bool:
    """Whether training computes empty places too, and not just what sits."""
    sitting = self.dispatcher.name in ('grouped', 'per_token')
    dropless = self.dispatcher.name == 'auto' and self.train_capacity.dropless
    return not (sitting or dropless)

  def executed_experts(self, group_size: int) -> float:
    """Experts computed per token in training, filled places or not."""
    if self.train_capacity.dropless:
      return self.expected_k
    slots = self.slots(group_size, deterministic=False)
    return self.num_experts * slots / group_size


@dataclasses.dataclass(frozen=True)
class StackConfig(Checked):
  """Depth of one stack and which of its layers are sparse.

  Layer i is sparse where i % sparse_every == sparse_offset (ST-MoE: 3 of 4;
  HuggingFace Switch: 1 of 2); sparse_every 0 makes none sparse.
  """

  num_layers: Annotated[int, Range(1, 2**12)] = 12
  sparse_every: CountOr0 = 4
  sparse_offset: CountOr0 = 3
  group_size: Count = 2048  # Tokens that compete for places.
  moe: MoEConfig | None = None  # Of its sparse layers; None: the model's.

  def __post_init__(self):
    super().__post_init__()
    if self.sparse_every and not 0 <= self.sparse_offset < self.sparse_every:
      raise ValueError(
        f'sparse_offset {self.sparse_offset} is never reached with'
        f' sparse_every {self.sparse_every}; it must be 0 to'
        f' {self.sparse_every - 1}.'
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
  """A T5-like Transformer: T5 1.1 by default, sparse where its stacks say so.

  Without a decoder it reads (encoder-only), without an encoder it is a causal
  language model; nothing else changes.
  """

  vocab_size: SizeOr0 = 32_128  # 0: as the vocabulary of the run needs it.
  embed_dim: Size = 768
  num_heads: Size = 12
  head_dim: Size = 64
  mlp_dim: Size = 2048
  # 'geglu': three matrices; 'relu' (T5 1.0, Switch) or 'gelu': two.
  activation: Part = Part.of('geglu')  # `ACTIVATIONS` of model/layers.py.
  encoder: StackConfig | None = StackConfig()
  decoder: StackConfig | None = StackConfig(group_size=456)
  moe: MoEConfig = MoEConfig()
  # The dense twin: each sparse FFN replaced by one as wide as the hidden units
  # the sparse one computes per token. Everything else stays.
  dense: bool = False

  dropout: Rate = 0.0
  tie_embeddings: bool = False
  relpos_buckets: Annotated[int, Range(2, 2**16)] = 32
  relpos_max_distance: Count = 128
  relpos_per_layer: bool = False  # A table for each layer (UMT5), not one.
  init_scale: Above0 = 0.1  # Of every kernel; T5 had 1.0 (Switch, section 2.4).
  # Of the position biases; None: `init_scale`. Adafactor's steps are as large
  # as the weights are: a table that starts small learns word order late.
  relpos_init_scale: Above0 | None = None

  # Of activations; 'auto': bfloat16 on TPU and GPU, else float32.
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
  # In which gradients of weights add up over tokens and devices: 'float32', as
  # in the paper (section 3.4), or that of 'activations': fewer bytes travel.
  gradient_sums: Literal['float32', 'activations'] = 'float32'
  scan_layers: bool = True
  # What the backward pass recomputes.
  remat: Literal['none', 'full', 'dots'] = 'none'

  def __post_init__(self):
    super().__post_init__()
    if self.encoder is None and self.decoder is None:
      raise ValueError(
        'encoder and decoder are none: a model needs an encoder, a decoder, or'
        ' both.'
      )
    # Of an encoder half of the buckets look back and half ahead.
    least = 4 if self.encoder else 2
    if self.relpos_buckets < least:
      raise ValueError(
        f'relpos_buckets = {self.relpos_buckets} should be at least {least}.'
      )
    exact = self.relpos_buckets // (2 if self.decoder else 4)
    if self.relpos_max_distance <= exact:
      raise ValueError(
        f'relpos_max_distance = {self.relpos_max_distance} should be above'
        f' {exact}: so far each distance has one of the relpos_buckets ='
        f' {self.relpos_buckets}.'
      )
    layers = max(self.stack(stack).num_layers for stack in self.stacks)
    joined = self.num_heads * self.head_dim
    _check_room(
      {
        'embed_dim x vocab_size': self.embed_dim * self.vocab_size,
        'embed_dim x num_heads x head_dim x num_layers': (
          self.embed_dim * joined * layers
        ),
        'embed_dim x mlp_dim x num_layers': (
          self.embed_dim * self.mlp_dim * layers
        ),
        'embed_dim x moe.hidden_dim x moe.num_experts x num_layers': (
          self.embed_dim
          * layers
          * max(
            self.expert_dim(moe) * moe.num_experts
            for moe in map(self.moe_of, self.stacks)
          )
        ),
        'embed_dim x moe.hidden_dim x moe.beside.count x num_layers': (
          self.embed_dim
          * layers
          * max(map(self.beside_dim, map(self.moe_of, self.stacks)))
        ),
      }
    )
    for stack in self.stacks:
      moe = self.moe_of(stack)
      k, sparse = moe.selector.kwargs.get('k'), self.plan(stack).num_sparse
      if sparse and isinstance(k, int) and not 1 <= k <= moe.num_experts:
        raise ValueError(
          f'moe.selector.k={k} experts per token; it must be 1 to'
          f' {moe.num_experts}.'
        )

  def moe_of(self, stack: str) -> MoEConfig:
    """How the sparse layers of 'encoder' or 'decoder' are made."""
    return self.stack(stack).moe or self.moe

  def with_moe(self, **changes) -> 'ModelConfig':
    """The same model with fields of every `MoEConfig` changed."""
    return self.map_moe(lambda moe: dataclasses.replace(moe, **changes))

  def map_moe(self, change) -> 'ModelConfig':
    """The same model with every `MoEConfig` as `change` makes it."""
    own = lambda stack: (
      stack and dataclasses.replace(stack, moe=stack.moe and change(stack.moe))
    )
    return dataclasses.replace(
      self,
      moe=change(self.moe),
      encoder=own(self.encoder),
      decoder=own(self.decoder),
    )

  def expert_dim(self, moe: MoEConfig) -> int:
    """Hidden units of each expert."""
    return moe.hidden_dim or self.mlp_dim

  def beside_dim(self, moe: MoEConfig) -> int:
    """Hidden units that every token meets beside the experts."""
    dim = _BESIDE_DIM.get(moe.beside.name)
    return dim(self, moe) if dim else 0

  def executed_dim(self, stack: str) -> int:
    """Hidden units a sparse layer computes per token in training."""
    moe = self.moe_of(stack)
    experts = moe.executed_experts(self.stack(stack).group_size)
    return round(experts * self.expert_dim(moe)) + self.beside_dim(moe)

  def expert_dropout(self, moe: MoEConfig) -> float:
    rate = moe.expert_dropout
    return self.dropout if rate is None else rate

  @property
  def position_init_scale(self) -> float:
    scale = self.relpos_init_scale
    return self.init_scale if scale is None else scale

  def stack(self, name: str) -> StackConfig:
    return getattr(self, name)

  @property
  def stacks(self) -> tuple[str, ...]:
    """Names of the stacks there are, in the order data meets them."""
    return tuple(s for s in ('encoder', 'decoder') if getattr(self, s))

  def plan(self, stack: str) -> LayerPlan:
    """The layers of 'encoder' or 'decoder'."""
    return layer_plan.of(self, stack)

  @property
  def num_experts(self) -> int:
    """What every sparse layer's experts are a multiple of; 0: there is none."""
    sparse = [s for s in self.stacks if self.plan(s).num_sparse]
    return math.gcd(*(self.moe_of(stack).num_experts for stack in sparse))


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
  """What the batches are made of. Lengths in tokens, sizes in examples."""

  # Task or text source by name -> rate. A rate is a number, or 'size': as many
  # as it has training examples, capped by `size_cap` (0: no cap) and flattened
  # by `temperature` (rate ** (1 / temperature)).
  mixture: Mapping[Text, Above0 | Literal['size']] = dataclasses.field(
    default_factory=dict
  )
  size_cap: CountOr0 = 0
  # Below, rates leave what a float can hold.
  temperature: Annotated[float, Range(0.1)] = 1.0

  # Text sources for span corruption: name -> {'train': glob, 'validation':
  # glob}. Globs of .txt, .jsonl, .json, plain or .gz; local or gs://.
  files: Mapping[Text, Mapping[Text, Text]] = dataclasses.field(
    default_factory=dict
  )
  text_field: Text = 'text'
  # Pairs of texts: name -> {'train': glob, 'validation': glob, 'test': glob} of
  # .jsonl or .json, and where it is not so: 'inputs' and 'targets', the fields
  # that hold them; 'labels', the answers there are ('no|yes'); 'metrics'
  # ('accuracy', 'rouge' or 'accuracy|rouge').
  pairs: Mapping[Text, Mapping[Text, Text]] = dataclasses.field(
    default_factory=dict
  )
  noise_density: Annotated[float, Range(0, 1, above=True, below=True)] = 0.15
  mean_span: Annotated[float, Range(1)] = 3.0

  # Path of a SentencePiece model, or 'bytes'; both get 100 sentinels on top,
  # unless the model has its own. 'byt5': bytes with the sentinels of ByT5.
  # '': that of `init`, else one of `vocabulary_size` ids, sentinels included,
  # trained on the mixture.
  vocabulary: str = ''
  vocabulary_size: Annotated[
    int, Range(104, 2**24, says='100 are sentinels, 3 special')
  ] = 4000
  # What else a new vocabulary learns from: a glob of text, or 'tiny_world', the
  # embedded tasks.
  vocabulary_extra: str = ''

  inputs_length: Length = 512
  targets_length: Length = 114
  # The share of a task's training targets that may be longer than that: cut,
  # they teach a model to stop there.
  allow_cut: Annotated[float, Range(0, 1)] = 0.01
  batch_size: Size = 128
  seed: Seed = 0
  cache_dir: str = ''  # Where tokenised shards lie; '' is ~/.cache/st_moe.
  data_dir: str = ''  # Where tasks find their files; '': $ST_MOE_DATA.
  workers: Annotated[int, Range(1, 4096)] = 1
  # Whether a run may go on where its training data have changed. It trains on
  # other batches from there on.
  may_change: bool = False

  @property
  def drawn(self) -> Mapping[str, float | str]:
    """The mixture; where it is empty, all pairs by size."""
    return self.mixture or dict.fromkeys(self.pairs, 'size')

  def length(self, stack: str) -> int:
    """Tokens of a row of 'encoder' or 'decoder'."""
    return self.inputs_length if stack == 'encoder' else self.targets_length


@dataclasses.dataclass(frozen=True)
class LossConfig(Checked):
  """What is minimised: cross-entropy per target token, and more."""

  z_loss: AtLeast0 = 1e-4  # On the output softmax.
  label_smoothing: Rate = 0.0
  # Router losses (`model.moe.losses`) over sparse layers: 'sum' (Mesh-TF) or
  # 'mean' (T5X).
  layers: Literal['sum', 'mean'] = 'sum'
  # Targets of a row whose logits are there at once; 0: all. With few of them a
  # large vocabulary takes little memory, and one more product with the output
  # matrix time.
  positions: CountOr0 = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
  """Adafactor as T5X sets it for sparse models, or AdamW."""

  name: Literal['adafactor', 'adamw'] = 'adafactor'
  # What is trained, the rest is frozen: 'all', 'moe', 'non_moe', 'attention',
  # 'ffn', 'router', or a pattern of parameter paths.
  train: Text = 'all'
  # Schedule: `learning_rate` after a linear ramp of `warmup_steps` (0: none),
  # constant for `constant_steps`, then falling as 1 / sqrt(step).
  learning_rate: AtLeast0 = 0.01
  warmup_steps: CountOr0 = 0
  constant_steps: CountOr0 = 10_000
  # 'none': constant for ever (fine-tuning).
  decay: Literal['rsqrt', 'none'] = 'rsqrt'
  # Adafactor.
  decay_exponent: Above0 = 0.8
  clip_threshold: Above0 = 1.0
  parameter_scale: bool = True
  min_dim_to_factor: CountOr0 = 128
  # AdamW.
  b1: Annotated[float, Range(0, 1, below=True)] = 0.9
  b2: Annotated[float, Range(0, 1, below=True)] = 0.999
  # Of either, times the learning rate.
  weight_decay: AtLeast0 = 0.0
  # Rules for parameters after the update (`train/after.py`), in turn.
  after: Parts = ()
  # A step whose loss or gradients are not finite is not applied; so many in a
  # row end the run.
  max_bad_steps: Count = 10


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
  """Devices along each mesh axis; data 0: whatever the others leave."""

  data: SizeOr0 = 0
  fsdp: Size = 1
  expert: Size = 1
  model: Size = 1
  # Lets axes other than data cross the slow network between TPU slices.
  across_slices: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
  """When checkpoints are written and which of them stay."""

  every: CountOr0 = 1000  # Steps; 0: at the end only.
  keep_last: CountOr0 = 2  # 0: all.
  keep_every: CountOr0 = 0  # Steps; 0: none are kept for ever.
  # Metrics; the best checkpoint of each stays. Separated by commas, * is any:
  # 'eval/*/accuracy,eval/*/f1'; '-eval/x/loss' is the lowest.
  keep_best: str = ''
  asynchronous: bool = True


@dataclasses.dataclass(frozen=True)
class EvalConfig(Checked):
  """What is measured during training and by `st-moe evaluate`."""

  every: CountOr0 = 1000  # Steps; 0: at the end only.
  batches: CountOr0 = 0  # Batches per source and split; 0: all.
  batch_size: SizeOr0 = 0  # 0: the training batch.
  split: Text = 'validation'
  decode: bool = False  # Greedy decoding beside rank classification.
  # Rank by the mean log-probability of an answer's tokens, not by their sum.
  length_normalized: bool = False
  # Answers drop no token; false: as `model.moe.eval_capacity` has it.
  dropless: bool = True


@dataclasses.dataclass(frozen=True)
class LogConfig(Checked):
  """Where numbers go."""

  every: CountOr0 = 100  # Steps; 0: only what is measured.
  tensorboard: bool = True
  wandb: bool = False
  wandb_project: Text = 'st_moe'


@dataclasses.dataclass(frozen=True)
class Config(Checked):
  """One run."""

  name: str = ''
  # How what the file leaves open is routed: as this code does it.
  routing: Literal['paper', 'flaxformer', 'huggingface'] = 'paper'
  seed: Seed = 0
  total_steps: CountOr0 = 0
  init: str = ''  # A checkpoint or workdir to start from; '': random.
  # 'params'; 'upcycle': dense into sparse; 'architecture': only its model and
  # vocabulary, untrained.
  init_take: Literal['params', 'upcycle', 'architecture'] = 'params'
  # The optimizer's slots of `init`: 'reset', or 'keep' to go on with them.
  init_slots: Literal['reset', 'keep'] = 'reset'
  # What else is made of what: pattern of a path -> path there ('' is: new).
  init_rules: Mapping[Text, str] = dataclasses.field(default_factory=dict)
  # Gradient accumulation. Each microbatch draws dropout and routing noise by a
  # lot of its own; where a config has no noise it changes no number.
  microbatches: Size = 1
  # Places that sparse layers may compute for each that their tokens need, where
  # groups are larger than what a device has; 0: any number.
  max_padding: AtLeast0 = 2.0
  paper_params: AtLeast0 = 0.0  # What its paper prints, to compare; 0: nothing.
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluate: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()

  def __post_init__(self):
    super().__post_init__()
    model, data = self.model, self.data
    wide = {'embed_dim': model.embed_dim, 'mlp_dim': model.mlp_dim}
    for stack in model.stacks:
      length = 'inputs' if stack == 'encoder' else 'targets'
      batch = f'data.batch_size x data.{length}_length'
      tokens = data.batch_size * data.length(stack)
      layers = model.stack(stack).num_layers
      _check_room(
        {
          f'{batch} x its length x model.num_heads': (
            tokens * data.length(stack) * model.num_heads
          ),
          f'{batch} x model.vocab_size': tokens * model.vocab_size,
          **{
            f'{batch} x model.{side} x model.{stack}.num_layers': (
              tokens * size * layers
            )
            for side, size in wide.items()
          },
        }
      )
