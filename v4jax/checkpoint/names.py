"""The one table of tensor names: checkpoint tensor ↔ place in a module's parameter, both ways.

A row gives the name of a layer's tensor, the parameter of a block that it belongs to, and the
format in which the release stores it. A parameter gathers its tensors along leading axes:

    layers.9.ffn.experts.5.w3.weight  ↔  stack.period.0.moe.experts.gate_up [3, 5, 1]
                                         └ repeat 3 of the period, expert 5, slot 1 (w3, "up")

Matrices stay [out, in] as stored: gathering is the only transform. `places` lists a whole model.
`to_transformers` and `from_transformers` rename for what transformers writes. `MODULES` has the
names of its modules.

Source: spec D.2, D.5; files written by `save_pretrained` of transformers 5.24, with and without
`save_original_format`.
"""

import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator

from v4jax.config import Layer, LayerKind, ModelConfig, RouterKind


class Stored(enum.Enum):
    """The format in which the release stores a tensor."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FP8 = "fp8"  # e4m3 with one scale per 128×128 tile
    EXPERT = "expert"  # fp4 or fp8, as `config.expert_dtype` says
    TABLE = "table"  # int64


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a layer: its name, its parameter's path, both below the layer's prefix.

    `{expert}` in the name stands for every expert; `slot` is the tensor's place in [w1, w3].
    """

    tensor: str
    parameter: str
    stored: Stored
    slot: int | None = None


def _rows(text: str) -> tuple[Row, ...]:
    """Reads lines of `tensor  parameter  format  [slot]`."""
    lines = (line.split() for line in text.strip().splitlines())
    return tuple(Row(line[0], line[1], Stored(line[2]), *map(int, line[3:])) for line in lines)


EMBED = _rows("embed.weight  embed  bfloat16")

HEAD = _rows("""
    norm.weight  norm.weight  bfloat16
    head.weight  head         bfloat16
""")

COLLAPSE = _rows("""
    hc_head_fn     collapse.fn     float32
    hc_head_base   collapse.base   float32
    hc_head_scale  collapse.scale  float32
""")

BLOCK = _rows("""
    hc_attn_fn                      attention_hyper.fn               float32
    hc_attn_base                    attention_hyper.base             float32
    hc_attn_scale                   attention_hyper.scale            float32
    attn_norm.weight                attention_norm.weight            bfloat16
    attn.wq_a.weight                attention.query_down             fp8
    attn.q_norm.weight              attention.query_norm.weight      bfloat16
    attn.wq_b.weight                attention.query_up               fp8
    attn.wkv.weight                 attention.key_value              fp8
    attn.kv_norm.weight             attention.key_value_norm.weight  bfloat16
    attn.attn_sink                  attention.sink                   float32
    attn.wo_a.weight                attention.output_down            fp8
    attn.wo_b.weight                attention.output_up              fp8
    hc_ffn_fn                       moe_hyper.fn                     float32
    hc_ffn_base                     moe_hyper.base                   float32
    hc_ffn_scale                    moe_hyper.scale                  float32
    ffn_norm.weight                 moe_norm.weight                  bfloat16
    ffn.gate.weight                 moe.router.weight                bfloat16
    ffn.shared_experts.w1.weight    moe.shared.gate_up               fp8      0
    ffn.shared_experts.w3.weight    moe.shared.gate_up               fp8      1
    ffn.shared_experts.w2.weight    moe.shared.down                  fp8
    ffn.experts.{expert}.w1.weight  moe.experts.gate_up              expert   0
    ffn.experts.{expert}.w3.weight  moe.experts.gate_up              expert   1
    ffn.experts.{expert}.w2.weight  moe.experts.down                 expert
""")

COMPRESSOR = _rows("""
    attn.compressor.wkv.weight    attention.compressor.key_value      bfloat16
    attn.compressor.wgate.weight  attention.compressor.gate           bfloat16
    attn.compressor.ape           attention.compressor.position_bias  float32
    attn.compressor.norm.weight   attention.compressor.norm.weight    bfloat16
""")

INDEXER = _rows("""
    attn.indexer.wq_b.weight              attention.indexer.query_up                  fp8
    attn.indexer.weights_proj.weight      attention.indexer.head_weights              bfloat16
    attn.indexer.compressor.wkv.weight    attention.indexer.compressor.key_value      bfloat16
    attn.indexer.compressor.wgate.weight  attention.indexer.compressor.gate           bfloat16
    attn.indexer.compressor.ape           attention.indexer.compressor.position_bias  float32
    attn.indexer.compressor.norm.weight   attention.indexer.compressor.norm.weight    bfloat16
""")

ROUTER = {
    RouterKind.TOPK: _rows("ffn.gate.bias  moe.router.bias  float32"),
    RouterKind.HASH: _rows("ffn.gate.tid2eid  moe.router.table  table"),
}

MTP = _rows("""
    enorm.weight   embed_norm.weight   bfloat16
    hnorm.weight   stream_norm.weight  bfloat16
    e_proj.weight  embed_projection    fp8
    h_proj.weight  stream_projection   fp8
    norm.weight    norm.weight         bfloat16
""")


# The draft module: rows of one stage only, below `mtp.{stage}.` and `draft.`.
DRAFT_FIRST = _rows("""
    main_proj.weight  context_projection   fp8
    main_norm.weight  context_norm.weight  bfloat16
""")

DRAFT_LAST = _rows("""
    norm.weight                   norm.weight       bfloat16
    markov_head.markov_w1.weight  markov_embed      bfloat16
    markov_head.markov_w2.weight  markov_head       bfloat16
    confidence_head.proj.weight   confidence_head   bfloat16
""")


def block_rows(layer: Layer) -> tuple[Row, ...]:
    """Returns the rows that a layer of this kind has."""
    rows = BLOCK + ROUTER[layer.router]
    if layer.kind is not LayerKind.WINDOW:
        rows += COMPRESSOR
    if layer.kind is LayerKind.CSA:
        rows += INDEXER
    return rows


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one tensor of a checkpoint lives: `parameter[index]`, matrices [out, in] below that."""

    tensor: str
    parameter: str
    index: tuple[int, ...]
    stored: Stored


def places(config: ModelConfig) -> Iterator[Place]:
    """Yields the place of every tensor, scales aside, in the order of the released files."""
    yield from _expand(EMBED, "", "", (), config)
    for number, layer in enumerate(config.layers):
        module, index = block_path(config, number)
        yield from _expand(block_rows(layer), f"layers.{number}.", f"{module}.", index, config)
    yield from _expand(HEAD + COLLAPSE, "", "", (), config)
    for number, layer in enumerate(config.mtp_layers):
        prefix = f"mtp.{number}."
        yield from _expand(block_rows(layer), prefix, f"{prefix}block.", (), config)
        yield from _expand(MTP + COLLAPSE, prefix, prefix, (), config)
    stages = config.draft_layers
    for number, layer in enumerate(stages):
        prefix = f"mtp.{number}."
        yield from _expand(block_rows(layer), prefix, f"drafter.stages.{number}.", (), config)
        if number == 0:
            yield from _expand(DRAFT_FIRST, prefix, "drafter.", (), config)
        if number == len(stages) - 1:
            yield from _expand(DRAFT_LAST + COLLAPSE, prefix, "drafter.", (), config)


def stored_formats(config: ModelConfig) -> dict[str, str]:
    """Returns the format in which the release stores every parameter, by the parameter's path.

    "fp4", "fp8", "bfloat16", "float32", or "table".
    """
    return {place.parameter: format_of(place.stored, config) for place in places(config)}


def format_of(stored: Stored, config: ModelConfig) -> str:
    """Returns the name of a stored format; that of experts is configured."""
    return config.expert_dtype if stored is Stored.EXPERT else stored.value


def block_path(config: ModelConfig, number: int) -> tuple[str, tuple[int, ...]]:
    """Returns the module that holds layer `number`, and its index along the module's leading axis.

    >>> block_path(flash, 9)   # prefix 3, then [HCA, CSA] twenty times: layer 9 is HCA, repeat 3
    ('stack.period.0', (3,))
    """
    plan = config.stack_plan
    repeated = number - plan.prefix
    if repeated < 0:
        return f"stack.prefix.{number}", ()
    if repeated < plan.period * plan.repeats:
        return f"stack.period.{repeated % plan.period}", (repeated // plan.period,)
    return f"stack.suffix.{repeated - plan.period * plan.repeats}", ()


def by_parameter(found: Iterable[Place]) -> dict[str, list[Place]]:
    """Groups places by parameter path, in the order of first appearance."""
    groups: dict[str, list[Place]] = {}
    for place in found:
        groups.setdefault(place.parameter, []).append(place)
    return groups


def _expand(rows, tensor_prefix, module_prefix, index, config) -> Iterator[Place]:
    for row in rows:
        slot = () if row.slot is None else (row.slot,)
        parameter = module_prefix + row.parameter
        if "{expert}" not in row.tensor:
            yield Place(tensor_prefix + row.tensor, parameter, index + slot, row.stored)
            continue
        for expert in range(config.n_routed_experts):
            tensor = tensor_prefix + row.tensor.format(expert=expert)
            yield Place(tensor, parameter, (*index, expert, *slot), row.stored)


def scale_name(tensor: str) -> str:
    """Returns the name of a quantized tensor's scales: `X.weight` → `X.scale`."""
    return tensor.removesuffix("weight") + "scale"


_HYPER = ("fn", "base", "scale")

# What is below a layer, by the released name and by that of transformers' modules.
MODULES = (
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    *((f"hc_{part}_{of}", f"{part}_hc.{of}") for part in ("attn", "ffn") for of in _HYPER),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wq_a", "self_attn.q_a_proj"),
    ("attn.q_norm", "self_attn.q_a_norm"),
    ("attn.wq_b", "self_attn.q_b_proj"),
    ("attn.wkv", "self_attn.kv_proj"),
    ("attn.kv_norm", "self_attn.kv_norm"),
    ("attn.wo_a", "self_attn.o_a_proj"),
    ("attn.wo_b", "self_attn.o_b_proj"),
    ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
    ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.norm", "self_attn.compressor.kv_norm"),
    ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
    ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.norm", "self_attn.compressor.indexer.kv_norm"),
    ("ffn.gate", "mlp.gate"),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
    ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
    ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
)
EXPERT_MODULES = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
_RELEASED = {theirs: released for released, theirs in MODULES}

# Routed experts of a layer in one tensor, as transformers has them: [experts, rows, columns], whose
# rows are those of these, one after the other.
STACKED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_STACKED_NAME = re.compile(r"(layers\.\d+\.ffn\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")

# transformers renames on the way in and only partly back on the way out, so that what it writes is
# neither the released names nor those of its modules: (released, transformers) whole-name patterns.
_TRANSFORMERS = (
    (r"embed\.weight", r"model.embed_tokens.weight"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"hc_head_(fn|base|scale)", r"model.hc_head.hc_\1"),
    (r"(layers\.\d+\.attn)\.kv_norm\.weight", r"model.\1.norm.weight"),
    (r"(layers\..*)", r"model.\1"),
)  # head.weight and mtp.* keep their names


def to_transformers(tensor: str) -> str:
    """Returns the name under which transformers' `save_pretrained` writes a released tensor."""
    for released, written in _TRANSFORMERS:
        if re.fullmatch(released, tensor):
            return re.sub(released, written, tensor)
    return tensor


def from_transformers(tensor: str) -> str:
    """Undoes `to_transformers`; also understands the names of transformers' modules.

    Stacked experts keep their own name, as `split_stacked` wants it. A name it does not know comes
    back unchanged, and is then unknown to `places`.
    """
    name = re.sub(r"\.weight_scale_inv$", ".scale", tensor)
    if not name.startswith("model."):
        return {"lm_head.weight": "head.weight"}.get(name, name)
    name = name.removeprefix("model.")
    name = re.sub(r"^embed_tokens\.", "embed.", name)
    name = re.sub(r"^hc_head\.hc_", "hc_head_", name)
    name = re.sub(r"^(layers\.\d+\.attn)\.norm\.", r"\1.kv_norm.", name)
    layer = re.fullmatch(r"(layers\.\d+\.)((?:self_attn|mlp|\w+norm|\w+_hc)\..*)", name)
    return name if layer is None else layer[1] + _from_module(layer[2])


def _from_module(name: str) -> str:
    """Returns the released name of what a module of a layer holds."""
    if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)\.(.*)", name):
        released = {theirs: own for own, theirs in EXPERT_MODULES}.get(expert[2], expert[2])
        return f"ffn.experts.{expert[1]}.{released}.{expert[3]}"
    name = re.sub(r"^mlp\.experts\.", "ffn.experts.", name)
    module, parts = name, []
    while module and module not in _RELEASED:
        module, _, last = module.rpartition(".")
        parts.insert(0, last)
    return ".".join([_RELEASED[module], *parts]) if module else name


def split_stacked(tensor: str) -> tuple[str, tuple[str, ...], str] | None:
    """Returns prefix, parts and ending of the tensors that a stacked one holds; None for others.

    `layers.3.ffn.experts.gate_up_proj` → `layers.3.ffn.experts`, (`w1`, `w3`), `weight`.
    """
    found = _STACKED_NAME.fullmatch(tensor)
    if found is None:
        return None
    return found[1], STACKED[found[2]], "scale" if found[3] else "weight"
