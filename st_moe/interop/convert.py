"""From one format to another: `load` for Python, `convert` for the command."""

import dataclasses
import importlib
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from st_moe import config_file, paths, sharding
from st_moe.config import Config, ModelConfig, unknown
from st_moe.data import files, vocabulary
from st_moe.interop import links
from st_moe.model.transformer import Transformer
from st_moe.train.state import abstract_params

FORMATS = {
  'hf': 'st_moe.interop.huggingface',
  't5x': 'st_moe.interop.t5x',
  't5x_orbax': 'st_moe.interop.t5x_orbax',
  'mtf': 'st_moe.interop.mesh_tf',
  'st_moe': 'st_moe.interop.ours',
}


# What code that expects a number, a list or a tensor of two axes makes of
# anything else that a checkpoint may say.
_STRANGE = (
  ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
)  # fmt: skip


def split(uri: str) -> tuple[str, str]:
  """'hf:PLACE' as ('hf', 'PLACE'); what names no format is one of ours."""
  name, colon, where = str(uri).partition(':')
  named = colon and '/' not in name and not where.startswith('//')
  if named and name not in FORMATS:
    raise unknown('format', name, FORMATS)
  return (name, where) if name in FORMATS and colon else ('st_moe', str(uri))


def open_source(uri: str):
  """Opens the checkpoint at FORMAT:PLACE without reading its tensors."""
  name, where = split(uri)
  try:
    return importlib.import_module(FORMATS[name]).open_source(where)
  except KeyError as e:  # Of a field or tensor that every model there has.
    raise ValueError(
      f'{uri} has no {e.args[0]}: it is damaged, or of another model.'
    ) from e
  except ValueError as e:  # Of a format, which may say where, or not.
    if where in str(e):
      raise
    raise ValueError(f'{uri}: {e}') from e
  except _STRANGE as e:
    raise ValueError(
      f'{uri} cannot be understood ({type(e).__name__}: {e}): it is damaged, or'
      ' of another model.'
    ) from e


def load_config(spec: str, overrides: Mapping | None = None) -> Config:
  """What `st-moe train --config=SPEC --config.FIELD=VALUE ...` would train.

  Args:
    spec: 'FILE' or 'FILE:argument,argument=value', as of those in configs/.
    overrides: dotted field -> value. A config with an `init` continues the
      model of that checkpoint.

  Raises:
    ValueError: what is wrong and where.
  """
  base = lambda init: config_file.to_dict(open_source(init).config)
  return config_file.load(spec, overrides, base=base)


def load(uri: str, *, mesh=None) -> tuple[dict, ModelConfig]:
  """Parameters and model of the checkpoint at FORMAT:PLACE.

  Args:
    mesh: where parameters go; None is one device.

  Raises:
    ValueError: what is wrong with it, by tensor and shape.
  """
  source = open_source(uri)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use(mesh):
    model = Transformer(source.config.model)
    return source.load(abstract_params(model, mesh)), source.config.model


def convert(
  source: str,
  target: str,
  *,
  overrides: Mapping | None = None,
  verify: bool = False,
) -> list[str]:
  """Writes the checkpoint `source` as `target`, both FORMAT:PLACE.

  Args:
    overrides: fields of the config to set: what a checkpoint does not say of
      its model, or `model.scan_layers`, the layout of one of ours.
    verify: compare logits with the source's own implementation.

  Returns:
    What was done with every tensor, in lines.

  Raises:
    ValueError: the source is damaged or of another model, the target is there
      already or has no names for a part of the model, or logits differ; then
      nothing is written.
  """
  name, where = split(target)
  if not files.is_remote(where):  # Not every library takes a relative one.
    where = str(epath.Path(where).expanduser().resolve())
  files.check_new(where)
  opened = open_source(source)
  values = config_file.to_dict(opened.config)
  for field, value in (overrides or {}).items():
    values = config_file.set_field(values, field, value)
  opened.config = config_file.from_dict(values)
  module = importlib.import_module(FORMATS[name])
  config = opened.config
  if opened.vocabulary is not None:
    known = vocabulary.checked(source, opened.vocabulary)
    known.check_fits(config.model.vocab_size)
  # Arrays of JAX, which Orbax writes without a copy.
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with sharding.use(mesh):
    abstract = abstract_params(Transformer(config.model), mesh)
  check_export(name, config, abstract)
  params = opened.load(abstract)
  lines = report(opened, abstract)
  if verify:
    lines.append(_verify(source, params, config))
  module.save(where, params, config, opened.vocabulary)
  return [*lines, f'wrote {target}']


def check_export(format: str, config: Config, abstract) -> None:
  """Raises a ValueError for a part of a model that a format has no place for.

  Args:
    abstract: shapes of the parameters.
  """
  module = importlib.import_module(FORMATS[format])
  if hasattr(module, 'check_export'):
    module.check_export(config)
  if hasattr(module, 'names'):
    names = module.names(config.model)
    links.check_named(abstract, config.model, names, format)


def report(opened, abstract) -> list[str]:
  """What became of every tensor of a source."""
  leaves = paths.by_path(abstract).values()
  total = sum(int(np.prod(leaf.shape)) for leaf in leaves)
  lines = [f'{total:,} parameters filled, in {len(leaves)} arrays']
  if not hasattr(opened, 'links'):
    return lines
  used = {name for link in opened.links.values() for name in link.names}
  lines.append(
    f'{len(opened.shapes)} tensors in {opened.where}: {len(used)} mapped,'
    f' {len(opened.copies)} tied, {len(opened.unused)} unused'
  )
  lines += [f'  tied: {a} = {b}' for a, b in opened.copies.items()]
  lines += [
    f'  unused: {name} {list(opened.shapes[name])}' for name in opened.unused
  ]
  changed = {
    f'{opened.dtypes[n].name} -> float32'
    for n in used
    if opened.dtypes[n] != np.float32
  }
  return [*lines, *(f'  dtype: {change}' for change in sorted(changed))]


def _verify(source: str, params, config: Config) -> str:
  name, where = split(source)
  module = importlib.import_module(FORMATS[name])
  if not hasattr(module, 'logits'):
    return f'no implementation of {name} to verify with'
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.integers(
    2, config.model.vocab_size, shape, dtype=np.int32
  )
  inputs, targets = draw(2, 12), draw(2, 7)
  inputs[1, 8:] = 0
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  model = Transformer(dataclasses.replace(config.model, dtype='float32'))
  given, what = {'enable_dropout': False}, 'logits'
  batch = [inputs, shifted, targets]
  if not config.model.decoder:
    given['method'], what, batch = 'encode', 'encodings', [inputs]
  got = model.apply({'params': params}, *batch, **given)
  want = module.logits(where, inputs, shifted)
  if not config.model.decoder:  # Padding has encodings too; nobody reads them.
    got, want = got[inputs > 0], want[inputs > 0]
  off, most = np.abs(got - want).max(), np.abs(want).max()
  line = f'{what} differ from {name} by at most {off:.2g}, of {most:.2g}'
  if not off <= _BOUND * most:  # Nor is NaN.
    raise ValueError(f'{source}: {line}. Nothing was written.')
  return line


_BOUND = 1e-3  # Of the largest logit, in float32.
