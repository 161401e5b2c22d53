"""`v4jax plan`: what fits, and what it costs, before a chip is rented."""

import dataclasses
import json
import os
from typing import Literal

from v4jax.config.inference import InferenceConfig
from v4jax.config.ranges import MOST_TOKENS, within
from v4jax.config.run import MeshConfig
from v4jax.errors import RequestError

SUMMARY = "says what fits on which chips and how fast it can be, without any chip"
USAGE = """
Counts the arrays of the abstract model and cache as the mesh splits them, traces the step as one
device runs them, and bounds the time of a step by the chip's published peaks. Allocates nothing.

  v4jax plan --model=v4_flash --topology=v6e-16 --mesh=expert=16 --context=1048576 --batch=4
  v4jax plan --model=v4_pro --topology=v6e-64 --mesh=expert=32,tensor=2 --regime=prefill --batch=1
  v4jax plan --model=v4_flash --topology=v5p:4x4x8 --mesh=data=8,expert=16 --regime=train
    --context=4096 --batch=128
  v4jax plan --model=v4_flash --topology=v6e-16 --batch=4 --compile
  v4jax plan --config=configs/inference/flash_v6e_16.py --topology=v6e-16
  v4jax plan --chips   the figures of every chip and their sources

Mesh axes are data, expert, context and tensor; v4jax/parallel/axes.py says what each splits.
v5p and tpu7x slices are named by TensorCores, two a chip: v5p-16 has 8 chips, as v5p:2x2x2.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax plan` is told.

    Attributes:
      config: Python file as batch takes it (configs/inference). Model, numerics and mesh come from
        it; its max_tokens is --context, its chunk_tokens is --chunk, and its questions_at_once is
        --batch in decode (in prefill, --batch is one document for each part along data). Flags
        replace its values.
      model: Checkpoint folder with config.json, hf://org/name, or the name of a packaged
        configuration. By default that of --config, else v4_flash.
      topology: Slice: v6e-16, v5p:2x2x4, tpu7x-8, h100-8. Required.
      slices: How many such slices, joined by the data-center network along the mesh axis data.
      mesh: Sizes of the mesh axes, such as data=2,expert=8; their product is the number of devices.
        By default all devices on expert.
      regime: decode: one token of every sequence; prefill: a chunk of every sequence; train: a
        step.
      context: Tokens of a sequence, prompt and answer together. By default 1048576.
      batch: Sequences, over all devices. By default 1.
      chunk: Prefill: tokens of a sequence that a step reads. By default 1024 per device.
      training: Train: which weights have gradients and optimizer state. lora keeps the base as
        released.
      lora_rank: Train: rank of the adapters.
      numerics: How the computation rounds. By default as batch chooses it, released for large
        models and float32 for small ones; in training bfloat16.
      json: Print JSON instead of text.
      compile: Also compile the step with the TPU compiler (libtpu), which takes minutes, and print
        the compiler's figures beside the plan's.
      chips: Print the table of chips.
    """

    config: str | None = None
    model: str | None = None
    topology: str | None = None
    slices: int = within(1, 1 << 12, 1)
    mesh: MeshConfig | None = None
    regime: Literal["decode", "prefill", "train"] = "decode"
    context: int | None = within(1, MOST_TOKENS, None)
    batch: int | None = within(1, 1 << 24, None)
    chunk: int | None = within(1, MOST_TOKENS, None)
    training: Literal["adamw", "muon", "lora"] = "adamw"
    lora_rank: int = within(1, 1 << 16, 16)
    numerics: Literal["float32", "bfloat16", "released"] | None = None
    json: bool = False
    compile: bool = False
    chips: bool = False


def run(flags: Flags) -> int:
    """Prints the plan; exit status 1 where it does not fit."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: leave accelerators alone
    return _print_chips(flags) if flags.chips else _print_plan(_complete(flags))


def _complete(flags: Flags) -> Flags:
    """Returns the flags with what --config and the defaults say where they are silent."""
    if not flags.topology:
        raise RequestError("--topology is required; --help shows examples")
    trains = flags.regime == "train"
    defaults = {"model": "v4_flash", "context": 1 << 20, "batch": 1}
    if trains:
        defaults["numerics"] = "bfloat16"
    if flags.config:
        from v4jax.config.loading import load_run

        if trains:
            raise RequestError("--config is of an inference, which --regime=train does not plan")
        config = load_run(InferenceConfig, flags.config)
        mesh = flags.mesh or config.mesh
        documents = mesh.data if mesh else 1
        defaults |= {
            "model": config.model,
            "numerics": config.numerics,
            "mesh": config.mesh,
            "context": config.max_tokens or defaults["context"],
            "chunk": config.chunk_tokens,
            "batch": config.questions_at_once if flags.regime == "decode" else documents,
        }
    silent = {name for name in defaults if getattr(flags, name) is None}
    return dataclasses.replace(flags, **{name: defaults[name] for name in silent})


def _print_plan(flags: Flags) -> int:
    from v4jax.config import choose_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.costs import chips
    from v4jax.planning import report, workload

    topology = chips.parse_topology(flags.topology, flags.slices)
    config = load_model_config(flags.model)
    work = workload.build_workload(
        config,
        choose_numerics(flags.numerics, config),
        topology=topology,
        mesh=(flags.mesh or MeshConfig(expert=topology.devices)).sizes,
        regime=flags.regime,
        context=flags.context,
        batch=flags.batch,
        chunk=flags.chunk,
        training=flags.training,
        lora_rank=flags.lora_rank,
    )
    plan = report.make_plan(flags.model, work)
    data, text = report.as_data(plan), report.as_text(plan)
    if flags.compile:
        from v4jax.planning import compile as compiler

        compiled = compiler.compile_step(work)
        data["compiled"] = dataclasses.asdict(compiled) | {"total": compiled.total}
        text += "\n\n" + compiler.as_text(compiled, plan.held)
    print(json.dumps(data, indent=2) if flags.json else text)
    return 0 if plan.fits else 1


def _print_chips(flags: Flags) -> int:
    from v4jax.costs import chips

    if flags.json:
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
