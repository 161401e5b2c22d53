#!/usr/bin/env bash
# The main job on a laptop: a long text in, answers out.
#
#   bash launch/demo.sh [TOKENS]      default 65536; text, question and answer together
#
# Hides codes in documentation and sources of Python's standard library, reads them with the packaged
# model nano, asks for ten of the codes and says which answers are right. On the CPU unless
# JAX_PLATFORMS says otherwise. Leaves its files in out/demo.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[[ "${1:-}" != --help ]] || show_help
make_environment

tokens="${1:-65536}"
folder=out/demo
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" # the same everywhere; nano gains nothing from a GPU

python launch/demo_text.py write "$folder/documents.jsonl" --tokens "$tokens"
v4jax batch --model=nano --input="$folder/documents.jsonl" --output="$folder/answers.jsonl" \
  --summary="$folder/summary.json" --max_new_tokens=8 --overwrite
python launch/demo_text.py show "$folder/documents.jsonl" "$folder/answers.jsonl"
