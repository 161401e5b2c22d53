"""Values in place of the configuration's: for a model, for a layer; and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import IDS, TINY, make_config, make_model, write_folder

import v4jax
from v4jax.config.overrides import override
from v4jax.config.to_hf import model_config_to_hf
from v4jax.errors import ConfigError
from v4jax.model.layer_view import view_layers

SMALL = make_config("csa csa")
TOKENS = jnp.asarray(IDS[:1, :64])
ZERO, OWN = jnp.int32(0), {1: {"index_topk": 3, "compress_rope_theta": 300.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), SMALL)


def count_selected(model) -> list[int]:
    """Returns how many entries the last token's query selects, by layer."""
    return [int((layer["selected"][0, -1] >= 0).sum()) for layer in view_layers(model, TOKENS)]


def test_a_layer_of_its_own(folder):
    """The other layer computes what it did, and layers that differ are no longer one scan."""
    plain, own = v4jax.load(folder), v4jax.load(folder, overrides={"layers": OWN})
    assert plain.config.stack_plan.repeats == 2 and own.config.stack_plan.repeats == 0
    assert count_selected(plain) == [8, 8] and count_selected(own) == [8, 3]
    assert count_selected(v4jax.load(folder, overrides={"index_topk": 5, "layers": OWN})) == [5, 3]
    first, second = (view_layers(model, TOKENS)[1] for model in (plain, own))
    assert (
        np.abs(first["index_keys"].block(ZERO, 16) - second["index_keys"].block(ZERO, 16)).max()
        > 0.1
    )
    # Without overrides the same folder gives the same logits, whatever was loaded before.
    np.testing.assert_array_equal(plain(TOKENS), v4jax.load(folder)(TOKENS))


def test_a_model_of_the_same_weights():
    model = make_model(SMALL)
    narrow = model.override(index_topk=2)
    assert narrow.config.index_topk == 2 and model.config.index_topk == 8
    assert count_selected(narrow) == [2, 2] and narrow.head is not model.head
    np.testing.assert_array_equal(narrow.override(index_topk=8)(TOKENS), model(TOKENS))
    with pytest.raises(ConfigError, match=r"override\(layers\) changes which layers are stored"):
        model.override(layers=OWN)
    with pytest.raises(ConfigError, match=r"override\(hidden_size\) changes .*or what weights"):
        model.override(hidden_size=SMALL.hidden_size * 2)


def test_a_configuration_cannot_be_exchanged():
    model = make_model(SMALL)
    for name, value in (("config", TINY), ("numerics", "float32")):
        with pytest.raises(ConfigError, match=rf"model\.{name} says how .*model\.override\(index_"):
            setattr(model, name, value)
    model.config = model.config  # which changes nothing
    assert model.config is SMALL


def test_what_one_layer_has_of_its_own_is_not_written():
    own = override(TINY, {"layers": {2: {"swiglu_limit": 7.0}}})
    with pytest.raises(ConfigError, match=r"layers 2 have values of their own, which config\.json"):
        model_config_to_hf(own)
    assert model_config_to_hf(override(TINY, {"index_topk": 4}))["index_topk"] == 4


BAD = {
    "unknown field": ({"index_topx": 4}, "overrides has no field 'index_topx'; did you mean 'ind"),
    "unknown in a layer": ({"layers": {0: {"swiglu": 4}}}, r"overrides.layers\[0\] has no field"),
    "a size in a layer": ({"layers": {0: {"hidden_size": 4}}}, "has no field 'hidden_size'"),
    "no such layer": ({"layers": {6: {}}}, r"overrides.layers\[6\] must be a layer, 0 … 5"),
    "a layer as text": ({"layers": {"0": {}}}, r"overrides.layers\['0'\] must be a layer"),
    "layers as a list": ({"layers": [3]}, r"overrides.layers must be \{layer: \{field: value"),
    "a number as layer": ({"layers": {0: 3}}, r"overrides.layers\[0\] must be \{field: value"),
    "out of range": ({"index_topk": 0}, "overrides.index_topk must be between 1 and"),
    "out of range in a layer": (
        {"layers": {0: {"hc_eps": 2}}},
        r"layers\[0\].hc_eps must be betwe",
    ),
    "no integer": ({"layers": {0: {"index_topk": 4.5}}}, "index_topk must be an integer, got 4.5"),
    "text": ({"rope_theta": "big"}, "overrides.rope_theta must be between"),
    "a rule": ({"num_experts_per_tok": 99}, "num_experts_per_tok must not exceed n_routed_experts"),
    "a rule in a layer": (
        {"layers": {0: {"num_experts_per_tok": 99}}},
        "num_experts_per_tok must not exceed n_routed_experts",
    ),
}


@pytest.mark.parametrize("overrides, message", BAD.values(), ids=BAD.keys())
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        override(TINY, overrides)
