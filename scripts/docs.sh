#!/usr/bin/env bash
# Makes the site of docs/ into docs/_build/html, in .venv; a warning is an error: a link or
# an anchor that leads nowhere, a docstring that does not render. Needs no network once
# installed. Arguments go to sphinx-build.
EXTRAS=docs source "$(dirname "$0")/env.sh"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3
sphinx-build -W --keep-going -n -q -b html -c docs -d docs/_build/doctrees "$@" . docs/_build/html
echo "Made docs/_build/html/index.html"
