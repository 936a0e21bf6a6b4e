# Makes or reuses .venv with this checkout and $EXTRAS installed; sourced by the other scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! [ -x .venv/bin/python ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "st_moe needs Python 3.11 or later; set PYTHON=/path/to/python3." >&2; exit 1; }
  "$python" -m venv .venv
fi
# Installed for exactly this setup.py? A changed one is installed again.
extras=${EXTRAS:-dev}
if ! cmp -s setup.py ".venv/installed-$extras"; then
  .venv/bin/python -m pip install --quiet --upgrade pip
  PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet -e ".[$extras]"
  cp setup.py ".venv/installed-$extras"
fi
export PATH="$PWD/.venv/bin:$PATH"
