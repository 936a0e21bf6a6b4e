#!/usr/bin/env bash
# The whole test suite, in .venv, a file to a process. Arguments go to pytest.
# On another Python: PYTHON=python3.13 VENV=.venv-3.13 bash scripts/test.sh
source "$(dirname "$0")/env.sh"
exec python -m pytest -n auto --maxprocesses=4 --dist loadfile "$@"
