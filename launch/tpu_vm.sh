#!/usr/bin/env bash
# A TPU slice through gcloud queued resources: asked for, waited for, used on all its hosts, deleted.
#
#   bash launch/tpu_vm.sh create --name=reader --zone=us-east5-b --accelerator=v6e-8 --spot
#   bash launch/tpu_vm.sh wait   --name=reader --zone=us-east5-b
#   bash launch/tpu_vm.sh run    --name=reader --zone=us-east5-b --accelerator=v6e-8 --bucket=my-bucket \
#     -- batch --model=/bucket/v4-flash --input=gs://my-bucket/docs.jsonl --output=gs://my-bucket/answers.jsonl
#   bash launch/tpu_vm.sh delete --name=reader --zone=us-east5-b
#
# Steps: create, wait, run, delete; `all` is the four in this order, and deletes even when the job
# fails. A slice costs money until it is deleted: `gcloud compute tpus queued-resources list` says
# what is left.
#
#   --name=NAME          of the request and of its slice
#   --zone=ZONE          a zone that has such TPUs
#   --accelerator=TYPE   v5e-N and v6e-N count chips, v5p-N cores (v5p-8: 4 chips)
#   --project=PROJECT    default: that of gcloud's configuration
#   --spot               cheaper; can be taken away at any time. A batch continues when started again
#   --minutes=M          how long `wait` waits (default 120)
#   --bucket=BUCKET      mounts gs://BUCKET as /bucket on every host (gcsfuse has to be installed there);
#                        paths in gs:// and s3:// need no mount, only a service account that may use them
#   --dry-run            prints the commands instead
#
# `run` copies the last commit of this repository to every host, and installs it there with [tpu].
# batch and train run on all hosts of a slice as one model; the first host alone reads the documents
# and writes. Give several slices their parts of the input with --shard. convert runs on slices of one
# host (at most v5e-8, v6e-8, v5p-8).

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$V4JAX_ROOT/launch/arguments.sh"

name= zone= accelerator= project= spot=no minutes=120 bucket=
step="${1:-}"
case "$step" in
  create | wait | run | delete | all) shift ;;
  --help | -h) show_help; exit 0 ;;
  *) fail "the first word must be a step: create, wait, run, delete or all; got '$step'. --help shows examples" ;;
esac
read_options name zone accelerator project spot minutes bucket -- "$@"
need name zone
need_name name
need_number minutes
[[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone must be a zone such as us-east5-b, got '$zone'"
[[ -z "$project" ]] || need_name project
[[ "$bucket" =~ ^([a-z0-9][-a-z0-9._]+)?$ ]] || fail "--bucket must be a bucket's name without gs://, got '$bucket'"

place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")

# Sets `type` and `runtime` as gcloud names them, and `hosts`.
read_accelerator() {
  need accelerator
  [[ "$accelerator" =~ ^(v5e|v5p|v6e|tpu7x)-([1-9][0-9]{0,4})$ ]] ||
    fail "--accelerator must be v5e-N, v5p-N or v6e-N, got '$accelerator'"
  local size="${BASH_REMATCH[2]}"
  case "${BASH_REMATCH[1]}" in
    v5e) type="v5litepod-$size" runtime=v2-alpha-tpuv5-lite hosts=$((size <= 8 ? 1 : size / 4)) ;;
    v6e) type="v6e-$size" runtime=v2-alpha-tpuv6e hosts=$((size <= 8 ? 1 : size / 4)) ;;
    v5p) type="v5p-$size" runtime=v2-alpha-tpuv5 hosts=$((size <= 8 ? 1 : size / 8)) ;;
    tpu7x) fail "tpu7x is not offered as queued resources; use launch/gke.sh" ;;
  esac
}

create() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  [[ "$spot" == no ]] || flags+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${flags[@]}"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
}

wait_for_slice() {
  if [[ -n "$dry_run" ]]; then
    echo "# every 30 s, at most $minutes minutes, until it says ACTIVE:"
    quote gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)'
    return
  fi
  local now before= end=$((SECONDS + minutes * 60))
  while ((SECONDS < end)); do
    now="$(state)"
    [[ "$now" == "$before" ]] || say "launch: $name is $now"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "$name will not become active ($now); delete it, and ask again elsewhere or without --spot" ;;
    esac
    sleep 30
  done
  fail "$name is still $before after $minutes minutes; it stays in the queue: wait again, or delete it"
}

run_job() {
  local archive remote
  archive="${TMPDIR:-/tmp}/v4jax-$name.tar.gz"
  # Everything stops at the first error, so that no host goes on with half an installation.
  remote='set -e; mkdir -p ~/v4jax; tar -xzf ~/v4jax.tar.gz -C ~/v4jax; '
  if [[ -n "$bucket" ]]; then
    remote+="command -v gcsfuse >/dev/null || { echo 'launch: error: gcsfuse is not installed on this host' >&2; exit 1; }; "
    remote+="mountpoint -q /bucket || { sudo mkdir -p /bucket; sudo chown \$(id -u) /bucket; gcsfuse --implicit-dirs $bucket /bucket; }; "
  fi
  remote+="V4JAX_EXTRAS=$(list_extras tpu) bash ~/v4jax/launch/run.sh $(quote "${job[@]}")"
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:v4jax.tar.gz" "${place[@]}" --worker=all
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$remote"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

case "$step" in create | run | all) read_accelerator ;; esac
case "$step" in
  run | all)
    need_job
    [[ "${job[0]}" != convert || "$hosts" == 1 ]] ||
      fail "${job[0]} runs on one host, and $accelerator has $hosts; take a slice of one host, at most v5e-8, v6e-8 or v5p-8"
    ;;
  *) ((${#job[@]} == 0)) || fail "$step takes no job; only run and all do" ;;
esac
[[ -n "$dry_run" ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install. --dry-run works without"

case "$step" in
  create) create ;;
  wait) wait_for_slice ;;
  run) run_job ;;
  delete) delete ;;
  all)
    create
    [[ -n "$dry_run" ]] || trap delete EXIT # whatever happens from here on
    wait_for_slice
    run_job
    [[ -z "$dry_run" ]] || delete
    ;;
esac
