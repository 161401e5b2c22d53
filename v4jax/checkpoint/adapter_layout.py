"""Names and shapes of adapters in a file: those of PEFT on transformers' model, or as released.

    naming "released": every matrix of the release is a module, every expert too
      layers.3.attn.wq_b                   [rank, in], [out, rank]
      layers.3.ffn.experts.17.w1
    naming "peft": what PEFT attaches to transformers' DeepseekV4ForCausalLM
      model.layers.3.self_attn.q_b_proj    a module: `target_modules`
      model.layers.3.self_attn.o_a_proj    its parameter `weight`: `target_parameters`, as its
                                           forward pass takes groups and no vectors
      model.layers.3.mlp.experts           its parameters `gate_up_proj` and `down_proj`

PEFT flattens the factors of stacked experts: lora_A is [experts · rank, in], experts outside;
lora_B is [out, rank · experts], experts inside. Gate and up are one parameter there, and two
matrices here: their factors are a pair of rank 2r, whose B is zero outside two blocks. PEFT names
the tensors of a parameter after its module; where both parameters have adapters, the first one is
the `base_layer` of the second.

Source: `ParamWrapper` of PEFT 0.21, tuners/lora/layer.py; `_inject_parameters` of its
tuners/tuners_utils.py.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from v4jax.checkpoint import names
from v4jax.checkpoint.names import Place, Stored
from v4jax.errors import CheckpointError

Naming = Literal["peft", "released"]
Factor = Literal["down", "up"]
PREFIX = "base_model.model."
EXTRA = "mtp."  # MTP blocks and draft modules, which transformers does not have
SUFFIXES: dict[Factor, str] = {"down": ".lora_A.weight", "up": ".lora_B.weight"}

_MODULES = dict(names.MODULES)
_PARAMETERS = ("self_attn.o_a_proj", "mlp.gate")  # targets with `.weight`: no plain linear layers
_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w\d)\.weight")
_STACK = re.compile(r"model\.layers\.(\d+)\.mlp\.experts(\.base_layer)?")
_INNER, _OUTER = names.STACKED  # gate_up_proj, down_proj: the order in transformers' module


@dataclasses.dataclass(frozen=True)
class Module:
    """What has one pair of factors in a file.

    Attributes:
      name: of the tensors, before the factor's suffix.
      target: what the configuration calls it.
      is_parameter: whether the target is one of `target_parameters`.
      weight: the weight of the model that holds the values, at `index`.
      slots: of how many matrices, one above the other, it is; 0 for one matrix and no experts.
    """

    name: str
    target: str
    is_parameter: bool
    weight: str
    index: tuple[int, ...]
    slots: int = 0


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the factors of one matrix of the release may be.

    Attributes:
      module: the released name, or `layers.3.ffn.experts.gate_up_proj` for stacked experts.
      expert: index in a stack; None outside one.
      slot: which of the `slots` matrices, one above the other, it is.
    """

    module: str
    expert: int | None = None
    slot: int = 0
    slots: int = 1


def can_adapt(place: Place) -> bool:
    """Whether a matrix may have adapters in a file."""
    plain = place.stored not in (Stored.FLOAT32, Stored.TABLE)
    return plain and (place.tensor == "head.weight" or place.tensor.startswith(("layers.", EXTRA)))


def list_modules(weights: Mapping[str, Iterable[Place]], naming: Naming) -> list[Module]:
    """Returns the modules of these weights; MTP's have the released names always.

    Raises:
      CheckpointError: a weight is none that can have adapters.
    """
    found: dict[str, Module] = {}
    for weight, places in weights.items():
        for place in places:
            released = place.tensor.removesuffix(".weight")
            if not can_adapt(place):
                raise CheckpointError(
                    f"{released} cannot have adapters in a file: matrices of layers and the head "
                    "can, where the release stores them as FP4, FP8 or bfloat16"
                )
            if naming == "released" or released.startswith(EXTRA):
                found[released] = Module(released, released, False, weight, place.index)
            elif expert := _EXPERT.fullmatch(place.tensor):
                stem, leaf = f"model.layers.{expert[1]}.mlp.experts", _leaf(expert[3])
                slots = len(names.STACKED[leaf])
                index = place.index[: -2 if slots > 1 else -1]
                target = f"{stem}.{leaf}"
                found.setdefault(target, Module(stem, target, True, weight, index, slots))
            else:
                module = _to_module(released)
                target = _target(module)
                found[target] = Module(module, target, target != module, weight, place.index)
    for target, module in found.items():
        if target.endswith(_INNER) and f"{module.name}.{_OUTER}" in found:
            found[target] = dataclasses.replace(module, name=f"{module.name}.base_layer")
    return list(found.values())


def find_sites(place: Place) -> tuple[Site, ...]:
    """Returns where the factors of a tensor may be: by itself, or in a stack of experts."""
    alone = Site(place.tensor.removesuffix(".weight"))
    expert = _EXPERT.fullmatch(place.tensor)
    if expert is None:
        return (alone,)
    leaf = _leaf(expert[3])
    parts = names.STACKED[leaf]
    module, slot = f"layers.{expert[1]}.ffn.experts.{leaf}", parts.index(expert[3])
    return alone, Site(module, int(expert[2]), slot, len(parts))


def parse_module(
    name: str, siblings: Iterable[str], parameters: Iterable[str]
) -> tuple[str, str] | None:
    """Returns `Site.module` of a module in a file, and what the configuration calls it.

    None: it is of stacked experts, and nothing says of which parameter.

    Args:
      siblings: all modules of the file.
      parameters: `target_parameters` of the configuration.
    """
    stack = _STACK.fullmatch(name)
    if stack is None:
        released = names.from_transformers(name + ".weight").removesuffix(".weight")
        return released, name if released == name else _target(name)
    stem = f"model.layers.{stack[1]}.mlp.experts"
    leaves = [leaf for leaf in names.STACKED if _is_among(f"{stem}.{leaf}", parameters)]
    if stack[2]:
        leaves = [_INNER]
    elif f"{name}.base_layer" in siblings:
        leaves = [_OUTER]
    if len(leaves) != 1:
        return None
    return f"layers.{stack[1]}.ffn.experts.{leaves[0]}", f"{stem}.{leaves[0]}"


def pack(values: np.ndarray, factor: Factor, slots: int) -> np.ndarray:
    """Returns the factor of a module as a file has it, a matrix.

    Args:
      values: [rank, in] or [out, rank] without slots; [experts, …] with one slot;
        [experts, slots, …] with several.
    """
    if not slots:
        return values
    if slots == 1:
        values = values[:, None]
    experts, _, rows, columns = values.shape
    if factor == "down":
        return values.reshape(-1, columns)
    whole = np.zeros((slots, rows, slots, columns, experts), values.dtype)
    for slot in range(slots):
        whole[slot, :, slot] = values[:, slot].transpose(1, 2, 0)
    return whole.reshape(slots * rows, -1)


def packed_shape(factor: Factor, slots: int, experts: int, rank: int, size: int) -> tuple[int, int]:
    """Returns the shape of `pack`.

    Args:
      rank: of each matrix.
      size: columns of the matrices for "down", rows of each for "up".
    """
    count = max(1, slots)
    width = rank * count * (experts if slots else 1)
    return (width, size) if factor == "down" else (size * count, width)


def unpack(values: np.ndarray, factor: Factor, site: Site, rank: int, halved: bool) -> np.ndarray:
    """Returns [rank, in] or [out, rank] of one matrix of a module.

    Args:
      values: as a file has them.
      rank: of the module.
      halved: whether `is_halved`: a matrix of two then has half the rank.
    """
    if site.expert is None:
        return values
    ranks = slice(0, rank)
    if halved:
        ranks = slice(site.slot * rank // site.slots, (site.slot + 1) * rank // site.slots)
    if factor == "down":
        return values.reshape(-1, rank, values.shape[1])[site.expert, ranks]
    size = len(values) // site.slots
    rows = values[site.slot * size : (site.slot + 1) * size]
    return rows.reshape(size, rank, -1)[:, ranks, site.expert]


def is_halved(up: np.ndarray, rank: int) -> bool:
    """Whether gate and up share no rank in lora_B [2 · out, rank · experts], as `pack` makes it."""
    if rank % 2:
        return False
    blocks = up.reshape(2, len(up) // 2, 2, -1)  # rank is outside of experts
    return not (blocks[0, :, 1].any() or blocks[1, :, 0].any())


def _leaf(part: str) -> str:
    return next(leaf for leaf, parts in names.STACKED.items() if part in parts)


def _to_module(released: str) -> str:
    if released == "head":
        return "lm_head"
    _, number, below = released.split(".", 2)
    return f"model.layers.{number}.{_MODULES[below]}"


def _target(module: str) -> str:
    return module + ".weight" if module.endswith(_PARAMETERS) else module


def _is_among(target: str, parameters: Iterable[str]) -> bool:
    return any(target == name or target.endswith("." + name) for name in parameters)
