"""`v4jax plan`: what fits, and what it costs, before a chip is rented."""

import dataclasses
import json
import os
from typing import Any

SUMMARY = "says what fits on which chips and how fast it can be, without any chip"
USAGE = """
Counts the arrays of the abstract model and cache as the mesh splits them, traces the layers as one
device runs them, and bounds the time of a step by the chip's published peaks. Allocates nothing.

  v4jax plan --model=v4_flash --topology=v6e-16 --mesh=expert=16 --context=1048576 --batch=4
  v4jax plan --model=v4_pro --topology=v6e-64 --mesh=expert=32,tensor=2 --regime=prefill --batch=1
  v4jax plan --model=v4_flash --topology=v5p:4x4x8 --mesh=data=8,expert=16 --regime=train
    --context=4096 --batch=128
  v4jax plan --model=v4_flash --topology=v6e-16 --batch=4 --compile
  v4jax plan --chips   the figures of every chip and their sources

Mesh axes are data, expert, context and tensor; what each splits stands in v4jax/parallel/axes.py.
v5p and tpu7x slices are named by TensorCores, two a chip: v5p-16 has 8 chips, as v5p:2x2x2.
"""


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "model",
        "v4_flash",
        "Checkpoint folder with config.json, or the name of a packaged configuration.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "topology", None, "Slice: v6e-16, v5p:2x2x4, tpu7x-8, h100-8. Required.", flag_values=values
    )
    flags.DEFINE_integer(
        "slices",
        1,
        "How many such slices, joined by the data-center network along the mesh axis data.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mesh",
        None,
        "Sizes of the mesh axes, such as data=2,expert=8; their product is the number of devices. "
        "By default all devices on expert.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "regime",
        "decode",
        ("decode", "prefill", "train"),
        "decode: one token of every sequence; prefill: a chunk of every sequence; train: a step.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "context", 1048576, "Tokens of a sequence, prompt and answer together.", flag_values=values
    )
    flags.DEFINE_integer("batch", 1, "Sequences, over all devices.", flag_values=values)
    flags.DEFINE_integer(
        "chunk",
        None,
        "Prefill: tokens of a sequence that a step reads. By default 1024 per device.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "training",
        "adamw",
        ("adamw", "muon", "lora"),
        "Train: what has gradients and optimizer state. lora keeps the base as released.",
        flag_values=values,
    )
    flags.DEFINE_integer("lora_rank", 16, "Train: rank of the adapters.", flag_values=values)
    flags.DEFINE_enum(
        "numerics",
        None,
        ("float32", "bfloat16", "released"),
        "How the computation rounds. By default released, and bfloat16 in training.",
        flag_values=values,
    )
    flags.DEFINE_boolean("json", False, "Print JSON instead of text.", flag_values=values)
    flags.DEFINE_boolean(
        "compile",
        False,
        "Also compile the step with the TPU compiler (libtpu), which takes minutes, and print what "
        "it says beside the plan.",
        flag_values=values,
    )
    flags.DEFINE_boolean("chips", False, "Print the table of chips.", flag_values=values)


def run(values: Any, positional: list[str]) -> int:
    """Prints the plan; exit status 1 where it does not fit."""
    from v4jax.errors import RequestError

    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; plan takes flags only")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: leave accelerators alone
    if values.chips:
        return _print_chips(values)
    return _print_plan(values)


def _print_plan(values: Any) -> int:
    from v4jax.cli import model_flags
    from v4jax.config import get_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.costs import chips
    from v4jax.parallel.mesh import parse_mesh
    from v4jax.planning import report, workload

    model_flags.require(values, "model", "topology")
    topology = chips.parse_topology(values.topology, values.slices)
    mesh = parse_mesh(values.mesh or f"expert={topology.devices}")
    trains = values.regime == "train"
    work = workload.build_workload(
        load_model_config(values.model),
        get_numerics(values.numerics or ("bfloat16" if trains else "released")),
        topology=topology,
        mesh=mesh,
        regime=values.regime,
        context=values.context,
        batch=values.batch,
        chunk=values.chunk,
        training=values.training,
        lora_rank=values.lora_rank,
    )
    plan = report.make_plan(values.model, work)
    data, text = report.as_data(plan), report.as_text(plan)
    if values.compile:
        from v4jax.planning import compile as compiler

        compiled = compiler.compile_step(work, _programs()[work.regime])
        data["compiled"] = dataclasses.asdict(compiled) | {"total": compiled.total}
        text += "\n\n" + compiler.as_text(compiled, plan.held)
    print(json.dumps(data, indent=2) if values.json else text)
    return 0 if plan.fits else 1


def _programs() -> dict[str, Any]:
    """Returns what builds the program of each regime; planning knows no training."""
    from v4jax.planning.compile import serving_program

    return {"decode": serving_program, "prefill": serving_program, "train": training_program}


def training_program(work: Any, layout: Any) -> Any:
    """Returns the step of a planned workload: that of a run with the defaults of `TrainConfig`."""
    from v4jax.config.data import DataConfig, SourceConfig
    from v4jax.config.run import LoraConfig, OptimizerConfig, TrainConfig
    from v4jax.training.program import abstract_program

    adapts = work.training == "lora"
    planned = SourceConfig("text", paths=("planned",))
    config = TrainConfig(
        model="planned",
        output="planned",
        data=DataConfig(sources=(planned,), length=work.context, batch=work.batch),
        numerics=work.numerics.name,
        optimizer=OptimizerConfig(kind="adamw" if adapts else work.training),
        lora=LoraConfig(rank=work.lora_rank) if adapts else None,
        offload=work.offload,
    )
    return abstract_program(config, work.config, layout, work.storage)


def _print_chips(values: Any) -> int:
    from v4jax.costs import chips

    if values.json:
        rows = {name: dataclasses.asdict(chip) for name, chip in chips.CHIPS.items()}
        print(json.dumps(rows, indent=2))
        return 0
    gib, giga, tera = chips.GIB, chips.GB, chips.TERA
    print("per chip    devices  usable GiB    bf16    fp8     HBM  links  network  source")
    print("                     a device      TFLOP/s          GB/s one way, both GB/s")
    for chip in chips.CHIPS.values():
        print(
            f"{chip.name:<12}{chip.devices:>7}{chip.device_limit_bytes / gib:>12.2f}"
            f"{chip.bf16_flops_per_second / tera:>8.0f}{chip.fp8_flops_per_second / tera:>7.0f}"
            f"{chip.hbm_bytes_per_second / giga:>8.0f}{chip.link_bytes_per_second / giga:>7.0f}"
            f"{chip.network_bytes_per_second / giga:>9.1f}  {chip.source}"
        )
    return 0
