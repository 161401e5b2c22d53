"""The transformers layout: transformers reads what we write, we read what it writes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracle import checkpoints, hf  # noqa: E402

from v4jax.checkpoint import read_model, write_model  # noqa: E402

from . import folders  # noqa: E402

pytestmark = pytest.mark.oracle

CONFIGS = {"flash": checkpoints.FLASH_TINY, "pro": checkpoints.PRO_TINY}
TOKENS = np.arange(60) * 7 % 150


def load(folder):
    """Returns transformers' model of a folder in float32, and what it complained about."""
    model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    return model.eval(), {key: found for key, found in report.items() if found}


@pytest.mark.parametrize("format", ["transformers", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_reads_what_we_write(tmp_path, config, format):
    tensors = folders.tensors_of(config)
    folders.write(tmp_path / "in", tensors, config)
    write_model(read_model(tmp_path / "in"), tmp_path / "out", format, shard_bytes=500_000)
    model, complaints = load(tmp_path / "out")
    assert not complaints
    expected = hf.forward(hf.build(checkpoints.dequantize(tensors), config), TOKENS)
    assert np.array_equal(hf.forward(model, TOKENS), expected)


@pytest.mark.parametrize(
    ("dtype", "original"), [("float32", True), ("bfloat16", True), ("float32", False)]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_we_read_what_transformers_writes(tmp_path, config, dtype, original):
    """Under the names of the checkpoint it read, or under those of its own modules."""
    plain = checkpoints.dequantize(folders.tensors_of(config))
    theirs = hf.build(plain, config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="300KB", save_original_format=original)
    model = read_model(tmp_path)
    assert model.config.num_nextn_predict_layers == 0 and not model.mtp
    found = folders.stored_tensors(model)
    assert found.keys() == {name for name in plain if not name.startswith("mtp.")}
    for name, array in found.items():
        expected = plain[name]
        if dtype == "bfloat16" and expected.dtype == np.float32:
            bits = torch.from_numpy(expected).to(torch.bfloat16)
            expected = bits.to(torch.float32).numpy()
        assert np.array_equal(array.astype(expected.dtype), expected), name
