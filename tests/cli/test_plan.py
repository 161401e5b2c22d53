"""`v4jax plan`: what it prints, in which form, and its errors."""

import json

import pytest
from training import mini_model

from v4jax.cli import main

MODEL = mini_model.__file__
MINI = (f"--model={MODEL}", "--topology=v6e-4", "--mesh=expert=2,context=2", "--context=16384")


def plan(capsys, *arguments: str, status: int = 0) -> str:
    """Returns what a command prints."""
    assert main.run(["plan", *arguments]) == status
    return capsys.readouterr().out


def test_text(capsys):
    shown = plan(capsys, *MINI, "--batch=2")
    assert f"{MODEL}: decode on v6e:2x2 (4 chips, a device each), mesh expert=2,context=2" in shown
    for part in ("bytes of one device", "fits: ", "index scores", "all-reduce", "tokens/s"):
        assert part in shown


def test_json(capsys):
    data = json.loads(plan(capsys, *MINI, "--batch=2", "--json"))
    assert (data["regime"], data["fits"], data["mesh"]["context"]) == ("decode", True, 2)
    assert data["sequence_flops"].keys() == data["device_flops"].keys()


def test_all_devices_on_expert_by_default(capsys):
    data = json.loads(
        plan(capsys, f"--model={MODEL}", "--topology=v6e-4", "--context=4096", "--json")
    )
    assert data["mesh"] == {"data": 1, "expert": 4, "context": 1, "tensor": 1}


def test_the_file_of_an_inference(capsys, tmp_path):
    """It gives what it says, a flag goes before it; a document for each part reads it."""
    (tmp_path / "run.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        f"    return ml_collections.ConfigDict(dict(model={MODEL!r}, max_tokens=16384,\n"
        "        chunk_tokens=512, mesh=dict(data=2, expert=2)))\n"
    )
    given = (f"--config={tmp_path}/run.py", "--topology=v6e-4")
    shown = plan(capsys, *given)
    assert f"{MODEL}: decode on v6e:2x2" in shown and "each), mesh data=2,expert=2\n" in shown
    assert "4 sequences of 16,384 tokens, one token of each" in shown and "float32" in shown
    shown = plan(capsys, *given, "--regime=prefill", "--mesh=expert=4", "--numerics=bfloat16")
    assert "1 sequences of 16,384 tokens, 512 tokens of each" in shown and "bfloat16" in shown


def test_a_plan_that_does_not_fit_says_so_by_its_status(capsys):
    arguments = (f"--model={MODEL}", "--topology=v5e-1", "--batch=100000", "--context=1048576")
    shown = plan(capsys, *arguments, status=1)
    assert "DOES NOT FIT" in shown and "smallest change: --batch=" in shown


def test_chips(capsys):
    shown = plan(capsys, "--chips")
    for name in ("v5e", "v5p", "v6e", "tpu7x", "h100", "h200"):
        assert any(line.startswith(name) for line in shown.splitlines())
    assert json.loads(plan(capsys, "--chips", "--json"))["v6e"]["hbm_bytes"] == 32 * 2**30


BROKEN = {
    "inference to train": (
        ["--topology=v6e-4", "--regime=train", "--config=run.py"],
        "--config is of an inference, which --regime=train does not plan",
    ),
    "no topology": ([], "--topology is required"),
    "topology": (["--topology=v6e-3"], "usual are v6e-1, v6e-4"),
    "mesh": (["--topology=v6e-4", "--mesh=expert=3"], "must multiply to the 4 devices"),
    "positional": (["v4_flash"], "unexpected argument 'v4_flash'"),
    "model": (["--topology=v6e-4", "--model=v4_flsh"], "did you mean 'v4_flash'?"),
}


@pytest.mark.parametrize("flags, message", BROKEN.values(), ids=BROKEN.keys())
def test_bad_requests(capsys, flags, message):
    assert main.run(["plan", *flags]) == 2
    assert message in capsys.readouterr().err
