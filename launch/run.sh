#!/usr/bin/env bash
# One verb of v4jax in its environment on this host: what the other scripts start on each machine.
#
#   bash launch/run.sh VERB FLAGS…      as in: bash launch/run.sh batch --help
#
#   V4JAX_EXTRAS=tpu,gcs    what to install beside v4jax: tpu, cuda, or nothing for the CPU; gcs, s3
#                           for paths in buckets; train

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
here="$OLDPWD" # paths in flags are relative to where the command was given
make_environment "${V4JAX_EXTRAS:-}"
set_accelerator_flags
cd "$here"
exec v4jax "$@"
