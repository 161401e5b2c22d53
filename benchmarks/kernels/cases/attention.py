"""Cases of attention: the indexer, sparse attention (CSA), dense attention (HCA, window layers)."""

import jax
import jax.numpy as jnp

from benchmarks.kernels.cases.case import CHUNK, CONTEXT, Case, Kernel, spec
from v4jax.config.model import ModelConfig
from v4jax.kernels import Target
from v4jax.shapes import ceil_div, round_up


def dense_attention_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
    """HCA and window layers. FLOPs: 4 · channels per query head and key it sees."""
    ratio = 128
    return [
        _dense(model, config, target, "prefill", 1, CHUNK, CONTEXT, ratio, goal=0.65),
        _dense(model, config, target, "prefill window layer", 1, CHUNK, CONTEXT, 0),
        _dense(model, config, target, "decode 16", 16, 1, CONTEXT, ratio),
        _dense(model, config, target, "training 8192", 1, 8192, 8192, ratio, backward=True),
    ]


def _dense(
    model, config, target, shape, batch, tokens, context, ratio, goal=None, backward=False
) -> Case:
    from v4jax.kernels import attention
    from v4jax.kernels.attention import dense_backward_tpu, dense_tpu, entries_tpu
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
        return attention.attend_dense(
            *(queries, recent, sink, start, start + tokens),
            window=window,
            entries=table,
            ratio=ratio,
            target=target,
        )

    def gradients(*arguments):
        y, pull = jax.vjp(lambda *x: run(*x, *arguments[4:]), *arguments[:4])
        return pull(y)

    arguments = (
        spec((batch, tokens, heads, channels), jnp.bfloat16),
        spec((batch, window + tokens, channels), jnp.bfloat16),
        spec((heads,), jnp.float32),
        stored,
        spec((), jnp.int32),
        spec((batch,), jnp.int32),
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
        # A block is attended to as it is loaded; the second loop waits for nothing.
        rounds = (blocks, 0)
        assumes = f"every sequence at {context:,} tokens: {blocks} blocks of {block} entries"
    elif ratio:
        tile = dense_tpu.TILE_ROWS // heads
        tiles = ceil_div(tokens, tile)
        halves = min(tiles, 2)  # parts of the grid; each decodes its blocks in its first tile
        blind = (ratio - 1) // tile if first == 0 else 0  # tiles before an entry is complete
        rounds = (blocks * halves / tiles, whole, (blocks - whole) * (1 - blind / tiles))
        assumes = f"positions {first:,} to {context:,}: {whole} of {blocks} blocks without mask"
    kernels = (
        Kernel("dense_attention", (), flops, moved, rounds=rounds, goal=goal, assumes=assumes),
    )
    if backward:
        tile = dense_backward_tpu.TILE_ROWS // heads
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


def sparse_attention_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
    """CSA layers. FLOPs: 4 · channels · (window + selected) per query head.

    The rows of a product are the heads of one token, because every token has its own entries. Where
    a matrix unit is wider, the rest of it idles, whichever operand stays in the unit.
    """
    from v4jax.kernels import attention
    from v4jax.kernels.attention import rows_tpu
    from v4jax.kernels.table import EntryTable
    from v4jax.kernels.tpu import LANES
    from v4jax.quant import EntryFormat

    heads, channels, window = config.num_attention_heads, config.head_dim, config.sliding_window
    count, capacity = config.index_topk, CONTEXT // 4
    stored_as = EntryFormat("fp8", channels, config.qk_rope_head_dim, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, selected):
        table = EntryTable(stored, layer, stored_as)
        options = {"window": window, "entries": table, "selected": selected}
        return attention.attend_sparse(queries, recent, sink, start, **options, target=target)[0]

    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 16", 16, 1)):
        arguments = (
            spec((batch, tokens, heads, channels), jnp.bfloat16),
            spec((batch, window + tokens, channels), jnp.bfloat16),
            spec((heads,), jnp.float32),
            jax.eval_shape(lambda batch=batch: stored_as.zeros(2, batch, capacity)),
            spec((), jnp.int32),
            spec((batch,), jnp.int32),
            spec((batch, tokens, count), jnp.int32),
        )
        queries = batch * tokens
        fetched = count * 2 * channels
        if tokens == 1:  # with its neighbours: see `sparse_decode_tpu`
            fetched = count * LANES * stored_as.bytes_per_entry
        kernel = Kernel(
            "sparse_attention",
            flops=queries * heads * 4 * channels * (window + count),
            moved_bytes=queries * (2 * channels * 2 * heads + fetched),
            rows=heads,
            goal_of_bound=0.60 if shape == "prefill" else None,
            **(_random_selection(arguments[0], window, count) if tokens > 1 else {}),
        )
        rows = Kernel(  # the entries in use, decoded so that one row can be fetched alone
            "sparse_attention_rows",
            flops=0,
            moved_bytes=batch * capacity * (stored_as.bytes_per_entry + 2 * channels),
            grid=(capacity // rows_tpu.BLOCK,),
        )
        kernels = (rows, kernel)
        if tokens > 1:
            kernels += (_union_sort(arguments[0], window, count),)
        cases.append(Case("sparse_attention", model, shape, run, arguments, kernels))
    return cases


def _union_sort(queries, window: int, count: int) -> Kernel:
    """Describes the sort of a group's selections: two in a call, a column for each group."""
    from v4jax.kernels.attention import sort_tpu, sparse_prefill_tpu
    from v4jax.kernels.tpu import LANES

    plan = sparse_prefill_tpu.make_plan(queries.shape, window, count)
    rows = sort_tpu.padded_rows(plan.members * count)
    # Stage s = 4, …, log2(rows) has s − 3 steps between registers.
    steps = range(1, rows.bit_length() - 1 - 3 + 1)
    return Kernel(
        "sparse_attention_sort",
        flops=0,
        moved_bytes=2 * 4 * rows * round_up(plan.tiles * plan.groups, LANES),
        rounds=(sum(steps) / len(steps),),
    )


def _random_selection(queries, window: int, count: int) -> dict:
    """Returns rounds where neighbours select nothing in common, which is the most work.

    Every block of a group's union is then full. While a block is computed, the rows of a later one
    are requested, except in the last rounds of a tile: two branches of one loop.
    """
    from v4jax.kernels.attention import sparse_prefill_tpu

    plan = sparse_prefill_tpu.make_plan(queries.shape, window, count)
    blocks = plan.places // sparse_prefill_tpu.BLOCK
    last = sparse_prefill_tpu.DEPTH / (plan.groups * blocks)
    return {
        "rounds": (blocks,),
        "entered": {"0.3.0?0": 1 - last, "0.3.0?1": last},
        "assumes": f"random selections: {plan.members} neighbours share nothing, {blocks} blocks "
        "for each group of them; what they do share makes it faster",
    }


def indexer_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
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
        options = {"ratio": ratio, "count": count, "target": target}
        return indexer.select(queries, weights, table, start, end, **options)

    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 16", 16, 1)):
        arguments = (
            spec((batch, tokens, heads, channels), jnp.bfloat16),
            spec((batch, tokens, heads), jnp.bfloat16),
            jax.eval_shape(lambda batch=batch: stored_as.zeros(2, batch, capacity)),
            spec((), jnp.int32),
            spec((batch,), jnp.int32),
            spec((batch,), jnp.int32),
        )
        seen = sum((p + 1) // ratio for p in range(CONTEXT - tokens, CONTEXT))
        blocks = pallas_tpu.FEW if tokens <= pallas_tpu.FEW_TOKENS else pallas_tpu.MANY
        steps = ceil_div(capacity, blocks.entries)
        counted = _SELECTION_ROUNDS.get((count, tokens == 1))
        options = {}
        if counted is not None:
            chunks, refreshes, *rounds = counted
            refresh, write = (chunks, chunks + 11), (chunks + 12, len(rounds) - 1)
            options = {
                "rounds": tuple(rounds),
                "visits": {refresh: refreshes / steps, write: 1 / steps},
                "entered": {"0.0": 1 / steps},  # candidates are emptied before each program
                "assumes": f"random scores: {refreshes} refreshes in {steps} blocks",
            }
        kernel = Kernel(
            "indexer_select",
            depth=channels,
            goal_inner=0.5 if shape == "prefill" else None,
            # What is not scoring may cost half as much as scoring.
            goal_inner_part=2 / 3 if shape == "prefill" else None,
            flops=batch * seen * 2 * heads * channels,
            moved_bytes=batch
            * (capacity * stored_as.bytes_per_entry + tokens * (2 * heads * channels + 4 * count)),
            grid=(steps,),
            **options,
        )
        cases.append(Case("indexer", model, shape, run, arguments, (kernel,)))
    return cases


# Rounds by (entries to select, whether a program has one query): chunks of a block, refreshes in a
# million tokens, then the rounds of each loop each time it is entered, in program order: one loop
# for each chunk, 12 for a refresh, the others for the last write. `python -m
# benchmarks.kernels.count_rounds` counted them on random scores in random order; count again when
# the kernel's loops change.
_SELECTION_ROUNDS = {
    (512, False): (
        *(2, 7),
        *(3.244, 3.227),
        *(20, 20, 20, 8.143, 19.12, 20, 20, 0, 0, 84, 10, 84),
        *(91, 91, 91, 91, 7, 91),
    ),
    (1024, False): (
        *(2, 9),
        *(3.877, 3.895),
        *(23.11, 23.11, 23.11, 9.111, 22.65, 23.11, 23.11, 0, 0, 96.44, 10, 96.44),
        *(159, 159, 159, 159, 8, 159),
    ),
    (512, True): (
        *(1, 1),
        *(0,),
        *(7, 7, 7, 16, 7, 7, 7, 0, 0, 32, 8, 32),
        *(3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 3),
    ),
    (1024, True): (
        *(1, 1),
        *(0,),
        *(7, 7, 7, 13, 7, 7, 7, 0, 0, 32, 8, 32),
        *(4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2, 4),
    ),
}
