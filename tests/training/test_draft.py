"""Training the draft module: its loss against the specification's program, and what it leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model.test_draft import CONFIG, IDS, model, oracle, tensors  # noqa: F401 (fixtures)
from oracle.checkpoints import read_checkpoint
from small_models import make_config, make_model, on_mesh

import v4jax
from v4jax.cli import main
from v4jax.config.loading import load_run
from v4jax.config.model import DraftConfig
from v4jax.config.run import DraftTraining, LossConfig, TrainConfig
from v4jax.model.weights import read_weights, write_weights
from v4jax.training.batch import PADDING, Batch, put_batch
from v4jax.training.draft import Anchors, compute_draft_losses, count_rows, place_anchors
from v4jax.training.forward import Mode
from v4jax.training.metrics import read_metrics
from v4jax.training.state import init_state, split_model
from v4jax.training.step import build_step
from v4jax.training.trainer import Trainer

from . import small_run

# Float32 through five layers and three stages, against float64.
LOSS, GRADIENT = 2e-5, 2e-3
MESH = 1e-5  # of a weight after a step: float32 sums in another order
STEP = 1e-4  # of a weight's norm; loss differences are of float64
# One weight of each way into the loss, by its released name.
RELEASED = {
    "context_projection": "mtp.0.main_proj.weight",
    "stages.1.attention.key_value": "mtp.1.attn.wkv.weight",
    "stages.0.moe.router.weight": "mtp.0.ffn.gate.weight",
    "norm.weight": "mtp.2.norm.weight",
    "markov_embed": "mtp.2.markov_head.markov_w1.weight",
    "markov_head": "mtp.2.markov_head.markov_w2.weight",
    "confidence_head": "mtp.2.confidence_head.proj.weight",
}
ROWS = CONFIG.draft.block_size
BASE = make_config("window window", mtp=True)
TRAINING = DraftTraining(anchors=6)
DOCUMENTS = {0: IDS[:200], 256: (IDS[:140] * 7 + 3) % CONFIG.vocab_size}  # by their begin
# The window begins, is just not full and just full; the last rows have no target, or one each.
PLACES = (1, 128, 129, 197, 257, 394)


def packed() -> Batch:
    """One row of both documents; of the second, the tokens from 393 on are no targets."""
    tokens, weights = np.zeros((1, 512), np.int32), np.zeros((1, 512), np.float32)
    begin = np.full((1, 512), PADDING, np.int32)
    for first, ids in DOCUMENTS.items():
        where = slice(first, first + len(ids))
        tokens[0, where], begin[0, where], weights[0, where] = ids, first, 1.0
        weights[0, first] = 0.0
    weights[0, 300:] *= 0.5
    return Batch(*(jnp.asarray(x) for x in (tokens, weights, begin)))


def anchored() -> Anchors:
    """The places of the test, with the weights that `place_anchors` gives them."""
    batch = packed()
    found = place_anchors(batch, 512, ROWS, jax.random.key(0))
    order = [np.flatnonzero(np.asarray(found.places[0]) == place)[0] for place in PLACES]
    return Anchors(found.places[:, np.array(order)], found.weights[:, np.array(order)])


@pytest.fixture(scope="module")
def targets(oracle):  # noqa: F811
    """Logits and taps of the target by document; no weight of the module changes them."""
    return {first: oracle.target(ids) for first, ids in DOCUMENTS.items()}


def compute_naively(oracle, targets, weights, accepted):  # noqa: F811
    """Returns loss and parts by the specification's program, row by row.

    Args:
      accepted: what the confidence is compared with, by row; filled where it is missing.
    """
    sums = dict.fromkeys(("cross_entropy", "distance", "confidence_loss"), 0.0)
    total, held = 0.0, [oracle.W[RELEASED[name]] for name in ("markov_embed", "markov_head")]
    confidence = oracle.W[RELEASED["confidence_head"]]
    contexts = {first: oracle.context(taps) for first, (_, taps) in targets.items()}
    for a, place in enumerate(PLACES):
        first = max(begin for begin in DOCUMENTS if begin <= place)
        ids, at = DOCUMENTS[first], place - first
        x, base = oracle.draft_hidden(contexts[first], at - 1, ids[at])
        for i in np.flatnonzero(weights[a]):
            weight, before = weights[a, i] * np.exp(-i / 4), held[0][ids[at + i]]
            q = oracle.softmax(base[i] + held[1] @ before, -1)
            p = oracle.softmax(targets[first][0][at + i], -1)
            share = accepted.setdefault((place, i), np.minimum(p, q).sum())
            estimate = oracle.sig(confidence @ np.concatenate([x[i], before]))[0]
            entropy = share * np.log(estimate) + (1 - share) * np.log(1 - estimate)
            sums["cross_entropy"] -= weight * np.log(q[ids[at + i + 1]])
            sums["distance"] += weight * np.abs(p - q).sum()
            sums["confidence_loss"] -= weight * entropy
            total += weight
    parts = {name: value / total for name, value in sums.items()}
    loss = 0.1 * parts["cross_entropy"] + 0.9 * parts["distance"] + parts["confidence_loss"]
    return parts | {"loss": loss}


def test_anchors():
    """A block stays in its document, and its rows count up to the first that has no target."""
    batch = packed()
    found = place_anchors(batch, 512, ROWS, jax.random.key(0))
    counted = {
        int(place): np.asarray(rows)
        for place, rows in zip(found.places[0], found.weights[0], strict=True)
        if rows[0] > 0
    }
    # The first token is no target; the last has none behind it.
    assert counted.keys() == {*range(1, 199), *range(257, 395)}
    assert counted[197].tolist() == [1, 1, 0, 0, 0]
    assert counted[257].tolist() == [1, 1, 1, 1, 1]
    assert counted[297].tolist() == [1, 1, 0.5, 0.5, 0.5]
    assert counted[394].tolist() == [0.5, 0, 0, 0, 0]
    fewer = place_anchors(batch, 100, ROWS, jax.random.key(1))
    drawn = set(np.asarray(fewer.places[0]).tolist())
    assert len(drawn) == 100 and drawn < counted.keys() and max(drawn) > 300


def test_anchors_stop_at_gaps():
    """A block lies on one side of a gap, and sees the tokens behind it only."""
    tokens = jnp.zeros((1, 256), jnp.int32)
    skipped = jnp.where(jnp.arange(256) < 128, 0, 1000)[None]
    batch = Batch(tokens, jnp.ones((1, 256)), jnp.zeros((1, 256), jnp.int32), skipped)
    found = place_anchors(batch, 256, ROWS, jax.random.key(0))
    rows = np.zeros((256, ROWS))
    rows[np.asarray(found.places[0])] = found.weights[0]
    counts = rows.sum(axis=-1)
    assert counts[0] == 0 and counts[128] == 0  # nothing of the document is in sight
    assert (counts[1:123] == 5).all() and counts[123:128].tolist() == [4, 3, 2, 1, 0]
    assert (counts[129:251] == 5).all() and counts[255] == 0


@pytest.mark.slow
def test_step_on_a_mesh_equals_one_device():
    module = DraftConfig(stages=2, target_layer_ids=(0, 1), markov_rank=4, noise_token_id=7)
    config = make_config("csa window").with_draft(module)
    training, optimizer = DraftTraining(anchors=8), optax.sgd(1.0)
    begin = np.broadcast_to(np.arange(512) // 256 * 256, (1, 2, 512)).astype(np.int32)
    tokens = np.random.RandomState(0).randint(0, 256, begin.shape).astype(np.int32)
    batch, states, metrics = Batch(tokens, np.ones(begin.shape, np.float32), begin), [], []
    for sizes in ({}, dict(data=2, context=2, tensor=2), dict(expert=2, context=2, tensor=2)):
        made = make_model(config)
        made = on_mesh(made, "train", **sizes) if sizes else made
        names = [name for name in read_weights(made) if name.startswith("drafter.")]
        frozen, weights, biases = split_model(made, names)
        state = init_state(frozen, weights, biases, optimizer)
        step = jax.jit(
            build_step(LossConfig(), optimizer, optax.constant_schedule(0.1), Mode(), 1e9, training)
        )
        state, found = step(frozen, state, put_batch(batch, made.layout))
        states.append(jax.device_get(state)), metrics.append(jax.device_get(found))
    for state, found in zip(states[1:], metrics[1:], strict=True):
        for name in ("loss", "acceptance", "agreement", "accepted_length", "grad_norm"):
            np.testing.assert_allclose(found[name], metrics[0][name], 1e-5, 1e-6, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, found["load"], metrics[0]["load"])
        for name, value in states[0].weights.items():
            np.testing.assert_allclose(state.weights[name], value, 0, MESH, err_msg=name)


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_the_specification(oracle, model, targets):  # noqa: F811
    batch, anchors = packed(), anchored()
    totals = count_rows(anchors, TRAINING.decay)

    @jax.jit
    def compute(weights):
        def run(weights):
            held = write_weights(model, weights)
            return compute_draft_losses(held, batch, anchors, totals, TRAINING, Mode())

        return jax.grad(run, has_aux=True)(weights)

    gradients, parts = compute(read_weights(model))
    arguments, accepted = (oracle, targets, np.asarray(anchors.weights[0])), {}
    for name, value in compute_naively(*arguments, accepted).items():
        assert float(parts[name]) == pytest.approx(value, abs=LOSS), name
    rows = [[accepted.get((place, i)) for i in range(ROWS)] for place in PLACES]
    expected = [np.mean([x for x in column if x]) for column in zip(*rows, strict=True)]
    np.testing.assert_allclose(parts["acceptance"], expected, 0, LOSS)
    for name, gradient in gradients.items():
        assert np.asarray(gradient).any() == name.startswith("drafter."), name
    for name, released in RELEASED.items():
        gradient = np.asarray(gradients[f"drafter.{name}"], np.float64)
        direction, start = gradient / np.linalg.norm(gradient), oracle.W[released]
        sides = []
        for sign in (1, -1):
            oracle.W[released] = start + sign * STEP * direction.reshape(start.shape)
            sides.append(compute_naively(*arguments, accepted)["loss"])
        oracle.W[released] = start
        slope = (sides[0] - sides[1]) / (2 * STEP)
        assert slope == pytest.approx(np.linalg.norm(gradient), rel=GRADIENT), name


RUN = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.model = "base"
    config.output = "run"
    config.steps = 2
    config.log_every = 1
    config.numerics = "float32"
    config.remat = "none"
    config.optimizer = dict(warmup_steps=0)
    config.data = dict(sources=(dict(kind="text", paths=("text.txt",)),), length=128, batch=2)
    config.evaluation = dict(every=2, batches=1, data=config.data)
    config.draft = dict(
        module=dict(
            stages=2, target_layer_ids=(0, 1), markov_rank=4, block_size=3, noise_token_id=7
        ),
        anchors=8,
    )
    return config
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `base`, which has MTP, and a finished run that gave it a draft module."""
    folder = tmp_path_factory.mktemp("draft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(jax, "device_count", lambda: 1)
        small_run.write_text(folder)
        (folder / "run.py").write_text(RUN)
        v4jax.save(make_model(BASE, stored_as="released"), folder / "base")
        trainer = finish_run()
        yield folder, trainer


def finish_run(**changes) -> Trainer:
    """Returns the trainer of a finished and exported run in the working folder."""
    trainer = Trainer(load_run(TrainConfig, "run.py", changes))
    assert trainer.run() == "finished"
    trainer.export()
    trainer.close()
    return trainer


def read_tensors(folder):
    """Returns the bytes of every tensor of a checkpoint folder by its released name."""
    return {name: tensor.tobytes() for name, tensor in read_checkpoint(folder)[0].items()}


def test_only_the_module_changes(trained):
    folder, trainer = trained
    assert trainer.state.weights.keys() == {
        name for name in read_weights(trainer.finished_model()) if name.startswith("drafter.")
    }
    assert {name.split(".")[0] for name in trainer.state.biases} == {"drafter"}
    assert all(np.asarray(bias).any() for bias in trainer.state.biases.values())
    before, after = read_tensors(folder / "base"), read_tensors(folder / "run" / "model")
    trunk = {name for name in before if not name.startswith("mtp.")}
    assert trunk == {name for name in after if not name.startswith("mtp.")}
    assert all(after[name] == before[name] for name in trunk)
    assert "mtp.0.main_proj.scale" in after and "mtp.1.markov_head.markov_w1.weight" in after


def test_the_export_is_a_released_checkpoint(trained, tmp_path, capsys):
    folder, _ = trained
    loaded = v4jax.load(folder / "run" / "model")
    assert loaded.config == BASE.with_draft(loaded.config.draft)
    assert (loaded.config.draft.stages, loaded.config.draft.block_size) == (2, 3)
    v4jax.save(loaded, tmp_path / "again")
    assert read_tensors(tmp_path / "again") == read_tensors(folder / "run" / "model")
    assert main.run(["inspect", str(folder / "run" / "model")]) == 0
    assert "drafter.stages.1.attention.key_value" in capsys.readouterr().out


def test_what_a_run_says(trained):
    lines = read_metrics(trained[0] / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 2]
    for line in lines[:2]:
        parts = 0.1 * line["cross_entropy"] + 0.9 * line["distance"] + line["confidence_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert len(line["acceptance"]) == len(line["agreement"]) == 3
        assert 1 <= line["accepted_length"] <= 4
        assert line["imbalance"].keys() == {"drafter.stages.0", "drafter.stages.1"}
    assert lines[2]["eval_loss"] > 0 and len(lines[2]["eval_acceptance"]) == 3


FINE_TUNED = {
    "full": {},
    "adapters": {"lora": {"rank": 2, "targets": ("attention.query_up",)}},
}


@pytest.mark.parametrize("kind", ["full", pytest.param("adapters", marks=pytest.mark.slow)])
def test_fine_tuning_leaves_the_module_bit_for_bit(trained, kind, caplog):
    folder, _ = trained
    start = str(folder / "run" / "model")
    changes = {"model": start, "output": kind, "draft": None, "evaluation": None, "steps": 1}
    tuned = finish_run(**changes, **FINE_TUNED[kind])
    assert not any(name.startswith("drafter.") for name in tuned.state.weights)
    assert "the draft module stays bit for bit as it is" in caplog.text
    before, after = read_tensors(folder / "run" / "model"), read_tensors(folder / kind / "model")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed and not any(name.startswith("mtp.") for name in changed)
