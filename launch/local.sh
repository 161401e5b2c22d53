#!/usr/bin/env bash
# Several processes on this machine: a rehearsal of several machines, on CPU devices.
#
#   bash launch/local.sh --devices=4 -- batch --model=nano --input=docs.jsonl --output=answers.jsonl
#   bash launch/local.sh --shards=2 -- batch --model=nano --input=docs.jsonl --output=answers.jsonl
#   bash launch/local.sh --processes=2 --devices=4 -- train --config=…
#
#   --processes=N   how many serve or train one model (default 2; 1 with --shards)
#   --shards=N      batch: jobs of their own beside each other, each with its part of the input
#   --devices=D     CPU devices that each process simulates (default 1)
#   --logs=DIR      where processes other than the first write what they say (default out/local)
#   --dry-run       prints the commands instead
#
# The processes are one job, connected through jax.distributed. With --shards they know nothing of
# each other: every one answers its part of the input (--shard=i/N) and writes its own file.
# convert: needs one process.
#
# The first process speaks here. When one fails the others are stopped, and its status is returned.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$V4JAX_ROOT/launch/arguments.sh"
cd "$OLDPWD"

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) || fail "bash 5.1 or later is needed, this is $BASH_VERSION"
processes= shards=1 devices=1 logs=out/local
read_options processes shards devices logs -- "$@"
need_number shards devices
processes="${processes:-$((shards > 1 ? 1 : 2))}"
need_number processes
need_job
[[ "${job[0]}" != convert || "$processes" == 1 ]] ||
  fail "convert runs in one process; add --processes=1"
[[ "${job[0]}" == batch || "$shards" == 1 ]] || fail "--shards divides the input of batch; ${job[0]} has none"
((processes == 1 || shards == 1)) || fail "--shards are processes of their own here; leave --processes out"
! has_flag shard || ((shards == 1)) || fail "--shard is set here, one for each process; leave it out"

# Before they start: processes that make the same environment at once would disturb each other.
extras="$(list_extras)"
[[ -n "$dry_run" ]] || { (cd "$V4JAX_ROOT" && make_environment "$extras"); mkdir -p "$logs"; }

# A number of its own for each start; the dry run shows the word.
port=$((20000 + $$ % 20000))
[[ -z "$dry_run" ]] || port=PORT
started=() failed=0
stop() { ((${#started[@]} == 0)) || { kill "${started[@]}" 2>/dev/null || true; wait; }; }
trap stop EXIT

for ((i = 0; i < processes * shards; i++)); do
  settings=(
    "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}"
    "XLA_FLAGS=--xla_force_host_platform_device_count=$devices${XLA_FLAGS:+ $XLA_FLAGS}"
  )
  [[ -z "$extras" ]] || settings+=("V4JAX_EXTRAS=$extras")
  flags=("${job[@]}")
  if ((shards > 1)); then
    flags+=("--shard=$i/$shards")
  elif ((processes > 1)); then
    settings+=("V4JAX_COORDINATOR=localhost:$port")
    settings+=("V4JAX_PROCESS_INDEX=$i" "V4JAX_PROCESS_COUNT=$processes")
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
