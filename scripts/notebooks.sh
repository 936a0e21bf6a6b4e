#!/usr/bin/env bash
# Runs notebooks/ from a kernel that has only what they install; --write keeps what they show.
source "$(dirname "$0")/env.sh"
exec python -m tests.notebooks --python="$(command -v "$python")" "$@"
