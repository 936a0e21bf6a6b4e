#!/usr/bin/env bash
# The whole test suite, in .venv, a file to a process. Arguments go to pytest.
source "$(dirname "$0")/env.sh"
exec python -m pytest -n auto --maxprocesses=4 --dist loadfile "$@"
