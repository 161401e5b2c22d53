"""Whole runs: resumed, interrupted, with bad numbers, without room, with changed configurations."""

import dataclasses
import functools
import json
import pathlib
import resource

import jax
import numpy as np
import pytest

from v4jax.config.loading import load_run
from v4jax.config.run import EvaluationConfig, TrainConfig
from v4jax.errors import CheckpointError, ConfigError, TrainingError
from v4jax.tokenizer.vocabulary import BOS
from v4jax.training.metrics import read_metrics
from v4jax.training.trainer import Trainer

from . import small_run

# Losses of one run on another mesh: float32 sums in another order, over six steps of Adam.
MESH_TOLERANCE = 2e-6
SPEEDS = ("tokens_per_second", "model_flops_per_second", "executed_flops_per_second")


@functools.cache
def built(phase, optimizer):
    """Holds the compiled step of all runs that have the same; none here decays its rate."""
    return []


@pytest.fixture(autouse=True)
def mini(tmp_path, monkeypatch):
    """Runs in a folder with the text, on one device; equal steps are compiled once."""
    small_run.write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    build = Trainer._build_step

    def share(trainer, mode, loss):
        assert not trainer.config.optimizer.decay_steps  # else the step depends on their number
        held = built((mode, loss), trainer.config.optimizer)
        if not held:
            held.append(build(trainer, mode, loss))
        return held[0]

    monkeypatch.setattr(Trainer, "_build_step", share)


def configured(**changes) -> TrainConfig:
    return load_run(TrainConfig, small_run.__file__, changes)


def run(config: TrainConfig, stop_at: int | None = None) -> Trainer:
    """Returns the trainer after its run; `stop_at` leaves it before that step, as a kill would."""
    trainer = Trainer(config)
    if stop_at is not None:
        make = trainer._make_step

        def make_until(step, batches):
            if step + 1 == stop_at:
                raise KeyboardInterrupt
            return make(step, batches)

        trainer._make_step = make_until
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    else:
        assert trainer.run() == "finished"
    trainer.close()
    return trainer


def lines_of(folder: str) -> list[dict]:
    """Returns the metrics without the speeds, which no two runs share."""
    lines = read_metrics(pathlib.Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


def assert_same_state(found: Trainer, expected: Trainer) -> None:
    """Asserts the same weights, biases, moments and counters, bit for bit."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found.state),
        jax.tree.leaves(expected.state),
        strict=True,
    )
    for (path, a), b in pairs:
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@functools.cache
def uninterrupted() -> tuple[Trainer, list[dict]]:
    """Returns the trainer and the metrics of a run that nothing stops."""
    return run(configured(output="whole")), lines_of("whole")


def test_resumed_equals_uninterrupted(monkeypatch):
    """Stopped twice and resumed: the same state, the same lines, the lost future cut away."""
    expected, lines = uninterrupted()
    run(configured(), stop_at=6)  # two steps after the checkpoint of step 3
    assert [line["step"] for line in lines_of("run")] == [1, 2, 3, 4]  # 5 was still computing
    positions = []
    restore = Trainer._resume
    monkeypatch.setattr(
        Trainer, "_resume", lambda self: (restore(self), positions.append(self.step))
    )
    run(configured(), stop_at=9)
    found = run(configured())
    assert positions == [3, 6]
    assert_same_state(found, expected)
    assert lines_of("run") == lines and len(lines) == 10
    assert found.store.steps() == [9, 10]
    # A run that is finished does nothing more.
    assert_same_state(run(configured()), expected)
    assert lines_of("run") == lines


def test_what_a_line_says():
    """The run learns, and its rate rises in two steps."""
    _, lines = uninterrupted()
    assert lines[-1]["loss"] < lines[0]["loss"] - 1.0
    assert set(lines[0]["imbalance"]) == {"stack.prefix.0"}
    assert all(line["finite"] for line in lines)
    assert [line["rate"] for line in lines[:3]] == pytest.approx([5e-3, 1e-2, 1e-2])


def spoil(trainer: Trainer, steps: set[int]) -> None:
    """Makes the loss of these steps nan."""
    make = trainer._make_step

    def make_spoiled(step, batches):
        if step + 1 in steps:
            batches = dataclasses.replace(batches, weights=batches.weights * np.nan)
        return make(step, batches)

    trainer._make_step = make_spoiled


def test_step_that_is_not_finite_is_skipped(capfd):
    """Nothing moves in it; the run goes on with the next data."""
    trainer = Trainer(configured(steps=4))
    spoil(trainer, {2, 4})
    assert trainer.run() == "finished"
    trainer.close()
    assert [line["finite"] for line in lines_of("run")] == [True, False, True, False]
    assert int(trainer.state.skipped) == 1 and trainer.step == 4
    # The rates that were applied: their clock goes on while steps are skipped.
    assert [line["rate"] for line in lines_of("run")] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])
    counts = [leaf for leaf in jax.tree.leaves(trainer.state.optimizer) if leaf.ndim == 0]
    assert [int(count) for count in counts] == [2]  # updates of the moments, and no other clock
    leaves = jax.tree.leaves((trainer.state.weights, trainer.state.optimizer))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    said = capfd.readouterr().err
    assert "warning: train: step 2 has loss nan and gradient norm nan; skipped (1 in a row)" in said


def test_too_many_bad_steps_stop_the_run():
    trainer = Trainer(configured())
    spoil(trainer, set(range(5, 11)))
    with pytest.raises(TrainingError) as error:
        trainer.run()
    trainer.close()
    assert str(error.value) == (
        "train.max_skipped = 2 steps in a row had a loss or gradient that is not finite, up to "
        f"step 6; the last good checkpoint is step 3 in {trainer.store.folder}. Lower the rate, or "
        "look at the data of these steps"
    )


def test_data_that_ends():
    """What was trained is kept."""
    trainer = Trainer(of_epochs(5, {"optimizer.accumulate": 2, "steps": 10}))
    with pytest.raises(TrainingError, match=r"train.data ended at step 3 of 10: every record was "):
        trainer.run()
    trainer.close()
    assert trainer.store.latest() == 3 and len(lines_of("run")) == 3


def of_epochs(records: int, changes: dict) -> TrainConfig:
    """Returns a run of one epoch on that many conversations, one a batch."""
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    pathlib.Path("talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for _ in range(records)))
    data = {"sources": [{"kind": "chat", "paths": ["talks.jsonl"]}], "batch": 1, "packing": False}
    data |= {"length": 128, "epochs": 1}
    return configured(**{f"data.{name}": value for name, value in data.items()} | changes)


def test_a_run_of_epochs(capfd):
    """It ends with its data, whose remainder is a step with the loss of its own targets."""
    trainer = run(of_epochs(5, {"optimizer.accumulate": 2, "steps": None}))
    assert trainer.step == trainer.config.steps == 3
    assert trainer.config.optimizer.spans(3) == (2, 0)
    said = capfd.readouterr().err
    assert "data: data.epochs = 1 makes 5 batches, 3 steps" in said
    assert "data: 5 documents, " in said
    # All conversations are equal: a mean over padding as well would halve the last loss.
    losses = [line["loss"] for line in lines_of("run")]
    still = {"optimizer.warmup_steps": 0}
    alone = run(
        of_epochs(1, {"optimizer.accumulate": 2, "steps": None, "output": "alone", **still})
    )
    assert alone.step == 1 and lines_of("alone")[0]["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert lines_of("alone")[0]["grad_norm"] == pytest.approx(lines_of("run")[0]["grad_norm"], 1e-5)
    assert run(of_epochs(5, {"optimizer.accumulate": 2, "steps": None})).step == 3  # is finished


@pytest.fixture
def no_room():
    """Lets this process write no file of more than 64 KiB, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit=64 << 10: resource.setrlimit(
        resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard)
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full(no_room):
    """The run ends with the reason; with room again the same command computes the same."""
    expected, lines = uninterrupted()
    run(configured(), stop_at=5)
    trainer = Trainer(configured())
    no_room()
    with pytest.raises(CheckpointError, match=r"step 6 was not written to .*: File too large; kep"):
        trainer.run()
    no_room(None)
    trainer.close()
    found = run(configured())
    assert_same_state(found, expected)
    assert lines_of("run") == lines


def test_metrics_that_cannot_be_written():
    trainer = Trainer(configured())
    trainer.metrics.path = pathlib.Path("/dev/full")
    with pytest.raises(TrainingError, match="/dev/full cannot be written: No space left on device"):
        trainer.run()
    trainer.close()


def test_output_that_cannot_be_written(monkeypatch):
    """Said before weights are read, which takes long."""
    monkeypatch.setattr("v4jax.training.trainer.load_model", None)
    with pytest.raises(CheckpointError, match="below/checkpoints cannot be written: Not a directo"):
        Trainer(configured(output="text.txt/below"))
    assert pathlib.Path("text.txt").stat().st_size > 1000


def test_folder_of_another_run():
    """Another model, other data, another optimizer: refused, and nothing there is touched."""
    run(configured(steps=3))
    before = {p: p.stat().st_mtime_ns for p in pathlib.Path("run").rglob("*") if p.is_file()}
    text = pathlib.Path(configured().model).read_text()
    pathlib.Path("model.py").write_text(
        text.replace("config.n_", "config.index_topk = 9; config.n_")
    )
    cases = {
        "model": (
            {"model": "model.py"},
            CheckpointError,
            "model.index_topk is 8 there and 9 here",
        ),
        "configuration": (
            {"data.seed": 1, "optimizer.rate": 1e-5},
            CheckpointError,
            r"belongs to another run: train.data.seed was 0 and is 1; train.optimizer.rate was "
            r"0.01 and is 1e-05. Restore that, choose another output, or give "
            r"--allow_changed=data.seed,optimizer.rate if it is meant",
        ),
        "adapters": ({"lora": {}}, CheckpointError, "train.lora was None and is 'given'"),
        "random weights": ({"seed": 1}, CheckpointError, "train.seed was 0 and is 1"),
    }
    for changes, error, message in cases.values():
        with pytest.raises(error, match=message):
            Trainer(configured(**changes))
    with pytest.raises(CheckpointError, match=r"train.model \(a digest of the weights .* was '"):
        Trainer(configured(seed=1), ["seed"])
    with pytest.raises(ConfigError, match=r"'optimizer.rat' is no field .* mean 'optimizer.rate'"):
        Trainer(configured(), ["optimizer.rat"])
    text = pathlib.Path("text.txt").read_text()
    pathlib.Path("text.txt").write_text(text.replace("line 7 ", "line 8 "))  # as many records
    with pytest.raises(CheckpointError, match=r"sources\[0\].paths \(a digest of what the fil"):
        Trainer(configured())
    pathlib.Path("text.txt").write_text(text)
    after = {p: p.stat().st_mtime_ns for p in pathlib.Path("run").rglob("*") if p.is_file()}
    assert after == before


def test_changes_that_are_meant(capfd):
    """Another rate goes on with the data, other data begins anew; files may have other names."""
    run(configured(steps=2))
    pathlib.Path("text.txt").rename("other.txt")
    text = [{"kind": "text", "paths": ["other.txt"]}]
    trainer = Trainer(configured(**{"optimizer.rate": 1e-3, "data.sources": text}), ["optimizer"])
    assert trainer.step == 2 and trainer.loader.counts().rows == 4
    trainer.close()
    trainer = Trainer(configured(**{"data.seed": 4, "data.sources": text}), ["data"])
    assert trainer.step == 2 and trainer.loader.counts().rows == 0
    trainer.close()
    assert "train: the data begins anew, because data.seed changed" in capfd.readouterr().err


def test_receivers():
    """TensorBoard gets every number; a package that is missing is named."""
    with pytest.raises(ConfigError, match=r'"v4jax\[wandb\]", or leave it out: metrics.jsonl is'):
        Trainer(configured(report_to=("wandb",)))
    pytest.importorskip("tensorboardX", reason='needs the "tensorboard" extra')
    run(configured(steps=2, report_to=("tensorboard",)))
    events = b"".join(p.read_bytes() for p in pathlib.Path("run/tensorboard").iterdir())
    assert b"imbalance/stack.prefix.0/0" in events and b"grad_norm" in events


def test_evaluation_on_the_way():
    config = configured(steps=4)
    held_out = EvaluationConfig(dataclasses.replace(config.data, seed=3), every=2, batches=1)
    run(dataclasses.replace(config, evaluation=held_out))
    lines = lines_of("run")
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert [i for i, line in enumerate(lines) if "eval_loss" in line] == [2, 5]
    assert 0 < lines[5]["eval_recall"] < 1 and lines[5]["eval_loss"] < lines[2]["eval_loss"]
    samples = lines[2]["samples"]
    assert len(samples) == 2  # a row each
    text = pathlib.Path("text.txt").read_text()
    for sample in samples:
        assert sample["prompt"].removeprefix(BOS) + sample["expected"] in text
        assert sample["written"]


@pytest.mark.slow
def test_other_mesh(monkeypatch):
    """A checkpoint of one device goes on on eight, its losses within float32 roundings."""
    _, lines = uninterrupted()
    run(configured(), stop_at=5)
    here = pathlib.Path.cwd()
    monkeypatch.undo()  # all eight devices, and a step of their own
    monkeypatch.chdir(here)
    config = configured()
    mesh = dataclasses.replace(config.mesh, data=2, expert=2, tensor=2)
    found = run(dataclasses.replace(config, mesh=mesh))
    assert len(jax.tree.leaves(found.state.weights)[0].sharding.device_set) == 8
    losses, expected = ([line["loss"] for line in some] for some in (lines_of("run"), lines))
    np.testing.assert_allclose(losses, expected, rtol=MESH_TOLERANCE)
