# Sourced by the scripts that start jobs elsewhere: their options, verbs and dry runs.
#
# A script's options are shell variables with their defaults; `read_options "$@"` sets them from
# --name=value, and what follows `--` is the job: a verb of v4jax and its flags, in the array `job`.

dry_run=
job=()
V4JAX_VERBS=(batch train convert)

# Prints the comment at the top of the script, which is its help.
show_help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; }

# The names with underscores are those of no option.
# read_options NAME… -- ARGUMENT…  sets the variables NAME from --NAME=VALUE; an option whose
# variable is "no" is a switch, which --NAME turns to "yes".
read_options() {
  local _names=() _name _argument
  while [[ "$1" != -- ]]; do _names+=("$1"); shift; done
  shift
  while (($#)); do
    _argument="$1"
    shift
    case "$_argument" in
      --) job=("$@"); break ;;
      --help | -h) show_help; exit 0 ;;
      --dry-run | --dry_run) dry_run=yes; continue ;;
      --*) ;;
      *) fail "unexpected $_argument; options are --name=value, and the job follows --, as in: -- batch --model=…" ;;
    esac
    _name="${_argument#--}"
    _name="${_name%%=*}"
    [[ " ${_names[*]} " == *" $_name "* ]] || fail "unknown option --$_name; known: ${_names[*]/#/--} --dry-run --help"
    if [[ "${!_name}" == no || "${!_name}" == yes ]]; then
      [[ "$_argument" == "--$_name" ]] || fail "--$_name is a switch and takes no value"
      printf -v "$_name" yes
    else
      [[ "$_argument" == *=* ]] || fail "--$_name needs a value: --$_name=…"
      printf -v "$_name" %s "${_argument#*=}"
    fi
  done
}

need() {
  local _name
  for _name; do [[ -n "${!_name}" ]] || fail "--$_name is required; --help shows examples"; done
}

need_number() {
  local _name
  for _name; do
    [[ "${!_name}" =~ ^[1-9][0-9]{0,5}$ ]] || fail "--$_name must be a number from 1, got '${!_name}'"
  done
}

# What Kubernetes and Google Cloud accept as a name; it also needs no quoting anywhere.
need_name() {
  local _name
  for _name; do
    [[ "${!_name}" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
      fail "--$_name must be lower-case letters, digits and hyphens, at most 40, got '${!_name}'"
  done
}

# Checks the verb. Whether its flags are right only v4jax itself knows.
need_job() {
  ((${#job[@]})) || fail "no job: put a verb and its flags after --, as in: -- batch --model=nano --input=docs.jsonl --output=answers.jsonl"
  [[ " ${V4JAX_VERBS[*]} " == *" ${job[0]} "* ]] ||
    fail "the job must begin with one of: ${V4JAX_VERBS[*]}; got '${job[0]}'"
}

# list_extras EXTRA…  prints what to install beside v4jax, as in "tpu,gcs": the extras given, and
# those that the verb and the paths of the job need.
list_extras() {
  local IFS=, extras=("$@")
  [[ "${job[0]}" != train ]] || extras+=(train)
  [[ "${job[*]}" != *gs://* ]] || extras+=(gcs)
  [[ "${job[*]}" != *s3://* ]] || extras+=(s3)
  echo "${extras[*]}"
}

has_flag() {
  local argument
  for argument in "${job[@]}"; do [[ "$argument" == "--$1" || "$argument" == "--$1="* ]] && return; done
  return 1
}

# quote WORD…  prints the words as a shell reads them back, quoted only where that is needed.
quote() {
  local word line=
  for word; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ -n "$dry_run" ]]; then quote "$@"; else "$@"; fi
}
