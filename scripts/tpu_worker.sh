#!/usr/bin/env bash
# What tpu_vm.sh does on each worker: setup, start ARGS..., stop, status, and
# `resume`, which supervises the run. ~/st_moe_run holds its log.
set -euo pipefail
cd "$(dirname "$0")/.."
run=$HOME/st_moe_run  # `args` there is the run to keep going: none, nothing to do.
mkdir -p "$run"
idle() { flock -n "$run/lock" true; }

verb=$1
shift
case $verb in
  setup)
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    # The image's Python where it will do, one that uv fetches elsewhere.
    [[ -x .venv/bin/python ]] || uv venv --python '>=3.11,<3.14' .venv
    uv pip install --python .venv/bin/python -e '.[tpu,gcp]'
    {
      crontab -l 2>/dev/null | grep -v tpu_worker.sh || true
      echo "@reboot bash $PWD/scripts/tpu_worker.sh resume"
    } | crontab -
    ;;
  start)
    [[ -x .venv/bin/st-moe ]] || { echo "Not set up: scripts/tpu_vm.sh setup." >&2; exit 1; }
    if ! idle; then
      printf '%s\0' "$@" | cmp -s - "$run/args" && { echo "Already running."; exit; }
      echo "Another run is under way: scripts/tpu_vm.sh stop ends it." >&2
      exit 1
    fi
    printf '%s\0' "$@" >"$run/args"
    setsid bash scripts/tpu_worker.sh resume >/dev/null 2>&1 </dev/null &
    ;;
  resume)
    [[ -e $run/args ]] || exit 0
    exec 9>"$run/lock"  # Inherited by st-moe: held until the last process is gone.
    flock -n 9 || exit 0
    exec >>"$run/log" 2>&1
    export PYTHONUNBUFFERED=1  # A log to follow.
    mapfile -d '' args <"$run/args"
    crashes=0
    while [[ -e $run/args ]]; do
      .venv/bin/st-moe "${args[@]}" &
      echo $! >"$run/pid"
      wait $! && code=0 || code=$?
      rm "$run/pid"
      echo "$(date): st-moe ended with exit status $code"
      echo "$code" >"$run/code"
      # 75: preempted, checkpoint written. A signal: JAX aborts everywhere when one
      # machine is lost, which comes back; ten times in a row, the fault is ours.
      if ((code == 75)); then
        crashes=0
      elif ((code > 128 && ++crashes < 10)); then
        sleep 30
      else
        rm -f "$run/args"
      fi
    done
    ;;
  stop)
    rm -f "$run/args"
    if idle; then echo "Nothing runs."; exit; fi
    { kill "$(cat "$run/pid")" || true; } 2>/dev/null  # No pid: between two starts.
    flock -w 600 "$run/lock" true || { echo "Still there after ten minutes." >&2; exit 1; }
    ;;
  status) if [[ -e $run/args ]]; then echo running; else echo "ended $(cat "$run/code")"; fi ;;
  *) echo "tpu_worker.sh: no verb '$verb'." >&2; exit 2 ;;
esac
