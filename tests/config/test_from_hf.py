"""`config.json` → ModelConfig: what the released files say, and what every broken one is told."""

import dataclasses
import re

import pytest

from v4jax import log
from v4jax.checkpoint.hf_folder import with_blocks
from v4jax.config import LayerKind, ModelConfig, Rope, RouterKind, YarnScaling
from v4jax.config.from_hf import FIXED, INFORMATIONAL, model_config_from_hf
from v4jax.config.loading import load_model_config
from v4jax.errors import ConfigError

from .released import FLASH, FLASH_0731, FLASH_TRANSFORMERS, PRO, RELEASED


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_the_packaged_configurations(name):
    assert model_config_from_hf(RELEASED[name]) == load_model_config(name)


PLAIN = {key: value for key, value in FLASH_TRANSFORMERS.items() if key != "quantization_config"}
DSPARK = {key: value for key, value in FLASH_0731.items() if key.startswith("dspark_")}
# {what transformers wrote, by its version: (the file, what it changes of the model)}
OF_TRANSFORMERS = {
    "5.24, expert_dtype also inside": (FLASH_TRANSFORMERS, {}),
    "5.17, expert_dtype outside alone": (
        PLAIN | {"quantization_config": FLASH["quantization_config"]},
        {},
    ),
    "weights expanded": (PLAIN, {}),
    "modules that are not converted": (
        PLAIN
        | {
            "quantization_config": FLASH["quantization_config"]
            | {"modules_to_not_convert": ["lm_head"], "dequantize": False}
        },
        {},
    ),
    "Flash-0731, whose module it drops": (FLASH_TRANSFORMERS | DSPARK, {"profile": "0731"}),
}


@pytest.mark.parametrize(("raw", "changes"), OF_TRANSFORMERS.values(), ids=OF_TRANSFORMERS.keys())
def test_transformers_keys_say_the_same(raw, changes):
    found = model_config_from_hf(raw)
    if "profile" in changes:  # no entry is of a block behind the layers, and none is counted
        found = with_blocks(found, 1)
    assert found == dataclasses.replace(model_config_from_hf(FLASH), **changes)


def test_layers_of_flash():
    config = model_config_from_hf(FLASH)
    kinds = [layer.kind for layer in config.layers]
    assert kinds.count(LayerKind.WINDOW) == 2
    assert kinds.count(LayerKind.CSA) == 21
    assert kinds.count(LayerKind.HCA) == 20
    routers = [layer.router for layer in config.layers]
    assert routers == [RouterKind.HASH] * 3 + [RouterKind.TOPK] * 40
    assert config.layers[0].rope == Rope(10000.0, None, 64)
    assert config.layers[2].rope == Rope(160000.0, YarnScaling(), 64)
    assert [layer.kind for layer in config.mtp_layers] == [LayerKind.WINDOW]
    assert hash(config) == hash(model_config_from_hf(FLASH))


def test_drafts_of_flash_0731():
    config = model_config_from_hf(FLASH_0731)
    assert config.draft.stages == len(config.draft_layers) == 3
    assert {layer.kind for layer in config.draft_layers} == {LayerKind.WINDOW}
    assert {layer.rope.theta for layer in config.draft_layers} == {10000.0}  # and no YaRN
    assert config.mtp_layers == () and config.layers == model_config_from_hf(FLASH).layers


# {what: (change to the file of Flash-0731, what the message must say)}
BROKEN_DRAFTS = {
    "a key missing": ({"dspark_markov_rank": None}, "no dspark_markov_rank; copy the config.json"),
    "a tapped layer that is none": (
        {"dspark_target_layer_ids": [41, 42, 43]},
        "model.draft.target_layer_ids must be ascending layers 0 … 42, got (41, 42, 43)",
    ),
    "a noise token that is none": (
        {"dspark_noise_token_id": 129280},
        "model.draft.noise_token_id must be an id below 129280",
    ),
    "a stage with a ratio": (
        {"compress_ratios": [*FLASH_0731["compress_ratios"][:-1], 4]},
        "model.compress_ratios must be 0 for the draft stages, got [0, 0, 4]",
    ),
    "no rows": (
        {"dspark_block_size": 0},
        "model.draft.block_size must be between 1 and 1024, got 0",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN_DRAFTS.values(), ids=BROKEN_DRAFTS.keys())
def test_broken_drafts(change, message):
    raw = {key: value for key, value in (FLASH_0731 | change).items() if value is not None}
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_config_from_hf(raw)


def test_ratios_of_blocks_that_were_taken_out():
    raw = FLASH | {"num_nextn_predict_layers": 0}
    config = model_config_from_hf(raw)
    assert config.layers == model_config_from_hf(FLASH).layers and config.mtp_layers == ()


def test_entries_of_layers_that_were_taken_out(monkeypatch, capsys):
    """As transformers: a model that was cut to its first layers keeps the list of all."""
    monkeypatch.setattr(log, "_said", set())
    first = {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}
    config = model_config_from_hf(FLASH | first)
    assert config.compress_ratios == (0, 0, 4, 128)
    assert "has 44 entries for 4 layers and 0 MTP blocks" in capsys.readouterr().err
    config = model_config_from_hf(FLASH | first | {"num_nextn_predict_layers": 1})
    assert config.compress_ratios == (0, 0, 4, 128, 0)
    assert [layer.kind for layer in config.mtp_layers] == [LayerKind.WINDOW]


def test_width_of_index_heads_matters_where_there_are_some():
    narrow = {"index_head_dim": 32}
    with pytest.raises(ConfigError, match="index_head_dim must be at least qk_rope_head_dim = 64"):
        model_config_from_hf(FLASH | narrow)
    ratios = [0 if ratio == 4 else ratio for ratio in FLASH["compress_ratios"]]
    config = model_config_from_hf(FLASH | narrow | {"compress_ratios": ratios})
    assert LayerKind.CSA not in config.layer_types


def test_layers_of_pro():
    kinds = [layer.kind for layer in model_config_from_hf(PRO).layers]
    assert (kinds.count(LayerKind.HCA), kinds.count(LayerKind.CSA)) == (31, 30)


QUANTIZED = FLASH["quantization_config"]
NO_DTYPE = {"expert_dtype": None}
# {name: (changes to Flash's file, what they change of the model)}
SAME = {
    "ratios without the MTP entry": ({"compress_ratios": FLASH["compress_ratios"][:-1]}, {}),
    "informational keys": (dict.fromkeys(INFORMATIONAL, "anything"), {}),
    "both vocabularies": ({"layer_types": FLASH_TRANSFORMERS["layer_types"]}, {}),
    "aliases": ({"num_local_experts": 256, "intermediate_size": 2048}, {}),
    "legacy rates": ({"compress_rate_csa": 4, "compress_rate_hca": 128}, {}),
    "expert_dtype inside": (
        NO_DTYPE | {"quantization_config": QUANTIZED | {"expert_dtype": "fp8"}},
        {"expert_dtype": "fp8"},
    ),
    "no expert_dtype": (NO_DTYPE, {"expert_dtype": "fp4"}),
    "not quantized": (NO_DTYPE | {"quantization_config": None}, {}),
    "no rope scaling": ({"rope_scaling": None}, {"rope_scaling": None}),
    "default rope type": ({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
    "other eps": ({"rms_norm_eps": 1e-20}, {"rms_norm_eps": 1e-20}),
    "one eos in a list": ({"eos_token_id": [1]}, {}),
    "several eos": ({"eos_token_id": [1, 5, 1, 9]}, {"more_eos_token_ids": (5, 9)}),
    "a profile": ({"v4jax_profile": "0731"}, {"profile": "0731"}),
}


@pytest.mark.parametrize("change, expected", SAME.values(), ids=SAME.keys())
def test_equivalent_files(change, expected):
    expected = dataclasses.replace(model_config_from_hf(FLASH), **expected)
    assert model_config_from_hf(FLASH | change) == expected


def test_general_ratios_come_with_layer_types():
    names = FLASH_TRANSFORMERS["layer_types"]
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}
    config = model_config_from_hf(FLASH_TRANSFORMERS | {"compress_rates": rates})
    assert config.compress_ratios[:5] == (0, 0, 8, 64, 8)
    assert [kind.value for kind in config.layer_types] == [*names, "sliding_attention"]


YARN = FLASH["rope_scaling"]


def quantization(**changes):
    """Changes of Flash's quantization_config."""
    return {"quantization_config": FLASH["quantization_config"] | changes}


def scaling(**changes):
    """Changes of Flash's rope_scaling."""
    return {"rope_scaling": YARN | changes}


def rope(part, **changes):
    """Changes of one part of transformers' rope_parameters."""
    parts = FLASH_TRANSFORMERS["rope_parameters"]
    changed = parts | {part: parts[part] | changes}
    return {"rope_parameters": changed, "compress_ratios": FLASH["compress_ratios"]}


# {what is wrong: (change to Flash's file, what the message must say)}; ... removes the key.
BROKEN = {
    "other family": ({"model_type": "deepseek_v41"}, r"model_type must be 'deepseek_v4'"),
    "no family": ({"model_type": ...}, r"lacks the key 'model_type'"),
    "architecture": ({"architectures": ["DeepseekV41ForCausalLM"]}, r"architectures must be \["),
    "scoring": ({"scoring_func": "sigmoid"}, r"scoring_func must be 'sqrtsoftplus', got 'sigmoid'"),
    "unnormalized": ({"norm_topk_prob": False}, r"norm_topk_prob must be True, got False"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act must be 'silu'"),
    "attention bias": ({"attention_bias": True}, r"attention_bias must be False"),
    "mlp bias": ({"mlp_bias": True}, r"mlp_bias must be False"),
    "dropout": ({"attention_dropout": 0.1}, r"attention_dropout must be 0.0"),
    "tied": ({"tie_word_embeddings": True}, r"tie_word_embeddings must be False"),
    "shared experts": ({"n_shared_experts": 2}, r"n_shared_experts must be 1, got 2"),
    "key-value heads": ({"num_key_value_heads": 8}, r"num_key_value_heads must be 1, got 8"),
    "top-k method": ({"topk_method": "greedy"}, r"topk_method must be 'noaux_tc'"),
    "quant method": (quantization(quant_method="awq"), r"quant_method must be 'fp8'"),
    "fp8 kind": (quantization(fmt="e5m2"), r"quantization_config: fmt must be 'e4m3'"),
    "static scales": (
        quantization(activation_scheme="static"),
        r"activation_scheme must be 'dynamic'",
    ),
    "unknown quantization key": (
        quantization(group_size=32),
        r"quantization_config: unknown key 'group_size'",
    ),
    "expert dtype": (
        {"expert_dtype": "int4"},
        r"model.expert_dtype must be 'fp4' or 'fp8', got 'int4'",
    ),
    "two expert dtypes": (
        quantization(expert_dtype="fp8"),
        r"expert_dtype = 'fp8' and expert_dtype_outside = 'fp4' contradict",
    ),
    "vision": ({"vision_n_layers": 32}, r"vision_n_layers is a key of a vision checkpoint"),
    "nested": ({"text_config": {}}, r"text_config is a key of a nested"),
    "unknown": ({"qk_norm_gain": 2.0}, r"unknown key 'qk_norm_gain' \(= 2.0\) could change"),
    "misspelt": ({"hidden_sizes": 1}, r"unknown key 'hidden_sizes'.*did you mean 'hidden_size'\?"),
    "missing": ({"hidden_size": ...}, r"config.json lacks the key 'hidden_size'"),
    "missing eps": ({"rms_norm_eps": ...}, r"lacks the key 'rms_norm_eps'"),
    "missing theta": ({"compress_rope_theta": ...}, r"lacks the key 'compress_rope_theta'"),
    "missing rope dim": ({"qk_rope_head_dim": ...}, r"lacks the key 'qk_rope_head_dim'"),
    "text for a number": ({"hidden_size": "4096"}, r"hidden_size must be an integer, got '4096'"),
    "true for a number": ({"hc_mult": True}, r"hc_mult must be an integer, got True"),
    "no number": ({"rope_theta": float("nan")}, r"rope_theta must be finite, got nan"),
    "zero": ({"sliding_window": 0}, r"model.sliding_window must be between 1 and 1048576, got 0"),
    "groups": ({"o_groups": 7}, r"num_attention_heads must be a multiple of o_groups = 7, got 64"),
    "too many chosen": ({"num_experts_per_tok": 300}, r"must not exceed n_routed_experts = 256"),
    "token id": ({"eos_token_id": 129280}, r"eos_token_id must be a token id below vocab_size"),
    "no eos": ({"eos_token_id": []}, r"eos_token_id must name a token that ends an answer"),
    "several eos": ({"eos_token_id": [1, 129280]}, r"must be token ids below vocab_size"),
    "profile": ({"v4jax_profile": "0732"}, r"model.profile must be one of preview, 0731, got"),
    "magnitude factor": (
        scaling(attention_factor=1.277),
        r"attention_factor must be 1.0, got 1.277",
    ),
    "mscale": (scaling(mscale=1.0), r"rope_scaling: unknown key 'mscale'"),
    "rope kind": (scaling(type="linear"), r"type must be 'yarn' or 'default', got"),
    "yarn on window layers": (
        rope("main", **YARN, rope_type="yarn"),
        r"window layers have no YaRN",
    ),
    "two rotations": (
        rope("compress", factor=40),
        r"rope_scaling = .* and rope_parameters = .* contradict",
    ),
    "two thetas": (
        rope("compress", rope_theta=4e4),
        r"compress_rope_theta = 160000.0 and rope_parameters = 40000.0 contradict",
    ),
    "rotary factor": (
        {"partial_rotary_factor": 0.25},
        r"partial_rotary_factor = 0.25 contradicts 64 rotated channels",
    ),
    "no schedule": ({"compress_ratios": ...}, r"needs compress_ratios or layer_types"),
    "short schedule": ({"compress_ratios": [0, 4]}, r"compress_ratios must have 44 entries"),
    "ratio of the wrong type": (
        {"compress_ratios": [0, "4"]},
        r"every entry of compress_ratios must",
    ),
    "two HCA ratios": (
        {"compress_ratios": [0, 128, 64] + [0] * 41},
        r"compress_ratios must be equal on all HCA layers",
    ),
    "layer name": (
        {"compress_ratios": ..., "layer_types": ["full"] * 43},
        r"every entry of layer_types must be one of .*got 'full'",
    ),
    "two schedules": (
        {"layer_types": ["sliding_attention"] * 43},
        r"compress_ratios = .* and layer_types = .* contradict",
    ),
    "no routers": ({"num_hash_layers": ...}, r"lacks the key 'num_hash_layers'"),
    "too many hash layers": ({"num_hash_layers": 44}, r"num_hash_layers must be between 0 and 43"),
    "two router lists": (
        {"mlp_layer_types": ["moe"] * 43},
        r"num_hash_layers = .* and mlp_layer_types = .* contradict",
    ),
    "two expert counts": (
        {"num_local_experts": 8},
        r"n_routed_experts = 256 and num_local_experts = 8 contradict",
    ),
    "object for a list": ({"compress_ratios": {}}, r"compress_ratios must be a list"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(change, message):
    raw = {key: value for key, value in (FLASH | change).items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        model_config_from_hf(raw)


SIZES = [field.name for field in dataclasses.fields(ModelConfig) if field.type in (int, float)]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_no_model_has(name):
    """Each is refused with one short line, or is one that the field may have."""
    accepted = set()
    for value in (10**9, 10**12, 10**400, -1, 1e300):
        try:
            model_config_from_hf(FLASH | {name: value})
            accepted.add(value)
        except ConfigError as error:
            assert name in str(error) and "\n" not in str(error) and len(str(error)) < 300
    bases = name in ("rope_theta", "compress_rope_theta", "swiglu_limit")
    assert accepted == ({10**9, 10**12} if bases else set())


BLOCKS = {"none": [], "one": [128], "three": [128] * 3, "zero": [0, 128], "huge": [10**30, 1]}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks_of_scales(block):
    with pytest.raises(ConfigError, match=r"model.weight_block_size must be"):
        model_config_from_hf(FLASH | quantization(weight_block_size=block))


def test_long_values_are_shown_in_part():
    with pytest.raises(ConfigError, match=r"unknown key 'x+\.\.\.x+' .= \[0, 1, 2") as caught:
        model_config_from_hf(FLASH | {"x" * 10_000: list(range(10_000))})
    assert len(str(caught.value)) < 400


def test_every_released_key_is_used_or_explained():
    for key in FLASH:
        changed = FLASH | {key: "no value that any key has"}
        if key in INFORMATIONAL:
            assert model_config_from_hf(changed) == model_config_from_hf(FLASH)
        else:
            with pytest.raises(ConfigError, match=key):
                model_config_from_hf(changed)


def test_fixed_and_informational_do_not_overlap():
    assert not FIXED.keys() & INFORMATIONAL.keys()
