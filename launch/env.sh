# Sourced by the recipes: finds a Python, makes the environment, sets what JAX needs. Sourcing it
# installs nothing; make_environment does.
#
#   PYTHON=python3.12   the interpreter (default: the first of python3.11 … python3 that is new enough)
#   V4JAX_VENV=DIR      where the environment is (default: .venv in the repository)
#   V4JAX_GET_PYTHON=1  where no Python is new enough, installs one with uv, for this user alone

set -euo pipefail

V4JAX_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
V4JAX_FROM="$PWD" # paths in flags are relative to where the command was given
cd "$V4JAX_ROOT"
V4JAX_VENV="${V4JAX_VENV:-$V4JAX_ROOT/.venv}"

say() { printf '%s\n' "$*" >&2; }
fail() { say "launch: error: $*"; exit 1; }

# Prints the comment at the top of the script, which is its help.
show_help() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"; exit 0; }

# Runs a command; with DRY_RUN=1 prints it, quoted for a shell.
run() { if [[ -n "${DRY_RUN:-}" ]]; then printf '%s\n' "${*@Q}"; else "$@"; fi; }

# Tests use JAX without v4jax's command line, which keeps compiled programs by itself: theirs are
# kept beside the environment, and the second run of the suite is faster.
keep_programs_of_tests() {
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$V4JAX_VENV/compiled}"
  # Programs that compile faster than this are not worth a file.
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is missing or older than 3.11"
    echo "$PYTHON"
    return
  fi
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    is_new_enough "$candidate" && echo "$candidate" && return
  done
  if [[ -n "${V4JAX_GET_PYTHON:-}" ]]; then
    get_python
    return
  fi
  fail "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python3.11 (V4JAX_GET_PYTHON=1 installs one with uv)"
}

# Installs a Python of its own for this user, and prints where it is. The images of TPU machines have
# Python 3.10 (Ubuntu 22.04).
get_python() {
  export PATH="$HOME/.local/bin:$PATH"
  say "launch: no Python 3.11 or later is here; installing one with uv"
  if ! command -v uv >/dev/null; then
    curl --fail --silent --show-error --location https://astral.sh/uv/install.sh | sh >&2 ||
      fail "uv could not be installed from https://astral.sh/uv; install Python 3.11 by hand"
  fi
  uv python install 3.12 >&2 || fail "uv could not install Python 3.12"
  uv python find 3.12
}

# Installs the package, editable, with the extras named ("test", "tpu,gcs" or nothing). Does nothing
# if that was done before and the package's metadata have not changed since.
make_environment() {
  local extras="${1:-}" python stamp key
  if [[ -z "${PYTHON:-}" ]] && is_new_enough "$V4JAX_VENV/bin/python"; then
    python="$V4JAX_VENV/bin/python" # keeps the environment it finds
  else
    python="$(find_python)"
    if [[ "$(version_of "$V4JAX_VENV/bin/python")" != "$(version_of "$python")" ]]; then
      say "launch: making $V4JAX_VENV with $("$python" --version)"
      "$python" -m venv --clear "$V4JAX_VENV" ||
        fail "$python cannot make an environment; Debian and Ubuntu need the package python3-venv"
    fi
  fi
  python="$V4JAX_VENV/bin/python"
  stamp="$V4JAX_VENV/installed-${extras:-plain}"
  key="$(cat setup.cfg pyproject.toml | cksum) $V4JAX_ROOT"
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$key" ]]; then
    say "launch: installing v4jax${extras:+[$extras]} (some minutes the first time)"
    rm -f "$stamp"
    # Python compiles a module when it is first imported; of most packages few ever are.
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile \
      --editable ".${extras:+[$extras]}"
    echo "$key" >"$stamp"
  fi
  export PATH="$V4JAX_VENV/bin:$PATH"
}

# What the compilers are told where several devices work together. launch/run.sh calls it; tests and
# demo do not, as their programs should not depend on it. Flags that are in the variables already
# come last and therefore win.
set_accelerator_flags() {
  # libtpu overlaps collectives with computation where they have a start and an end. all_to_all, the
  # exchange of tokens between experts, has them only with this flag (compiled for v5e and v6e with
  # libtpu 0.0.42.1; openxla.org/xla/flags_guidance).
  local tpu="--xla_tpu_enable_async_all_to_all=true"
  # XLA on GPUs moves collectives so that they overlap with kernels (docs.jax.dev, GPU performance
  # tips).
  local gpu="--xla_gpu_enable_latency_hiding_scheduler=true"
  export LIBTPU_INIT_ARGS="$tpu${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
  export XLA_FLAGS="$gpu${XLA_FLAGS:+ $XLA_FLAGS}"
  # JAX takes 75 % of a GPU's memory by default, and the model is nearly all that needs any; NCCL and
  # cuBLAS need the rest (docs.nvidia.com/jax-toolbox, performance tips).
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
}
