"""An object store in a folder: what `gs://` is in the tests.

An object appears whole or not at all; none can be renamed or appended to, and
there are no directories. TensorStore, and so Orbax, comes over HTTP as it does
to Google's, `etils.epath` through fsspec.

  python -m tests.store FOLDER PREFIX WRITES train --workdir=gs://runs/mine ...

runs the command of `st-moe` with FOLDER behind gs:// and ends it, as SIGKILL
would, when it comes to write after WRITES others below PREFIX.
"""

import contextlib
import http.server
import io
import json
import os
import pathlib
import sys
import threading
import urllib.parse
from unittest import mock

import fsspec
from etils.epath import backend, gpath


class Store:
  """Objects 'BUCKET/NAME' as files of a folder."""

  def __init__(self, root):
    self.root = pathlib.Path(root)
    self.root.mkdir(parents=True, exist_ok=True)
    # What changed it, in order: (name, bytes, or None where it was deleted).
    self.journal: list[tuple[str, bytes | None]] = []
    self.before_write = lambda name: None
    self._lock = threading.Lock()

  def __contains__(self, name):
    return (self.root / name).is_file()

  def names(self, prefix=''):
    folder = self.root / prefix.rpartition('/')[0]
    found = (p for p in folder.rglob('*') if p.is_file())
    names = sorted(p.relative_to(self.root).as_posix() for p in found)
    return [n for n in names if n.startswith(prefix)]

  def get(self, name) -> bytes:
    return (self.root / name).read_bytes()

  def put(self, name, data: bytes):
    self._change(name, data)

  def delete(self, name):
    if name not in self:
      raise FileNotFoundError(name)
    self._change(name, None)

  def _change(self, name, data):
    with self._lock:
      self.before_write(name)
      self.journal.append((name, data))
      self._apply(name, data)

  def _apply(self, name, data):
    path = self.root / name
    if data is not None:
      path.parent.mkdir(parents=True, exist_ok=True)
      temp = self.root / '.tmp'
      temp.write_bytes(data)
      temp.replace(path)
      return
    path.unlink()
    while (path := path.parent) != self.root and not any(path.iterdir()):
      path.rmdir()

  def replay(self, journal):
    """The store as these changes leave it."""
    for name, data in journal:
      self._apply(name, data)

  @contextlib.contextmanager
  def mounted(self):
    """`gs://` is this store."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Requests)
    server.daemon_threads = True
    server.store = self
    serve = lambda: server.serve_forever(poll_interval=0.01)
    threading.Thread(target=serve, daemon=True).start()
    files = _Files(store=self, skip_instance_cache=True)
    env = {
      'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{server.server_port}',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    }
    patch = mock.patch.object
    with (
      server,
      mock.patch.dict(os.environ, env),
      # With TensorFlow installed, epath would take its file system.
      patch(gpath, '_is_tf_installed', lambda: False),
      patch(backend._FileSystemSpecBackend, 'fs', lambda *_: files),
    ):
      yield self
      server.shutdown()


class _Files(fsspec.AbstractFileSystem):
  """The store as fsspec, and gcsfs, show one."""

  protocol = ('gcs', 'gs')

  def __init__(self, store, **kwargs):
    super().__init__(**kwargs)
    self.store = store

  def ls(self, path, detail=True, **_):
    path = self._strip_protocol(path)
    names = [path]
    if path not in self.store:
      names = [f'{path}/{name}' for name in os.listdir(self.store.root / path)]
    return [*map(self._entry, sorted(names))] if detail else sorted(names)

  def _entry(self, name):
    path = self.store.root / name
    if path.is_dir():
      return {'name': name, 'size': 0, 'type': 'directory'}
    stat = path.stat()
    entry = {'name': name, 'size': stat.st_size, 'type': 'file'}
    return entry | {'mtime': stat.st_mtime}

  def info(self, path, **_):
    return self._entry(self._strip_protocol(path))

  def _open(self, path, mode='rb', **_):
    if mode == 'rb':
      if path not in self.store:
        raise FileNotFoundError(path)
      return io.BytesIO(self.store.get(path))
    assert mode == 'wb', f'{mode}: no append'
    return _Upload(self.store, path)

  def rm(self, path, recursive=False, **_):
    path = self._strip_protocol(path)
    below = self.store.names(f'{path}/') if recursive else []
    for name in below or [path]:
      self.store.delete(name)

  def cp_file(self, *_, **__):
    raise AssertionError('neither rename nor copy')

  mv = rename = cp_file


class _Upload(io.BytesIO):
  """An object, there once it is closed; but not if the writer failed."""

  def __init__(self, store, name):
    super().__init__()
    self._store, self._name = store, name

  def __exit__(self, error, *rest):
    if error:
      self._name = None
    return super().__exit__(error, *rest)

  def close(self):
    if not self.closed and self._name:
      data, name = self.getvalue(), self._name
      super().close()
      self._store.put(name, data)
    super().close()


class _Requests(http.server.BaseHTTPRequestHandler):
  """What TensorStore asks of Google's JSON API."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    pass

  def _answer(self, status=200, body=b'', **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _any(self):
    length = int(self.headers.get('Content-Length') or 0)
    data = self.rfile.read(length)
    url = urllib.parse.urlsplit(self.path)
    asked = dict(urllib.parse.parse_qsl(url.query))
    bucket, _, name = url.path.partition('/b/')[2].partition('/o')
    name = urllib.parse.unquote(name.removeprefix('/'))
    try:
      self._serve(bucket, name, asked, data)
    except PermissionError as e:
      self._answer(403, str(e).encode())

  def _serve(self, bucket, name, asked, data):
    store = self.server.store
    if self.command == 'POST':
      store.put(f'{bucket}/{asked["name"]}', data)
      return self._json(self._about(bucket, asked['name']))
    if not name:
      names = store.names(f'{bucket}/{asked.get("prefix", "")}')
      names = [n.removeprefix(f'{bucket}/') for n in names]
      return self._json({'items': [self._about(bucket, n) for n in names]})
    if f'{bucket}/{name}' not in store:
      return self._answer(404)
    if self.command == 'DELETE':
      store.delete(f'{bucket}/{name}')
      return self._answer(204)
    about = self._about(bucket, name)
    if asked.get('alt') != 'media':
      return self._json(about)
    whole = store.get(f'{bucket}/{name}')
    seen = {'x_goog_generation': about['generation']}
    if 'Range' not in self.headers:
      return self._answer(200, whole, **seen)
    first, _, last = self.headers['Range'].removeprefix('bytes=').partition('-')
    span = range(len(whole))
    span = span[int(first) : int(last) + 1 if last else None] if first else (
      span[-int(last) :]
    )  # fmt: skip
    part = whole[span.start : span.stop]
    shown = f'bytes {span.start}-{span.stop - 1}/{len(whole)}'
    return self._answer(206, part, Content_Range=shown, **seen)

  def _json(self, value):
    kind = {'Content_Type': 'application/json'}
    self._answer(200, json.dumps(value).encode(), **kind)

  def _about(self, bucket, name):
    stat = (self.server.store.root / bucket / name).stat()
    generation = str(stat.st_mtime_ns)
    return {
      'name': name, 'bucket': bucket, 'size': str(stat.st_size),
      'generation': generation, 'metageneration': '1',
    }  # fmt: skip

  do_GET = do_POST = do_DELETE = _any


def main():
  from st_moe import cli

  folder, prefix, writes, *argv = sys.argv[1:]
  left = iter(range(int(writes)))

  def die_in_time(name):
    if name.startswith(prefix) and next(left, None) is None:
      os._exit(137)

  store = Store(folder)
  store.before_write = die_in_time
  with store.mounted():
    cli.main(argv)


if __name__ == '__main__':
  main()
