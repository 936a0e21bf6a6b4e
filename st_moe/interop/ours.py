"""Our own checkpoints, as a source and a target like the others."""

import dataclasses

import jax
from etils import epath

from st_moe import checkpoint, config_file, paths, sharding
from st_moe.config import Config
from st_moe.model.transformer import Transformer
from st_moe.train import optimizer
from st_moe.train.state import abstract_params, init_state, parameter_axes


@dataclasses.dataclass
class Source:
  """One of our checkpoints, opened and not yet read."""

  where: str
  config: Config
  vocabulary: bytes | None
  modules: tuple[str, ...] = ()  # Imported for its tasks when it was trained.

  def load(self, abstract):
    """Parameters in the layout of `abstract`, scanned or not."""
    own = _config(self.where, checkpoint.read_run(self.where)).model
    model = self.config.model
    if own.scan_layers == model.scan_layers:
      return checkpoint.load_params(self.where, abstract)
    saved = abstract_params(Transformer(own))
    params = checkpoint.load_params(self.where, saved)
    turn = paths.roll if model.scan_layers else paths.unroll
    return jax.tree.map(_as_asked, turn(params, model), abstract)

  def slots(self, config: Config, like):
    """The optimizer's slots, as far as `like`, the slots of a run, has them.

    Raises:
      ValueError: this checkpoint has none, or others.
    """
    own = _config(self.where, checkpoint.read_run(self.where))
    if own.optimizer.name != config.optimizer.name:
      raise ValueError(
        f'{self.where} has slots of {own.optimizer.name}, this config wants'
        f" {config.optimizer.name}: set init_slots='reset'."
      )
    model = Transformer(own.model)
    made = optimizer.make(own.optimizer, parameter_axes(model))
    boxed = sharding.shapes_of(
      lambda: init_state(model, made, jax.random.key(0))
    )
    state = checkpoint.load_rest(self.where, sharding.unbox(boxed))
    found = paths.by_path(state['opt_state'][0])

    def take(path, leaf):
      if path not in found or found[path].shape != leaf.shape:
        raise ValueError(
          f'{self.where} has no slot {path} of shape {list(leaf.shape)}: set'
          " init_slots='reset'."
        )
      return _as_asked(found[path], leaf)

    return paths.map_by_path(take, like)


def _as_asked(array, abstract):
  return jax.device_put(array.astype(abstract.dtype), abstract.sharding)


def _config(where: str, run) -> Config:
  return config_file.from_dict(run['config'], f'the config of {where}')


def open_source(where: str) -> Source:
  found = _find(where)  # Once: all is read from the same.
  run = checkpoint.read_run(found)
  config = _config(where, run)
  modules = tuple(run.get('modules', ()))
  return Source(f'{found}', config, checkpoint.vocabulary_of(run), modules)


def _find(where: str) -> epath.Path:
  """One of our checkpoints; says what else a place may be."""
  place = epath.Path(where).expanduser()
  if place.exists() and not place.is_dir():
    raise ValueError(f'{where} is a file; a checkpoint is a directory.')
  try:
    return checkpoint.find(where)
  except ValueError as e:
    if any(place.glob('*.safetensors')):
      raise ValueError(f"{e} HuggingFace's is hf:{where}.") from None
    raise


def save(where: str, params, config: Config, vocabulary: bytes | None) -> None:
  run = checkpoint.describe_run(config_file.to_dict(config), vocabulary)
  checkpoint.save_params(where, params, run)
