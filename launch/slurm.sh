#!/usr/bin/env bash
# A job on a cluster of GPUs that Slurm manages. Submit it from the repository; options of sbatch
# before the script replace the lines below, and what follows it is the job:
#
#   V4JAX_EXTRAS=cuda bash launch/run.sh batch --help          # once: makes the environment
#   sbatch --array=0-3 launch/slurm.sh batch --model=/models/v4-flash --input=docs.jsonl \
#     --output=answers.jsonl --shard=auto/4
#   sbatch --nodes=2 launch/slurm.sh batch --model=/models/v4-pro --mesh=expert=16 …
#   sbatch --nodes=4 launch/slurm.sh train --config=…
#
# One process per machine uses all of its GPUs, and its model has to fit them: V4-Flash, of 149 GiB,
# takes 26 GiB on each of eight GPUs and does not fit one. `v4jax plan --topology=h100-8` says it for
# any model and mesh. The repository and local paths have to be on a file system that all machines
# share. Tasks of an array answer a part of the input each, and continue it when they are submitted
# again.
#
#SBATCH --job-name=v4jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log

set -euo pipefail
[[ "${1:---help}" != --help ]] || { awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0"; exit 0; }
export V4JAX_EXTRAS="${V4JAX_EXTRAS:-cuda}"
# When one process of a job fails, the others cannot go on.
srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/launch/run.sh" "$@"
