"""`v4jax convert`, on tiny checkpoints."""

import pytest
from checkpoint import folders
from oracle import checkpoints
from training import one_layer

from v4jax.checkpoint import read_model
from v4jax.cli import main

MINI = one_layer.__file__


def convert(*arguments: str) -> int:
    """Runs the verb."""
    return main.run(["convert", *arguments])


def test_released_to_released_and_bfloat16(tmp_path, capsys):
    tensors = folders.tensors_of()
    folders.write(tmp_path / "in", tensors)
    assert convert(f"--model={tmp_path}/in", f"--output={tmp_path}/same") == 0
    written, _ = checkpoints.read_checkpoint(tmp_path / "same")
    assert all(folders.same_bytes(written[name], array) for name, array in tensors.items())
    plain = ("--format=bfloat16", "--shard_gib=0.0001")
    assert convert(f"--model={tmp_path}/in", f"--output={tmp_path}/plain", *plain) == 0
    written, _ = checkpoints.read_checkpoint(tmp_path / "plain")
    assert written.keys() == checkpoints.dequantize(tensors).keys()
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    assert "save: wrote" in capsys.readouterr().err


def test_a_configuration_gives_random_weights(tmp_path, capsys):
    for seed in (1, 2):
        assert convert(f"--model={MINI}", f"--output={tmp_path}/{seed}", f"--seed={seed}") == 0
    assert f"{MINI}: random weights (seed 2)" in capsys.readouterr().err
    first, second = (folders.stored_tensors(read_model(tmp_path / str(seed))) for seed in (1, 2))
    assert first["head.weight"].tobytes() != second["head.weight"].tobytes()


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
    for name, value in {"COORDINATOR": "h:1", "PROCESS_INDEX": "1", "PROCESS_COUNT": "2"}.items():
        monkeypatch.setenv(f"V4JAX_{name}", value)
    assert convert("--model=tiny", f"--output={tmp_path}/out") == 2
    assert "process 1 of 2 (explicit), coordinator h:1: convert runs in one process" in (
        capsys.readouterr().err
    )


# {what is wrong: (flags, what the message must say)}; {tmp} is a folder, {in} a good checkpoint.
BROKEN = {
    "no input": (["--output={tmp}/out"], "--model is required"),
    "no output": (["--model={in}"], "--output is required"),
    "positional": (["--model={in}", "--output={tmp}/out", "more"], "unexpected argument 'more'"),
    "format": (["--model={in}", "--output={tmp}/out", "--format=int4"], "format"),
    "shard size": (
        ["--model={in}", "--output={tmp}/out", "--shard_gib=0"],
        "--shard_gib must be between 1e-06 and 1048576, got 0.0",
    ),
    "too large": (["--model=v4_flash", "--output={tmp}/out"], "too many for random weights"),
    "no such model": (["--model={tmp}/none", "--output={tmp}/out"], "a folder with config.json"),
    "no checkpoint": (
        ["--model={tmp}", "--output={tmp}/out"],
        "config.json cannot be read: No such file",
    ),
    "adapters of nothing": (
        ["--model={in}", "--output={tmp}/out", "--adapters_to=peft"],
        "give --adapters, or --run",
    ),
    "adapters in a format": (
        [
            *("--model={in}", "--output={tmp}/out"),
            *("--adapters=a", "--adapters_to=peft", "--format=bfloat16"),
        ],
        "takes no --format",
    ),
    "adapters of no naming": (
        ["--model={in}", "--output={tmp}/out", "--adapters=a", "--adapters_to=transformers"],
        "should be one of",
    ),
    "full output": (["--model={in}", "--output={in}"], "exists and is not empty"),
}


@pytest.mark.parametrize("flags, message", BROKEN.values(), ids=BROKEN.keys())
def test_bad_requests(tmp_path, capsys, flags, message):
    folders.write(tmp_path / "in")
    names = {"tmp": tmp_path, "in": tmp_path / "in"}
    assert convert(*(flag.format(**names) for flag in flags)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_input_leaves_no_output(tmp_path, capsys):
    tensors = folders.tensors_of()
    del tensors["norm.weight"]
    folders.write(tmp_path / "in", tensors)
    assert convert(f"--model={tmp_path}/in", f"--output={tmp_path}/out") == 2
    assert "tensor norm.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
