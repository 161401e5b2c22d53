"""The name table: complete for the released models, invertible, and right about scanned layers."""

import pytest
from oracle import checkpoints

from v4jax.checkpoint import names
from v4jax.checkpoint.names import Stored
from v4jax.config import LayerKind
from v4jax.config.from_hf import model_config_from_hf
from v4jax.config.loading import load_model_config

from . import folders

# Tensors per layer without the 6·E of the routed experts, scales included (specification D.2).
LAYER_TENSORS = {LayerKind.WINDOW: 29, LayerKind.HCA: 33, LayerKind.CSA: 40}
MTP_TENSORS = 39
GLOBAL_TENSORS = 6
FILE_TENSORS = {"v4_flash": 69_187, "v4_flash_base": 69_187, "v4_pro": 145_116}


def count(found) -> int:
    """Returns the tensors of places, scales included."""
    return sum(2 if place.stored in (Stored.FP8, Stored.EXPERT) else 1 for place in found)


@pytest.mark.parametrize("name", FILE_TENSORS)
def test_tensor_counts_of_the_released_models(name):
    config = load_model_config(name)
    found = list(names.places(config))
    assert count(found) == FILE_TENSORS[name]
    plain = [place for place in found if place.stored is not Stored.EXPERT]
    for number, layer in enumerate(config.layers):
        own = [place for place in plain if place.tensor.startswith(f"layers.{number}.")]
        assert count(own) == LAYER_TENSORS[layer.kind]
    assert count([p for p in plain if p.tensor.startswith("mtp.0.")]) == MTP_TENSORS
    others = [p for p in plain if not p.tensor.startswith(("layers.", "mtp."))]
    assert count(others) == GLOBAL_TENSORS


CONFIGS = {
    "flash": checkpoints.FLASH_TINY,
    "pro": checkpoints.PRO_TINY,
    "small": folders.SMALL,
    "odd": folders.ODD,
    "uniform": folders.UNIFORM,
    "single": folders.SINGLE,
    "two mtp": folders.TWO_MTP,
}
FORMATS = {
    "bf16": Stored.BFLOAT16,
    "f32": Stored.FLOAT32,
    "fp8": Stored.FP8,
    "expert": Stored.EXPERT,
    "table": Stored.TABLE,
}


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_the_tests_own_table(raw):
    found = list(names.places(model_config_from_hf(raw)))
    expected = {name: FORMATS[kind] for name, (_, kind) in checkpoints.tensor_table(raw).items()}
    assert {place.tensor: place.stored for place in found} == expected
    assert len({(place.parameter, place.index) for place in found}) == len(found)


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_names_are_invertible(raw):
    found = [place.tensor for place in names.places(model_config_from_hf(raw))]
    written = [names.to_transformers(tensor) for tensor in found]
    assert len(set(written)) == len(found)
    assert [names.from_transformers(name) for name in written] == found
    assert [names.from_transformers(name) for name in found] == found


# layer of Flash → its place: three single layers, then [HCA, CSA] twenty times.
FLASH_PLACES = {
    0: ("stack.prefix.0", ()),
    2: ("stack.prefix.2", ()),
    3: ("stack.period.0", (0,)),
    4: ("stack.period.1", (0,)),
    9: ("stack.period.0", (3,)),
    42: ("stack.period.1", (19,)),
}


@pytest.mark.parametrize("number", FLASH_PLACES)
def test_places_of_flash_layers(number):
    assert names.block_path(load_model_config("v4_flash"), number) == FLASH_PLACES[number]


def test_places_behind_the_period():
    config = model_config_from_hf(folders.SMALL)
    assert (config.stack_plan.prefix, config.stack_plan.suffix) == (1, 1)
    assert names.block_path(config, 5) == ("stack.suffix.0", ())


PLACES = {
    "embed.weight": ("embed", ()),
    "hc_head_fn": ("collapse.fn", ()),
    "layers.9.attn.wo_a.weight": ("stack.period.0.attention.output_down", (3,)),
    "layers.9.ffn.experts.5.w1.weight": ("stack.period.0.moe.experts.gate_up", (3, 5, 0)),
    "layers.9.ffn.experts.5.w3.weight": ("stack.period.0.moe.experts.gate_up", (3, 5, 1)),
    "layers.9.ffn.experts.5.w2.weight": ("stack.period.0.moe.experts.down", (3, 5)),
    "layers.0.ffn.gate.tid2eid": ("stack.prefix.0.moe.router.table", ()),
    "mtp.0.enorm.weight": ("mtp.0.embed_norm.weight", ()),
    "mtp.0.hc_head_scale": ("mtp.0.collapse.scale", ()),
    "mtp.0.ffn.shared_experts.w3.weight": ("mtp.0.block.moe.shared.gate_up", (1,)),
}


def test_places_of_single_tensors():
    found = {place.tensor: place for place in names.places(load_model_config("v4_flash"))}
    for tensor, (parameter, index) in PLACES.items():
        assert (found[tensor].parameter, found[tensor].index) == (parameter, index)


TRANSFORMERS = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_base": "model.hc_head.hc_base",
    "layers.3.hc_attn_base": "model.layers.3.hc_attn_base",
    "layers.3.attn.kv_norm.weight": "model.layers.3.attn.norm.weight",
    "layers.3.attn.compressor.norm.weight": "model.layers.3.attn.compressor.norm.weight",
    "layers.3.ffn.experts.1.w2.weight": "model.layers.3.ffn.experts.1.w2.weight",
    "mtp.0.attn.kv_norm.weight": "mtp.0.attn.kv_norm.weight",
}


def test_transformers_names():
    for released, written in TRANSFORMERS.items():
        assert names.to_transformers(released) == written
    assert names.from_transformers("lm_head.weight") == "head.weight"
    scale = names.from_transformers("model.layers.1.attn.wq_a.weight_scale_inv")
    assert scale == "layers.1.attn.wq_a.scale"
