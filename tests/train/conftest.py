"""What the tests of this room share."""

from tests.data.conftest import bucket  # noqa: F401
