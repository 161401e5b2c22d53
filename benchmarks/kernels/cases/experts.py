"""Cases of products with stored weights: routed experts and linear layers."""

import functools
import math

import jax
import jax.numpy as jnp

from benchmarks.kernels.cases.case import CHUNK, Case, Kernel, count_bytes, spec, stored_weight
from v4jax.config.model import ModelConfig
from v4jax.kernels import Target
from v4jax.shapes import ceil_div, round_up


def grouped_matmul_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
    """Routed experts: one kernel for gate and up, one for down; in training their gradients."""
    experts = config.n_routed_experts
    share, pod = experts // 8, experts // 16
    sizes = model, config, target
    return [
        _experts(*sizes, "prefill fp4", CHUNK, share, "fp4", goal=0.65),
        _experts(*sizes, "prefill bfloat16", CHUNK, share, "bfloat16", goal=0.65),
        _experts(*sizes, "prefill fp8", CHUNK, share, "fp8"),
        # 4,096 tokens on each of 16 chips, which hold a sixteenth of the experts each.
        _experts(
            model, config, target, "prefill on 16 chips fp4", 2 * CHUNK, pod, "fp4", goal=0.65
        ),
        _experts(
            model, config, target, "prefill on 16 chips bf16", 2 * CHUNK, pod, "bfloat16", goal=0.65
        ),
        _experts(*sizes, "prefill all experts", CHUNK, experts, "fp4"),
        _experts(*sizes, "decode 16", 16, experts, "fp4"),
        _experts_backward(*sizes, "training bfloat16", CHUNK, share),
    ]


def _experts(model, config, target, shape, tokens, experts, kind, goal=None) -> Case:
    """`tokens` times top-k assignments, spread evenly over the experts held here.

    FLOPs: assignments · 2 · hidden · 2 · inner for gate and up, half of it for down.
    """
    from v4jax.kernels.grouped_matmul import pallas_tpu
    from v4jax.kernels.tpu import chip_of

    chip = chip_of(target)
    width, inner = config.hidden_size, config.moe_intermediate_size
    arguments = _expert_arguments(config, tokens, experts, kind)
    tile = pallas_tpu.choose_tile(chip, tokens * config.num_experts_per_tok, experts)
    assignments, used, tiles, assumes = _even_load(config, tokens, experts, tile)
    # The first loops expand weights, once for each expert and block of outputs.
    expansions = (0, 0) if kind == "bfloat16" else (2, 1)
    entered = [
        {f"0.{i}": used / tiles for i in range(loops)}
        | _visits(loops, assignments // used, tile, pallas_tpu.linear, chip)
        for loops in expansions
    ]
    options = {"grid": (tiles,), "goal": goal, "assumes": assumes}
    gate_up, down = (used / experts * count_bytes(weight) for weight in arguments[3:])
    rows = 2 * assignments * (width + inner)
    kernels = (
        Kernel(
            f"grouped_matmul_gated_{kind}",
            flops=assignments * 4 * width * inner,
            moved_bytes=gate_up + rows,
            entered=entered[0],
            **options,
        ),
        Kernel(
            f"scaled_matmul_{kind}",
            flops=assignments * 2 * width * inner,
            moved_bytes=down + rows,
            entered=entered[1],
            **options,
        ),
    )
    run = functools.partial(_run_experts, limit=config.swiglu_limit, target=target)
    return Case("grouped_matmul", model, shape, run, arguments, kernels)


def _visits(first: int, load: int, tile: int, linear, chip) -> dict[str, float]:
    """Returns loop → share of an expert's tiles that it multiplies.

    Where matrix units are wide, the kernels have a loop for every number of rows a tile may use.
    """
    if not linear.varies(chip, tile):
        return {}
    tiles, numbers = ceil_div(load, tile), range(linear.ROW_STEP, tile + 1, linear.ROW_STEP)
    last = round_up(load - (tiles - 1) * tile, linear.ROW_STEP)
    loads = [tile] * (tiles - 1) + [last]
    return {f"0.{first + i}": loads.count(rows) / tiles for i, rows in enumerate(numbers)}


def _run_experts(x, ids, routing, gate_up, down, **options):
    from v4jax.kernels import grouped_matmul

    return grouped_matmul.apply_experts(x, ids, routing, gate_up, down, **options)


def _experts_backward(model, config, target, shape, tokens, experts) -> Case:
    """All gradients. FLOPs, in units of assignments · 2 · hidden · inner:

    gate, up and the gradient of the inner activations 3, of the inputs 2, of the weights 2 and 1.
    """
    from v4jax.kernels.grouped_matmul import pallas_tpu
    from v4jax.kernels.tpu import chip_of

    chip = chip_of(target)
    width, inner = config.hidden_size, config.moe_intermediate_size
    arguments = _expert_arguments(config, tokens, experts, "bfloat16")
    tile = pallas_tpu.choose_tile(chip, tokens * config.num_experts_per_tok, experts)
    assignments, used, forward_tiles, _ = _even_load(config, tokens, experts, tile)
    entered = _visits(0, assignments // used, tile, pallas_tpu.linear, chip)
    tile = pallas_tpu.choose_backward_tile(assignments, experts)
    tiles, assumes = _even_load(config, tokens, experts, tile)[2:]
    unit = assignments * 2 * width * inner
    gate_up, down = map(count_bytes, arguments[3:])
    rows, inner_rows = 2 * assignments * width, 2 * assignments * inner
    options = {"grid": (tiles,), "assumes": assumes}

    def run(x, ids, routing, gate_up, down):
        def forward(*differentiable):
            x, routing, gate_up, down = differentiable
            options = {"limit": config.swiglu_limit, "target": target}
            return _run_experts(x, ids, routing, gate_up, down, **options)

        y, pull = jax.vjp(forward, x, routing, gate_up, down)
        return pull(y)

    kernels = (
        Kernel(
            "grouped_matmul_gated_bfloat16",
            flops=2 * unit,
            moved_bytes=gate_up + rows + inner_rows,
            **options | {"grid": (forward_tiles,), "entered": entered},
        ),
        Kernel(
            "scaled_matmul_bfloat16",
            flops=unit,
            moved_bytes=down + rows + inner_rows,
            **options | {"grid": (forward_tiles,), "entered": entered},
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
        spec((tokens, width), jnp.bfloat16),
        spec((tokens, chosen), jnp.int32),
        spec((tokens, chosen), jnp.float32),
        stored_weight((experts, 2, inner, width), kind),
        stored_weight((experts, width, inner), kind),
    )


def _even_load(config: ModelConfig, tokens: int, experts: int, tile: int):
    """Returns (assignments, experts with tokens, tiles in use, these facts as a sentence)."""
    assignments = tokens * config.num_experts_per_tok
    used = min(experts, assignments)
    tiles = used * ceil_div(assignments // used, tile)
    facts = f"{assignments} rows, evenly over {used} experts: {tiles} tiles of {tile} rows"
    return assignments, used, tiles, facts


def scaled_matmul_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
    """The widest linear layer in FP8, queries up. FLOPs: tokens · 2 · rows · columns.

    Then stored weights that are expanded whole, as training's gradients and adapters need them: an
    eighth of the experts, and queries up. The result needs no product, and no FLOPs are stated.
    """
    from v4jax.kernels import scaled_matmul
    from v4jax.kernels.scaled_matmul import pallas_tpu

    rows, columns = config.num_attention_heads * config.head_dim, config.q_lora_rank
    weight = stored_weight((rows, columns), "fp8")
    cases = []
    for shape, tokens in (("prefill", CHUNK), ("decode 64", 64)):
        tiles = ceil_div(tokens, pallas_tpu.LARGEST_TILE)
        kernel = Kernel(
            "scaled_matmul_fp8",
            flops=tokens * 2 * rows * columns,
            moved_bytes=count_bytes(weight) + 2 * tokens * (rows + columns),
            grid=(tiles,),
            entered={"0.0": 1 / tiles},
        )
        arguments = spec((1, tokens, columns), jnp.bfloat16), weight
        run = functools.partial(scaled_matmul.matmul, target=target)
        cases.append(Case("scaled_matmul", model, shape, run, arguments, (kernel,)))
    share = config.n_routed_experts // 8
    experts = stored_weight((share, 2, config.moe_intermediate_size, config.hidden_size), "fp4")
    run = functools.partial(scaled_matmul.expand, dtype=jnp.bfloat16, target=target)
    for kind, stored in (("fp4", experts), ("fp8", weight)):
        moved = count_bytes(stored) + 2 * math.prod(stored.shape)
        kernel = Kernel(f"expand_{kind}", moved_bytes=moved)
        cases.append(Case("scaled_matmul", model, f"expansion {kind}", run, (stored,), (kernel,)))
    return cases
