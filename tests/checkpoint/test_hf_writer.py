"""Writing: released files come back byte for byte, other formats hold the same numbers."""

import errno
import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from oracle import checkpoints, quantizers

from v4jax.checkpoint import hf_writer, names, new_folder, read_model, write_model
from v4jax.config import get_numerics
from v4jax.config.loading import load_model_config
from v4jax.errors import CheckpointError
from v4jax.model import Transformer
from v4jax.quant import ScaledArray

from . import folders

CONFIGS = {
    "prefix, period, suffix": folders.SMALL,
    "long prefix": folders.ODD,
    "nothing repeats": folders.SINGLE,
    "two mtp blocks": folders.TWO_MTP,
    "pro": checkpoints.PRO_TINY,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small released checkpoint, read."""
    return read_model(folders.write(tmp_path_factory.mktemp("small")), "float32")


@pytest.fixture(scope="module")
def float_model():
    """A tiny model with float32 weights."""
    config, numerics = load_model_config("tiny"), get_numerics("float32")
    return Transformer(config, numerics, storage="float32", rngs=nnx.Rngs(3))


def check_same(written, expected):
    """Asserts equal names, dtypes and bytes."""
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        assert folders.same_bytes(written[name], array), name


@pytest.mark.parametrize("kind", ["released", "base"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_released_files_come_back_byte_for_byte(tmp_path, config, kind, capsys):
    tensors = folders.tensors_of(config, kind)
    folders.write(tmp_path / "in", tensors, config)
    write_model(read_model(tmp_path / "in"), tmp_path / "out")
    written, raw = checkpoints.read_checkpoint(tmp_path / "out")
    check_same(written, tensors)
    original = json.loads((tmp_path / "in" / "config.json").read_text())
    assert raw == {k: v for k, v in original.items() if k != "transformers_version"}
    assert "warning" not in capsys.readouterr().err


def test_plain_files_come_back_byte_for_byte(tmp_path):
    tensors = folders.tensors_of(kind="bfloat16")
    folders.write(tmp_path / "in", tensors)
    write_model(read_model(tmp_path / "in"), tmp_path / "out", "bfloat16")
    written, raw = checkpoints.read_checkpoint(tmp_path / "out")
    check_same(written, tensors)
    assert "quantization_config" not in raw and raw["torch_dtype"] == "bfloat16"


def test_byte_scales_come_back_as_e8m0(tmp_path):
    tensors = folders.tensors_of()
    as_bytes = {k: v.view(np.uint8) if k.endswith(".scale") else v for k, v in tensors.items()}
    folders.write(tmp_path / "in", as_bytes)
    write_model(read_model(tmp_path / "in"), tmp_path / "out")
    check_same(checkpoints.read_checkpoint(tmp_path / "out")[0], tensors)


def test_bfloat16_holds_quantized_weights_exactly(tmp_path, small):
    write_model(small, tmp_path / "out", "bfloat16")
    written, _ = checkpoints.read_checkpoint(tmp_path / "out")
    expected = checkpoints.dequantize(folders.tensors_of())
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(written[name].astype(array.dtype), array), name
    assert written["layers.1.attn.wo_a.weight"].dtype == ml_dtypes.bfloat16
    assert written["layers.1.attn.attn_sink"].dtype == np.float32


def test_transformers_layout_reads_back_with_its_mtp(tmp_path, small):
    write_model(small, tmp_path / "out", "transformers")
    written, raw = checkpoints.read_checkpoint(tmp_path / "out")
    assert {names.from_transformers(name) for name in written} == set(
        checkpoints.tensor_table(folders.SMALL)
    )
    assert raw["layer_types"][0] == "sliding_attention" and raw["dtype"] == "bfloat16"
    again = read_model(tmp_path / "out")
    assert again.config == small.config
    expected = checkpoints.dequantize(folders.tensors_of())
    for name, array in folders.stored_tensors(again).items():
        assert np.array_equal(array.astype(expected[name].dtype), expected[name]), name


def test_float_weights_are_quantized_as_released(tmp_path, float_model, capsys):
    write_model(float_model, tmp_path / "out")
    matrices = sum(
        place.stored in (names.Stored.FP8, names.Stored.EXPERT)
        for place in names.places(float_model.config)
    )
    assert f"{matrices:,} matrices are plain in memory and get rounded" in capsys.readouterr().err
    written, raw = checkpoints.read_checkpoint(tmp_path / "out")
    held = folders.stored_tensors(float_model)
    for place in names.places(float_model.config):
        name, scale = place.tensor, names.scale_name(place.tensor)
        if place.stored in (names.Stored.FP8, names.Stored.EXPERT):
            fp4 = place.stored is names.Stored.EXPERT
            quantize = quantizers.quantize_fp4_weight if fp4 else quantizers.quantize_fp8_weight
            values, scales = quantize(held[name])
            assert folders.same_bytes(written[name], values), name
            assert folders.same_bytes(written[scale], quantizers.encode_scales(scales)), name
        else:
            assert np.array_equal(written[name], held[name].astype(written[name].dtype)), name
    assert raw["expert_dtype"] == "fp4" and raw["v4jax_tokenizer"] == "byte"
    assert read_model(tmp_path / "out").config == float_model.config


def test_float32_stays_float32_for_transformers(tmp_path, float_model):
    write_model(float_model, tmp_path / "out", "transformers")
    again = read_model(tmp_path / "out")
    check_same(folders.stored_tensors(again), folders.stored_tensors(float_model))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["dtype"] == "float32"


def test_shards_keep_weights_with_their_scales(tmp_path, small):
    write_model(small, tmp_path / "out", shard_bytes=40_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / folders.INDEX).read_text())
    tensors = folders.tensors_of()
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 5
    for name, file in index["weight_map"].items():
        if name.endswith(".scale"):
            assert index["weight_map"][name.removesuffix("scale") + "weight"] == file
    assert all(file.stat().st_size < 100_000 for file in files)  # 40,000 and the header
    check_same(checkpoints.read_checkpoint(tmp_path / "out")[0], tensors)


def test_tokenizer_files_come_along(tmp_path):
    folders.write(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    write_model(read_model(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)


def test_what_a_folder_says_of_conversations_comes_along(tmp_path):
    """End tokens and prompt profile, as files beside config.json gave them."""
    folders.write(tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (tmp_path / "in" / "chat_template.jinja").write_text("Reasoning Effort: Beyond maximum")
    write_model(read_model(tmp_path / "in"), tmp_path / "out")
    written = read_model(tmp_path / "out").config
    assert (written.end_token_ids, written.profile) == ((1, 7), "0731")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 7]


def left_behind(folder):
    """Returns what is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_empty_target_is_taken_and_full_target_refused(tmp_path, small):
    (tmp_path / "out").mkdir()
    write_model(small, tmp_path / "out")
    before = left_behind(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out exists and is not empty; remove it"):
        write_model(small, tmp_path / "out")
    assert left_behind(tmp_path / "out") == before and left_behind(tmp_path) == ["out"]


def test_unknown_format(tmp_path, small):
    with pytest.raises(CheckpointError, match=r"format must be one of .*got 'fp16'"):
        write_model(small, tmp_path / "out", "fp16")


def test_full_disk_leaves_nothing(tmp_path, small, monkeypatch):
    real, written = new_folder.as_bytes, []

    def encode(tensor, values):
        if len(written) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tensor.name)
        return real(tensor, values)

    monkeypatch.setattr(new_folder, "as_bytes", encode)
    with pytest.raises(CheckpointError, match=r"out cannot be written: No space left on device"):
        write_model(small, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_interruption_leaves_nothing(tmp_path, small, monkeypatch):
    def interrupt(tensor, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(new_folder, "as_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_model(small, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_unwritable_target(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: Not a directory"):
        write_model(small, tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match=r"file exists and is not empty"):
        write_model(small, tmp_path / "file")


def test_formats_of_what_is_written(small):
    pieces = hf_writer.plan_pieces(small, "released")
    by_name = {place.tensor: group for place, group in pieces.items()}
    dtypes = [piece.dtype for piece in by_name["layers.3.ffn.experts.1.w3.weight"]]
    assert dtypes == ["I8", "F8_E8M0"]
    assert [piece.dtype for piece in by_name["layers.0.ffn.gate.tid2eid"]] == ["I64"]
    assert isinstance(small.stack.suffix[0].moe.experts.down.get_value(), ScaledArray)
