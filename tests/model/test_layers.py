"""Activations by name: what each is of, and what they make of it."""

import dataclasses

import jax.numpy as jnp
import pytest

from st_moe.config import Part
from st_moe.interop import links
from st_moe.model import layers, parts
from tests.helpers import tiny


def test_an_activation_is_a_part():
  assert layers.inputs_of(Part('relu')) == ['wi']
  assert layers.inputs_of(Part('geglu')) == ['wi_0', 'wi_1']
  # GELU(1) = 0.8412 by tanh, times 3.
  found = layers.activation(Part('geglu'))(jnp.float32(1), jnp.float32(3))
  assert float(found) == pytest.approx(2.5236, abs=1e-4)
  with pytest.raises(ValueError, match="activation 'gegl'.*mean 'geglu'"):
    parts.check(tiny(activation='gegl'))
  with pytest.raises(ValueError, match="option of activation 'relu' 'a'"):
    parts.check(dataclasses.replace(tiny(), activation=Part.of('relu', a=1)))


def test_another_activation_goes_nowhere_by_a_wrong_name(monkeypatch):
  swiglu = lambda x, linear: x / (1 + jnp.exp(-x)) * linear
  monkeypatch.setitem(layers.ACTIVATIONS, 'swiglu', swiglu)
  model = tiny(activation='swiglu')
  assert links.matrices(model) == ('wi_0', 'wi_1', 'wo')
  assert links.unknown_parts(model) == ["activation 'swiglu'"]
