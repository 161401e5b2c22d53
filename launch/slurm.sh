#!/usr/bin/env bash
# A job on a cluster of GPUs that SLURM manages. Start it where sbatch is.
#
#   bash launch/slurm.sh --shards=16 --gpus=1 --time=04:00:00 \
#     -- batch --model=/models/v4-flash --input=docs.jsonl --output=answers.jsonl
#   bash launch/slurm.sh --nodes=2 --gpus=8 -- batch --model=/models/v4-pro --mesh=expert=16 …
#   bash launch/slurm.sh --nodes=4 --gpus=8 -- train --config=…
#
#   --name=NAME           of the job (default v4jax)
#   --nodes=N             machines that serve or train one model; not for convert (default 1)
#   --gpus=G              GPUs of each machine (default 1)
#   --shards=N            batch: an array of N tasks, each with its part of the input, and each on
#                         so many nodes (default 1)
#   --partition=P         default: the cluster's
#   --account=A           default: the user's
#   --time=[D-]HH:MM:SS   default: the partition's
#   --dry-run             prints the script instead of submitting it
#
# One process per machine sees all of its GPUs. Repository and paths have to be on a file system that
# all machines share, or paths in gs:// or s3://. A task of an array that failed continues when it is submitted again.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$V4JAX_ROOT/launch/arguments.sh"
here="$OLDPWD"

name=v4jax nodes=1 gpus=1 shards=1 partition= account= time=
read_options name nodes gpus shards partition account time -- "$@"
need_name name
need_number nodes gpus shards
need_job
[[ "$partition$account" =~ ^[A-Za-z0-9_.-]*$ ]] || fail "--partition and --account are names, got '$partition' and '$account'"
[[ -z "$time" || "$time" =~ ^([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}$ ]] || fail "--time must be [D-]HH:MM:SS, got '$time'"
[[ "${job[0]}" != convert || "$nodes" == 1 ]] || fail "convert runs on one machine, got --nodes=$nodes; leave it out"
[[ "${job[0]}" == batch || "$shards" == 1 ]] || fail "--shards divides the input of batch; ${job[0]} has none"
! has_flag shard || ((shards == 1)) || fail "--shard is set here, one for each task; leave it out"

lines=(
  "#!/usr/bin/env bash"
  "#SBATCH --job-name=$name"
  "#SBATCH --nodes=$nodes"
  "#SBATCH --ntasks-per-node=1"
  "#SBATCH --gpus-per-node=$gpus"
)
[[ -z "$partition" ]] || lines+=("#SBATCH --partition=$partition")
[[ -z "$account" ]] || lines+=("#SBATCH --account=$account")
[[ -z "$time" ]] || lines+=("#SBATCH --time=$time")
extras="$(list_extras cuda)"
flags=("${job[@]}")
if ((shards > 1)); then
  lines+=("#SBATCH --array=0-$((shards - 1))" "#SBATCH --output=$name-%A-%a.log")
  flags+=("--shard=auto/$shards")
else
  lines+=("#SBATCH --output=$name-%j.log")
fi
lines+=(
  "export V4JAX_EXTRAS=$extras"
  "# When one process of a job fails the others cannot go on."
  "srun --kill-on-bad-exit=1 bash $(quote "$V4JAX_ROOT/launch/run.sh" "${flags[@]}")"
)
script="$(printf '%s\n' "${lines[@]}")"

if [[ -n "$dry_run" ]]; then
  echo "$script"
  exit 0
fi
command -v sbatch >/dev/null || fail "sbatch is not here; start this on a login node of the cluster. --dry-run works anywhere"
make_environment "$extras" # once, here: many machines making the same folder would disturb each other
cd "$here"
sbatch <<<"$script"
