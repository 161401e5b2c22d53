#!/usr/bin/env bash
# Trains nano from random weights on a CPU, in eleven stages of some hours together:
#
#   bash launch/train_nano.sh [FIRST]      default 1, the stage to begin at
#
# A run that was stopped goes on when it is started again. examples/nano/train.py has the stages.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[[ "${1:-}" != --help ]] || show_help
make_environment train
python examples/nano/train.py "$@"
