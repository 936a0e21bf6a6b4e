"""Stable and transferable sparse expert models (arXiv:2202.08906) in JAX."""

import importlib

# Imported on use, so that `import st_moe` costs nothing.
_PUBLIC = {
  'Config': 'st_moe.config',
  'ModelConfig': 'st_moe.config',
  'MoEConfig': 'st_moe.config',
  'StackConfig': 'st_moe.config',
  'Transformer': 'st_moe.model.transformer',
  'evaluate': 'st_moe.infer.evaluate',
  'load': 'st_moe.infer.load',
  'load_config': 'st_moe.interop.convert',
}
_PACKAGES = ('interop', 'train')
__all__ = sorted([*_PUBLIC, *_PACKAGES])


def __getattr__(name: str):
  if name == '__version__':
    return importlib.import_module('importlib.metadata').version('st_moe')
  if name in _PACKAGES:
    return importlib.import_module(f'st_moe.{name}')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)
