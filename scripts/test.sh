#!/usr/bin/env bash
# The whole test suite, in .venv. Arguments go to pytest.
source "$(dirname "$0")/env.sh"
exec python -m pytest "$@"
