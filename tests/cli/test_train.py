"""`v4jax train`: its flags, its exit status, and what it says before it reads a weight."""

import json
import pathlib
import signal
import types

import pytest

from v4jax.cli import main
from v4jax.training import trainer

RUN = pathlib.Path(__file__).parents[1] / "training" / "small_run.py"


class FakeTrainer:
    """A run that ends as it is told, without computing."""

    ending, step = "finished", 0

    def __init__(self, config, allow_changed):
        self.allow_changed = allow_changed
        self.config, self.folder = config, pathlib.Path(config.output)
        self.metrics = types.SimpleNamespace(path=self.folder / "metrics.jsonl")
        self.closed = False
        type(self).made = self

    def run(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ({"step": step, "loss": 3.0 / step} for step in (1, 2, 3))
        self.metrics.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if self.ending == "killed":
            signal.raise_signal(signal.SIGTERM)
        return self.ending

    def has_exported(self):
        return (self.folder / "model").exists()

    def export(self):
        (self.folder / "model").mkdir()
        return self.folder / "model"

    def close(self):
        self.closed = True


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It was late.")
    monkeypatch.setattr(trainer, "Trainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "ending", "finished")
    monkeypatch.setattr(FakeTrainer, "step", 0)
    return FakeTrainer


def train(*flags: str) -> int:
    return main.run(["train", f"--config={RUN}", *flags])


ERRORS = {
    "no configuration": (["train"], "--config is required"),
    "no such file": (["train", "--config=absent.py"], "config must be a Python file with get_con"),
    "no field": (["train", f"--config={RUN}", "--set=stepz=3"], "did you mean 'steps'"),
    "no value": (
        ["train", f"--config={RUN}", "--set=steps"],
        "--set takes FIELD=VALUE, got 'steps'",
    ),
    "wrong type": (["train", f"--config={RUN}", "--set=steps=many"], "steps must be"),
    "a rule": (
        ["train", f"--config={RUN}", "--set=steps=1"],
        "warmup_steps + decay_steps must not",
    ),
    "an argument": (["train", "nano"], "unexpected argument 'nano'"),
    "nothing to draw": (["train", "--plot=absent"], "metrics.jsonl cannot be read: No such file"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_errors(case, capsys, fake):
    if case[1].startswith("metrics"):
        pytest.importorskip("matplotlib", reason='needs the "plots" extra')
    assert main.run(case[0]) == 2
    assert case[1] in capsys.readouterr().err


def test_missing_data_is_said_before_a_model_is_loaded(fake, tmp_path, capsys):
    (tmp_path / "text.txt").unlink()
    assert train() == 2
    assert "data.sources.paths: text.txt does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_what_would_run(capsys, fake):
    assert train("--dry_run", "--set=optimizer.accumulate=3", "--set=data.batch=4") == 0
    said = capsys.readouterr().out
    assert "steps: 10\n" in said and "  accumulate: 3\n" in said and "  batch: 4\n" in said
    assert "10 steps of 1,536 tokens: 15,360 tokens, " in said
    assert train("--dry_run", "--set=data.epochs=3", "--set=steps=None") == 0
    assert "3 epochs, in steps of 256 tokens and " in capsys.readouterr().out
    assert not hasattr(fake, "made") and [file.name for file in pathlib.Path().iterdir()] == [
        "text.txt"
    ]


def test_finished(capsys, fake):
    """Printed: the model's folder. A second time there is nothing to do."""
    assert train("--output=out", "--set=seed=3") == 0
    assert fake.made.config.seed == 3 and fake.made.closed
    assert capsys.readouterr().out == "out/model\n"
    assert fake.made.allow_changed == ()
    fake.step = 10
    assert train("--output=out") == 0
    assert capsys.readouterr().out == "out/model\n"
    # More steps would end at a folder that is not empty: said before they are made.
    assert train("--output=out", "--set=steps=20") == 2
    expected = "out/model exists, and the run goes on from step 10 to 20: move it away, or give"
    assert expected in capsys.readouterr().err
    allowed = "--allow_changed=optimizer.rate,data"
    assert train("--output=out", "--set=steps=20", "--noexport", allowed) == 0
    assert fake.made.allow_changed == ("optimizer.rate", "data")


def test_stopped_and_killed(capsys, fake):
    """143 both with a checkpoint and where the signal came before the run could listen."""
    fake.ending = "stopped"
    assert train() == 143
    assert fake.made.closed and not pathlib.Path("run/model").exists()
    fake.ending = "killed"
    assert train() == 143
    assert fake.made.closed and "v4jax: terminated" in capsys.readouterr().err


def test_picture(capsys, fake):
    pytest.importorskip("matplotlib", reason='needs the "plots" extra')
    assert train() == 0
    assert "train: drawn in run/run.png" in capsys.readouterr().err
    pathlib.Path("run/run.png").unlink()
    assert main.run(["train", "--plot=run"]) == 0
    assert capsys.readouterr().out == "run/run.png\n"
    assert pathlib.Path("run/run.png").stat().st_size > 10_000
