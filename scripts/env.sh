# Makes or reuses $VENV (.venv) with this checkout and $EXTRAS installed; sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
extras=${EXTRAS:-dev}
venv=${VENV:-.venv}

# Debian and Colab leave parts of venv out of Python: then what else is there.
make_venv() {
  "$python" -m venv --without-pip "$venv" || "$python" -m virtualenv "$venv" ||
    uv venv --allow-existing --python "$python" "$venv"
}
add_pip() {
  "$venv/bin/python" -m ensurepip ||
    "$python" -m pip --python "$venv/bin/python" install pip ||
    uv pip install --python "$venv/bin/python" pip
}

# Installed for exactly this setup.py, and not moved since? Else it is installed again.
if ! cmp -s setup.py "$venv/installed-$extras" || ! "$venv/bin/st-moe" --version >/dev/null 2>&1; then
  # Marked until it is whole, so that a first install cut short is begun anew.
  half=$venv/half-made
  trap '[[ ! -e $half ]] || rm -rf "$venv"' EXIT
  [[ ! -e $half ]] || rm -rf "$venv"
  if ! [[ -x $venv/bin/python ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "st_moe needs Python 3.11 or later; set PYTHON=/path/to/python3." >&2; exit 1; }
    mkdir -p "$venv" && touch "$half"
  fi
  if ! told=$({
    { [[ -x $venv/bin/python ]] || make_venv; } &&
      { "$venv/bin/python" -m pip --version || add_pip; }
  } 2>&1); then
    grep -Ev '^ |^Traceback' <<<"$told" >&2 || true
    echo "$python cannot make a virtual environment with pip in it: on Debian and Ubuntu," >&2
    echo "sudo apt install python3-venv; elsewhere, install uv. Then run this again." >&2
    exit 1
  fi
  "$venv/bin/python" -m pip install --quiet --upgrade pip
  PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet -e ".[$extras]"
  cp setup.py "$venv/installed-$extras"
  rm -f "$half"
  trap - EXIT
  echo "Installed into $venv. To have st-moe in your shell: source $venv/bin/activate"
fi
export PATH="$(cd "$venv/bin" && pwd):$PATH"
