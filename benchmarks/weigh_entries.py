"""How much the mass of HCA entries costs: codes found when each entry counts several times.

    python -m benchmarks.weigh_entries --length=65536 --times=4
    python -m benchmarks.weigh_entries --length=262144 --times=0.25

A text of four times the length has four times the HCA entries, and their softmax mass grows with
them whatever they say. This benchmark changes the mass alone: the logarithm of `times` is added to
it where attention over entries and attention over window and sink are merged. The questions are
those of `v4jax evaluate` to its first text (five depths): `--times=1` gives a part of that grid.
"""

import argparse

import jax.numpy as jnp

import v4jax
from v4jax.cli import needle_grid
from v4jax.inference import Engine, EngineOptions
from v4jax.kernels import attention
from v4jax.kernels.softmax import MASKED
from v4jax.model import attend

DEPTHS = 5
HCA = 128  # tokens of an entry


def weigh(times: float) -> None:
    """Makes every HCA entry count `times` times, in all calls of this process."""
    attend_all = attend.attend_all

    def attend_weighted(context, queries, recent, sink, *, window, entries, ratio, **rest):
        if entries is None or ratio != HCA:
            options = {"window": window, "entries": entries, "ratio": ratio}
            return attend_all(context, queries, recent, sink, **options, **rest)
        rows = context.start, context.end
        far_bthc, far_mass = attention.attend_dense(
            queries,
            recent[:, window:],
            jnp.full_like(sink, MASKED),
            *rows,
            window=0,
            entries=entries,
            ratio=ratio,
            target=context.target,
        )
        far_mass = far_mass + jnp.log(times)
        near_bthc, near_mass = attention.attend_dense(
            queries, recent, sink, *rows, window=window, target=context.target
        )
        mass = jnp.logaddexp(far_mass, near_mass)
        attended_bthc = far_bthc * jnp.exp(far_mass - mass)[..., None]
        return attended_bthc + near_bthc * jnp.exp(near_mass - mass)[..., None], mass

    attend.attend_all = attend_weighted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--length", type=int, default=65536, help="bytes of text")
    parser.add_argument("--times", type=float, default=4.0, help="how often an HCA entry counts")
    parser.add_argument("--questions", type=int, default=6, help="for each of five depths")
    arguments = parser.parse_args()
    weigh(arguments.times)
    engine = Engine(v4jax.load(arguments.model), EngineOptions())
    texts = needle_grid.draw_texts([arguments.length], DEPTHS, lambda _: arguments.questions, 0)
    cells = needle_grid.ask_texts(engine, texts[:1], DEPTHS, lambda *_: None, lambda _: None)
    right, asked = sum(cell.right for cell in cells), sum(cell.asked for cell in cells)
    print(f"{arguments.length:,} bytes, HCA entries times {arguments.times:g}: {right} of {asked}")


if __name__ == "__main__":
    main()
