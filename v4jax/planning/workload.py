"""What is planned: a model, a slice, a mesh over its devices, and what runs there."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jax.sharding import AbstractMesh, AxisType

from v4jax.config import ModelConfig, Numerics
from v4jax.costs.chips import Topology
from v4jax.errors import ConfigError
from v4jax.kernels import Target
from v4jax.parallel.axes import MESH_AXES, Tokens
from v4jax.parallel.context_parallel import token_unit
from v4jax.parallel.layout import Layout
from v4jax.parallel.mesh import check_mesh, divisors

Regime = Literal["train", "prefill", "decode"]
TRAININGS = ("adamw", "muon", "lora")
_CHUNK = 1024  # tokens of a prefill chunk per device, unless asked otherwise
_LORA_RANK = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """The question of one plan. Build it with `build_workload`, which checks it.

    regime: what a step does. context: tokens of a sequence, prompt and answer together. batch:
    sequences of a step, over all devices. chunk: tokens of each sequence that one step reads (1 in
    decode, all in training). training: "adamw" or "muon" for all weights, "lora" for adapters.
    offload: what a training step keeps in the host's memory, as `train.offload`.
    """

    config: ModelConfig
    numerics: Numerics
    topology: Topology
    mesh: tuple[tuple[str, int], ...]
    regime: Regime
    context: int
    batch: int
    chunk: int
    training: str = "adamw"
    lora_rank: int = _LORA_RANK
    offload: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The mesh without devices, and how weights lie on it."""
        weights = "train" if self.regime == "train" else "serve"
        return Layout(abstract_mesh(dict(self.mesh)), weights)

    @property
    def target(self) -> Target:
        """The chips, as operations choose their implementation by them."""
        return Target(self.topology.chip.platform, self.topology.chip.device_kind)

    @property
    def tokens(self) -> Tokens:
        """Whether the tokens of a step are split over devices."""
        return "whole" if self.regime == "decode" else "split"

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis → devices along it."""
        return dict(self.mesh)

    @property
    def mesh_name(self) -> str:
        """The mesh as its flag says it."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh if size > 1) or "data=1"

    @property
    def storage(self) -> str:
        """How weights are kept: trained ones in bfloat16, frozen and served ones as released."""
        trains = self.regime == "train" and self.training != "lora"
        return "bfloat16" if trains else "released"

    @property
    def local_batch(self) -> int:
        """Sequences on one device."""
        return self.batch // self.parts("batch")

    @property
    def local_tokens(self) -> int:
        """Tokens of one sequence on one device in a step."""
        return self.chunk // self.parts("tokens")

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all devices."""
        return self.batch * self.chunk

    def parts(self, name: str) -> int:
        """Returns over how many devices an axis of a call's arrays is split."""
        return self.layout.size(self.layout.array_axes(name, self.tokens))

    def weight_parts(self, name: str) -> int:
        """Returns over how many devices an axis of the weights is split."""
        return self.layout.size(self.layout.weight_axes(name))

    def changed(self, **changes: Any) -> "Workload":
        """Returns the work with other values of some fields, checked; a mesh is axis → size."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"mesh": self.sizes} | changes
        if self.regime != "prefill" or fields["chunk"] > fields["context"]:
            fields["chunk"] = None
        return build_workload(fields.pop("config"), fields.pop("numerics"), **fields)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices: enough for shapes, specs and tracing."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def build_workload(
    config: ModelConfig,
    numerics: Numerics,
    *,
    topology: Topology,
    mesh: Mapping[str, int],
    regime: Regime,
    context: int,
    batch: int,
    chunk: int | None = None,
    training: str = "adamw",
    lora_rank: int = _LORA_RANK,
    offload: tuple[str, ...] = (),
) -> Workload:
    """Returns a checked `Workload`.

    Args:
      mesh: axis → size; axes left out have size 1.
      chunk: tokens of a sequence per prefill step; by default 1024 per device of the sequence.

    Raises:
      ConfigError: a size is out of range, or the mesh does not divide the model, the batch or the
        tokens; the message names what does.
    """
    sizes = {axis: mesh.get(axis, 1) for axis in MESH_AXES}
    product = math.prod(sizes.values())
    if product != topology.devices:
        named = " · ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
        raise ConfigError(
            f"mesh sizes must multiply to the {topology.devices} devices of {topology.name}, "
            f"got {named} = {product}{_devices_hint(topology)}"
        )
    if not 1 <= context <= config.max_position_embeddings:
        raise ConfigError(
            f"context must be 1 … max_position_embeddings = {config.max_position_embeddings}, "
            f"got {context}"
        )
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    check_mesh(abstract_mesh(sizes), config, "train" if regime == "train" else "serve")
    work = Workload(
        *(config, numerics, topology, tuple(sizes.items()), regime, context, batch),
        *(1, training, lora_rank, offload),
    )
    if batch % work.parts("batch"):
        raise ConfigError(
            f"mesh.data = {work.parts('batch')} does not divide a batch of {batch}; sizes that "
            f"would do: {divisors(batch)}"
        )
    return dataclasses.replace(work, chunk=_choose_chunk(work, chunk))


def _devices_hint(topology: Topology) -> str:
    if topology.chip.devices == 1:
        return ""
    return f" (each of its {topology.chips} chips is {topology.chip.devices} devices)"


def _choose_chunk(work: Workload, chunk: int | None) -> int:
    """Returns the tokens of a sequence in one step; shares are whole windows (128 tokens)."""
    parts, unit = work.parts("tokens"), token_unit(work.config)
    if work.regime == "decode":
        return 1
    whole = work.context if work.regime == "train" or chunk is None else chunk
    if parts > 1 and whole % (parts * unit) and (work.regime == "train" or chunk is not None):
        fitting = [n for n in divisors(whole // unit) if whole % unit == 0] or [1]
        raise ConfigError(
            f"mesh.context · mesh.expert = {parts} does not divide {whole} tokens of a step in "
            f"whole windows of {unit}; sizes that would do: {fitting}"
        )
    if work.regime == "train":
        return work.context
    if chunk is not None:
        return chunk
    smallest = parts * unit if parts > 1 else 1
    return min(_CHUNK * parts, max(-(-work.context // smallest) * smallest, smallest))
