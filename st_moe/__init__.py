"""Stable and transferable sparse expert models (arXiv:2202.08906) in JAX."""

import importlib

# Imported on use, so that `import st_moe` costs nothing.
_PUBLIC = {
  'Config': 'st_moe.config',
  'ModelConfig': 'st_moe.config',
  'MoEConfig': 'st_moe.config',
  'StackConfig': 'st_moe.config',
  'Transformer': 'st_moe.model.transformer',
  'load': 'st_moe.infer.load',
  'train': 'st_moe.train.loop',
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
  if name == 'interop':
    return importlib.import_module('st_moe.interop')
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)
