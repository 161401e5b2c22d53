#!/usr/bin/env bash
# A TPU slice through gcloud queued resources: asked for, waited for, used on all its hosts, deleted.
#
#   export NAME=reader ZONE=us-east5-b ACCELERATOR=v6e-8
#   bash launch/tpu_vm.sh create --spot        # further words go to gcloud
#   bash launch/tpu_vm.sh wait
#   bash launch/tpu_vm.sh run batch --model=gs://models/v4-flash --input=gs://texts/docs.jsonl \
#     --output=gs://texts/answers.jsonl
#   bash launch/tpu_vm.sh delete
#   bash launch/tpu_vm.sh all batch …          # the four in this order; deletes even if the job fails
#
#   bash launch/tpu_vm.sh follow               # after a lost connection: what the job says, to its end
#   bash launch/tpu_vm.sh finish               # the same, and then deletes the slice
#   bash launch/tpu_vm.sh stop                 # ends the job on all hosts
#
#   ACCELERATOR    as gcloud names it: v6e-N and v5litepod-N count chips, v5p-N cores (v5p-8: 4 chips)
#   MINUTES=120    how long `wait` waits
#   SETUP=…        a command for every host before the job, such as
#                  'mountpoint -q /bucket || { sudo mkdir -pm 777 /bucket; gcsfuse my-bucket /bucket; }'
#   V4JAX_EXTRAS   what to install beside v4jax (default tpu,gcs,train)
#   DRY_RUN=1      prints the commands instead
#
# `run` copies the last commit of this repository to every host, starts the job there, and shows what
# host 0 says. The job belongs to no session: when this command or its connection ends, it goes on.
# Each host keeps what it says in ~/v4jax.log and at the end its status in ~/v4jax.status. A host
# without Python 3.11 gets one through uv. All hosts serve or train one model. Several slices divide
# an input with --shard=0/4 and so on. convert runs on a slice of one host.
# A slice costs money until it is deleted: `gcloud compute tpus queued-resources list` shows what is
# left. `all` leaves the slice where it was interrupted while the job runs, and says so. A spot slice
# can be taken away at any time; a batch continues when it is started again.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
step="${1:---help}"
[[ "$step" != --help ]] || show_help
shift
: "${NAME:?a name for the request and its slice}" "${ZONE:?a zone such as us-east5-b}"
resources=(gcloud compute tpus queued-resources)

create() {
  local runtime
  case "${ACCELERATOR:?as gcloud names it, such as v6e-8}" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR must be v5litepod-N, v5p-N or v6e-N, got '$ACCELERATOR'; launch/gke_*.yaml have others" ;;
  esac
  run "${resources[@]}" create "$NAME" --zone="$ZONE" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" "$@"
}

wait_for_slice() {
  local state= end=$((SECONDS + ${MINUTES:-120} * 60))
  local ask=("${resources[@]}" describe "$NAME" --zone="$ZONE" --format='value(state.state)')
  [[ -z "${DRY_RUN:-}" ]] || { run "${ask[@]}"; return; } # every 30 s, until it says ACTIVE
  while ((SECONDS < end)); do
    state="$("${ask[@]}")"
    say "launch: $NAME is $state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) fail "$NAME will not become active; delete it, and ask again elsewhere or without --spot" ;;
    esac
    sleep 30
  done
  fail "$NAME is still $state after ${MINUTES:-120} minutes; it stays in the queue: wait again, or delete it"
}

machine=(gcloud compute tpus tpu-vm)
LOST=255 # the status of ssh without a connection

# Starts the job on every host, in a session of its own, and returns.
start_job() {
  local archive="${TMPDIR:-/tmp}/v4jax-$NAME.tar.gz" job remote
  # Everything stops at the first error, so that no host goes on with half an installation.
  job="set -e; ${SETUP:-true}; export V4JAX_GET_PYTHON=1 V4JAX_EXTRAS=${V4JAX_EXTRAS:-tpu,gcs,train}; "
  job+="exec bash ~/v4jax/launch/run.sh ${*@Q}"
  job="trap : TERM; bash -c ${job@Q}; echo \$? >~/v4jax.status" # of a job that is stopped, too
  remote="if kill -0 \$(cat ~/v4jax.pid 2>/dev/null) 2>/dev/null; then "
  remote+="echo 'launch: error: a job runs here; stop it first' >&2; exit 1; fi; "
  remote+="set -e; mkdir -p ~/v4jax; tar -xzf ~/v4jax.tar.gz -C ~/v4jax; rm -f ~/v4jax.status; "
  remote+="nohup setsid bash -c ${job@Q} >~/v4jax.log 2>&1 </dev/null & echo \$! >~/v4jax.pid"
  run git archive --format=tar.gz --output="$archive" HEAD
  run "${machine[@]}" scp "$archive" "$NAME:v4jax.tar.gz" --zone="$ZONE" --worker=all
  run "${machine[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$remote"
}

# Shows what the job says on host 0, and returns its status once it has ended.
follow_job() {
  local remote='tail -n +1 --pid="$(cat ~/v4jax.pid)" -f ~/v4jax.log; exit "$(cat ~/v4jax.status || echo 1)"'
  run "${machine[@]}" ssh "$NAME" --zone="$ZONE" --worker=0 --command="$remote" || {
    local status=$?
    ((status != LOST)) || say "launch: the connection is lost, the job goes on: bash launch/tpu_vm.sh follow"
    return "$status"
  }
}

# Ends the job as ctrl-C would: a batch keeps its answers, training writes a checkpoint.
stop_job() {
  run "${machine[@]}" ssh "$NAME" --zone="$ZONE" --worker=all \
    --command='kill -TERM -- "-$(cat ~/v4jax.pid)"'
}

# Follows the job to its end and deletes the slice; leaves both when this command or its connection
# ends before.
finish() {
  local status=0 here="NAME=$NAME ZONE=$ZONE bash launch/tpu_vm.sh"
  trap 'say "launch: the job goes on, and the slice costs money until it is deleted: $here finish"' EXIT
  follow_job || status=$?
  ((status != LOST)) || exit "$LOST"
  trap - EXIT
  delete
  exit "$status"
}

delete() { run "${resources[@]}" delete "$NAME" --zone="$ZONE" --force --quiet; }

case "$step" in
  create) create "$@" ;;
  wait) wait_for_slice ;;
  run)
    start_job "$@"
    follow_job
    ;;
  follow) follow_job ;;
  stop) stop_job ;;
  finish) finish ;;
  delete) delete ;;
  all)
    create
    trap delete EXIT # whatever happens before the job has begun
    wait_for_slice
    start_job "$@"
    finish
    ;;
  *) fail "the first word must be a step: create, wait, run, follow, stop, finish, delete or all; got '$step'. --help shows examples" ;;
esac
