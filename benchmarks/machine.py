"""The machine of a benchmark: its processor, and how fast it multiplies matrices by itself.

The same program is several times as fast on one processor as on another, and a machine that others
use varies by a factor of two within minutes. A benchmark therefore prints `describe()`, and beside
every rate its share of the product rate that was measured in the same run.
"""

import datetime
import platform
import time

import jax
import jax.numpy as jnp

_SIZE = 2048  # rows and columns of the matrices
_VECTOR_UNITS = ("avx512f", "avx2", "avx", "sve", "asimd")  # widest first


def describe() -> str:
    """Returns date, processor or accelerator, and the version of JAX, in a line."""
    device = jax.devices()[0]
    name = processor() if device.platform == "cpu" else device.device_kind
    return f"{datetime.date.today()}, {name}, JAX {jax.__version__}"


def processor() -> str:
    """Returns the processor's name and its widest vector unit, as Linux says them."""
    try:
        with open("/proc/cpuinfo") as file:
            facts = dict(_fact(line) for line in file if ":" in line)
    except OSError:
        facts = {}
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", facts.get("Features", "")).split()
    return " with ".join([name, *[unit for unit in _VECTOR_UNITS if unit in flags][:1]])


def _fact(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def best_seconds(function, *arguments, repeats: int = 3) -> float:
    """Returns the shortest of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def product_rate(repeats: int = 3) -> float:
    """Returns FLOP/s of a square product of float32 matrices."""
    x = jnp.ones((_SIZE, _SIZE), jnp.float32)
    return 2 * _SIZE**3 / best_seconds(_multiply, x, repeats=repeats)


@jax.jit
def _multiply(x):
    return x @ x


def share(flops_per_second: float, product_flops_per_second: float) -> str:
    """Returns a rate beside the product rate of the same run.

    >>> share(22e9, 100e9)
    '22 % of 100 GFLOP/s'
    """
    part = 100 * flops_per_second / product_flops_per_second
    return f"{part:.3g} % of {product_flops_per_second / 1e9:.0f} GFLOP/s"
