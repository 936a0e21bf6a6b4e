#!/usr/bin/env bash
# `st-moe` on a Cloud TPU slice, from a checkout and gcloud.
set -euo pipefail

usage() {
  cat <<'END'
scripts/tpu_vm.sh VERB --name=NAME --zone=ZONE [--project=ID] [--dry-run] ...

  create --type=TYPE [--runtime=VERSION] [--spot]
             asks for a slice (v5litepod-16, v6e-64, v5p-128, ...) and waits for it
  setup      this checkout, as it is now, and its environment on every worker
  launch [--keep-alive] ARGS...
             `st-moe ARGS...` on every worker, in the background, again after a
             preemption that left the machines (exit status 75) and after a reboot
  logs [--worker=N]       follows the log of worker 0, or N
  stop [--delete]         checkpoint and stop; --delete then gives the slice back

A preempted spot slice is gone for good. `launch --keep-alive` stays in the
foreground, looks once a minute, and does delete, create, setup and launch anew; it
takes the flags of create. Interrupted, the run goes on; called again, it looks on.
The same command resumes from what is under gs://, and from nothing else.

TPU_NAME, ZONE, PROJECT, TPU_TYPE and TPU_RUNTIME stand in for flags. --dry-run
prints the commands and needs no gcloud. For slices of several workers, gcloud
wants its key in the agent: ssh-add ~/.ssh/google_compute_engine
END
}
die() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

name=${TPU_NAME:-} zone=${ZONE:-} project=${PROJECT:-}
type=${TPU_TYPE:-} runtime=${TPU_RUNTIME:-} spot='' worker=0
dry='' keep_alive='' delete=''
[[ $# -gt 0 ]] || { usage >&2; exit 2; }
verb=$1
shift
case $verb in
  create | setup | launch | logs | stop) ;;
  help | -h | --help) usage; exit ;;
  *) die "no verb '$verb': create, setup, launch, logs, stop or help." ;;
esac
while [[ ${1:-} == -* ]]; do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --worker=?*) worker=${1#*=} ;;
    --spot) spot=--spot ;;
    --dry-run) dry=1 ;;
    --keep-alive) keep_alive=1 ;;
    --delete) delete=1 ;;
    *) die "no flag '$1'; \`scripts/tpu_vm.sh help\` shows them, values follow '='." ;;
  esac
  shift
done
[[ $name ]] || die 'which slice? --name=NAME or TPU_NAME.'
[[ $zone ]] || die 'which zone? --zone=ZONE or ZONE.'
if [[ $verb == launch ]]; then
  [[ $# -gt 0 ]] || die 'launch what? For example: train --config=FILE --workdir=gs://BUCKET/RUN.'
  [[ $* == *gs://* || ! $keep_alive ]] ||
    die '--keep-alive without a gs:// path: nothing to resume from would be left.'
else
  [[ $# -eq 0 ]] || die "$verb takes flags only, not '$1'."
fi
if [[ $verb == create || $keep_alive ]]; then
  [[ $type ]] || die 'which kind of slice? --type=v5litepod-16 or TPU_TYPE.'
  case $type in
    v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
    v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
    v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
    *) runtime=${runtime:-tpu-ubuntu2204-base} ;;
  esac
fi
[[ $dry ]] || command -v gcloud >/dev/null ||
  die 'gcloud is missing: https://cloud.google.com/sdk/docs/install'
cd "$(dirname "$0")/.."

# Words for a shell, quoted where needed, also by the bash 3.2 of macOS.
quote() {
  local word line='' one="'" escaped="'\\''"
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@,+-]*) word="'${word//$one/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  echo "$line"
}
run() { if [[ $dry ]]; then quote "$@"; else "$@"; fi; }
tpus() { run gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"}; }
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }
worker_sh='bash st_moe/scripts/tpu_worker.sh'

# Queued resources: a slice that is not to be had now is waited for.
ask() {
  tpus queued-resources create "$name" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$runtime" $spot
}
state() { tpus queued-resources describe "$name" --format='value(state.state)'; }
discard() { tpus queued-resources delete "$name" --force --quiet; }
setup() {
  # A commit of the working tree without a commit: what git does not ignore.
  run mkdir -p build &&
    run env GIT_INDEX_FILE=build/index git add --all &&
    run env GIT_INDEX_FILE=build/index sh -c \
      'git archive --format=tar.gz --output=build/st_moe.tgz $(git write-tree)' &&
    tpus tpu-vm scp build/st_moe.tgz "$name:" --worker=all &&
    on all "mkdir -p st_moe && tar -xzf st_moe.tgz -C st_moe && $worker_sh setup"
}
start() { on all "$worker_sh start $(quote "$@")"; }
keep_alive() {
  local started='' told
  case $(state || true) in
    SUSPENDED | FAILED) ;;
    *) start "$@"; started=1 ;;
  esac
  while sleep 60; do
    case $(state || true) in  # No answer: we are offline, not preempted.
      SUSPENDED | FAILED)
        echo "$name was preempted; asking for another."
        discard && ask && started='' || true
        ;;
      ACTIVE)
        if [[ ! $started ]]; then
          setup && start "$@" && started=1 || true
        elif told=$(on 0 "$worker_sh status") && [[ $told == ended* ]]; then
          echo "$told"
          exit "${told#ended }"
        fi
        ;;
    esac
  done
}

case $verb in
  create)
    ask
    if [[ $dry ]]; then state; exit; fi
    until now=$(state || true); [[ $now == ACTIVE ]]; do
      [[ $now != FAILED && $now != SUSPENDED ]] ||
        die "the request for $name has $now; \`stop --delete\`, then create it again."
      echo "waiting for $name ($now); interrupted, it stays in the queue."
      sleep 30
    done
    ;;
  setup) setup ;;
  launch)
    if [[ $dry && $keep_alive ]]; then
      start "$@"
      echo '# Every minute, and if it says SUSPENDED or FAILED the rest as well:'
      state && discard && ask && setup && start "$@"
    elif [[ $keep_alive ]]; then
      keep_alive "$@"
    else
      start "$@"
    fi
    ;;
  logs) on "$worker" 'tail -n 100 -F st_moe_run/log' ;;
  stop)
    # A slice that was preempted cannot be asked to stop, only be deleted.
    on all "$worker_sh stop" || [[ $delete ]] || exit 1
    [[ ! $delete ]] || discard
    ;;
esac
