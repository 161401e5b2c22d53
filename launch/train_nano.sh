#!/usr/bin/env bash
# Trains nano from random weights on a CPU: bash launch/train_nano.sh [FIRST], or --help.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_environment train
python examples/nano/train.py "$@"
