"""Checkpoints of other codes, in and out: `FORMAT:PLACE` names one.

params, config = st_moe.interop.load('hf:google/switch-base-8')
model = st_moe.Transformer(config)
"""

import importlib

_PUBLIC = {name: 'st_moe.interop.convert' for name in ('load', 'convert')}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)
