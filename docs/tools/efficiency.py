"""The report's comparison with DeepSeek-V3.2: cache bytes and operations per token, by length.

    python -m docs.tools.efficiency
    python -m docs.tools.efficiency --plot=efficiency.png

Cache bytes of our models are those of the real arrays. Operations are weighted as the report's
figures are: 2 a multiply-add, and by operand format relative to FP8, so that work in bfloat16
counts twice and FP4 × FP4 half (spec C.4: a reconstruction that gives the printed digits).
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from v4jax.cache import init_cache
from v4jax.checkpoint.hf_folder import with_blocks
from v4jax.config import Numerics, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.costs import flops
from v4jax.costs.inventory import list_cache
from v4jax.errors import V4JaxError
from v4jax.model import take_inventory
from v4jax.pictures import make_figure

LENGTHS = (32_768, 131_072, 262_144, 524_288, 1_048_576)
MODELS = ("v4_pro", "v4_flash")
GIB = 2**30
# FP4 experts multiply FP8 activations at the FP8 rate; FP4 index keys meet FP4 queries.
_WEIGHTS = {"fp8": 1.0, "fp4": 1.0, "bfloat16": 2.0, "float32": 2.0}
_INDEX_WEIGHT = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.tools.efficiency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--plot", help="also draw the comparison to this PNG (needs matplotlib)")
    options = parser.parse_args(arguments)
    rows = compare()
    if options.plot:
        try:
            plot(rows, options.plot)
        except V4JaxError as error:
            print(f"docs.tools.efficiency: error: {error}", file=sys.stderr)
            return 2
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print(as_text(rows))
    return 0


@dataclasses.dataclass(frozen=True)
class Predecessor:
    """DeepSeek-V3.2: what its cache and its decode step cost. Source: spec C.3, C.4."""

    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    heads: int = 128
    query_rank: int = 1536
    latent: int = 512
    plain: int = 128
    rope: int = 64
    value: int = 128
    dense_width: int = 18432
    experts: int = 256
    chosen: int = 8
    expert_width: int = 2048
    index_heads: int = 64
    index_width: int = 128
    topk: int = 2048
    vocab: int = 129280
    token_layer_bytes: int = 512 + 16 + 128 + 132  # FP8 latent, scales, bfloat16 rope; index key

    def cache_bytes(self, tokens: int) -> int:
        """Returns the bytes of one sequence's cache."""
        return self.token_layer_bytes * self.layers * tokens

    def flops(self, tokens: int) -> float:
        """Returns the weighted operations of the token at position tokens − 1."""
        fp8, plain = self.linear_parameters()
        seen = min(tokens, self.topk)
        core = 2.0 * self.layers * self.heads * (2 * self.latent + self.rope) * seen
        scores = 2.0 * self.layers * self.index_heads * self.index_width * tokens
        return 2.0 * (fp8 + 2 * plain) + 2 * core + scores

    def linear_parameters(self) -> tuple[int, int]:
        """Returns the parameters that a token is multiplied with: stored as FP8, as bfloat16."""
        d, h, r = self.hidden, self.heads, self.query_rank
        attention = (
            d * r
            + r * h * (self.plain + self.rope)
            + d * (self.latent + self.rope)
            + self.latent * h * (self.plain + self.value)
            + h * self.value * d
        )
        index = r * self.index_heads * self.index_width + d * self.index_width
        routed_layers = self.layers - self.dense_layers
        dense = self.dense_layers * 3 * d * self.dense_width
        experts = routed_layers * (self.chosen + 1) * 3 * d * self.expert_width
        gates = routed_layers * self.experts * d + self.layers * d * self.index_heads
        return self.layers * (attention + index) + dense + experts, gates + self.vocab * d


@dataclasses.dataclass(frozen=True)
class Row:
    """One model at one length. flops: weighted; counted_flops: multiply-adds × 2, unweighted."""

    model: str
    tokens: int
    cache_bytes: int
    state_bytes: int
    flops: float
    counted_flops: float
    cache_share: float
    flops_share: float


def compare(lengths: tuple[int, ...] = LENGTHS, numerics: Numerics | None = None) -> list[Row]:
    """Returns a row for each length and model; shares are of V3.2 at the same length."""
    numerics = numerics or get_numerics("released")
    before = Predecessor()
    rows = []
    for tokens in lengths:
        for name in MODELS:
            # The report's figures are of the main model: nothing is kept for drafts.
            config = with_blocks(load_model_config(name), 0)
            make = functools.partial(init_cache, config, numerics, 1, tokens)
            arrays = list_cache(jax.eval_shape(make))
            # The report's figure leaves out the raw rows of unfinished windows.
            state = sum(array.bytes for array in arrays if array.holds.startswith("unfinished"))
            cache = sum(array.bytes for array in arrays) - state
            work = flops.count_tokens(take_inventory(config), tokens - 1, tokens)
            weighted = weigh(work)
            rows.append(
                Row(
                    model=name,
                    tokens=tokens,
                    cache_bytes=cache,
                    state_bytes=state,
                    flops=weighted,
                    counted_flops=flops.total([w for w in work if w.unit == "matrix"]),
                    cache_share=cache / before.cache_bytes(tokens),
                    flops_share=weighted / before.flops(tokens),
                )
            )
    return rows


def weigh(work: list[flops.Work]) -> float:
    """Returns operations as equivalents of FP8 operations; elementwise work is left out."""
    return sum(
        item.flops * (_INDEX_WEIGHT if item.component == "index scores" else _WEIGHTS[item.fmt])
        for item in work
        if item.unit == "matrix"
    )


def as_text(rows: list[Row]) -> str:
    """Returns the comparison as two tables and bars of the longest length."""
    before, lines = Predecessor(), []
    lines += ["cache of one sequence, GiB (counted from the arrays that init_cache makes)", ""]
    lines += [_header("V4-Pro", "V4-Flash")]
    for tokens, pro, flash in _by_length(rows):
        sizes = (before.cache_bytes(tokens), pro.cache_bytes, flash.cache_bytes)
        lines.append(_line(tokens, [size / GIB for size in sizes], 4, pro, flash, "cache_share"))
    states = ", ".join(
        f"{row.state_bytes / 1e6:.1f} MB ({row.model})" for row in rows[: len(MODELS)]
    )
    lines += ["", f"beside it, at any length, raw rows of unfinished windows: {states}", ""]
    lines += ["operations per decoded token, 10⁹ FP8 equivalents (bfloat16 × 2, index scores × ½)"]
    lines += ["", _header("V4-Pro", "V4-Flash")]
    for tokens, pro, flash in _by_length(rows):
        counts = (before.flops(tokens), pro.flops, flash.flops)
        lines.append(_line(tokens, [count / 1e9 for count in counts], 1, pro, flash, "flops_share"))
    lines += ["", "the same unweighted, multiply-adds × 2, 10⁹", ""]
    for tokens, pro, flash in _by_length(rows):
        counted = (pro.counted_flops / 1e9, flash.counted_flops / 1e9)
        lines.append(f"{_length(tokens):>8}{'':>11}{counted[0]:>11.1f}{'':>9}{counted[1]:>11.1f}")
    return "\n".join([*lines, "", *bars(rows)])


def bars(rows: list[Row]) -> list[str]:
    """Returns text bars of the longest length, V3.2 = 100 %."""
    tokens, pro, flash = _by_length(rows)[-1]
    lines = []
    for title, field in (("cache", "cache_share"), ("operations", "flops_share")):
        lines.append(f"{title} at {_length(tokens)} tokens")
        shares = (
            ("V3.2", 1.0),
            ("V4-Pro", getattr(pro, field)),
            ("V4-Flash", getattr(flash, field)),
        )
        for name, share in shares:
            lines.append(f"  {name:<9}{'█' * max(1, round(share * 50)):<50} {share:7.2%}")
    return lines


def plot(rows: list[Row], path: str) -> None:
    """Writes both comparisons over length as a PNG.

    Raises:
      UnsupportedError: matplotlib is not installed.
    """
    draw(rows).savefig(path, dpi=120)


def draw(rows: list[Row]) -> Any:
    """Returns both comparisons over length as a matplotlib figure.

    Raises:
      UnsupportedError: matplotlib is not installed.
    """
    before, lengths = Predecessor(), sorted({row.tokens for row in rows})
    figure = make_figure(
        "--plot needs matplotlib: pip install matplotlib; without --plot the table ends in text "
        "bars",
        figsize=(10, 4),
        layout="constrained",
    )
    left, right = figure.subplots(1, 2)
    curves = [("V3.2", [(before.cache_bytes(n), before.flops(n)) for n in lengths])]
    for model, name in (("v4_pro", "V4-Pro"), ("v4_flash", "V4-Flash")):
        mine = sorted((row for row in rows if row.model == model), key=lambda row: row.tokens)
        curves.append((name, [(row.cache_bytes, row.flops) for row in mine]))
    for name, values in curves:
        left.plot(lengths, [size / GIB for size, _ in values], marker="o", label=name)
        right.plot(lengths, [count / 1e9 for _, count in values], marker="o", label=name)
    for axes, title in ((left, "cache of a sequence, GiB"), (right, "GFLOP a token (FP8)")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axes.set_xticks(lengths, [_length(tokens) for tokens in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    return figure


def _by_length(rows: list[Row]) -> list[tuple[int, Row, Row]]:
    found = {(row.tokens, row.model): row for row in rows}
    return [(n, found[n, "v4_pro"], found[n, "v4_flash"]) for n in sorted({n for n, _ in found})]


def _header(*names: str) -> str:
    return f"{'tokens':>8}{'V3.2':>11}" + "".join(f"{name:>11}{'%':>9}" for name in names)


def _line(tokens, values, digits, pro, flash, field) -> str:
    shares = (None, getattr(pro, field), getattr(flash, field))
    cells = "".join(
        f"{value:>11.{digits}f}" + ("" if share is None else f"{100 * share:>9.2f}")
        for value, share in zip(values, shares, strict=True)
    )
    return f"{_length(tokens):>8}{cells}"


def _length(tokens: int) -> str:
    for unit, size in (("M", 1_048_576), ("K", 1024)):
        if tokens % size == 0:
            return f"{tokens // size} {unit}"
    return f"{tokens:,}"


if __name__ == "__main__":
    sys.exit(main())
