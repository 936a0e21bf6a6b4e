"""What transformers makes of small models, written down for the tests.

  python -m tests.interop.make_golden CHECKPOINT

Needs transformers and torch; CHECKPOINT is T5X's test_t5_tiny.checkpoint_0.

Weights are drawn by name, so a file holds names and shapes and no weights:
logits, loss, gradient norms, expert choices and greedy decoding follow.
"""

import functools
import json
import pathlib
import sys
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / 'golden'
_SMALL = dict(
  vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_heads=2,
  decoder_start_token_id=0, dropout_rate=0.0,
)  # fmt: skip
_SWITCH = dict(
  _SMALL, model_type='switch_transformers', router_jitter_noise=0.0
)
CASES = {
  't5': dict(_SMALL, model_type='t5', num_layers=2),
  't5_1_1': dict(
    _SMALL, model_type='t5', num_layers=2, num_decoder_layers=3,
    feed_forward_proj='gated-gelu', tie_word_embeddings=False,
  ),
  't5_1_1_tied': dict(
    _SMALL, model_type='t5', num_layers=1, feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
  ),
  'mt5': dict(
    _SMALL, model_type='mt5', num_layers=2, feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
  ),
  'umt5': dict(
    _SMALL, model_type='umt5', num_layers=2, feed_forward_proj='gated-gelu',
    tie_word_embeddings=False,
  ),
  'switch_8': dict(
    _SWITCH, num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=2,
    num_sparse_decoder_layers=2, num_experts=8, expert_capacity=3,
  ),
  'switch_32': dict(
    _SWITCH, num_layers=4, num_decoder_layers=4, num_sparse_encoder_layers=4,
    num_sparse_decoder_layers=2, num_experts=32, expert_capacity=2,
  ),
}  # fmt: skip


def weight(name: str, shape) -> np.ndarray:
  """The same numbers for a name everywhere."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  values = 0.3 * rng.standard_normal(shape)
  return (values + ('norm' in name)).astype(np.float32)


def batch() -> dict[str, np.ndarray]:
  """Inputs with padding, and targets: ids from 2 on, 0 is padding."""
  rng = np.random.default_rng(0)
  inputs, targets = (rng.integers(2, 48, (3, n), np.int32) for n in (11, 7))
  inputs[1, 6:], inputs[2, 9:], targets[2, 4:] = 0, 0, 0
  return {
    'inputs': inputs,
    'targets': targets,
    'shifted': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
  }


def theirs(case: str):
  """A case in transformers, with its weights by name."""
  import torch
  import transformers

  about = dict(CASES[case])
  config = transformers.AutoConfig.for_model(about.pop('model_type'), **about)
  model = transformers.AutoModelForSeq2SeqLM.from_config(config)
  if case in ('t5_1_1', 'mt5', 'umt5'):  # Released ones are untied.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
  for name, parameter in model.named_parameters():
    parameter.data = torch.tensor(weight(name, parameter.shape))
  return model


def generated(model, inputs, **options) -> list[list[int]]:
  """What transformers answers; each text ends at its EOS."""
  import torch

  ids = torch.tensor(inputs, dtype=torch.long)
  config = model.config
  found = (
    model.eval()
    .generate(
      input_ids=ids,
      attention_mask=(ids > 0).long(),
      do_sample=False,
      # Theirs allots the cache by the encoder's depth.
      use_cache=config.num_layers == config.num_decoder_layers,
      **options,
    )[:, 1:]
    .tolist()
  )
  return [row[: (row + [1]).index(1) + 1] for row in found]


def run(case: str) -> dict:
  """Everything transformers says about a case."""
  import torch

  model = theirs(case)
  config = model.config
  parameters = dict(model.named_parameters())
  model.train()  # No dropout, no jitter: as in evaluation.
  data = {k: torch.tensor(v, dtype=torch.long) for k, v in batch().items()}
  experts = []
  for name, module in model.named_modules():
    if name.endswith('router'):
      module.register_forward_hook(
        lambda _, args, out, name=name: experts.append(
          (name, out[2].argmax(-1).tolist())
        )
      )
  given = {
    'input_ids': data['inputs'],
    'attention_mask': (data['inputs'] > 0).long(),
  }
  labels = data['targets'].masked_fill(data['targets'] == 0, -100)
  out = model(**given, decoder_input_ids=data['shifted'], labels=labels)
  out.loss.backward()
  chosen = dict(experts)
  answer = functools.partial(
    generated, model, batch()['inputs'], max_new_tokens=9
  )
  return {
    'config': json.loads(config.to_json_string()),
    'shapes': {name: list(p.shape) for name, p in parameters.items()},
    'logits': out.logits.detach().numpy().tolist(),
    'loss': out.loss.item(),
    'gradient_norms': {
      # None: an expert whom nobody chose.
      name: 0.0 if p.grad is None else float(p.grad.norm())
      for name, p in parameters.items()
    },
    'experts': chosen,
    'greedy': answer(),
    'beams': answer(num_beams=3, num_return_sequences=2, length_penalty=0.5),
  }


def encoder(kind: str) -> dict:
  """What an encoder alone makes of the batch."""
  import torch
  import transformers

  config = transformers.AutoConfig.for_model(kind, **_SMALL, num_layers=2)
  model = getattr(transformers, f'{kind.upper()}EncoderModel')(config).eval()
  for name, parameter in model.named_parameters():
    parameter.data = torch.tensor(weight(name, parameter.shape))
  config.architectures = [type(model).__name__]
  ids = torch.tensor(batch()['inputs'], dtype=torch.long)
  with torch.no_grad():
    found = model(input_ids=ids, attention_mask=(ids > 0).long())
  return {
    'config': json.loads(config.to_json_string()),
    'shapes': {n: list(p.shape) for n, p in model.named_parameters()},
    'encodings': found.last_hidden_state.numpy().tolist(),
  }


def t5x_tiny(path) -> dict:
  """The T5X checkpoint at `path` in HuggingFace's T5, tensor by tensor."""
  import torch
  import transformers
  from flax import serialization

  tree = serialization.msgpack_restore(pathlib.Path(path).read_bytes())
  ours = tree['optimizer']['target']
  vocab, d = ours['token_embedder']['embedding'].shape
  encoder, decoder = ours['encoder'], ours['decoder']
  heads = encoder['relpos_bias']['rel_embedding'].shape[0]
  first = encoder['layers_0']
  count = lambda stack: sum(k.startswith('layers_') for k in stack)
  config = transformers.T5Config(
    vocab_size=vocab, d_model=d, num_heads=heads,
    d_kv=first['attention']['query']['kernel'].shape[1] // heads,
    d_ff=first['mlp']['wi_0']['kernel'].shape[1], num_layers=count(encoder),
    num_decoder_layers=count(decoder), feed_forward_proj='gated-gelu',
    tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=0.0,
  )  # fmt: skip
  model = transformers.T5ForConditionalGeneration(config)
  model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())

  def put(parameter, array):
    assert parameter.shape == array.shape
    parameter.data = torch.tensor(np.array(array))

  put(model.shared.weight, ours['token_embedder']['embedding'])
  put(model.lm_head.weight, decoder['logits_dense']['kernel'].T)
  for theirs, stack in ((model.encoder, encoder), (model.decoder, decoder)):
    name = 'decoder' if stack is decoder else 'encoder'
    put(theirs.final_layer_norm.weight, stack[f'{name}_norm']['scale'])
    table = theirs.block[0].layer[0].SelfAttention.relative_attention_bias
    put(table.weight, stack['relpos_bias']['rel_embedding'].T)
    own = 'self_attention' if stack is decoder else 'attention'
    for i, block in enumerate(theirs.block):
      layer = stack[f'layers_{i}']
      mixers = [(own, 'SelfAttention', f'pre_{own}_layer_norm')]
      if stack is decoder:
        cross = 'encoder_decoder_attention'
        mixers.append(
          (cross, 'EncDecAttention', 'pre_cross_attention_layer_norm')
        )
      for (mine, attr, norm), part in zip(mixers, block.layer, strict=False):
        put(part.layer_norm.weight, layer[norm]['scale'])
        for letter, key in zip(
          'qkvo', ('query', 'key', 'value', 'out'), strict=True
        ):
          kernel = layer[mine][key]['kernel']
          put(getattr(getattr(part, attr), letter).weight, kernel.T)
      last = block.layer[-1]
      put(last.layer_norm.weight, layer['pre_mlp_layer_norm']['scale'])
      for w in ('wi_0', 'wi_1', 'wo'):
        put(getattr(last.DenseReluDense, w).weight, layer['mlp'][w]['kernel'].T)
  data = {k: torch.tensor(v, dtype=torch.long) for k, v in batch().items()}
  with torch.no_grad():
    out = model.eval()(
      input_ids=data['inputs'],
      attention_mask=(data['inputs'] > 0).long(),
      decoder_input_ids=data['shifted'],
    )
  logits = out.logits[:, :, :48].numpy()  # Of 32128: enough to tell.
  return {'logits': logits.tolist(), 'scale': float(out.logits.abs().max())}


def main():
  import transformers

  GOLDEN.mkdir(exist_ok=True)
  for case in CASES:
    found = {'transformers': transformers.__version__, **run(case)}
    found = _rounded(found)
    (GOLDEN / f'hf_{case}.json').write_text(json.dumps(found) + '\n')
    print(case, found['loss'])
  for kind in ('t5', 'umt5'):
    found = {'transformers': transformers.__version__, **encoder(kind)}
    text = json.dumps(_rounded(found))
    (GOLDEN / f'hf_{kind}_encoder.json').write_text(f'{text}\n')
  found = _rounded(t5x_tiny(sys.argv[1]))
  (GOLDEN / 't5x_tiny.json').write_text(json.dumps(found) + '\n')


def _rounded(value):
  """Seven digits: all that a float32 holds."""
  if isinstance(value, float):
    return float(f'{value:.7g}')
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  return value


if __name__ == '__main__':
  main()
