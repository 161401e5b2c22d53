#!/usr/bin/env bash
# Several processes on this machine: a rehearsal of several machines, on CPU devices.
#
#   DEVICES=4 bash launch/local.sh batch --model=nano --input=docs.jsonl --output=answers.jsonl
#   bash launch/local.sh batch --model=nano --input=docs.jsonl --output=answers.jsonl --shard=auto/2
#   V4JAX_EXTRAS=train DEVICES=4 bash launch/local.sh train --config=…
#
#   PROCESSES=2        how many processes
#   DEVICES=1          CPU devices that each process simulates
#   LOGS=out/local     folder for what processes other than the first say
#   V4JAX_EXTRAS=s3    what to install beside v4jax; DRY_RUN=1 prints the commands instead
#
# The processes are one job. With --shard=auto/N each is a job of its own, as in an Indexed Job of
# Kubernetes. The first process speaks here. When one fails, the others are stopped.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[[ $# -gt 0 && "$1" != --help ]] || show_help
processes="${PROCESSES:-2}" logs="${LOGS:-out/local}"

if [[ -z "${DRY_RUN:-}" ]]; then
  make_environment "${V4JAX_EXTRAS:-}" # here, as several processes would disturb each other
  (cd "$V4JAX_FROM" && mkdir -p "$logs")
  trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
fi
cd "$V4JAX_FROM"

for ((i = 0; i < processes; i++)); do
  command=(
    env "V4JAX_COORDINATOR=localhost:${PORT:-$((20000 + $$ % 20000))}"
    "V4JAX_PROCESS_COUNT=$processes"
    "JOB_COMPLETION_INDEX=$i" # the index of a process, or of its shard
    "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "XLA_FLAGS=--xla_force_host_platform_device_count=${DEVICES:-1}${XLA_FLAGS:+ $XLA_FLAGS}"
    bash "$V4JAX_ROOT/launch/run.sh" "$@"
  )
  if [[ -n "${DRY_RUN:-}" ]]; then
    run "${command[@]}"
  elif ((i == 0)); then
    "${command[@]}" &
  else
    "${command[@]}" >"$logs/process-$i.log" 2>&1 &
  fi
done

for process in $(jobs -p); do
  wait -n || { status=$?; say "launch: a process ended with status $status, the others are stopped; logs are in $logs"; exit "$status"; }
done
