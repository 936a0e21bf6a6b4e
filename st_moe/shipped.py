"""Folders that come with the package: inside a wheel, beside it in a clone."""

import pathlib


def folder(name: str) -> pathlib.Path:
  """Where `configs` or `experiments` lies."""
  package = pathlib.Path(__file__).parent
  inside = package / name
  return inside if inside.is_dir() else package.parent / name
