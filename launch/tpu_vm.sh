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
#   ACCELERATOR    as gcloud names it: v6e-N and v5litepod-N count chips, v5p-N cores (v5p-8: 4 chips)
#   MINUTES=120    how long `wait` waits
#   SETUP=…        a command for every host before the job, such as
#                  'mountpoint -q /bucket || { sudo mkdir -pm 777 /bucket; gcsfuse my-bucket /bucket; }'
#   V4JAX_EXTRAS   what to install beside v4jax (default tpu,gcs,train)
#   DRY_RUN=1      prints the commands instead
#
# `run` copies the last commit of this repository to every host. All hosts serve or train one model.
# Several slices divide an input with --shard=0/4 and so on. convert runs on a slice of one host.
# A slice costs money until it is deleted: `gcloud compute tpus queued-resources list` shows what is
# left. A spot slice can be taken away at any time; a batch continues when it is started again.

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

run_job() {
  local archive="${TMPDIR:-/tmp}/v4jax-$NAME.tar.gz" machine=(gcloud compute tpus tpu-vm)
  # Everything stops at the first error, so that no host goes on with half an installation.
  local remote="set -e; mkdir -p ~/v4jax; tar -xzf ~/v4jax.tar.gz -C ~/v4jax; ${SETUP:-true}; "
  remote+="V4JAX_EXTRAS=${V4JAX_EXTRAS:-tpu,gcs,train} bash ~/v4jax/launch/run.sh ${*@Q}"
  run git archive --format=tar.gz --output="$archive" HEAD
  run "${machine[@]}" scp "$archive" "$NAME:v4jax.tar.gz" --zone="$ZONE" --worker=all
  run "${machine[@]}" ssh "$NAME" --zone="$ZONE" --worker=all --command="$remote"
}

delete() { run "${resources[@]}" delete "$NAME" --zone="$ZONE" --force --quiet; }

case "$step" in
  create) create "$@" ;;
  wait) wait_for_slice ;;
  run) run_job "$@" ;;
  delete) delete ;;
  all)
    create
    trap delete EXIT # whatever happens from here on
    wait_for_slice
    run_job "$@"
    ;;
  *) fail "the first word must be a step: create, wait, run, delete or all; got '$step'. --help shows examples" ;;
esac
