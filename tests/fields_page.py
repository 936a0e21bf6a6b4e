"""docs/fields.md, made from the dataclasses of a config and their comments.

python -m tests.fields_page
"""

import dataclasses
import inspect
import pathlib
import re
import textwrap

from st_moe import config, fields

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'fields.md'
HEAD = """# Fields of a config

Every field, as `--config.NAME=value` sets it and a config file does
([how](howto/config.md)). Made by `python -m tests.fields_page` from
[`st_moe/config.py`](../st_moe/config.py).
"""
# Where a dataclass stands, beside where its field's name says.
PLACES = {
  '': 'The run',
  'model.encoder': '`model.encoder`, `model.decoder`',
  'model.moe.train_capacity': '`model.moe.train_capacity`, `.eval_capacity`',
}
# These have the fields of another.
ELSEWHERE = 'model.encoder.moe', 'model.decoder', 'model.moe.eval_capacity'
# Rules in fewer words; that a number has a largest one goes without saying.
SHORT = {
  r'\ba int\b': 'a whole number',
  r'\ba float\b': 'a number',
  r'\ba str\b': 'a text',
  r'\ba bool\b': 'true or false',
  r'\ba dict\b': 'values by name',
  r', finite': '',
  r' and at most \d+(,\d{3}){2,}': '',
}


def comments(kind: type) -> dict[str, str]:
  """What the source says of each field: above it, or behind it."""
  found, above = {}, []
  for line in textwrap.dedent(inspect.getsource(kind)).split('\n'):
    if said := re.match(r'  # (.*)', line):
      above.append(said[1])
      continue
    if field := re.match(r'  (\w+): [^#]*(?:  # (.*))?$', line):
      found[field[1]] = ' '.join([*above, field[2] or '']).strip()
    if line.startswith('  def '):
      break
    above = []
  return found


def _default(field: dataclasses.Field) -> str:
  value = field.default
  if value is dataclasses.MISSING:
    value = field.default_factory()
  parts = [value] if isinstance(value, config.Part) else value
  if isinstance(parts, tuple | list) and parts:
    said = (
      ' '.join([p.name, *(f'{k}={v}' for k, v in p.options)]) for p in parts
    )
    return ', '.join(f'`{each}`' for each in said)
  if value == '':
    return "`''`"
  return f'`{value:,}`' if type(value) is int else f'`{value}`'


def _may_be(hint) -> str:
  if hint in (config.Part, config.Parts):
    several = ', any number' if hint is config.Parts else ''
    return f'[a mechanism](methods.md){several}'
  said = ', or '.join(map(fields.described, fields.alternatives(hint)))
  for pattern, instead in SHORT.items():
    said = re.sub(pattern, instead, said)
  return said


def _inner(hint) -> type | None:
  """The dataclass that a field holds, if it is a group of fields."""
  for each in fields.alternatives(hint):
    if dataclasses.is_dataclass(each) and each is not config.Part:
      return each
  return None


def _section(kind: type, place: str) -> list[str]:
  title = PLACES.get(place, f'`{place}`')
  rows = [f'\n## {title}\n\n{inspect.getdoc(kind)}\n']
  rows.append('| field | may be | default | |\n| --- | --- | --- | --- |')
  hints, said, below = fields.of(kind), comments(kind), []
  for field in dataclasses.fields(kind):
    hint, name = hints[field.name], f'{place}.{field.name}'.lstrip('.')
    inner = _inner(hint)
    if inner and name not in ELSEWHERE:
      below += _section(inner, name)
    if not inner:
      cells = _may_be(hint), _default(field), said.get(field.name, '')
      plain = (re.sub('([|*])', r'\\\1', cell) for cell in cells)
      rows.append(f'| `{name}` | {" | ".join(plain)} |')
  return [*rows, *below]


def page() -> str:
  """docs/fields.md as it should be."""
  return HEAD + '\n'.join(_section(config.Config, '')) + '\n'


if __name__ == '__main__':
  PAGE.write_text(page())
