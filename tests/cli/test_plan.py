"""`v4jax plan`: what it prints, in which form, and its errors."""

import json
from types import SimpleNamespace

import pytest
from training import one_layer

from v4jax.cli import engine, main
from v4jax.config.inference import InferenceConfig

MODEL = one_layer.__file__
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


class PlannedError(Exception):
    """Carries the work that a plan would be made of."""


@pytest.fixture
def planned(monkeypatch):
    """Returns what gives a command's work; nothing is traced."""

    def make_plan(name, work):
        raise PlannedError(name, work)

    def find(*arguments):
        with pytest.raises(PlannedError) as made:
            main.run(["plan", "--topology=v6e-4", *arguments])
        return made.value.args

    monkeypatch.setattr("v4jax.planning.report.make_plan", make_plan)
    return find


def test_defaults(planned):
    name, work = planned()
    assert (name, work.regime, work.batch, work.context) == ("v4_flash", "decode", 1, 1 << 20)
    assert work.sizes == {"data": 1, "expert": 4, "context": 1, "tensor": 1}
    assert work.numerics.name == "released"
    assert planned("--regime=train", "--batch=4", "--context=4096")[1].numerics.name == "bfloat16"


def test_the_file_of_an_inference(planned, tmp_path):
    """It gives what it says, a flag goes before it; a document for each part reads it."""
    (tmp_path / "run.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict(dict(model='nano', max_tokens=16384,\n"
        "        chunk_tokens=512, mesh=dict(data=2, expert=2)))\n"
    )
    name, work = planned(f"--config={tmp_path}/run.py")
    assert (name, work.numerics.name, work.mesh_name) == ("nano", "float32", "data=2,expert=2")
    assert (work.batch, work.context) == (4, 16384)
    given = ("--regime=prefill", "--numerics=bfloat16")
    _, work = planned(f"--config={tmp_path}/run.py", *given)
    assert (work.batch, work.chunk, work.numerics.name) == (2, 512, "bfloat16")
    assert planned(f"--config={tmp_path}/run.py", *given, "--mesh=expert=4")[1].batch == 1


@pytest.mark.parametrize("name, numerics", [("v4_flash", "released"), ("nano", "float32")])
def test_numerics_are_those_that_batch_would_take(planned, name, numerics):
    for given, expected in ((None, numerics), ("bfloat16", "bfloat16")):
        flags = [f"--model={name}", *([f"--numerics={given}"] if given else [])]
        assert planned(*flags)[1].numerics.name == expected
        assert engine.complete(InferenceConfig(name, numerics=given)).numerics == expected


def test_a_plan_that_does_not_fit_says_so_by_its_status(monkeypatch, capsys):
    monkeypatch.setattr("v4jax.planning.report.make_plan", lambda *_: SimpleNamespace(fits=False))
    monkeypatch.setattr("v4jax.planning.report.as_data", lambda plan: {})
    monkeypatch.setattr("v4jax.planning.report.as_text", lambda plan: "DOES NOT FIT")
    assert plan(capsys, *MINI, status=1) == "DOES NOT FIT\n"


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
