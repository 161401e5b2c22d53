"""Reading: every tensor at its place, in every layout and format."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import checkpoints

from v4jax.checkpoint import names, read_abstract, read_model
from v4jax.checkpoint.hf_folder import open_folder
from v4jax.errors import CheckpointError
from v4jax.model.weights import variables
from v4jax.quant import ScaledArray

from . import folders

CONFIGS = {
    "prefix, period, suffix": folders.SMALL,
    "long prefix": folders.ODD,
    "period alone": folders.UNIFORM,
    "nothing repeats": folders.SINGLE,
    "two mtp blocks": folders.TWO_MTP,
    "flash": checkpoints.FLASH_TINY,
    "pro": checkpoints.PRO_TINY,
}


def as_stored(array: np.ndarray) -> np.ndarray:
    """Returns a checkpoint's array as the model keeps it."""
    if array.dtype == np.int64:
        return array.astype(np.int32)
    if array.dtype in (np.dtype(np.int8), np.dtype(ml_dtypes.float8_e8m0fnu)):
        return array.view(np.uint8)
    return array


def check_holds(model, tensors):
    """Asserts that the model holds exactly these tensors."""
    found = folders.stored_tensors(model)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert folders.same_bytes(found[name], as_stored(array)), name


@pytest.mark.parametrize("kind", ["released", "base"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_tensor_lies_at_its_place(tmp_path, config, kind):
    tensors = folders.tensors_of(config, kind)
    model = read_model(folders.write(tmp_path, tensors, config), "float32")
    check_holds(model, tensors)
    assert model.folder == tmp_path and model.numerics.name == "float32"
    assert model.config.expert_dtype == ("fp4" if kind == "released" else "fp8")
    assert len(model.mtp) == config["num_nextn_predict_layers"]


def test_formats_stay_packed_in_memory(tmp_path):
    model = read_model(folders.write(tmp_path))
    experts = model.stack.period[0].moe.experts.gate_up.get_value()
    assert isinstance(experts, ScaledArray) and experts.is_fp4 and experts.block == (1, 32)
    assert experts.shape == (2, 4, 2, 32, 64)
    assert experts.values.dtype == experts.scales.dtype == jnp.uint8
    query = model.stack.prefix[0].attention.query_up.get_value()
    assert query.values.dtype == jnp.float8_e4m3fn and query.block == (128, 128)
    assert model.stack.prefix[0].moe.router.table.get_value().dtype == jnp.int32
    for variable in variables(model).values():
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variable.get_value()))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_plain_tensors_take_the_place_of_quantized_ones(tmp_path, dtype):
    plain = checkpoints.dequantize(folders.tensors_of())
    tensors = {
        name: array if array.dtype == np.int64 else array.astype(dtype)
        for name, array in plain.items()
    }
    model = read_model(folders.write(tmp_path, tensors))
    found = folders.stored_tensors(model)
    for name, array in tensors.items():
        assert np.array_equal(found[name].astype(np.float32), array.astype(np.float32)), name
    kept = {place.tensor: place.stored for place in names.places(model.config)}
    for name, array in found.items():
        if kept[name] is names.Stored.FLOAT32:
            assert array.dtype == np.float32
        elif kept[name] is not names.Stored.TABLE:
            assert array.dtype == dtype


def test_bfloat16_beside_float32_is_widened(tmp_path):
    tensors = folders.tensors_of(kind="bfloat16")
    name = "layers.3.attn_norm.weight"
    tensors[name] = tensors[name].astype(np.float32)
    model = read_model(folders.write(tmp_path, tensors))
    assert model.stack.period[0].attention_norm.weight.get_value().dtype == jnp.float32
    assert model.stack.period[1].attention_norm.weight.get_value().dtype == jnp.bfloat16


def scales_as(tensors, dtype):
    """Returns the same checkpoint with scales of another dtype."""
    out = dict(tensors)
    for name, array in tensors.items():
        if name.endswith(".scale"):
            out[name] = array.view(np.uint8) if dtype == np.uint8 else array.astype(dtype)
    return out


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, np.uint8, np.float32])
def test_scales_of_every_dtype(tmp_path, dtype):
    original = folders.tensors_of()
    model = read_model(folders.write(tmp_path, scales_as(original, dtype)))
    plain = checkpoints.dequantize(original)
    value = model.stack.suffix[0].moe.experts.down.get_value()
    assert value.scales.dtype == (np.float32 if dtype == np.float32 else np.uint8)
    for expert in range(4):
        expected = plain[f"layers.5.ffn.experts.{expert}.w2.weight"]
        assert np.array_equal(np.asarray(value.dequantize())[expert], expected)


def test_expert_dtype_comes_from_the_tensors_when_nothing_says_it(tmp_path):
    folders.write(tmp_path, folders.tensors_of(kind="base"))
    folders.change_json(tmp_path / "config.json", lambda raw: raw.pop("expert_dtype"))
    assert read_model(tmp_path).config.expert_dtype == "fp8"


def test_one_file_without_an_index(tmp_path):
    folders.write(tmp_path, shards=1)
    (tmp_path / folders.INDEX).unlink()
    check_holds(read_model(tmp_path), folders.tensors_of())


def rename_for_transformers(tensors, keep_mtp=False):
    """Returns the tensors under transformers' names."""
    return {
        names.to_transformers(name): array
        for name, array in tensors.items()
        if keep_mtp or not name.startswith("mtp.")
    }


@pytest.mark.parametrize("keep_mtp", [False, True])
def test_transformers_layout(tmp_path, keep_mtp):
    tensors = folders.tensors_of(kind="bfloat16")
    model = read_model(folders.write(tmp_path, rename_for_transformers(tensors, keep_mtp)))
    check_holds(model, {k: v for k, v in tensors.items() if keep_mtp or not k.startswith("mtp.")})
    assert len(model.mtp) == model.config.num_nextn_predict_layers == int(keep_mtp)


def stack_for_transformers(tensors):
    """Returns the tensors as transformers' modules have them, the experts of a layer in two."""
    written, stacks = {}, {}
    modules = sorted(names.MODULES, key=lambda pair: -len(pair[0]))
    for name, array in tensors.items():
        expert = re.fullmatch(r"(layers\.\d+)\.ffn\.experts\.(\d+)\.(w\d)\.(\w+)", name)
        layer = re.fullmatch(r"(layers\.\d+)\.(.*)", name)
        if expert:
            stacked = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}[expert[3]]
            ending = "" if expert[4] == "weight" else "_scale_inv"
            key = f"model.{expert[1]}.mlp.experts.{stacked}{ending}"
            stacks.setdefault(key, {}).setdefault(int(expert[2]), {})[expert[3]] = array
        elif layer:
            released, module = next(p for p in modules if f"{layer[2]}.".startswith(f"{p[0]}."))
            ending = re.sub(r"^\.scale$", ".weight_scale_inv", layer[2].removeprefix(released))
            written[f"model.{layer[1]}.{module}{ending}"] = array
        else:
            known = {"head.weight": "lm_head.weight"}
            written[known.get(name, names.to_transformers(name))] = array
    for key, experts in stacks.items():
        rows = [np.concatenate([e[part] for part in sorted(e)]) for _, e in sorted(experts.items())]
        written[key] = np.stack(rows)
    return written


@pytest.mark.parametrize("kind", ["released", "base", "bfloat16"])
def test_names_of_transformers_modules(tmp_path, kind):
    """What `save_original_format=False` writes, also of quantized weights."""
    tensors = {n: a for n, a in folders.tensors_of(kind=kind).items() if not n.startswith("mtp.")}
    written = stack_for_transformers(tensors)
    assert "model.layers.0.self_attn.q_a_proj.weight" in written
    assert not any(re.search(r"experts\.\d", name) for name in written)
    assert open_folder(folders.write(tmp_path, written)).layout == "transformers"
    check_holds(read_model(tmp_path), tensors)


def test_stacked_experts_of_another_count(tmp_path):
    written = stack_for_transformers(folders.tensors_of(kind="bfloat16"))
    key = "model.layers.2.mlp.experts.down_proj"
    folders.write(tmp_path, written | {key: written[key][:3]})
    with pytest.raises(CheckpointError, match=r"layers.2.ffn.experts.0.w2.weight is missing"):
        read_model(tmp_path)


def test_abstract_model_has_the_formats_of_the_files(tmp_path):
    folders.write(tmp_path, folders.tensors_of(kind="base"))
    abstract, real = read_abstract(tmp_path), read_model(tmp_path)
    for path, variable in variables(real).items():
        other = variables(abstract)[path].get_value()
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variable.get_value())
        assert jax.tree.map(lambda x: (x.shape, x.dtype), other) == shapes, path


def test_put_places_every_array(tmp_path):
    seen = []

    def put(path, array):
        seen.append(path)
        return jax.device_put(array)

    model = read_model(folders.write(tmp_path), put=put)
    assert set(seen) == set(variables(model))
