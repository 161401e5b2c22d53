#!/usr/bin/env bash
# Trains nano from random weights: the curriculum whose result is packaged in v4jax/pretrained/nano.
#
#   bash launch/train_nano.sh [FIRST]      FIRST: stage to begin at, 1 to 10
#
# On a CPU with two cores about four hours, by the speed of the stages one by one. Every stage is a run
# of v4jax train and goes on where it stood; the last one's model is out/nano_10/model.

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_environment train
export PYTHONPATH="$V4JAX_ROOT" # the stages import configs.train
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

# The window each stage trains with; nano's own is 128.
windows=(32 128 128 32 128 128 128 128 128 128)

mkdir -p out
cat >out/nano_0.py <<'PY'
import dataclasses

from v4jax.config.loading import load_model_config


def get_config():
    return dataclasses.replace(load_model_config("nano"), sliding_window=32)
PY
# Stage 10 starts with the norms of CSA entries multiplied; its configuration says why.
sharpen_entries() {
  rm -rf "$1.before" # of a run that ended between
  mv "$1" "$1.before"
  python - "$1" <<'PY'
import sys

import v4jax
from v4jax.model.weights import read_weights, write_weights

model, norm = v4jax.load(sys.argv[1] + ".before"), "compressor.norm.weight"
held = read_weights(model)
names = [name for name in held if name.endswith("attention.indexer." + norm)]
names = [name.replace("indexer.", "") for name in names]
model = write_weights(model, {name: 1.5 * held[name] for name in names})
v4jax.save(model, sys.argv[1], format="bfloat16")
PY
  rm -r "$1.before"
}

for ((stage = ${1:-1}; stage <= 10; stage++)); do
  v4jax train --config="configs/train/nano_$stage.py" --noexport
  rm -rf "out/nano_$stage/start"
  v4jax convert --input="out/nano_$stage" --run="configs/train/nano_$stage.py" \
    --output="out/nano_$stage/start" --format=bfloat16
  next="${windows[stage]:-128}" # of the stage that comes
  sed -i "s/\"sliding_window\": [0-9]*/\"sliding_window\": $next/" "out/nano_$stage/start/config.json"
  if ((stage == 9)); then sharpen_entries out/nano_9/start; fi
done
v4jax convert --input=out/nano_10 --run=configs/train/nano_10.py --output=out/nano_10/model
