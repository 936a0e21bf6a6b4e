"""docs/names.md, whose tables are made from the code that converts.

python -m tests.names_page
"""

import itertools
import pathlib
import re
from collections.abc import Mapping

from st_moe import config_file
from st_moe.interop import huggingface, mesh_tf, t5x
from st_moe.interop.links import Link

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'names.md'
TABLES = '## Parameters\n'

# A dense layer and a sparse one in each stack have every kind of parameter.
_STACK = {'num_layers': 2, 'sparse_every': 2, 'sparse_offset': 1}
_MODEL = {'encoder': _STACK, 'decoder': _STACK}
T5 = {'dense': True, 'moe': {'extra_ffn': 'none'}}
T5_1_0 = {**T5, 'activation': 'relu'}
SWITCH = {'activation': 'relu', 'moe': {'extra_ffn': 'none', 'num_experts': 2}}
ST_MOE = {'moe': {'num_experts': 2}}

# A number of its own for each field, so that it is found again in what is
# written.
NUMBERS = {
  'model.vocab_size': 1001,
  'model.embed_dim': 48,
  'model.num_heads': 6,
  'model.head_dim': 7,
  'model.mlp_dim': 96,
  'model.encoder.num_layers': 10,
  'model.decoder.num_layers': 9,
  'model.dropout': 0.25,
  'model.relpos_buckets': 34,
  'model.relpos_max_distance': 130,
  'model.moe.num_experts': 5,
  'model.moe.eval_capacity.count': 61,
  'model.moe.gate.jitter': 0.015,
  'model.moe.losses.load_balance': 0.011,
  'model.moe.losses.router_z': 0.012,
}
# And what makes a Switch Transformer of it.
REST = {
  'model.activation': 'relu',
  'model.tie_embeddings': True,
  'model.encoder.sparse_every': 5,
  'model.encoder.sparse_offset': 1,
  'model.decoder.sparse_every': 3,
  'model.decoder.sparse_offset': 1,
  'model.moe.selector.k': 1,
  'model.moe.extra_ffn': 'none',
}


def _links(model: Mapping, names) -> Mapping[str, Link]:
  return names(config_file.from_dict({'model': {**_MODEL, **model}}).model)


def _mesh_tf(model) -> Mapping[str, Link]:
  """As of a checkpoint of this model."""
  theirs = {ours: kind for kind, ours in mesh_tf._KINDS.items()}
  layers, shapes = {}, {}
  for stack in model.stacks:
    shapes[f'{stack}/final_layer_norm/scale'] = ()
    layers[stack] = [
      [(f'{stack}/block_b/layer_n', theirs[s.kind]) for s in sublayers]
      for sublayers in model.plan(stack).layers
    ]
  return mesh_tf._links(model, shapes, layers)


# Format -> the models it has, and its names of their parameters.
FORMATS = {
  'T5X': ((ST_MOE, SWITCH), t5x.names),
  'HuggingFace': ((T5, T5_1_0, SWITCH), huggingface.names),
  'Mesh-TensorFlow': ((ST_MOE,), _mesh_tf),
}


def _pattern(name: str) -> str:
  """A name with letters where layers and experts are counted."""
  name = re.sub(r'(layers_|block\.)\d+', r'\1i', name)
  return re.sub(r'expert_\d+', 'expert_e', name)


def parameters() -> dict[str, dict[str, str]]:
  """Ours -> format -> theirs, of every kind of parameter."""
  found = {}
  for name, (models, names) in FORMATS.items():
    for model in models:
      for ours, link in _links(model, names).items():
        cells = found.setdefault(_pattern(ours), {}).setdefault(name, {})
        cells[_pattern(link.names[0])] = None
  either = lambda cells: ' or '.join(f'`{cell}`' for cell in cells)
  return {
    ours: {name: either(cells) for name, cells in row.items()}
    for ours, row in found.items()
  }


def fields() -> dict[str, str]:
  """Fields of HuggingFace's config.json -> ours, by what is written there."""
  values = {}
  for field, value in itertools.chain(NUMBERS.items(), REST.items()):
    values = config_file.set_field(values, field, value)
  config = config_file.from_dict(values)
  ours = {str(value): field for field, value in NUMBERS.items()}
  written = huggingface.check_export(config).items()
  found = {k: ours[str(v)] for k, v in written if str(v) in ours}
  assert sorted(found.values()) == sorted(NUMBERS)
  return found


def _table(*rows) -> str:
  head, *rest = (f'| {" | ".join(row)} |' for row in rows)
  return '\n'.join([head, '| --- ' * len(rows[0]) + '|', *rest]) + '\n'


def page() -> str:
  """docs/names.md as it should be."""
  head = PAGE.read_text().partition(TABLES)[0]
  routings = {k: v for k, v in config_file.ROUTINGS.items() if v}
  differ = dict.fromkeys(f for each in routings.values() for f in each)

  def said(values, field):
    return f'`{values[field]}`' if field in values else 'as the paper'

  return '\n'.join(
    [
      head + TABLES,
      '`i` is the layer and `e` the expert; ours are those of a model with'
      '\n`scan_layers=false`. A cell is empty where a format has no such'
      ' parameter. In all three the\nheads of attention are joined, and'
      ' matrices of HuggingFace lie the other way.\n',
      _table(
        ('ours', *FORMATS),
        *(
          (f'`{ours}`', *(row.get(name, '') for name in FORMATS))
          for ours, row in parameters().items()
        ),
      ),
      "## Fields of HuggingFace's config.json\n",
      '`num_sparse_encoder_layers` and `num_sparse_decoder_layers` are the'
      ' layers over\n`model.encoder.sparse_every`, `model.decoder.sparse_every`'
      '.\n',
      _table(
        ('theirs', 'ours'),
        *((f'`{a}`', f'`{b}`') for a, b in fields().items()),
      ),
      '## Routing\n',
      'What `--config.routing` sets, where a config leaves it open.\n',
      _table(
        ('field', *routings),
        *(
          (f'`{field}`', *(said(v, field) for v in routings.values()))
          for field in differ
        ),
      ),
    ]
  )


if __name__ == '__main__':
  PAGE.write_text(page())
