#!/usr/bin/env bash
#SBATCH --job-name=st_moe
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
# One task per GPU, each seeing all GPUs of its node: under Slurm, jax.distributed gives
# local task i the i-th GPU it sees. One task per node would leave all but the first GPU
# idle, and --gpus-per-task would hide from task 1 the GPU it looks for.
set -euo pipefail

usage() {
  cat <<'END'
From the checkout, on a file system that all nodes share:
  sbatch --nodes=2 scripts/slurm.sh train --config=FILE --workdir=DIR
  bash scripts/slurm.sh --dry-run train ...      # prints what a job would run
Options of sbatch overrule the script's: nodes of four GPUs take
  sbatch --ntasks-per-node=4 --gres=gpu:4 ...
and large checkpoints more time between the signal and the limit: --signal=TERM@600.
Nodes without internet: first, where there is some, EXTRAS=cuda bash scripts/env.sh
END
}
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
dry=''
case $1 in
  help | -h | --help) usage; exit ;;
  --dry-run) dry=1; shift ;;
esac
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
run() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }

[[ $dry || ${SLURM_JOB_ID:-} ]] || { echo "Not a Slurm job: sbatch scripts/slurm.sh ARGS..." >&2; exit 2; }
tasks=${SLURM_NTASKS_PER_NODE:-8} gpus=${SLURM_GPUS_ON_NODE:-8}
[[ $dry || $tasks == "$gpus" ]] || {
  echo "$tasks tasks per node and $gpus GPUs; one per GPU: sbatch --ntasks-per-node=$gpus --gres=gpu:$gpus ..." >&2
  exit 2
}
# Slurm runs a copy of this file from elsewhere; $0 does not lead to the checkout.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[[ -f scripts/env.sh ]] || { echo "No checkout in $PWD; submit from there." >&2; exit 2; }
if [[ $dry ]]; then echo "EXTRAS=cuda source scripts/env.sh"; else EXTRAS=cuda source scripts/env.sh; fi
export PYTHONUNBUFFERED=1  # A log to follow.

# Since Slurm 22.05 srun does not take over --cpus-per-task. Not --kill-on-bad-exit: it
# would kill the other tasks over the first 75, and with them the 75.
run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" st-moe "$@" && code=0 || code=$?

# The signal goes to the tasks alone; each writes its part of a checkpoint and exits with
# 75. `scancel` ends this script too, so what a user cancels is not queued again.
[[ ! $dry ]] || echo "# on exit status 75:"
if [[ $dry || $code == 75 ]]; then run scontrol requeue "${SLURM_JOB_ID:-JOB}"; fi
exit "$code"
