# Sourced by the launch scripts: chooses a Python, makes the environment, sets what JAX needs.
#
#   PYTHON=python3.12   the interpreter (default: the first of python3.11 … python3 that is new enough)
#   V4JAX_VENV=DIR      where the environment lives (default: .venv in the repository)

set -euo pipefail

V4JAX_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$V4JAX_ROOT"
V4JAX_VENV="${V4JAX_VENV:-$V4JAX_ROOT/.venv}"

# Compiled programs are kept beside the environment: the second run of a script starts at once.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$V4JAX_VENV/compiled}"
# Programs that compile faster than this are not worth a file.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}"

say() { printf '%s\n' "$*" >&2; }
fail() { say "launch: error: $*"; exit 1; }

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
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or later found; install one, or name it: PYTHON=/path/to/python3.11"
}

# Installs the package, editable, with the extras named ("test", "test,oracle" or nothing). Does
# nothing if that was done before and the package's metadata have not changed since.
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
  key="$(cat setup.cfg pyproject.toml | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') $V4JAX_ROOT"
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

# What the compilers are told where several devices work together. Called by launch/run.sh, and not
# by the tests and the demo: what those compile should not depend on it. Flags that stand in the
# variables already come last and so win.
set_accelerator_flags() {
  # libtpu. Its scheduler overlaps collectives with computation by itself, where they have a start
  # and an end; for all_to_all that is off by default (openxla.org/xla/flags_guidance).
  local tpu=(
    # The exchange of tokens between experts. Compiled for v5e and v6e (libtpu 0.0.42.1), an
    # all_to_all has a start and an end with this flag and is one blocking operation without.
    --xla_tpu_enable_async_all_to_all=true
  )
  # XLA on GPUs.
  local gpu=(
    # Moves collectives so that they overlap with kernels (docs.jax.dev, GPU performance tips).
    --xla_gpu_enable_latency_hiding_scheduler=true
  )
  export LIBTPU_INIT_ARGS="${tpu[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
  export XLA_FLAGS="${gpu[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
  # JAX takes 75 % of a GPU's memory by default, and the model is nearly all that needs any; NCCL and
  # cuBLAS need the rest (docs.nvidia.com/jax-toolbox, performance tips).
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
}
