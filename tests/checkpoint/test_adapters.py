"""Adapters in PEFT's layout: names and shapes as documented, the same bits back, broken input."""

import dataclasses
import json
import re

import folder_bucket
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from v4jax.checkpoint.adapters import choose_naming, read_adapters, write_adapters
from v4jax.config import get_numerics
from v4jax.config.loading import load_model_config
from v4jax.errors import CheckpointError
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, write_weights
from v4jax.quant import LowRank

RANK, SCALE = 3, 0.5
CONFIG = load_model_config("tiny")
# Of a prefix layer, of a scanned one, with experts, gate and up, and outside the layers.
ADAPTED = (
    "stack.prefix.0.attention.query_up",
    "stack.period.0.attention.indexer.compressor.gate",
    "stack.period.1.moe.experts.gate_up",
    "stack.suffix.0.moe.shared.down",
    "stack.suffix.0.attention.output_down",
    "mtp.0.block.attention.output_down",
    "head",
)


@pytest.fixture(scope="module")
def model():
    numerics = get_numerics("bfloat16")
    return Transformer(CONFIG, numerics, storage="released", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def adapted(model):
    random, weights = np.random.RandomState(0), read_weights(model)

    def adapt(base):
        *lead, rows, columns = base.shape
        down, up = (
            jnp.asarray(random.standard_normal(shape).astype(np.float32))
            for shape in ((*lead, RANK, columns), (*lead, rows, RANK))
        )
        return LowRank(base, down, up, SCALE, "bfloat16", rounds_inputs=False)

    return write_weights(model, {name: adapt(weights[name]) for name in ADAPTED})


# {module: (name of the weight, index of its leading axes)}.
RELEASED = {
    "layers.0.attn.wq_b": ("stack.prefix.0.attention.query_up", ()),
    "layers.3.attn.indexer.compressor.wgate": (
        "stack.period.0.attention.indexer.compressor.gate",
        (1,),
    ),
    "layers.2.ffn.experts.7.w1": ("stack.period.1.moe.experts.gate_up", (0, 7, 0)),
    "layers.4.ffn.experts.0.w3": ("stack.period.1.moe.experts.gate_up", (1, 0, 1)),
    "layers.5.ffn.shared_experts.w2": ("stack.suffix.0.moe.shared.down", ()),
    "layers.5.attn.wo_a": ("stack.suffix.0.attention.output_down", ()),
    "mtp.0.attn.wo_a": ("mtp.0.block.attention.output_down", ()),
    "head": ("head", ()),
}
# Of single matrices; what PEFT calls them, and whether it has to wrap their parameter `weight`.
PEFT = {
    "model.layers.0.self_attn.q_b_proj": ("layers.0.attn.wq_b", False),
    "model.layers.3.self_attn.compressor.indexer.gate_proj": (
        "layers.3.attn.indexer.compressor.wgate",
        False,
    ),
    "model.layers.5.mlp.shared_experts.down_proj": ("layers.5.ffn.shared_experts.w2", False),
    "model.layers.5.self_attn.o_a_proj": ("layers.5.attn.wo_a", True),
    "lm_head": ("head", False),
}


def check_same(again, adapted):
    assert jax.tree.structure(again) == jax.tree.structure(adapted)  # scale and dtype included
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def read_folder(folder):
    """Returns the tensors, those of MTP, and the configuration."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    extra = folder / "adapter_mtp.safetensors"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 1.5)
    return tensors, safetensors.numpy.load_file(extra) if extra.exists() else {}, config


def test_released_names_and_back(tmp_path, model, adapted):
    write_adapters(adapted, tmp_path / "out", "released")
    tensors, extra, config = read_folder(tmp_path / "out")
    # Two layers of eight experts with gate and up; two scanned indexers; five single matrices.
    assert (len(tensors), extra) == (2 * (2 * 8 * 2 + 2 + 5), {})
    values = read_weights(adapted)
    for module, (name, index) in RELEASED.items():
        value, prefix = values[name], f"base_model.model.{module}"
        np.testing.assert_array_equal(tensors[prefix + ".lora_A.weight"], value.down[index])
        np.testing.assert_array_equal(tensors[prefix + ".lora_B.weight"], value.up[index])
    for tensor in tensors:
        module = re.fullmatch(r"base_model\.model\.(.*)\.lora_[AB]\.weight", tensor)[1]
        assert re.fullmatch(config["target_modules"], module), module
    assert not re.fullmatch(config["target_modules"], "layers.0.attn.wkv")
    check_same(read_adapters(model, tmp_path / "out"), adapted)
    with pytest.raises(CheckpointError, match="has adapters already"):
        read_adapters(adapted, tmp_path / "out")


def test_names_of_peft_and_back(tmp_path, model, adapted):
    write_adapters(adapted, tmp_path / "out")
    tensors, extra, config = read_folder(tmp_path / "out")
    # Gate and up of all experts are one module in each of two layers; MTP is apart.
    assert (len(tensors), len(extra)) == (2 * (2 + 2 + 4), 2)
    assert all(name.startswith("base_model.model.mtp.0.attn.wo_a.lora_") for name in extra)
    values = read_weights(adapted)
    for module, (released, is_parameter) in PEFT.items():
        name, index = RELEASED[released]
        value, prefix = values[name], f"base_model.model.{module}"
        np.testing.assert_array_equal(tensors[prefix + ".lora_A.weight"], value.down[index])
        np.testing.assert_array_equal(tensors[prefix + ".lora_B.weight"], value.up[index])
        target = (
            (module + ".weight", "target_parameters")
            if is_parameter
            else (
                module,
                "target_modules",
            )
        )
        assert target[0] in config[target[1]]
    experts = [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (2, 4)]
    assert set(experts) < set(config["target_parameters"])
    assert len(config["target_modules"]) == 5 and len(config["target_parameters"]) == 3
    (pattern,) = config["rank_pattern"]
    assert config["rank_pattern"] == {pattern: 6} and config["alpha_pattern"] == {pattern: 3.0}
    assert all(re.match(rf"(.*\.)?({pattern})$", name) for name in experts)
    value = values["stack.period.1.moe.experts.gate_up"]
    down, up = (tensors[f"base_model.model.{experts[1][:-13]}.lora_{x}.weight"] for x in "AB")
    # PEFT multiplies [experts, out, rank] and [experts, rank, in]; gate is above up.
    made = np.einsum("ore,eri->eoi", up.reshape(-1, 6, 8), down.reshape(8, 6, -1))
    expected = np.einsum("esor,esri->esoi", value.up[1], value.down[1])
    np.testing.assert_allclose(made, expected.reshape(made.shape), rtol=1e-5, atol=1e-5)
    check_same(read_adapters(model, tmp_path / "out"), adapted)


def test_ranks_and_scales_by_weight(tmp_path, model, adapted):
    """Each weight may have its own; in PEFT's file they are patterns."""
    weights = read_weights(adapted)
    head = weights["head"]
    other = dataclasses.replace(head, down=head.down[:2], up=head.up[:, :2], scale=4.0)
    mixed = write_weights(adapted, {"head": other})
    for naming in ("peft", "released"):
        write_adapters(mixed, tmp_path / naming, naming)
        check_same(read_adapters(model, tmp_path / naming), mixed)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["rank_pattern"]["lm_head"], config["alpha_pattern"]["lm_head"]) == (2, 8.0)


def test_in_a_bucket(tmp_path, model, adapted, bucket):
    write_adapters(adapted, tmp_path / "out")
    write_adapters(adapted, f"{bucket}/out")
    names = [f"adapter_{name}" for name in ("config.json", "model.safetensors", "mtp.safetensors")]
    assert folder_bucket.names(f"{bucket}/out") == names
    for file in (tmp_path / "out").iterdir():
        assert folder_bucket.read(f"{bucket}/out/{file.name}") == file.read_bytes()
    again = read_adapters(model, f"{bucket}/out")
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(CheckpointError, match="s3://bucket/out exists and is not empty"):
        write_adapters(adapted, f"{bucket}/out")


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


EXPERT = "base_model.model.layers.2.ffn.experts.7.w1.lora_B.weight"
BROKEN_TENSORS = {
    "a factor is missing": (
        lambda tensors: tensors.pop(EXPERT),
        "have no layers.2.ffn.experts.7.w1.lora_B.weight, but others beside it",
    ),
    "another rank": (
        lambda tensors: tensors.update({EXPERT: np.zeros((32, 4), np.float32)}),
        "must have shape [32, 3], got [32, 4]",
    ),
    "another model": (
        lambda tensors: tensors.update({EXPERT.replace(".7.", ".9."): tensors[EXPERT]}),
        "fits no module of this model",
    ),
    "no tensor": (lambda tensors: tensors.clear(), "holds no adapters: it has no tensor"),
    "whole numbers": (
        lambda tensors: tensors.update({EXPERT: np.zeros((32, 3), np.int32)}),
        "must have dtype F32 or BF16 or F16, got I32",
    ),
    "no number": (
        lambda tensors: tensors[EXPERT].__setitem__((4, 1), np.nan),
        "must hold finite numbers, got the F32 code 0x7FC00000 (infinity or NaN) at [4, 1]",
    ),
    "too large a number": (
        lambda tensors: tensors[EXPERT].__setitem__((0, 2), -np.inf),
        "must hold finite numbers, got the F32 code 0xFF800000 (infinity or NaN) at [0, 2]",
    ),
    "no LoRA": (
        lambda tensors: tensors.update({"base_model.model.head.lora_magnitude": tensors[EXPERT]}),
        "is no LoRA factor",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS.values(), ids=BROKEN_TENSORS.keys())
def test_broken_tensors(tmp_path, model, adapted, case):
    change, message = case
    write_adapters(adapted, tmp_path / "out", "released")
    change_tensors(tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_adapters(model, tmp_path / "out")


BROKEN_CONFIGS = {
    "another kind of adapter": ({"use_dora": True}, "use_dora must be False, got True"),
    "another scale": ({"use_rslora": True}, "use_rslora must be False"),
    "another rank": (
        {"rank_pattern": {"self_attn.q_b_proj": 8}},
        "layers.0.self_attn.q_b_proj.lora_A.weight",
    ),
    "no pattern": ({"rank_pattern": {"(": 8}}, "rank_pattern has '(', no regular expression"),
    "patterns of nothing": ({"alpha_pattern": [3]}, "alpha_pattern must be a JSON object, got [3]"),
    "a pattern's scale": ({"alpha_pattern": {"x": 0}}, "alpha_pattern of 'x' must be a number"),
    "parameters": ({"target_parameters": "experts"}, "target_parameters must be a list of names"),
    "which parameter": ({"target_parameters": []}, "must name one of the two"),
    "another method": ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
    "no rank": ({"r": None}, "r must be an integer between 1 and 65536, got None"),
    "true for a rank": ({"r": True}, "r must be an integer between 1 and 65536, got True"),
    "absurd rank": ({"r": 10**11}, "r must be an integer between 1 and 65536, got 100000000000"),
    "no scale": ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0 and at most"),
    "endless scale": ({"lora_alpha": float("inf")}, "lora_alpha must be a number above 0"),
    "absurd scale": ({"lora_alpha": 10**400}, "lora_alpha must be a number above 0"),
    "some layers": ({"layers_to_transform": [1]}, "layers_to_transform must be None, got [1]"),
    "unknown field": ({"use_magic": 7}, "'use_magic' (= 7) is unknown and could change"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS.keys())
def test_broken_configs(tmp_path, model, adapted, case):
    changes, message = case
    write_adapters(adapted, tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_adapters(model, tmp_path / "out")


BROKEN_FILES = {
    "no object": ("[3]", "adapter_config.json must hold a JSON object, got [3]"),
    "nested without end": ("[" * 100_000, "adapter_config.json is no JSON: nested too deeply"),
    "no JSON": ("{", "adapter_config.json is no JSON"),
}


@pytest.mark.parametrize("case", BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_broken_files(tmp_path, model, case):
    text, message = case
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_adapters(model, tmp_path)


def test_what_cannot_be_written(tmp_path, model, adapted):
    with pytest.raises(CheckpointError, match="no adapters to write"):
        write_adapters(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="naming must be peft or released"):
        write_adapters(adapted, tmp_path / "out", "transformers")
    name = "mtp.0.block.attention.output_down"
    alone = write_weights(model, {name: read_weights(adapted)[name]})
    assert (choose_naming(alone), choose_naming(adapted)) == ("released", "peft")
    with pytest.raises(CheckpointError, match="PEFT can attach none; write them with the naming"):
        write_adapters(alone, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        write_adapters(adapted, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapters(model, tmp_path / "none")
