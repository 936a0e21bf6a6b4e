#!/usr/bin/env bash
# T5X into $VENV (.venv), for python -m st_moe.t5x_bridge (docs/t5x.md): from its repository, or from a checkout on this machine,
#   T5X=/path/to/t5x bash scripts/install_t5x.sh [--dry-run]
# A checkout is linked, not copied. FLAXFORMER=/path/to/flaxformer links that too; only tests need it.
set -euo pipefail
run() { echo "+ $*" && "$@"; }
case ${1:-} in
  '') ;;
  --dry-run) run() { echo "+ $*"; } ;;
  *) echo "install_t5x.sh: $1 is no flag; there is --dry-run." >&2; exit 2 ;;
esac
checkout() { # PLACE PACKAGE: its absolute path
  [[ -d $1/$2 ]] || { echo "$1 is no checkout of $2: there is no folder $2 in it." >&2; exit 1; }
  (cd "$1" && pwd)
}
t5x=${T5X:+$(checkout "$T5X" t5x)}
flaxformer=${FLAXFORMER:+$(checkout "$FLAXFORMER" flaxformer)}
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
[[ ${1:-} ]] || source scripts/env.sh

echo "What T5X imports of a package index, whether it declares it or not:"
run "$venv/bin/python" -m pip install --quiet 'seqio>=0.0.20' cached-property chex clu fiddle jaxtyping jestimator \
  tensorboard ${flaxformer:+aqtp}
if [[ $t5x ]]; then
  echo "T5X and what else is at hand, as links, without what they pull in:"
  # Found as if installed; the versions of JAX and SeqIO that are here stay.
  run "$venv/bin/python" -c 'import sys, sysconfig, pathlib
pathlib.Path(sysconfig.get_path("purelib"), "t5x_checkouts.pth").write_text("\n".join(sys.argv[1:]))' \
    "$t5x" ${flaxformer:+"$flaxformer"}
else
  echo "T5X from its repository, without the unreleased packages it names:"
  run "$venv/bin/python" -m pip install --quiet --no-deps git+https://github.com/google-research/t5x
fi
echo "Does it come up? Of AirIO, which no index has, the bridge makes stubs."
run "$venv/bin/python" -c 'from st_moe import t5x_bridge; t5x_bridge.import_t5x("train"); print("T5X is there.")'
