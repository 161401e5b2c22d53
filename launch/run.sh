#!/usr/bin/env bash
# One verb of v4jax in its environment on this host. The other recipes start it on each machine.
#
#   V4JAX_EXTRAS=tpu,gcs bash launch/run.sh batch --model=… --input=… --output=…
#
#   V4JAX_EXTRAS   what to install beside v4jax: tpu, cuda, or nothing for the CPU; gcs, s3 for paths
#                  in buckets; hub for hf://; train
#   DRY_RUN=1      prints the command instead

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[[ $# -gt 0 && "$1" != --help ]] || show_help
[[ -z "${DRY_RUN:-}" ]] || { run v4jax "$@"; exit; }
make_environment "${V4JAX_EXTRAS:-}"
set_accelerator_flags
cd "$V4JAX_FROM"
exec v4jax "$@"
