#!/usr/bin/env bash
# Style, floors and tests. Arguments go to pytest:  bash launch/test.sh tests/inference -k killed
#
#   V4JAX_TEST_WORKERS=4   processes for pytest (default 2; 0 runs in one, for a debugger)

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[[ "${1:-}" != --help ]] || show_help
make_environment test
keep_programs_of_tests

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" # the suite simulates its devices

ruff check .
lint-imports
# A file's tests share compiled functions, so a file stays in one process.
# .ci/run runs the others: slow ones, and those that need torch (oracle) or libtpu (tpu_compiler).
marked="not slow and not oracle and not tpu_compiler"
python -m pytest -n "${V4JAX_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder -m "$marked" "$@"
