"""ModelConfig → `config.json`, and back without loss."""

import dataclasses
import json

import pytest

from v4jax.config import LayerKind, RouterKind
from v4jax.config.from_hf import model_config_from_hf
from v4jax.config.loading import load_model_config, packaged_names
from v4jax.config.to_hf import model_config_to_hf
from v4jax.errors import ConfigError

from .released import FLASH, RELEASED

LAYOUTS = ("released", "transformers")
TINY = load_model_config("tiny")
ODD = {
    "hash layers in the middle": dict(
        mlp_layer_types=(RouterKind.TOPK, RouterKind.HASH) + (RouterKind.TOPK,) * 4
    ),
    "other ratios": dict(compress_ratios=(0, 8, 64, 8, 64, 8, 0)),
    "HCA with the ratio of CSA": dict(
        compress_ratios=(0, 4, 4, 4, 4, 4, 0), layer_types=TINY.layer_types
    ),
    "no YaRN": dict(rope_scaling=None),
    "a rotary factor that transformers would round down": dict(head_dim=56, qk_rope_head_dim=18),
    "several end tokens": dict(more_eos_token_ids=(5, 7)),
    "a later profile without a draft module": dict(profile="0731"),
    "no MTP": dict(
        num_nextn_predict_layers=0,
        compress_ratios=TINY.compress_ratios[:-1],
        layer_types=TINY.layer_types[:-1],
    ),
}


def round_trip(config, layout):
    """Returns what comes back from a file."""
    return model_config_from_hf(json.loads(json.dumps(model_config_to_hf(config, layout))))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", packaged_names())
def test_round_trip(name, layout):
    config = load_model_config(name)
    assert round_trip(config, layout) == config


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_round_trip_of_odd_models(change, layout):
    config = dataclasses.replace(TINY, **change)
    assert round_trip(config, layout) == config


@pytest.mark.parametrize("name", RELEASED)
def test_released_layout_is_the_released_file(name):
    written = model_config_to_hf(load_model_config(name))
    assert written == {k: v for k, v in RELEASED[name].items() if k != "transformers_version"}
    assert list(written) == sorted(written)


def test_plain_tensors_have_no_quantization_config():
    written = model_config_to_hf(load_model_config("v4_flash"), quantized=False)
    assert "quantization_config" not in written and written.keys() < FLASH.keys()


def test_transformers_has_no_place_for_a_compressed_mtp_block():
    ratios = (*TINY.compress_ratios[:-1], 128)
    kinds = (*TINY.layer_types[:-1], LayerKind.HCA)
    config = dataclasses.replace(TINY, compress_ratios=ratios, layer_types=kinds)
    assert round_trip(config, "released") == config
    with pytest.raises(ConfigError, match=r"no entry for MTP blocks.*save as 'released'"):
        model_config_to_hf(config, "transformers")


@pytest.mark.oracle
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["v4_flash", "v4_pro", "nano", "tiny"])
def test_transformers_reads_and_writes_it(name, layout):
    transformers = pytest.importorskip("transformers")
    config = load_model_config(name)
    theirs = transformers.DeepseekV4Config(**model_config_to_hf(config, layout))
    assert theirs.qk_rope_head_dim == config.qk_rope_head_dim
    assert theirs.rope_parameters["compress"]["attention_factor"] == 1.0
    if config.draft and layout == "released":
        # It drops the ratios of the stages, as it drops their weights.
        layers = config.num_hidden_layers
        ratios, kinds = config.compress_ratios[:layers], config.layer_types[:layers]
        config = dataclasses.replace(config, draft=None, compress_ratios=ratios, layer_types=kinds)
    assert model_config_from_hf(theirs.to_dict()) == config
