#!/usr/bin/env bash
# A job on TPUs of a Kubernetes cluster at Google (GKE).
#
#   bash launch/gke.sh --name=reader --accelerator=v6e-8 --image=IMAGE --bucket=my-bucket --shards=16 \
#     -- batch --model=/bucket/v4-flash --input=gs://my-bucket/docs.jsonl --output=gs://my-bucket/answers.jsonl
#   bash launch/gke.sh --name=pro --accelerator=v6e-64 --image=IMAGE --bucket=my-bucket \
#     -- batch --model=/bucket/v4-pro --mesh=expert=32,tensor=2 --input=/bucket/docs.jsonl …
#   bash launch/gke.sh --name=tuning --accelerator=v5p-128 --image=IMAGE -- train --config=…
#
# batch on slices of one host becomes an Indexed Job: every index is one host with its part of the
# input (--shard=auto/N), which Kubernetes starts again when it fails and which then continues. batch
# on a slice of several hosts, train and convert become a JobSet over the hosts of the slices. The
# manifests are launch/gke_indexed_job.yaml, gke_jobset.yaml.
#
#   --name=NAME              of the job
#   --accelerator=TYPE       v5e-N and v6e-N count chips, v5p-N and tpu7x-N cores (two a chip); the
#                            cluster needs a node pool of this type and topology
#   --image=IMAGE            a container image in which v4jax[tpu] is installed; for paths in gs:// and
#                            s3:// v4jax[tpu,gcs] and v4jax[tpu,s3], for train v4jax[tpu,train]
#   --shards=N               batch on slices of one host: parts of the input (default 1)
#   --at_once=N              batch: parts worked on at a time (default: all)
#   --slices=N               train: slices joined by the data-center network (default 1)
#   --bucket=BUCKET          mounts gs://BUCKET as /bucket (the cluster's Cloud Storage FUSE driver)
#   --service_account=NAME   Kubernetes service account that may read and write the bucket, mounted or not
#   --namespace=NAME         default: default
#   --spot                   on spot nodes
#   --dry-run                prints the manifest instead of applying it

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
source "$V4JAX_ROOT/launch/arguments.sh"

name= accelerator= image= shards=1 at_once= slices=1 bucket= service_account= namespace=default spot=no
read_options name accelerator image shards at_once slices bucket service_account namespace spot -- "$@"
need name accelerator image
at_once="${at_once:-$shards}"
need_name name namespace
[[ -z "$service_account" ]] || need_name service_account
need_number shards at_once slices
((at_once <= shards)) || fail "--at_once=$at_once is more than --shards=$shards"
[[ "$image" =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || fail "--image must be the name of a container image, got '$image'"
[[ "$bucket" =~ ^([a-z0-9][-a-z0-9._]+)?$ ]] || fail "--bucket must be a bucket's name without gs://, got '$bucket'"
need_job

# accelerator → GKE's name, topology, chips of a host, hosts
case "$accelerator" in
  v5e-1) place="tpu-v5-lite-podslice 1x1 1 1" ;;
  v5e-4) place="tpu-v5-lite-podslice 2x2 4 1" ;;
  v5e-8) place="tpu-v5-lite-podslice 2x4 8 1" ;;
  v5e-16) place="tpu-v5-lite-podslice 4x4 4 4" ;;
  v5e-32) place="tpu-v5-lite-podslice 4x8 4 8" ;;
  v5e-64) place="tpu-v5-lite-podslice 8x8 4 16" ;;
  v5e-128) place="tpu-v5-lite-podslice 8x16 4 32" ;;
  v5e-256) place="tpu-v5-lite-podslice 16x16 4 64" ;;
  v6e-1) place="tpu-v6e-slice 1x1 1 1" ;;
  v6e-4) place="tpu-v6e-slice 2x2 4 1" ;;
  v6e-8) place="tpu-v6e-slice 2x4 8 1" ;;
  v6e-16) place="tpu-v6e-slice 4x4 4 4" ;;
  v6e-32) place="tpu-v6e-slice 4x8 4 8" ;;
  v6e-64) place="tpu-v6e-slice 8x8 4 16" ;;
  v6e-128) place="tpu-v6e-slice 8x16 4 32" ;;
  v6e-256) place="tpu-v6e-slice 16x16 4 64" ;;
  v5p-8 | tpu7x-8) place="2x2x1 4 1" ;;
  v5p-16 | tpu7x-16) place="2x2x2 4 2" ;;
  v5p-32 | tpu7x-32) place="2x2x4 4 4" ;;
  v5p-64 | tpu7x-64) place="2x4x4 4 8" ;;
  v5p-128 | tpu7x-128) place="4x4x4 4 16" ;;
  v5p-256 | tpu7x-256) place="4x4x8 4 32" ;;
  *) fail "--accelerator must be v5e-N or v6e-N with N of 1 4 8 16 32 64 128 256, or v5p-N or tpu7x-N with N of 8 16 32 64 128 256; got '$accelerator'" ;;
esac
case "$accelerator" in
  v5p-*) place="tpu-v5p-slice $place" ;;
  tpu7x-*) place="tpu7x $place" ;;
esac
read -r gke_accelerator topology chips hosts <<<"$place"

[[ "${job[0]}" != batch || "$slices" == 1 ]] ||
  fail "--slices is for train; give every slice of a batch its part of the input with --shard=i/N, in a job of its own"
if [[ "${job[0]}" == batch && "$hosts" == 1 ]]; then
  template=gke_indexed_job.yaml
  ! has_flag shard || fail "--shard is set here, one for each index; use --shards=N"
  ((shards == 1)) || job+=("--shard=auto/$shards")
else
  template=gke_jobset.yaml
  ((shards == 1)) || [[ "${job[0]}" != batch ]] ||
    fail "--shards is for slices of one host, and $accelerator has $hosts; start a job for each part, with -- batch --shard=i/$shards"
  ((shards == 1)) || fail "--shards divides the input of batch; ${job[0]} has none"
  [[ "${job[0]}" != convert ]] || ((hosts * slices == 1)) ||
    fail "${job[0]} runs on one host, got $((hosts * slices)); take v5e-8, v6e-8, v5p-8 or tpu7x-8"
fi

# The command as a JSON list, which YAML reads as well; Kubernetes itself would expand $(NAME).
command='["v4jax"'
for word in "${job[@]}"; do
  [[ "$word" != *[[:cntrl:]]* ]] || fail "flags must not hold control characters, got $(printf %q "$word")"
  word="${word//\\/\\\\}"
  word="${word//\"/\\\"}"
  word="${word//\$(/\$\$(}"
  command+=", \"$word\""
done
command+="]"

set_accelerator_flags
manifest="$(grep -v '^# ' "$V4JAX_ROOT/launch/$template" | {
  for option in bucket service_account spot; do
    [[ -n "${!option}" && "${!option}" != no ]] || leave_out="${leave_out:-^\$}|# only with --$option\$"
  done
  grep -Ev "${leave_out:-^\$}"
} | sed 's/ *# only with --[a-z_]*$//')"
manifest="${manifest//'{{name}}'/$name}"
manifest="${manifest//'{{namespace}}'/$namespace}"
manifest="${manifest//'{{service_account}}'/$service_account}"
manifest="${manifest//'{{accelerator}}'/$gke_accelerator}"
manifest="${manifest//'{{topology}}'/$topology}"
manifest="${manifest//'{{chips}}'/$chips}"
manifest="${manifest//'{{hosts}}'/$hosts}"
manifest="${manifest//'{{slices}}'/$slices}"
manifest="${manifest//'{{shards}}'/$shards}"
manifest="${manifest//'{{at_once}}'/$at_once}"
manifest="${manifest//'{{bucket}}'/$bucket}"
manifest="${manifest//'{{image}}'/$image}"
manifest="${manifest//'{{libtpu_flags}}'/"$LIBTPU_INIT_ARGS"}"
manifest="${manifest//'{{command}}'/"$command"}" # last: what the user wrote is not filled in again

if [[ -n "$dry_run" ]]; then
  echo "$manifest"
  exit 0
fi
command -v kubectl >/dev/null || fail "kubectl is not installed: https://kubernetes.io/docs/tasks/tools. --dry-run works without"
kubectl apply --filename=- <<<"$manifest"
say "launch: kubectl logs --namespace=$namespace --selector=$([[ $template == gke_jobset.yaml ]] && echo jobset.sigs.k8s.io/jobset-name || echo job-name)=$name shows what it says"
