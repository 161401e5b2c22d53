#!/usr/bin/env bash
# Several processes on this machine: a rehearsal of several machines, on CPU devices.
#
#   bash launch/local.sh --processes=2 -- batch --model=nano --input=docs.jsonl --output=answers.jsonl
#   bash launch/local.sh --processes=2 --devices=4 -- train --config=…
#
#   --processes=N   how many (default 2)
#   --devices=D     CPU devices that each process simulates (default 1)
#   --logs=DIR      where processes other than the first write what they say (default out/local)
#   --dry-run       prints the commands instead
#
# batch: every process answers its part of the input (--shard=i/N) and writes its own file.
# train: the processes are one job, connected through jax.distributed.
# convert: needs one process.
#
# The first process speaks here. When one fails the others are stopped, and its status is returned.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$V4JAX_ROOT/launch/arguments.sh"
cd "$OLDPWD"

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "bash 5.1 or later is needed, this is $BASH_VERSION"
processes=2 devices=1 logs=out/local
read_options processes devices logs -- "$@"
need_number processes devices
need_job
[[ "${job[0]}" != convert || "$processes" == 1 ]] ||
  fail "convert runs in one process; add --processes=1"
! has_flag shard || ((processes == 1)) || fail "--shard is set here, one for each process; leave it out"

# Before they start: processes that make the same environment at once would disturb each other.
extras="$(list_extras)"
[[ -n "$dry_run" ]] || { (cd "$V4JAX_ROOT" && make_environment "$extras"); mkdir -p "$logs"; }

# A number of its own for each start; the dry run shows the word.
port=$((20000 + $$ % 20000))
[[ -z "$dry_run" ]] || port=PORT
started=() failed=0
stop() { ((${#started[@]} == 0)) || { kill "${started[@]}" 2>/dev/null || true; wait; }; }
trap stop EXIT

for ((i = 0; i < processes; i++)); do
  settings=(
    "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "XLA_FLAGS=--xla_force_host_platform_device_count=$devices${XLA_FLAGS:+ $XLA_FLAGS}"
  )
  [[ -z "$extras" ]] || settings+=("V4JAX_EXTRAS=$extras")
  flags=("${job[@]}")
  if ((processes > 1)); then
    case "${job[0]}" in
      batch) flags+=("--shard=$i/$processes") ;;
      train)
        settings+=("V4JAX_COORDINATOR=localhost:$port")
        settings+=("V4JAX_PROCESS_INDEX=$i" "V4JAX_PROCESS_COUNT=$processes")
        ;;
    esac
  fi
  command=(env "${settings[@]}" bash "$V4JAX_ROOT/launch/run.sh" "${flags[@]}")
  log="$logs/process-$i.log"
  if [[ -n "$dry_run" ]]; then
    ((i == 0)) && where= || where=" >$log 2>&1"
    echo "$(quote "${command[@]}")$where &"
  elif ((i == 0)); then
    "${command[@]}" &
    started+=($!)
  else
    "${command[@]}" >"$log" 2>&1 &
    started+=($!)
  fi
done

while ((${#started[@]} && !failed)); do
  status=0
  wait -n -p ended "${started[@]}" || status=$?
  left=()
  for process in "${started[@]}"; do [[ "$process" == "$ended" ]] || left+=("$process"); done
  started=("${left[@]}")
  failed=$status
done
((!failed)) || say "launch: a process ended with status $failed, the others were stopped; logs are in $logs"
exit "$failed"
