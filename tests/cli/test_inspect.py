"""`v4jax inspect`: the published totals, and a table of every parameter."""

import json

import pytest
from checkpoint import folders

from v4jax.cli import main


def inspect(capsys, *arguments: str) -> str:
    """Returns what a command prints."""
    assert main.run(["inspect", *arguments]) == 0
    return capsys.readouterr().out


LINES = {
    "v4_flash": [
        "parameters       290,942,289,362 (284,332,240,471 without the blocks that draft)",
        "stored elements  158,069,433,298 ",
        "files            159,609,485,896 bytes in 69,187 tensors",
    ],
    "v4_pro": [
        "parameters       1,598,837,347,742 (1,572,997,201,763 without the blocks that draft)",
        "stored elements  861,608,274,846 ",
        "files            864,704,792,696 bytes in 145,116 tensors",
    ],
}


@pytest.mark.parametrize("name", LINES)
def test_totals_of_the_released_models(capsys, name):
    shown = inspect(capsys, f"--model={name}")
    for line in LINES[name]:
        assert line in shown


def test_rows_of_the_table(capsys):
    shown = [line.split() for line in inspect(capsys, "v4_flash").splitlines()]
    rows = {line[0]: line[1:] for line in shown if line}
    path = "stack.period.0.moe.experts.gate_up"
    axes = ["layers", "experts", "pair", "expert_width", "embed"]
    assert rows[path] == ["20×256×2×2048×4096", "fp4", "42.5", "GiB", *axes]
    assert rows["stack.prefix.0.moe.router.table"][:2] == ["129280×6", "int32"]
    assert rows["norm.weight"][:4] == ["4096", "bfloat16", "8.00", "KiB"]


def test_json(capsys):
    raw = json.loads(inspect(capsys, "--model=tiny", "--json"))
    totals = raw["totals"]
    assert totals["memory_bytes"] == sum(row["memory_bytes"] for row in raw["parameters"])
    assert totals["parameters"] == sum(row["parameters"] for row in raw["parameters"])
    assert totals["memory_bytes"] == sum(totals["memory_bytes_by_format"].values())


def test_storage_changes_bytes_and_not_parameters(capsys):
    flags = ("--model=tiny", "--json")
    released, plain = (
        json.loads(inspect(capsys, *flags, f"--storage={storage}"))["totals"]
        for storage in ("released", "float32")
    )
    assert released["parameters"] == plain["parameters"]
    assert released["memory_bytes"] < plain["memory_bytes"] / 2
    assert set(plain["memory_bytes_by_format"]) == {"float32", "int32"}


def test_a_folder_is_shown_as_its_files_are(tmp_path, capsys):
    tensors = folders.tensors_of(kind="base")
    folders.write(tmp_path, tensors)
    totals = json.loads(inspect(capsys, f"--model={tmp_path}", "--json"))["totals"]
    assert totals["file_bytes"] == sum(array.nbytes for array in tensors.values())
    assert totals["tensors"] == len(tensors) and "fp8" in totals["memory_bytes_by_format"]


BROKEN = {
    "no model": ([], "--model is required"),
    "two models": (["--model=tiny", "tiny"], "unexpected argument 'tiny'"),
    "two words": (["tiny", "nano"], "unexpected argument 'nano'"),
    "unknown name": (["--model=v4_flsh"], "did you mean 'v4_flash'?"),
    "unknown flag": (["--model=tiny", "--jason"], "did you mean --json?"),
    "storage": (["--model=tiny", "--storage=int4"], "storage"),
}


@pytest.mark.parametrize("flags, message", BROKEN.values(), ids=BROKEN.keys())
def test_bad_requests(capsys, flags, message):
    assert main.run(["inspect", *flags]) == 2
    assert message in capsys.readouterr().err
