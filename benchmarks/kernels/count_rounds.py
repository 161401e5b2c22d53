"""How often the loops of the indexer's kernel run: the rounds that `cases/attention.py` states.

    JAX_PLATFORMS=cpu python -m benchmarks.kernels.count_rounds --count=512
    JAX_PLATFORMS=cpu python -m benchmarks.kernels.count_rounds --count=1024 --tokens=1

The TPU kernel is traced, every loop whose rounds depend on data gets a counter, and the kernel is
interpreted on random queries and keys: one tile of queries at the end of a context, entries in
random order. Sixteen index heads are enough: a score is a sum over heads, and only its order
counts. (With four, all weights of some queries are negative, and their best scores tie at 0.)
Printed per loop, in program order: times entered, rounds, rounds each time.
"""

import argparse
import collections

import jax
import jax.extend
import jax.numpy as jnp

from v4jax.kernels import Target, indexer
from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat

CHANNELS, RATIO = 128, 4


class Counters:
    """Times entered and rounds of each loop, by its number in program order."""

    def __init__(self):
        self.loops = 0
        self.entered = collections.Counter()
        self.rounds = collections.Counter()


def count(function, arguments) -> Counters:
    """Runs a function whose Pallas kernels are made for TPUs, and interpreted here."""
    counters = Counters()
    closed = jax.make_jaxpr(function)(*arguments)
    closed = closed.replace(jaxpr=_instrument(closed.jaxpr, counters, in_kernel=False))
    run = jax.jit(jax.extend.core.jaxpr_as_fun(closed))
    jax.block_until_ready(run(*jax.tree.leaves(arguments)))
    jax.effects_barrier()
    return counters


def _instrument(jaxpr, counters: Counters, in_kernel: bool):
    equations, effects = [], set()
    for equation in jaxpr.eqns:
        params = dict(equation.params)
        if equation.primitive.name == "pallas_call":
            params["jaxpr"] = _instrument(params["jaxpr"], counters, in_kernel=True)
            params["interpret"] = True
        elif equation.primitive.name == "while" and in_kernel:
            number = counters.loops
            counters.loops += 1
            equations.append(_tick(counters.entered, number))
            body = _instrument(params["body_jaxpr"].jaxpr, counters, in_kernel)
            tick = _tick(counters.rounds, number)
            body = body.replace(eqns=[tick, *body.eqns], effects=body.effects | tick.effects)
            params["body_jaxpr"] = params["body_jaxpr"].replace(jaxpr=body)
        else:
            for name, value in params.items():
                params[name] = _inside(value, counters, in_kernel)
        added = {effect for value in params.values() for effect in _callbacks(value)}
        equations.append(equation.replace(params=params, effects=equation.effects | added))
        effects |= added
    for equation in equations:
        effects |= equation.effects if equation.primitive.name == "debug_callback" else set()
    return jaxpr.replace(eqns=equations, effects=jaxpr.effects | effects)


def _inside(value, counters: Counters, in_kernel: bool):
    if type(value) in (tuple, list):
        return type(value)(_inside(item, counters, in_kernel) for item in value)
    if hasattr(value, "consts") and hasattr(value, "jaxpr"):
        return value.replace(jaxpr=_instrument(value.jaxpr, counters, in_kernel))
    return _instrument(value, counters, in_kernel) if hasattr(value, "eqns") else value


def _callbacks(value) -> set:
    """Returns the effects of counting inside a parameter."""
    if type(value) in (tuple, list):
        return {effect for item in value for effect in _callbacks(item)}
    effects = getattr(value, "effects", ())
    return {effect for effect in effects if type(effect).__name__.endswith("DebugEffect")}


def _tick(table: collections.Counter, number: int):
    """Returns an equation that counts."""

    def add():
        table[number] += 1

    return jax.make_jaxpr(lambda: jax.debug.callback(add))().jaxpr.eqns[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=262_144)
    parser.add_argument("--tokens", type=int, default=128, help="of one tile; 1 for decoding")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--count", type=int, default=512, help="entries to select")
    options = parser.parse_args()
    stored_as = EntryFormat("fp4", CHANNELS, 64, "bfloat16")
    random = jax.random.split(jax.random.key(0), 3)
    shape = (1, options.tokens, options.heads, CHANNELS)
    queries = jax.random.normal(random[0], shape).astype(jnp.bfloat16)
    weights = jax.random.normal(random[1], shape[:3]).astype(jnp.bfloat16)
    keys = jax.random.normal(random[2], (1, 1, options.entries, CHANNELS))
    end = jnp.array([options.entries * RATIO], jnp.int32)

    def select(queries, weights, stored, start, end):
        table = EntryTable(stored, jnp.int32(0), stored_as)
        chosen = {"ratio": RATIO, "count": options.count, "target": Target("tpu")}
        return indexer.select(queries, weights, table, start, end, **chosen)

    arguments = (queries, weights, jax.jit(stored_as.encode)(keys), end - options.tokens, end)
    counters = count(select, arguments)
    print("loop  entered   rounds  each time")
    for loop in range(counters.loops):
        entered, rounds = counters.entered[loop], counters.rounds[loop]
        print(f"{loop:4} {entered:8} {rounds:8} {rounds / max(entered, 1):10.3f}")


if __name__ == "__main__":
    main()
