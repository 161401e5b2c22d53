"""Training nano on this machine: tokens per second, against the machine's own matrix products.

    python -m benchmarks.train
    python -m benchmarks.train --lengths 256 2048 --tokens 4096 --steps 5

A step is that of `v4jax train`: all weights, Muon, layers recomputed in the backward pass. It reads
random bytes, one document a row. The first two steps are not timed; of the others the median
counts, each beside a matrix product of the same moment.
"""

import argparse
import os
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from benchmarks import machine
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.run import TrainConfig
from v4jax.costs import flops
from v4jax.model import take_inventory
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.optimizer import build_optimizer, build_schedule
from v4jax.training.state import init_state
from v4jax.training.step import build_step
from v4jax.training.trainable import split_trained


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{machine.describe()}, load {os.getloadavg()[0]:.1f}")
    print("| row | rows | tokens/s | model FLOP/s | executed FLOP/s | of the product rate |")
    print("|---|---|---|---|---|---|")
    for length in arguments.lengths:
        print(measure(length, arguments.tokens // length, arguments.steps), flush=True)


def measure(length: int, rows: int, steps: int) -> str:
    """Returns a line of the table."""
    data = DataConfig((SourceConfig("text", paths=("none",)),), length=length, batch=rows)
    config = TrainConfig("nano", "none", data, steps=1000, numerics="float32")
    model = v4jax.load("nano", config.numerics, weight_layout="train")
    frozen, weights, biases = split_trained(model, config)
    optimizer = build_optimizer(config.optimizer, model.config)
    state = init_state(frozen, weights, biases, optimizer)
    rate = build_schedule(config.optimizer, config.steps)
    step = build_step(config.loss, optimizer, rate, Mode(config.remat), 1.0)
    step = jax.jit(step, donate_argnums=1)
    tokens = np.random.default_rng(0).integers(0, 256, (1, rows, length), np.int32)
    weights = np.broadcast_to(np.arange(length) > 0, tokens.shape).astype(np.float32)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, weights, np.zeros_like(tokens)))
    seconds, products = [], []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        state, found = step(frozen, state, batch)
        jax.block_until_ready((state, found))
        seconds.append(time.perf_counter() - begin)
        products.append(machine.product_rate(repeats=1))
    assert bool(found["finite"])
    rate = rows * length / median(seconds[2:])
    inventory = take_inventory(model.config)
    work = {
        again: flops.total(flops.count_training(inventory, length, remat=again)) / length
        for again in (False, True)
    }
    return (
        f"| {length:,} | {rows} | {rate:,.0f} | {rate * work[False] / 1e9:.1f} G | "
        f"{rate * work[True] / 1e9:.1f} G | "
        f"{machine.share(rate * work[True], median(products[2:]))} |"
    )


if __name__ == "__main__":
    main()
