"""Training on this machine: tokens per second of nano, against the machine's own matrix products.

    python -m tests.benchmarks.bench_train [--lengths 256 2048] [--tokens 4096] [--steps 5]

One step as `v4jax train` makes it (all weights, Muon, layers computed again in the backward pass)
on random bytes, a document a row. Steps are timed one by one after two that are not; the median
counts.
"""

import argparse
import os
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.run import TrainConfig
from v4jax.planning import flops
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.optimizer import build_optimizer
from v4jax.training.step import build_step, init_state
from v4jax.training.trainable import split_trained

_PRODUCT = 2048  # rows and columns of the matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f}")
    print("| row | rows | tokens/s | model FLOP/s | executed FLOP/s | of the product's rate |")
    print("|---|---|---|---|---|---|")
    for length in arguments.lengths:
        print(measure(length, arguments.tokens // length, arguments.steps), flush=True)
    print(f"load after: {os.getloadavg()[0]:.1f}")


def measure(length: int, rows: int, steps: int) -> str:
    """Returns a line of the table."""
    data = DataConfig((SourceConfig("text", paths=("none",)),), length=length, batch=rows)
    config = TrainConfig(model="nano", output="none", data=data, numerics="float32")
    model = v4jax.load("nano", config.numerics, regime="train")
    frozen, weights, biases = split_trained(model, config)
    optimizer = build_optimizer(config.optimizer, model.config, config.steps)
    state = init_state(weights, biases, optimizer)
    step = jax.jit(build_step(config.loss, optimizer, Mode(config.remat), 1.0), donate_argnums=1)
    tokens = np.random.default_rng(0).integers(0, 256, (1, rows, length), np.int32)
    weights = np.broadcast_to(np.arange(length) > 0, tokens.shape).astype(np.float32)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, weights, np.zeros_like(tokens)))
    seconds, product = [], []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        state, found = step(frozen, state, batch)
        jax.block_until_ready((state, found))
        seconds.append(time.perf_counter() - begin)
        product.append(time_product())
    assert bool(found["finite"])
    rate = rows * length / median(seconds[2:])
    work = {
        again: flops.total(flops.count_training(model.config, length, remat=again)) / length
        for again in (False, True)
    }
    peak = 2 * _PRODUCT**3 / median(product[2:])
    return (
        f"| {length:,} | {rows} | {rate:,.0f} | {rate * work[False] / 1e9:.1f} G | "
        f"{rate * work[True] / 1e9:.1f} G | {100 * rate * work[True] / peak:.0f} % of "
        f"{peak / 1e9:.0f} G |"
    )


def time_product() -> float:
    """Returns the seconds of one product of float32 matrices."""
    x = jnp.ones((_PRODUCT, _PRODUCT), jnp.float32)
    multiply(x).block_until_ready()
    begin = time.perf_counter()
    multiply(x).block_until_ready()
    return time.perf_counter() - begin


@jax.jit
def multiply(x):
    return x @ x


if __name__ == "__main__":
    main()
