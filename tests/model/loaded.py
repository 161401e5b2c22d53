"""Models for the tests: checkpoints written to disk and read back, each once per process."""

import functools
import tempfile

from oracle import checkpoints, golden

import v4jax


def load(tensors, config, numerics="float32"):
    """Returns the model of {released name: array}, read through a checkpoint folder."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_checkpoint(folder, tensors, config)
        return v4jax.load(folder, numerics)


@functools.cache
def golden_file(name):
    """Returns the golden file `name` as `golden.load` does."""
    return golden.load(name)


@functools.cache
def golden_model(name):
    """Returns the float32 model whose outputs the golden file `name` holds."""
    made = golden_file(name)
    return load(golden.weights(made), made["config"])
