"""Out of a run's folder: the model of a checkpoint, adapters merged or as PEFT keeps them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import WINDOWS, make_model

from v4jax.checkpoint import read_model, write_model
from v4jax.checkpoint.adapters import read_adapters, write_adapters
from v4jax.checkpoint.orbax_store import Store
from v4jax.cli import main
from v4jax.config import TrainConfig
from v4jax.config.loading import load_run
from v4jax.model.weights import read_weights
from v4jax.training.lora import merge
from v4jax.training.optimizer import build_optimizer
from v4jax.training.state import finish, init_state
from v4jax.training.trainable import split_trained
from v4jax.training.trainer import load_trained

RUN = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.model = "{folder}/base"
    config.output = "{folder}/elsewhere"
    config.steps = 10
    config.numerics = "float32"
    config.lora = dict(rank=2, alpha=4.0, targets=("attention.query_up", "moe.experts"))
    config.optimizer = dict(kind="adamw", warmup_steps=0)
    config.data = dict(sources=(dict(paths=("none",), kind="text"),), length=128, batch=1)
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A stopped run's folder and its trained model: its checkpoint of step 3, and an older one."""
    folder = tmp_path_factory.mktemp("run")
    write_model(make_model(WINDOWS, stored_as="released"), folder / "base")
    (folder / "run.py").write_text(RUN.format(folder=folder))
    config = load_run(TrainConfig, folder / "run.py", {"output": str(folder / "out")})
    frozen, weights, biases = split_trained(read_model(config.model, "float32"), config)
    optimizer = build_optimizer(config.optimizer, frozen.config)
    state = init_state(frozen, weights, biases, optimizer)
    with Store(folder / "out" / "checkpoints", model=frozen.config) as store:
        store.save(2, state)
        moved = {name: x + jnp.float32(0.05) for name, x in state.weights.items()}
        state = dataclasses.replace(state, step=jnp.int32(3), weights=moved)
        store.save(3, state)
    return folder, config, finish(frozen, state)


def same(a, b):
    """Whether two models hold the same arrays, to the bit."""
    a, b = read_weights(a), read_weights(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs
    )


def test_the_model_of_a_checkpoint(run):
    _, config, trained = run
    assert same(load_trained(config), trained)
    before = load_trained(config, 2)
    assert jax.tree.structure(before) == jax.tree.structure(trained) and not same(before, trained)


def test_convert_merges_a_run(run, capsys):
    folder, _, trained = run
    arguments = [f"--model={folder}/out", f"--run={folder}/run.py", f"--output={folder}/merged"]
    assert main.run(["convert", *arguments]) == 0
    assert "of the adapters' change" in capsys.readouterr().err
    assert same(read_model(folder / "merged"), merge(trained, requantize=True))
    assert main.run(["convert", f"--model={folder}/out", f"--output={folder}/no", "--step=2"]) == 2
    assert "give its --run, too" in capsys.readouterr().err


def test_convert_merges_adapters(run):
    folder, _, trained = run
    write_adapters(trained, folder / "adapters")
    base = read_model(folder / "base", "float32")
    assert same(read_adapters(base, folder / "adapters"), trained)
    # Of the run's checkpoint, and named anew and back, beside a base that is not read.
    for name, flags in {
        "run": [f"--model={folder}/out", f"--run={folder}/run.py", "--adapters_to=released"],
        "peft": [f"--model={folder}/base", f"--adapters={folder}/run", "--adapters_to=peft"],
    }.items():
        assert main.run(["convert", *flags, f"--output={folder}/{name}"]) == 0
        assert same(read_adapters(base, folder / name), trained)
    assert (folder / "peft" / "adapter_model.safetensors").read_bytes() == (
        folder / "adapters" / "adapter_model.safetensors"
    ).read_bytes()
    arguments = [f"--model={folder}/base", f"--adapters={folder}/adapters", "--format=bfloat16"]
    assert main.run(["convert", *arguments, f"--output={folder}/plain"]) == 0
    written = read_weights(read_model(folder / "plain"))
    for name, value in read_weights(merge(trained, "bfloat16")).items():
        plain = value.dequantize(jnp.bfloat16) if hasattr(value, "dequantize") else value
        assert np.array_equal(plain, written[name]), name
