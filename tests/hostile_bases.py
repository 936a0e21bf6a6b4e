"""What `tests.hostile` changes: whole inputs, and what reads each."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  kind: str  # Of input.
  name: str  # What was done to it.
  # (bases, folder to write to, rng) -> Attempt.
  make: Callable = dataclasses.field(compare=False, repr=False)

  def __str__(self) -> str:
    return f'{self.kind}: {self.name}'


@dataclasses.dataclass
class Attempt:
  """The command that reads an input, and what is made of it."""

  command: list[str] | Callable[[], None]
  # What the command made, as a digest.
  made: Callable[[], str]
  whole: str = ''  # The base whose digest shows that nothing has changed.
  never: pathlib.Path | None = None  # What may not be there in the end.


class Bases:
  """Whole inputs in a folder, and what is made of each."""

  def __init__(self, root: pathlib.Path):
    self.root = root

  def __getitem__(self, name: str) -> pathlib.Path:
    return self.root / name

  def copy(self, name: str, folder: pathlib.Path) -> pathlib.Path:
    target = folder / name
    if self[name].is_dir():
      shutil.copytree(self[name], target)
    else:
      shutil.copy(self[name], target)
    return target

  @functools.cache  # noqa: B019
  def made(self, name: str) -> str:
    """The digest of what is made of a whole base, as a case would."""
    with tempfile.TemporaryDirectory() as folder:
      attempt = WHOLE[name](self, pathlib.Path(folder))
      status, said = run(attempt.command)
      if status:
        raise RuntimeError(f'The whole {name} is refused: {said}')
      return attempt.made()


def build(root: pathlib.Path) -> Bases:
  """Writes every base."""
  import jax.numpy as jnp

  from st_moe.config import Config, StackConfig
  from st_moe.data import sources, vocabulary
  from st_moe.interop import huggingface, ours, safetensors, t5x, t5x_orbax
  from st_moe.model.transformer import Transformer
  from tests.helpers import random_params, tiny
  from tests.interop import test_mesh_tf

  root.mkdir(parents=True, exist_ok=True)
  words = itertools.islice(sources.embedded_corpus('validation'), 3)
  pieces = vocabulary.train(words, str(root / 'a.model'), size=240).model
  dense = StackConfig(1, 0, 0)
  model = tiny(
    vocab_size=256, encoder=dense, decoder=dense, activation='relu',
    tie_embeddings=True,
  )  # fmt: skip
  ids = jnp.ones((1, 1), jnp.int32)
  params = random_params(Transformer(model), ids, ids, ids)
  config = Config(name='base', model=model)
  huggingface.save(root / 'hf', params, config, pieces)
  shutil.copytree(root / 'hf', root / 'hf_cut')
  (root / 'hf_cut/model.safetensors').unlink()
  cut = safetensors.Reader(root / 'hf')
  tensors = [
    (n, s, cut.dtypes[n], functools.partial(cut.read, n))
    for n, s in cut.shapes.items()
  ]
  safetensors.write(root / 'hf_cut', tensors, shard_bytes=10_000)
  t5x.save(str(root / 't5x'), params, config, None)
  inline, t5x._INLINE = t5x._INLINE, 0
  t5x.save(str(root / 't5x_zarr'), params, config, None)
  t5x._INLINE = inline
  t5x_orbax.save(str(root / 't5x_orbax'), params, config, None)
  (root / 'mtf').mkdir()
  test_mesh_tf._write(
    root / 'mtf', test_mesh_tf._variables(**test_mesh_tf.CASES['t5'])
  )
  (root / 'mtf/checkpoint').write_text('model_checkpoint_path: "model.ckpt-7"')
  sparse = tiny(vocab_size=256)
  params = random_params(Transformer(sparse), ids, ids, ids)
  ours.save(str(root / 'own'), params, Config(model=sparse), pieces)

  rows = [{'text': f'document {i}, ' * 20, 'inputs': 'a'} for i in range(40)]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (root / 'a.jsonl').write_text(lines)
  (root / 'a.jsonl.gz').write_bytes(gzip.compress(lines.encode(), mtime=0))
  (root / 'a.json').write_text(json.dumps(rows))
  (root / 'a.txt').write_text('\n\n'.join(row['text'] for row in rows))
  with zipfile.ZipFile(root / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
    for name in official():
      archive.writestr(name, content(name))
  bases = Bases(root)
  status, said = run(prepare(root / 'a.jsonl', root / 'cache'))
  assert not status, said
  return bases


def official() -> list[str]:
  from st_moe.data import superglue

  files = (f for t in superglue.TASKS.values() for f in t.files.values())
  return sorted({names[0].partition('/')[2] for names in files})


def content(name: str) -> bytes:
  return f'{{"file": "{name}", "numbers": {list(range(200))}}}\n'.encode()


def convert(source: str, folder: pathlib.Path, base: str) -> Attempt:
  to = folder / 'made'
  command = ['convert', f'--from={source}', f'--to=st_moe:{to}']
  return Attempt(command, lambda: digest_of_checkpoint(to), base)


def digest_of_checkpoint(path: pathlib.Path) -> str:
  from st_moe import paths
  from st_moe.infer.load import load

  loaded = load(path)
  digest = hashlib.sha256(repr(loaded.config.model).encode())
  digest.update(loaded.vocabulary.model if loaded.vocabulary else b'none')
  for name, leaf in sorted(paths.by_path(loaded.params).items()):
    digest.update(name.encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def prepare(file: pathlib.Path, cache: pathlib.Path) -> list[str]:
  return [
    'prepare',
    '--config=configs/st_moe_tiny.py:runlocal',
    f'--config.data.files.mine.train={file}',
    '--config.data.mixture.mine=1',
    '--config.data.vocabulary=bytes',
    f'--config.data.cache_dir={cache}',
  ]


def digest_of_cache(cache: pathlib.Path) -> str:
  from st_moe.data import shards

  digest = hashlib.sha256()
  for about in sorted(cache.glob('*/info.json')):
    found = shards.Shards(about.parent)
    for index in range(len(found)):
      digest.update(found[index])
  return digest.hexdigest()


def prepared(file: pathlib.Path, folder: pathlib.Path, base: str) -> Attempt:
  cache = folder / 'cache'
  return Attempt(prepare(file, cache), lambda: digest_of_cache(cache), base)


def vocabulary(file: pathlib.Path, folder: pathlib.Path) -> Attempt:
  to = folder / 'cache'
  command = prepare(folder / 'text.txt', to)
  (folder / 'text.txt').write_text('some text, more of it\n' * 99)
  command[4] = f'--config.data.vocabulary={file}'
  return Attempt(command, lambda: digest_of_cache(to), 'a.model')


def superglue(archive: pathlib.Path, folder: pathlib.Path) -> Attempt:
  from st_moe.data import download

  data = folder / 'data'

  def command():
    official, download.SUMS = download.SUMS, {
      name: hashlib.sha256(content(name)).hexdigest()[:16]
      for name in download.SUMS
    }  # fmt: skip
    try:
      download.superglue(str(data), archive.as_uri())
    finally:
      download.SUMS = official

  def made():
    files = sorted(p for p in data.rglob('*') if p.is_file())
    return hashlib.sha256(b''.join(p.read_bytes() for p in files)).hexdigest()

  return Attempt(command, made, 'a.zip')


def answers(file: pathlib.Path, bases: Bases) -> Attempt:
  command = [
    'generate', f'--checkpoint={bases["own"]}', f'--input={file}', '--jsonl',
    '--max_length=2',
  ]  # fmt: skip
  return Attempt(command, lambda: 'answers')


# What each base is read by when nothing is wrong with it.
WHOLE = {
  **{
    name: functools.partial(
      lambda bases, folder, name, code: convert(
        f'{code}{bases[name]}', folder, name
      ),
      name=name,
      code=code,
    )
    for name, code in {
      'hf': 'hf:', 'hf_cut': 'hf:', 't5x': 't5x:', 't5x_zarr': 't5x:',
      't5x_orbax': 't5x:', 'mtf': 'mtf:', 'own': '',
    }.items()
  },
  **{
    name: functools.partial(
      lambda bases, folder, name: prepared(bases[name], folder, name),
      name=name,
    )
    for name in ('a.jsonl', 'a.jsonl.gz', 'a.json', 'a.txt')
  },
  'a.model': lambda bases, folder: vocabulary(bases['a.model'], folder),
  'a.zip': lambda bases, folder: superglue(bases['a.zip'], folder),
  'cache': lambda bases, folder: prepared(bases['a.jsonl'], folder, 'cache'),
}  # fmt: skip


def run(command) -> tuple[int, str]:
  """(status, what was said) of a command; a trace is said too."""
  from st_moe import cli

  with tempfile.TemporaryFile() as said:
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
    words = io.StringIO()
    try:
      with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        try:
          if callable(command):
            command()
            status = 0
          else:
            cli.main(command)
        except SystemExit as e:
          status = e.code or 0
        except (ValueError, OSError) as e:
          # As `cli.main` does; of commands it has already done so.
          status = 1 if callable(command) else 2
          words.write(f'st-moe: {e}\n')
          if not callable(command):
            traceback.print_exc(file=words)
        except BaseException:
          status = 2
          traceback.print_exc(file=words)
    finally:
      for number, old in enumerate(kept, 1):
        os.dup2(old, number)
        os.close(old)
    said.seek(0)
    return status, words.getvalue() + said.read().decode(errors='replace')
