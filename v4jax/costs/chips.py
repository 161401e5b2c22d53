"""Chips and slices: memory, rates and links, and the source of each figure.

Figures are per chip. A program sees devices: a tpu7x chip has two, every other chip one.
"""

import dataclasses
import math
import re

from v4jax.errors import ConfigError

GIB, GB, TERA = 2**30, 1e9, 1e12
_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
_FLAT |= {256: (16, 16)}
_CUBIC = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
_CUBIC |= {256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16)}
_NODES = {count: (count,) for count in (1, 2, 4, 8, *(8 * n for n in range(2, 129)))}
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of accelerator; sizes and rates are per chip, rates at their peak.

    device_kind: what JAX calls a device; longer names begin with it. devices: per chip, as JAX
    counts them. name_counts: how much a chip adds to the number in a slice's name (v5p-16 and
    tpu7x-16 count TensorCores: 8 chips). usable_bytes: what the compiler lets one device allocate;
    None where only the published size is known. link: bytes a chip sends over all its links to
    neighbours (ICI, NVLink), one way. network: the same over the data-center network. shapes:
    number of chips → the usual slice.
    """

    name: str
    platform: str
    device_kind: str
    devices: int
    name_counts: int
    hbm_bytes: float
    usable_bytes: float | None
    bf16_flops_per_second: float
    fp8_flops_per_second: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    shapes: dict[int, tuple[int, ...]] = dataclasses.field(compare=False)
    source: str

    @property
    def device_limit_bytes(self) -> float:
        """Bytes one device can hold: the compiler's limit where it is known."""
        return self.usable_bytes or self.hbm_bytes / self.devices

    @property
    def limit_source(self) -> str:
        """Where `device_limit_bytes` comes from, for reports."""
        return "compiler's limit" if self.usable_bytes else "published size"


_CLOUD = "docs.cloud.google.com/tpu/docs/"
_LIMIT = "; usable: the limit that libtpu 0.0.42 and 0.0.50 enforce"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            platform="tpu",
            device_kind="TPU v5 lite",
            devices=1,
            name_counts=1,
            hbm_bytes=16 * GIB,
            usable_bytes=15.75 * GIB,
            bf16_flops_per_second=197 * TERA,
            fp8_flops_per_second=197 * TERA,  # no FP8 unit: computed in bfloat16
            hbm_bytes_per_second=819 * GB,
            link_bytes_per_second=200 * GB,  # published both ways together: 400
            network_bytes_per_second=25 * GB / 8,  # 6.4 Tb/s a pod of 256
            shapes=_FLAT,
            source=_CLOUD + "v5e" + _LIMIT,
        ),
        Chip(
            name="v5p",
            platform="tpu",
            device_kind="TPU v5",
            devices=1,
            name_counts=2,
            hbm_bytes=96 * GIB,
            usable_bytes=95.7 * GIB,
            bf16_flops_per_second=459 * TERA,
            fp8_flops_per_second=459 * TERA,
            hbm_bytes_per_second=2765 * GB,
            link_bytes_per_second=600 * GB,  # published both ways together: 1200
            network_bytes_per_second=50 * GB / 8,
            shapes=_CUBIC,
            source=_CLOUD + "v5p" + _LIMIT,
        ),
        Chip(
            name="v6e",
            platform="tpu",
            device_kind="TPU v6 lite",
            devices=1,
            name_counts=1,
            hbm_bytes=32 * GIB,
            usable_bytes=31.2 * GIB,
            bf16_flops_per_second=918 * TERA,
            fp8_flops_per_second=918 * TERA,
            hbm_bytes_per_second=1638 * GB,
            link_bytes_per_second=400 * GB,  # published both ways together: 800
            network_bytes_per_second=100 * GB / 8,
            shapes=_FLAT,
            source=_CLOUD + "v6e and tpu7x (comparison)" + _LIMIT,
        ),
        Chip(
            name="tpu7x",
            platform="tpu",
            device_kind="TPU7x",
            devices=2,
            name_counts=2,
            hbm_bytes=192 * GIB,
            usable_bytes=94.7 * GIB,
            bf16_flops_per_second=2307 * TERA,
            fp8_flops_per_second=4614 * TERA,
            hbm_bytes_per_second=7380 * GB,
            link_bytes_per_second=600 * GB,  # published both ways together: 1200
            network_bytes_per_second=100 * GB / 8,
            shapes=_CUBIC,
            source=_CLOUD + "tpu7x" + _LIMIT,
        ),
        Chip(
            name="h100",
            platform="gpu",
            device_kind="NVIDIA H100",
            devices=1,
            name_counts=1,
            hbm_bytes=80 * GB,
            usable_bytes=None,
            bf16_flops_per_second=989.4 * TERA,
            fp8_flops_per_second=1978.9 * TERA,
            hbm_bytes_per_second=3350 * GB,
            link_bytes_per_second=450 * GB,  # published both ways together: 900
            network_bytes_per_second=400 * GB / 8,
            shapes=_NODES,
            source="NVIDIA H100 datasheet (SXM, without sparsity); one 400 Gb/s adapter per GPU",
        ),
        Chip(
            name="h200",
            platform="gpu",
            device_kind="NVIDIA H200",
            devices=1,
            name_counts=1,
            hbm_bytes=141 * GB,
            usable_bytes=None,
            bf16_flops_per_second=989.4 * TERA,
            fp8_flops_per_second=1978.9 * TERA,
            hbm_bytes_per_second=4800 * GB,
            link_bytes_per_second=450 * GB,
            network_bytes_per_second=400 * GB / 8,
            shapes=_NODES,
            source="NVIDIA H200 datasheet (SXM, without sparsity); one 400 Gb/s adapter per GPU",
        ),
    )
}


_OTHER_KINDS = {"TPU v5e": "v5e", "TPU v6": "v6e"}  # older and shorter names of devices


def peak_flops(device_kind: str) -> float | None:
    """Returns one device's bfloat16 peak per second, None for a kind without a published one."""
    kinds = {chip.device_kind: name for name, chip in CHIPS.items()} | _OTHER_KINDS
    for kind in sorted(kinds, key=len, reverse=True):  # "TPU v5 lite" before "TPU v5"
        if device_kind.startswith(kind):
            chip = CHIPS[kinds[kind]]
            return chip.bf16_flops_per_second / chip.devices
    return None


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips joined by fast links; several slices are joined by the network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Devices of all slices, as JAX counts them."""
        return self.chips * self.chip.devices

    @property
    def name(self) -> str:
        """The slice as the compiler names it, such as v5p:2x2x4; slices in front."""
        size = "x".join(map(str, self.shape))
        slices = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{size}"

    @property
    def mean_hops(self) -> float:
        """The number of links between two chips of a slice, averaged over all pairs.

        A dimension is a ring where the hardware closes it: 16 chips on flat slices, multiples of
        four from 4×4×4 upward. An all-to-all loads every link by this factor.
        """
        if self.chip.platform == "gpu":
            return 1.0
        cube = len(self.shape) == 3 and all(size % 4 == 0 for size in self.shape)
        return max(1.0, sum(_mean_distance(size, cube or size >= 16) for size in self.shape))


def _mean_distance(size: int, ring: bool) -> float:
    """Returns the mean distance of two places of a ring or a path of `size`, equal ones included.

    >>> _mean_distance(4, True), _mean_distance(4, False)
    (1.0, 1.25)
    """
    apart = range(size)
    distance = (min(a, size - a) if ring else abs(a - b) for b in range(size) for a in apart)
    return sum(distance) / size**2


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Returns the slice that a name means.

    Args:
      name: "v6e-16" (the cloud's name: chips on v5e and v6e, TensorCores on v5p and tpu7x),
        "v5p:2x2x4" (chips), or "h100-8" (GPUs).
      slices: how many of them, joined by the data-center network.

    Raises:
      ConfigError: the chip is unknown, or no such slice exists; the message has those that do.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)*))", name.strip().lower())
    if match is None or match[1] not in CHIPS:
        raise ConfigError(
            f"topology must be one of {', '.join(CHIPS)}, followed by -COUNT or :SHAPE, such as "
            f"v6e-16, v5p:2x2x4, h100-8; got {name!r}"
        )
    if slices < 1:
        raise ConfigError(f"slices must be at least 1, got {slices}")
    chip = CHIPS[match[1]]
    if match[3]:
        return Topology(chip, _parse_shape(name, chip, match[3]), slices)
    count, rest = divmod(int(match[2]), chip.name_counts)
    if rest or count not in chip.shapes:
        known = [f"{chip.name}-{size * chip.name_counts}" for size in list(chip.shapes)[:11]]
        counted = "chips" if chip.name_counts == 1 else "TensorCores, two a chip"
        raise ConfigError(
            f"topology {name!r} is no usual slice (the number counts {counted}); "
            f"usual are {', '.join(known)}; other shapes as {chip.name}:AxB…"
        )
    return Topology(chip, chip.shapes[count], slices)


def _parse_shape(name: str, chip: Chip, text: str) -> tuple[int, ...]:
    shape = tuple(map(int, text.split("x")))
    rank = len(next(iter(chip.shapes.values())))
    if len(shape) != rank or 0 in shape:
        example = "x".join(map(str, chip.shapes[8]))
        raise ConfigError(
            f"topology {name!r} must have {rank} positive sizes on {chip.name}, such as "
            f"{chip.name}:{example}"
        )
    return shape


def larger(topology: Topology) -> list[Topology]:
    """Returns the usual slices with more chips of the same kind, smallest first."""
    shapes = topology.chip.shapes
    more = sorted(count for count in shapes if count * topology.slices > topology.chips)
    return [Topology(topology.chip, shapes[count], topology.slices) for count in more]
