"""What a run is made of: frozen dataclasses and the numbers derived from them.

Defaults live here and nowhere else. A config file (`configs/*.py`) names only
what its experiment changes; `config_file.load` turns it into a `Config`.
"""

import dataclasses
import difflib
import fractions
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping

# Parameters of gates, selectors and dispatchers that the sparse layer fills.
_NOT_OPTIONS = (
  *('scores', 'ctx', 'rng', 'capacity'),  # Of a selector.
  *('num_experts', 'name', 'parent'),  # Of a gate.
  *('x', 'seats', 'experts', 'transport'),  # Of a dispatcher.
)
_ROUND = {'floor': math.floor, 'round': round, 'ceil': math.ceil}


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
  """The error for a `name` that is not among the `known` ones."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return ValueError(f'Unknown {what} {name!r}.{hint} Known: {known}.')


@dataclasses.dataclass(frozen=True)
class Part:
  """A mechanism chosen by name from a table, with its options."""

  name: str
  options: tuple[tuple[str, object], ...] = ()

  @classmethod
  def of(cls, name: str, **options) -> 'Part':
    return cls(name, tuple(sorted(options.items())))

  @property
  def kwargs(self) -> dict:
    return dict(self.options)

  def choose(self, what: str, table: Mapping[str, Callable]) -> Callable:
    """The entry of `table` with this name, its options bound.

    Raises:
      ValueError: an unknown name or option, with the known ones.
    """
    if self.name not in table:
      raise unknown(what, self.name, table)
    parameters = inspect.signature(table[self.name]).parameters
    known = [name for name in parameters if name not in _NOT_OPTIONS]
    for option in self.kwargs:
      if option not in known:
        raise unknown(f'option of {what} {self.name!r}', option, known)
    return functools.partial(table[self.name], **self.kwargs)


@dataclasses.dataclass(frozen=True)
class Capacity:
  """How many tokens of one group an expert can seat.

  The default is the rule of the paper and of Mesh-TensorFlow: `factor` * tokens
  / experts, rounded down, at least 4, NOT multiplied by the experts per token.
  Other codes differ in exactly the fields below (see `slots`).
  """

  factor: float = 1.25
  count: int = 0  # So many places, whatever the rest says; 0: by `factor`.
  times_k: bool = False  # V-MoE multiplies by the experts per token.
  rounding: str = 'floor'  # Flaxformer: 'round'; V-MoE: 'ceil'.
  minimum: int = 4
  multiple: int = 1
  dropless: bool = False  # Everyone sits; all of the above is moot.

  def __post_init__(self):
    if self.rounding not in _ROUND:
      raise ValueError(
        f'Capacity rounding {self.rounding!r} is none of {sorted(_ROUND)}.'
      )
    if self.factor <= 0 or self.count < 0 or self.multiple < 1:
      raise ValueError(
        f'{self} cannot seat anyone: factor must be above 0, count at least 0'
        ' and multiple at least 1.'
      )

  def slots(self, group_size: int, num_experts: int, k: int = 1) -> int:
    """Places per expert in a group of `group_size` tokens, never more."""
    if self.dropless:
      return group_size
    if self.count:
      return min(self.count, group_size)
    # Fractions, because floor(1.15 * 100 / 5) must not depend on float noise.
    share = fractions.Fraction(str(self.factor)) * group_size / num_experts
    slots = _ROUND[self.rounding](share * (k if self.times_k else 1))
    slots = max(slots, self.minimum)
    slots = -(-slots // self.multiple) * self.multiple
    return min(slots, group_size)


# What the fields of a sparse layer that are words may say.
_MOE_WORDS = {
  'extra_ffn': ('none', 'before', 'after'),
  'group_by': ('tokens', 'sequence'),
  'padding': ('ignored', 'routed', 'zeroed'),
  'transport': ('auto', 'gspmd', 'shard_map'),
}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """One sparse feed-forward layer. Defaults: ST-MoE (arXiv:2202.08906)."""

  num_experts: int = 32
  hidden_dim: int = 0  # 0: as wide as the dense FFN.
  train_capacity: Capacity = Capacity(1.25)
  eval_capacity: Capacity = Capacity(2.0)
  gate: Part = Part.of('linear')
  selector: Part = Part.of('top_k', k=2)
  # 'auto': `index` where places are limited; where nothing drops, `grouped`,
  # or what suits few tokens (see `MoE`).
  dispatcher: str = 'auto'
  # How tokens reach the devices of their experts: 'gspmd', as the compiler
  # finds best, or 'shard_map', to the letter: by all-to-alls, or for `grouped`
  # gathered by all who share the experts. 'auto': the latter for `grouped`
  # alone, where the compiler would gather in every turn of its loop.
  transport: str = 'auto'
  multiplicative_bias: bool = False  # On the expert's hidden units, Table 17.
  expert_dropout: float | None = None  # None: the model's dropout.
  # Dense FFN 'before' or 'after' a sparse one; 'none'.
  extra_ffn: str = 'after'
  # Who competes for places: `group_size` neighbours of the flattened batch
  # ('tokens'), or each 'sequence' by itself.
  group_by: str = 'tokens'
  # 'ignored': asks for no place. 'routed': as any token. 'zeroed': as any token
  # whose activations are 0.
  padding: str = 'ignored'

  def __post_init__(self):
    for field, known in _MOE_WORDS.items():
      if getattr(self, field) not in known:
        raise unknown(field, getattr(self, field), known)

  def capacity(self, deterministic: bool) -> Capacity:
    return self.eval_capacity if deterministic else self.train_capacity

  def slots(self, group_size: int, deterministic: bool) -> int:
    return self.capacity(deterministic).slots(
      group_size, self.num_experts, self.selector.kwargs.get('k', 1)
    )

  def executed_experts(self, group_size: int) -> float:
    """Experts computed per token in training, filled places or not."""
    if self.train_capacity.dropless:
      return self.selector.kwargs.get('k', 1)
    slots = self.slots(group_size, deterministic=False)
    return self.num_experts * slots / group_size


@dataclasses.dataclass(frozen=True)
class StackConfig:
  """Depth of one stack and which of its layers are sparse.

  Layer i is sparse where i % sparse_every == sparse_offset (ST-MoE: 3 of 4;
  HuggingFace Switch: 1 of 2); sparse_every 0 makes none sparse.
  """

  num_layers: int = 12
  sparse_every: int = 4
  sparse_offset: int = 3
  group_size: int = 2048  # Tokens that compete for places.

  def __post_init__(self):
    if self.group_size < 1:
      raise ValueError(
        f'group_size {self.group_size}: a group has at least one token.'
      )
    if self.sparse_every and not 0 <= self.sparse_offset < self.sparse_every:
      raise ValueError(
        f'sparse_offset {self.sparse_offset} is never reached with'
        f' sparse_every {self.sparse_every}; it must be 0 to'
        f' {self.sparse_every - 1}.'
      )


@dataclasses.dataclass(frozen=True)
class Sublayer:
  """One residual step: norm, `kind`, dropout, add."""

  kind: str  # 'self_attention', 'cross_attention', 'mlp' or 'moe'.
  name: str  # Of its module; part of every checkpoint.
  norm: str
  mlp_dim: int = 0


@dataclasses.dataclass(frozen=True)
class LayerPlan:
  """What each layer of a stack is: its sublayers in order."""

  layers: tuple[tuple[Sublayer, ...], ...]

  @property
  def period(self) -> int:
    """The shortest run of layers whose repetition gives the stack."""
    for p in range(1, len(self.layers)):
      if all(
        a == b for a, b in zip(self.layers, self.layers[p:], strict=False)
      ):
        return p
    return max(len(self.layers), 1)

  @property
  def sparse(self) -> tuple[int, ...]:
    """Numbers of the layers that have a sparse sublayer."""
    return tuple(
      i
      for i, layer in enumerate(self.layers)
      if any(s.kind == 'moe' for s in layer)
    )

  @property
  def num_sparse(self) -> int:
    return len(self.sparse)


# What the fields of a model that are words may say.
_WORDS = {
  'activation': ('geglu', 'gelu', 'relu'),
  'dtype': ('auto', 'float32', 'bfloat16'),
  'remat': ('none', 'full', 'dots'),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A T5-like Transformer: T5 1.1 by default, sparse where its stacks say so.

  Without a decoder it reads (encoder-only), without an encoder it is a causal
  language model; nothing else changes.
  """

  vocab_size: int = 32_128  # 0: as the vocabulary of the run needs it.
  embed_dim: int = 768
  num_heads: int = 12
  head_dim: int = 64
  mlp_dim: int = 2048
  # 'geglu': three matrices; 'relu' (T5 1.0, Switch) or 'gelu': two.
  activation: str = 'geglu'
  encoder: StackConfig | None = StackConfig()
  decoder: StackConfig | None = StackConfig(group_size=456)
  moe: MoEConfig = MoEConfig()
  # The dense twin: each sparse FFN replaced by one as wide as the hidden units
  # the sparse one computes per token. Everything else stays.
  dense: bool = False

  dropout: float = 0.0
  tie_embeddings: bool = False
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  init_scale: float = 0.1  # Of every kernel; T5 had 1.0 (Switch, section 2.4).
  # Of the position biases; None: `init_scale`. Adafactor's steps are as large
  # as the weights are: a table that starts small learns word order late.
  relpos_init_scale: float | None = None

  dtype: str = 'auto'  # Of activations: bfloat16 on TPU and GPU, else float32.
  scan_layers: bool = True
  remat: str = (
    'none'  # What the backward pass recomputes: 'none', 'full', 'dots'.
  )

  def __post_init__(self):
    if self.encoder is None and self.decoder is None:
      raise ValueError('A model needs an encoder, a decoder, or both.')
    for field, known in _WORDS.items():
      if getattr(self, field) not in known:
        raise unknown(field, getattr(self, field), known)

  @property
  def expert_dim(self) -> int:
    return self.moe.hidden_dim or self.mlp_dim

  def executed_dim(self, stack: str) -> int:
    """Hidden units a sparse layer computes per token in training."""
    experts = self.moe.executed_experts(self.stack(stack).group_size)
    return round(experts * self.expert_dim)

  @property
  def expert_dropout(self) -> float:
    rate = self.moe.expert_dropout
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
    cfg, moe = self.stack(stack), self.moe
    mlp = Sublayer('mlp', 'mlp', 'pre_mlp_layer_norm', self.mlp_dim)
    sparse = Sublayer('moe', 'moe', 'pre_mlp_layer_norm', self.expert_dim)
    if self.dense:
      sparse = dataclasses.replace(mlp, mlp_dim=self.executed_dim(stack))
    extra = dataclasses.replace(
      mlp, name='extra_mlp', norm='pre_extra_mlp_layer_norm'
    )
    beside = {
      'none': (sparse,),
      'before': (extra, sparse),
      'after': (sparse, extra),
    }[moe.extra_ffn]
    mix = [
      Sublayer('self_attention', 'self_attention', 'pre_attention_layer_norm')
    ]
    if stack == 'decoder' and self.encoder:
      mix.append(
        Sublayer(
          'cross_attention',
          'encoder_decoder_attention',
          'pre_cross_attention_layer_norm',
        )
      )
    every, offset = cfg.sparse_every, cfg.sparse_offset
    return LayerPlan(
      tuple(
        (*mix, *(beside if every and i % every == offset else (mlp,)))
        for i in range(cfg.num_layers)
      )
    )

  @property
  def num_experts(self) -> int:
    """Of each sparse layer; 0 where there is none."""
    sparse = any(self.plan(s).num_sparse for s in self.stacks)
    return self.moe.num_experts if sparse else 0

  def dropless(self) -> 'ModelConfig':
    """The same model, evaluated without dropping anyone."""
    moe = dataclasses.replace(
      self.moe, eval_capacity=Capacity(dropless=True), dispatcher='auto'
    )
    return dataclasses.replace(self, moe=moe)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What the batches are made of. Lengths in tokens, sizes in examples."""

  # Task or text source by name -> rate. A rate is a number, or 'size': as many
  # as it has training examples, capped by `size_cap` (0: no cap) and flattened
  # by `temperature` (rate ** (1 / temperature)).
  mixture: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
  size_cap: int = 0
  temperature: float = 1.0

  # Text sources for span corruption: name -> {'train': glob, 'validation':
  # glob}. Globs of .txt, .jsonl, .json, plain or .gz; local or gs://.
  files: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )
  text_field: str = 'text'
  noise_density: float = 0.15
  mean_span: float = 3.0

  # Path of a SentencePiece model, or 'bytes'; both get 100 sentinels on top.
  # '': that of `init`, else one of `vocabulary_size` ids, sentinels included,
  # trained on the mixture.
  vocabulary: str = ''
  vocabulary_size: int = 4000
  # What else a new vocabulary learns from: a glob of text, or 'tiny_world', the
  # embedded tasks.
  vocabulary_extra: str = ''

  inputs_length: int = 512
  targets_length: int = 114
  batch_size: int = 128
  seed: int = 0
  cache_dir: str = ''  # Where tokenised shards lie; '' is ~/.cache/st_moe.
  data_dir: str = ''  # Where tasks find their files; '': $ST_MOE_DATA.
  workers: int = 1

  def length(self, stack: str) -> int:
    """Tokens of a row of 'encoder' or 'decoder'."""
    return self.inputs_length if stack == 'encoder' else self.targets_length


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What is minimised: cross-entropy per target token plus these."""

  z_loss: float = 1e-4  # On the output softmax.
  label_smoothing: float = 0.0
  # Router losses by name; coefficients of Eq. 6 of arXiv:2202.08906.
  router: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {'load_balance': 1e-2, 'router_z': 1e-3}
  )
  layers: str = 'sum'  # Over sparse layers: 'sum' (Mesh-TF) or 'mean' (T5X).
  # Targets of a row whose logits are there at once; 0: all. With few of them a
  # large vocabulary takes little memory, and one more product with the output
  # matrix time.
  positions: int = 0

  def __post_init__(self):
    if self.positions < 0:
      raise ValueError(
        f'loss.positions={self.positions} must be 0 (all) or more.'
      )
    if self.layers not in ('sum', 'mean'):
      raise ValueError(f'loss.layers {self.layers!r} is neither sum nor mean.')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Adafactor as T5X sets it for sparse models, or AdamW."""

  name: str = 'adafactor'
  # What is trained, the rest is frozen: 'all', 'moe', 'non_moe', 'attention',
  # 'ffn', 'router', or a pattern of parameter paths.
  train: str = 'all'
  # Schedule: `learning_rate` after a linear ramp of `warmup_steps` (0: none),
  # constant for `constant_steps`, then falling as 1 / sqrt(step).
  learning_rate: float = 0.01
  warmup_steps: int = 0
  constant_steps: int = 10_000
  decay: str = 'rsqrt'  # or 'none': constant for ever (fine-tuning).
  # Adafactor.
  decay_exponent: float = 0.8
  clip_threshold: float = 1.0
  parameter_scale: bool = True
  min_dim_to_factor: int = 128
  # AdamW.
  b1: float = 0.9
  b2: float = 0.999
  # Of either, times the learning rate.
  weight_decay: float = 0.0
  # A step whose loss or gradients are not finite is not applied; so many in a
  # row end the run.
  max_bad_steps: int = 10


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; data 0: whatever the others leave."""

  data: int = 0
  fsdp: int = 1
  expert: int = 1
  model: int = 1
  # Lets axes other than data cross the slow network between TPU slices.
  across_slices: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When checkpoints are written and which of them stay."""

  every: int = 1000
  keep_last: int = 2  # 0: all.
  keep_every: int = 0  # Steps; 0: none are kept for ever.
  # Metrics; the best checkpoint of each stays. Separated by commas, * is any:
  # 'eval/*/accuracy,eval/*/f1'; '-eval/x/loss' is the lowest.
  keep_best: str = ''
  asynchronous: bool = True


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What is measured during training and by `st-moe evaluate`."""

  every: int = 1000  # Steps; 0: at the end only.
  batches: int = 0  # Batches per source and split; 0: all.
  batch_size: int = 0  # 0: the training batch.
  split: str = 'validation'
  decode: bool = False  # Greedy decoding beside rank classification.
  # Rank by the mean log-probability of an answer's tokens, not by their sum.
  length_normalized: bool = False
  # Answers drop no token; false: as `model.moe.eval_capacity` has it.
  dropless: bool = True


@dataclasses.dataclass(frozen=True)
class LogConfig:
  """Where numbers go."""

  every: int = 100
  tensorboard: bool = True
  wandb: bool = False
  wandb_project: str = 'st_moe'


# How other codes route, as fields that differ from the defaults; a checkpoint
# means what it meant only under the routing it was trained with.
#
#                        paper           flaxformer           huggingface
#   weights of top-2     renormalised    probabilities        (top-1 only)
#   second choices       random 0.2      all                  (top-1 only)
#   capacity             floor           round                64 a sequence
#   a group              tokens          tokens               a sequence
#   padding              asks nothing    goes to expert 0     as any token
#   balance counts       first choices   all choices          first choices
#   losses over layers   sum             mean                 mean
#   first sparse layer   the last of     the last of          the second
#                        each period     each period
#
# 'paper' is that of Mesh-TensorFlow too. HuggingFace takes the balance loss
# over all layers of a stack joined, as if they were one, which we do not.
ROUTINGS = {
  'paper': {},
  'flaxformer': {
    'model.moe.selector.k': 2,
    'model.moe.selector.normalize': False,
    'model.moe.selector.train_policy': 'all',
    'model.moe.train_capacity.rounding': 'round',
    'model.moe.eval_capacity.rounding': 'round',
    'model.moe.padding': 'zeroed',
    'loss.router': {'load_balance_all': 1e-2, 'router_z': 1e-3},
    'loss.layers': 'mean',
  },
  'huggingface': {
    'model.encoder.sparse_offset': 1,
    'model.decoder.sparse_offset': 1,
    'model.moe.selector.k': 1,
    'model.moe.train_capacity.count': 64,
    'model.moe.eval_capacity.count': 64,
    'model.moe.group_by': 'sequence',
    'model.moe.padding': 'routed',
    'model.moe.extra_ffn': 'none',
    'loss.layers': 'mean',
  },
}


@dataclasses.dataclass(frozen=True)
class Config:
  """One run."""

  name: str = ''
  routing: str = 'paper'  # One of ROUTINGS: what the file leaves open.
  seed: int = 0
  total_steps: int = 0
  init: str = ''  # A checkpoint or workdir to start from; '': random.
  # 'params'; 'upcycle': dense into sparse; 'architecture': only its model and
  # vocabulary, untrained.
  init_take: str = 'params'
  # The optimizer's slots of `init`: 'reset', or 'keep' to go on with them.
  init_slots: str = 'reset'
  # What else is made of what: pattern of a path -> path there ('' is: new).
  init_rules: Mapping[str, str] = dataclasses.field(default_factory=dict)
  microbatches: int = 1  # Gradient accumulation; changes no number.
  paper_params: float = 0.0  # What its paper prints, to compare; 0: nothing.
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluate: EvalConfig = EvalConfig()
  log: LogConfig = LogConfig()

  def __post_init__(self):
    if self.init_slots not in ('reset', 'keep'):
      raise unknown('init_slots', self.init_slots, ('reset', 'keep'))
