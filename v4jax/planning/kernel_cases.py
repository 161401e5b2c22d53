"""The shapes at which `v4jax bench kernels` reads the compiler's schedule: the table, as data.

A case is one call of an operation with abstract arguments, at the released models' sizes and a
context of 1,048,576 tokens; each of its Pallas kernels says what it must compute and move, and how
often loops run whose rounds depend on data. `loads are even` and other assumptions are printed.

To add a case, write a function that returns a `Case` and list it in `cases`. Loops and regions are
named by their place, as `v4jax bench kernels --loops` prints them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.config.loading import load_model_config
from v4jax.config.model import ModelConfig
from v4jax.errors import RequestError
from v4jax.shapes import ceil_div, round_up

CONTEXT, CHUNK = 1_048_576, 2_048
MODELS = ("v4_flash", "v4_pro")
_S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas kernel of a case."""

    name: str  # as `pallas_call` is told
    result: tuple[int, ...] = ()  # shape of the first result, where two kernels share a name
    flops: float | None = None  # that the result needs; None: not stated
    moved_bytes: float | None = None  # every operand and result once, at least
    # Sizes of the grid's dimensions that are known on device only, in order.
    grid: tuple[int, ...] = ()
    # Rounds of the loops for which the compiler's text states none (the grid aside), in program
    # order: the mean each time they are entered.
    rounds: tuple[float, ...] = ()
    # First and last of these loops → share of the visits in which the smallest skippable region
    # around both runs.
    visits: Mapping[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    # Loop or region → share of the visits in which it runs at all; by place.
    entered: Mapping[str, float] = dataclasses.field(default_factory=dict)
    depth: int | None = None  # channels a product sums over, where fewer than the unit is wide
    rows: int | None = None  # rows of a product, where fewer than the unit is wide
    goal: float | None = None  # share of the peak to reach
    goal_of_bound: float | None = None  # or share of what the shape allows
    assumes: str = ""

    def bound_for(self, unit: int) -> float:
        """Returns the share of the peak that the shape allows on matrix units of this width."""
        return min(1.0, (self.rows or unit) / unit) * min(1.0, (self.depth or unit) / unit)

    def goal_for(self, unit: int) -> float | None:
        """Returns the share of the peak to reach on matrix units of this width."""
        return self.goal_of_bound * self.bound_for(unit) if self.goal_of_bound else self.goal


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation."""

    op: str
    model: str
    shape: str  # a few words
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[Kernel, ...]

    @property
    def key(self) -> str:
        """The case's name on the command line: op/model/shape."""
        return f"{self.op}/{self.model}/{self.shape.replace(' ', '_')}"


def find(key: str) -> Case:
    """Returns the case of a key.

    Raises:
      RequestError: there is none.
    """
    for build in _BUILDERS:
        for model in MODELS:
            for case in build(model, _config(model)):
                if case.key == key:
                    return case
    raise RequestError(f"there is no benchmark case {key!r}")


def select(models: tuple[str, ...], only: tuple[str, ...] = ()) -> list[Case]:
    """Returns the cases of some models, and if `only` is given those whose key contains a word."""
    found = [
        case for build in _BUILDERS for model in models for case in build(model, _config(model))
    ]
    if not only:
        return found
    for word in only:
        if not any(word in case.key for case in found):
            known = sorted({case.op for case in found})
            raise RequestError(f"no case contains {word!r}; operations are {', '.join(known)}")
    return [case for case in found if any(word in case.key for word in only)]


@functools.cache
def _config(model: str) -> ModelConfig:
    return load_model_config(model)


def _stored(shape: tuple[int, ...], kind: str) -> Any:
    from v4jax.quant import quantize_weight

    if kind == "bfloat16":
        return _S(shape, jnp.bfloat16)
    return jax.eval_shape(lambda: quantize_weight(jnp.zeros(shape, jnp.bfloat16), kind))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _grouped_matmul(model: str, config: ModelConfig) -> list[Case]:
    """Routed experts: one kernel for gate and up, one for down; in training their gradients."""
    experts = config.n_routed_experts
    share = experts // 8
    return [
        _experts(model, config, "prefill fp4", CHUNK, share, "fp4", goal=0.65),
        _experts(model, config, "prefill bfloat16", CHUNK, share, "bfloat16", goal=0.65),
        _experts(model, config, "prefill fp8", CHUNK, share, "fp8"),
        _experts(model, config, "prefill all experts", CHUNK, experts, "fp4"),
        _experts(model, config, "decode 16", 16, experts, "fp4"),
        _experts_backward(model, config, "training bfloat16", CHUNK, share),
    ]


def _experts(model, config, shape, tokens, experts, kind, goal=None) -> Case:
    """`tokens` times top-k assignments, spread evenly over the experts held here.

    FLOPs: assignments · 2 · hidden · 2 · inner for gate and up, half of it for down.
    """
    from v4jax.kernels.grouped_matmul import pallas_tpu

    width, inner = config.hidden_size, config.moe_intermediate_size
    arguments = _expert_arguments(config, tokens, experts, kind)
    assignments, used, tiles, assumes = _even_load(
        config,
        tokens,
        experts,
        pallas_tpu.choose_tile(tokens * config.num_experts_per_tok, experts),
    )
    # Weights are expanded by the loops before the last one, once per expert and block of outputs.
    once = used / tiles
    expands = [{"0.0": once, "0.1": once}, {"0.0": once}] if kind != "bfloat16" else [{}, {}]
    options = {"grid": (tiles,), "goal": goal, "assumes": assumes}
    gate_up, down = (used / experts * _bytes(weight) for weight in arguments[3:])
    rows = 2 * assignments * (width + inner)
    kernels = (
        Kernel(
            f"grouped_matmul_gated_{kind}",
            flops=assignments * 4 * width * inner,
            moved_bytes=gate_up + rows,
            entered=expands[0],
            **options,
        ),
        Kernel(
            f"scaled_matmul_{kind}",
            flops=assignments * 2 * width * inner,
            moved_bytes=down + rows,
            entered=expands[1],
            **options,
        ),
    )
    run = functools.partial(_run_experts, limit=config.swiglu_limit)
    return Case("grouped_matmul", model, shape, run, arguments, kernels)


def _run_experts(x, ids, routing, gate_up, down, *, limit):
    from v4jax.kernels import grouped_matmul

    return grouped_matmul.apply_experts(x, ids, routing, gate_up, down, limit=limit)


def _experts_backward(model, config, shape, tokens, experts) -> Case:
    """All gradients. FLOPs, in units of assignments · 2 · hidden · inner:

    gate, up and the gradient of the inner activations 3, of the inputs 2, of the weights 2 and 1.
    """
    from v4jax.kernels.grouped_matmul import pallas_tpu, pallas_tpu_backward

    width, inner = config.hidden_size, config.moe_intermediate_size
    arguments = _expert_arguments(config, tokens, experts, "bfloat16")
    tile = pallas_tpu.choose_tile(tokens * config.num_experts_per_tok, experts)
    forward_tiles = _even_load(config, tokens, experts, tile)[2]
    tile = min(tile, pallas_tpu_backward.LARGEST_TILE)
    assignments, _, tiles, assumes = _even_load(config, tokens, experts, tile)
    unit = assignments * 2 * width * inner
    gate_up, down = map(_bytes, arguments[3:])
    rows, inner_rows = 2 * assignments * width, 2 * assignments * inner
    options = {"grid": (tiles,), "assumes": assumes}

    def run(x, ids, routing, gate_up, down):
        def forward(*differentiable):
            x, routing, gate_up, down = differentiable
            return _run_experts(x, ids, routing, gate_up, down, limit=config.swiglu_limit)

        y, pull = jax.vjp(forward, x, routing, gate_up, down)
        return pull(y)

    kernels = (
        Kernel(
            "grouped_matmul_gated_bfloat16",
            flops=2 * unit,
            moved_bytes=gate_up + rows + inner_rows,
            **options | {"grid": (forward_tiles,)},
        ),
        Kernel(
            "scaled_matmul_bfloat16",
            flops=unit,
            moved_bytes=down + rows + inner_rows,
            **options | {"grid": (forward_tiles,)},
        ),
        Kernel(
            "grouped_matmul_inner_gradient",
            flops=3 * unit,
            moved_bytes=gate_up + down + 2 * rows + 3 * inner_rows,
            **options,
        ),
        Kernel(
            "grouped_matmul_input_gradient",
            flops=2 * unit,
            moved_bytes=gate_up + rows + 2 * inner_rows,
            **options,
        ),
        Kernel(
            "grouped_matmul_weight_gradient",
            result=(experts, 2 * inner, width),
            flops=2 * unit,
            moved_bytes=gate_up + rows + 2 * inner_rows,
            **options,
        ),
        Kernel(
            "grouped_matmul_weight_gradient",
            result=(experts, width, inner),
            flops=unit,
            moved_bytes=down + rows + inner_rows,
            **options,
        ),
    )
    return Case("grouped_matmul", model, shape, run, arguments, kernels)


def _expert_arguments(config: ModelConfig, tokens: int, experts: int, kind: str):
    width, inner, chosen = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts_per_tok,
    )
    return (
        _S((tokens, width), jnp.bfloat16),
        _S((tokens, chosen), jnp.int32),
        _S((tokens, chosen), jnp.float32),
        _stored((experts, 2, inner, width), kind),
        _stored((experts, width, inner), kind),
    )


def _even_load(config: ModelConfig, tokens: int, experts: int, tile: int):
    """Returns (assignments, experts with tokens, tiles in use, these facts as a sentence)."""
    assignments = tokens * config.num_experts_per_tok
    used = min(experts, assignments)
    tiles = used * ceil_div(assignments // used, tile)
    facts = f"{assignments} rows, evenly over {used} experts: {tiles} tiles of {tile} rows"
    return assignments, used, tiles, facts


def _scaled_matmul(model: str, config: ModelConfig) -> list[Case]:
    """Linear layers in FP8: the widest, queries up. FLOPs: tokens · 2 · rows · columns."""
    from v4jax.kernels import scaled_matmul
    from v4jax.kernels.scaled_matmul import pallas_tpu

    rows, columns = config.num_attention_heads * config.head_dim, config.q_lora_rank
    weight = _stored((rows, columns), "fp8")
    cases = []
    for shape, tokens in (("prefill", CHUNK), ("decode 64", 64)):
        tiles = ceil_div(tokens, pallas_tpu.LARGEST_TILE)
        kernel = Kernel(
            "scaled_matmul_fp8",
            flops=tokens * 2 * rows * columns,
            moved_bytes=_bytes(weight) + 2 * tokens * (rows + columns),
            grid=(tiles,),
            entered={"0.0": 1 / tiles},
        )
        arguments = _S((1, tokens, columns), jnp.bfloat16), weight
        cases.append(
            Case("scaled_matmul", model, shape, scaled_matmul.matmul, arguments, (kernel,))
        )
    return cases


def _dense_attention(model: str, config: ModelConfig) -> list[Case]:
    """HCA and window layers. FLOPs: 4 · channels per query head and key it sees."""
    ratio = 128
    return [
        _dense(model, config, "prefill", 1, CHUNK, CONTEXT, ratio, goal=0.65),
        _dense(model, config, "prefill window layer", 1, CHUNK, CONTEXT, 0),
        _dense(model, config, "decode 16", 16, 1, CONTEXT, ratio),
        _dense(model, config, "training 8192", 1, 8192, 8192, ratio, backward=True),
    ]


def _dense(model, config, shape, batch, tokens, context, ratio, goal=None, backward=False) -> Case:
    from v4jax.kernels import dense_attention
    from v4jax.kernels.dense_attention import entries_tpu, pallas_tpu, pallas_tpu_backward
    from v4jax.kernels.table import EntryTable
    from v4jax.quant import EntryFormat

    heads, channels, window = config.num_attention_heads, config.head_dim, config.sliding_window
    first = context - tokens
    positions = range(first, context)
    capacity = context // ratio if ratio else 0
    keys = sum(min(p + 1, window) + ((p + 1) // ratio if ratio else 0) for p in positions)
    stored_as = EntryFormat(
        "bfloat16" if backward else "fp8", channels, config.qk_rope_head_dim, "bfloat16"
    )
    stored = jax.eval_shape(lambda: stored_as.zeros(2, batch, max(capacity, 1)))

    def run(queries, recent, sink, stored, layer, start):
        table = EntryTable(stored, layer, stored_as) if ratio else None
        return dense_attention.attend(
            *(queries, recent, sink, start, start + tokens),
            window=window,
            entries=table,
            ratio=ratio,
        )

    def gradients(*arguments):
        y, pull = jax.vjp(lambda *x: run(*x, *arguments[4:]), *arguments[:4])
        return pull(y)

    arguments = (
        _S((batch, tokens, heads, channels), jnp.bfloat16),
        _S((batch, window + tokens, channels), jnp.bfloat16),
        _S((heads,), jnp.float32),
        stored,
        _S((), jnp.int32),
        _S((batch,), jnp.int32),
    )
    block = min(entries_tpu.BLOCK, round_up(max(capacity, 1), entries_tpu.ALIGNMENT))
    blocks, whole = ceil_div(capacity, block), first // ratio // block if ratio else 0
    moved = batch * (
        2 * 2 * tokens * heads * channels
        + 2 * (window + tokens) * channels
        + capacity * stored_as.bytes_per_entry
    )
    flops = batch * 4 * channels * heads * keys
    rounds, assumes = (), ""
    if ratio and tokens == 1:
        # A block is attended to as it is loaded; the second loop awaits what nobody needs.
        rounds = (blocks, 0)
        assumes = f"every sequence at {context:,} tokens: {blocks} blocks of {block} entries"
    elif ratio:
        tile = pallas_tpu.TILE_ROWS // heads
        tiles = ceil_div(tokens, tile)
        halves = min(tiles, 2)  # each decodes its blocks in its first tile
        blind = (ratio - 1) // tile if first == 0 else 0  # tiles before an entry is complete
        rounds = (blocks * halves / tiles, whole, (blocks - whole) * (1 - blind / tiles))
        assumes = f"positions {first:,} to {context:,}: {whole} of {blocks} blocks without mask"
    kernels = (
        Kernel("dense_attention", (), flops, moved, rounds=rounds, goal=goal, assumes=assumes),
    )
    if backward:
        tile = pallas_tpu_backward.TILE_ROWS // heads
        tiles, steps = ceil_div(tokens, tile), ceil_div(window + tokens, tile)
        seeing = tiles - (ratio - 1) // tile
        kernels += (
            Kernel(
                "dense_attention_backward",
                (),
                flops * 5 // 2,  # five products where the forward pass has two
                2 * moved,
                rounds=(blocks / steps, blocks * seeing / steps),
                assumes=f"{seeing} of {tiles} tiles see the {blocks} block(s) of entries",
            ),
        )
    return Case("dense_attention", model, shape, gradients if backward else run, arguments, kernels)


def _sparse_attention(model: str, config: ModelConfig) -> list[Case]:
    """CSA layers. FLOPs: 4 · channels · (window + selected) per query head.

    The rows of a product are the heads of one token, since each has its own entries: where a
    matrix unit is wider, the rest of it idles, whichever operand stays in the unit.
    """
    from v4jax.kernels import sparse_attention
    from v4jax.kernels.table import EntryTable
    from v4jax.quant import EntryFormat

    heads, channels, window = config.num_attention_heads, config.head_dim, config.sliding_window
    count, capacity = config.index_topk, CONTEXT // 4
    stored_as = EntryFormat("fp8", channels, config.qk_rope_head_dim, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, selected):
        table = EntryTable(stored, layer, stored_as)
        return sparse_attention.attend(
            queries, recent, sink, start, window=window, entries=table, selected=selected
        )

    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 16", 16, 1)):
        arguments = (
            _S((batch, tokens, heads, channels), jnp.bfloat16),
            _S((batch, window + tokens, channels), jnp.bfloat16),
            _S((heads,), jnp.float32),
            jax.eval_shape(lambda batch=batch: stored_as.zeros(2, batch, capacity)),
            _S((), jnp.int32),
            _S((batch,), jnp.int32),
            _S((batch, tokens, count), jnp.int32),
        )
        queries = batch * tokens
        kernel = Kernel(
            "sparse_attention",
            flops=queries * heads * 4 * channels * (window + count),
            moved_bytes=queries * 2 * channels * (2 * heads + count),
            rows=heads,
            goal_of_bound=0.60 if shape == "prefill" else None,
        )
        cases.append(Case("sparse_attention", model, shape, run, arguments, (kernel,)))
    return cases


def _indexer(model: str, config: ModelConfig) -> list[Case]:
    """Scores and selection in one kernel. FLOPs: 2 · heads · channels per query and entry."""
    from v4jax.kernels import indexer
    from v4jax.kernels.indexer import pallas_tpu
    from v4jax.kernels.table import EntryTable
    from v4jax.quant import EntryFormat

    heads, channels = config.index_n_heads, config.index_head_dim
    ratio, count = 4, config.index_topk
    capacity = CONTEXT // ratio
    stored_as = EntryFormat("fp4", channels, config.qk_rope_head_dim, "bfloat16")

    def run(queries, weights, stored, layer, start, end):
        table = EntryTable(stored, layer, stored_as)
        return indexer.select(queries, weights, table, start, end, ratio=ratio, count=count)

    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 16", 16, 1)):
        arguments = (
            _S((batch, tokens, heads, channels), jnp.bfloat16),
            _S((batch, tokens, heads), jnp.bfloat16),
            jax.eval_shape(lambda batch=batch: stored_as.zeros(2, batch, capacity)),
            _S((), jnp.int32),
            _S((batch,), jnp.int32),
            _S((batch,), jnp.int32),
        )
        seen = sum((p + 1) // ratio for p in range(CONTEXT - tokens, CONTEXT))
        blocks = pallas_tpu.FEW if tokens <= pallas_tpu.FEW_TOKENS else pallas_tpu.MANY
        steps = ceil_div(capacity, blocks.entries)
        counted = _SELECTION_ROUNDS.get((count, tokens == 1))
        options = {}
        if counted is not None:
            refreshes, *rounds = counted
            options = {
                "rounds": tuple(rounds),
                "visits": {(2, 13): refreshes / steps, (14, len(rounds) - 1): 1 / steps},
                "entered": {"0.0": 1 / (batch * ceil_div(tokens, pallas_tpu.LANES) * steps)},
                "assumes": f"random scores: {refreshes} refreshes in {steps} blocks",
            }
        kernel = Kernel(
            "indexer_select",
            depth=channels,
            flops=batch * seen * 2 * heads * channels,
            moved_bytes=batch
            * (capacity * stored_as.bytes_per_entry + tokens * (2 * heads * channels + 4 * count)),
            grid=(steps,),
            **options,
        )
        cases.append(Case("indexer", model, shape, run, arguments, (kernel,)))
    return cases


# The first loop empties all candidates once, at the start.
# (entries to select, one query a program) → refreshes, then the rounds of each loop each time it is
# entered, in program order: chunks sifted (2 loops), refresh (12), write. Counted on random scores
# by `python -m tests.benchmarks.count_rounds`; count again when the kernel's loops change.
_SELECTION_ROUNDS = {
    (512, False): (
        *(7, 3.205, 3.238, 20, 20, 20, 13.57, 19.01, 20, 20, 13.29, 18.67, 84, 10, 84),
        *(92, 92, 92, 92, 7, 92),
    ),
}


def _compressor(model: str, config: ModelConfig) -> list[Case]:
    """Tokens to pooled entries. FLOPs: 2 · hidden · 2 · columns per token, values and gates."""
    from v4jax.kernels import compressor

    hidden, cases = config.hidden_size, []
    for shape, ratio, channels in (
        ("prefill CSA", 4, config.head_dim),
        ("prefill index keys", 4, config.index_head_dim),
        ("prefill HCA", 128, config.head_dim),
    ):
        overlaps = ratio == 4
        columns = channels * (1 + overlaps)
        arguments = (
            _S((1, CHUNK, hidden), jnp.bfloat16),
            _S((columns, hidden), jnp.bfloat16),
            _S((columns, hidden), jnp.bfloat16),
            _S((ratio, columns), jnp.float32),
            _S((2, 1, ratio, columns), jnp.float32),
            _S((1,), jnp.int32),
        )
        kernel = Kernel(
            "compressor",
            flops=CHUNK * 4 * hidden * columns,
            moved_bytes=_bytes(arguments) + 4 * CHUNK // ratio * channels,
        )
        run = functools.partial(compressor.compress, overlaps=overlaps)
        cases.append(Case("compressor", model, shape, run, arguments, (kernel,)))
    return cases


def _hyper_connections(model: str, config: ModelConfig) -> list[Case]:
    """One site's output merged, the next site's input collapsed: bound by memory.

    FLOPs: the projection alone, 2 · streams · hidden · outputs per token.
    """
    from v4jax.kernels import hyper_connections
    from v4jax.kernels.hyper_connections import Mix

    n, width = config.hc_mult, config.hidden_size
    outputs = (2 + n) * n
    options = {
        "norm_eps": config.rms_norm_eps,
        "eps": config.hc_eps,
        "iterations": config.hc_sinkhorn_iters,
    }
    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 64", 64, 1)):
        arguments = (
            _S((batch, tokens, width), jnp.bfloat16),
            _S((batch, tokens, n, width), jnp.bfloat16),
            Mix(_S((batch, tokens, n), jnp.float32), _S((batch, tokens, n, n), jnp.float32)),
            _S((outputs, n * width), jnp.float32),
            _S((outputs,), jnp.float32),
            _S((3,), jnp.float32),
        )
        streams = 2 * batch * tokens * n * width
        kernel = Kernel(
            "hyper_connections",
            flops=batch * tokens * 2 * n * width * outputs,
            moved_bytes=_bytes(arguments) + streams + streams // n,
        )
        run = functools.partial(hyper_connections.expand_mix, **options)
        cases.append(Case("hyper_connections", model, shape, run, arguments, (kernel,)))
    return cases


_BUILDERS = (
    _indexer,
    _sparse_attention,
    _dense_attention,
    _compressor,
    _hyper_connections,
    _grouped_matmul,
    _scaled_matmul,
)
