"""The training run. `st_moe.train(config, workdir)` is `loop.train`.

The function and this package have one name, and only a package that can be
called is always both.
"""

import sys
import types


class _Train(types.ModuleType):
  def __call__(self, config, workdir, **options) -> dict:
    """See `st_moe.run.loop.train`."""
    from st_moe.run import loop

    return loop.train(config, workdir, **options)


sys.modules[__name__].__class__ = _Train
