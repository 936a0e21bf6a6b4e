"""Flags of a command line: read alike for all verbs, each with its rule.

`--flag value` is `--flag=value`, before and behind what is no flag. Fields of
the config, `--config.FIELD=VALUE`, are taken out first.
"""

import argparse
import functools
import re
from collections.abc import Mapping, Sequence

from st_moe import fields
from st_moe.fields import Text, shown, unknown

_NUMBER = re.compile(r'-[\d.]')


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose flags say by `rule=` what they may be."""

  def __init__(self, **options):
    super().__init__(
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      **options,
    )
    self.register('action', None, Flag)
    self.register('action', 'append', functools.partial(Flag, several=True))

  def read(self, argv: Sequence[str]) -> tuple[argparse.Namespace, dict]:
    """The flags in `argv`, and fields of the config by name: their text.

    Raises:
      ValueError: a flag that is unknown, was given twice or breaks its rule.
    """
    known = self._option_string_actions
    given, others, overrides = _sorted(
      argv, {name: action.nargs is None for name, action in known.items()}
    )
    for flag in given:
      name = flag.partition('=')[0]
      if name not in known:
        raise unknown('flag', name, known, self._meant(name))
    flags, rest = self.parse_known_args([*given, '--', *others])
    if rest := [each for each in rest if each != '--']:
      name = rest[0].partition('=')[0]
      raise unknown('flag', name, known, self._meant(name))
    return flags, overrides

  def _meant(self, name: str) -> list[str]:
    """Fields of the config that somebody took for flags."""
    from st_moe import config_file

    if '--config' not in self._option_string_actions:
      return []
    return [f'--config.{path}' for path in config_file.named(name.strip('-'))]


class Flag(argparse.Action):
  """A flag that is given once, or `several` times, and keeps its rule."""

  def __init__(self, option_strings, dest, *, rule=Text, several=False, **more):
    super().__init__(option_strings, dest, **more)
    self.rule, self.several = rule, several

  def __call__(self, parser, namespace, value, option=None):
    if option is None:  # No flag.
      setattr(namespace, self.dest, value)
      return
    value = fields.read(value, self.rule, option)
    given = vars(namespace).setdefault('given', {})
    if self.several:
      value = [*given.get(self.dest, []), value]
    elif given.get(self.dest, value) != value:
      raise twice(option, given[self.dest], value)
    given[self.dest] = value
    setattr(namespace, self.dest, value)


def twice(flag: str, first, second) -> ValueError:
  return ValueError(
    f'{flag} is given twice, as {shown(first)} and as {shown(second)}: which?'
  )


def _sorted(argv: Sequence[str], takes: Mapping[str, bool]):
  """(flags, other arguments, fields of the config) of a command line.

  Args:
    takes: flag -> whether a value follows it.
  """
  given, others, overrides, rest = [], [], {}, list(argv)
  while rest:
    flag, equals, value = rest.pop(0).partition('=')
    if flag == '--' and not equals:
      others += rest
      break
    # A sentence is a prompt, whatever it begins with.
    if not flag.startswith('-') or ' ' in flag or _NUMBER.match(flag):
      others.append(flag + equals + value)
      continue
    if flag.startswith('--gin.'):  # T5X's spelling of a macro.
      flag, equals, value = '--gin', '=', flag[6:] + equals + value
    field = flag.startswith('--config.')
    follows = rest and not rest[0].startswith('--')
    if not equals and follows and (field or takes.get(flag)):
      equals, value = '=', rest.pop(0)
    if not field:
      given.append(flag + equals + value)
    elif not equals:
      raise ValueError(f'{flag} needs a value: {flag}=VALUE.')
    elif overrides.setdefault(flag.removeprefix('--config.'), value) != value:
      raise twice(flag, overrides[flag.removeprefix('--config.')], value)
  return given, others, overrides
