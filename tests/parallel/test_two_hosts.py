"""One model over two processes with four devices each equals one process with eight."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from two_processes import run_two

import v4jax
from v4jax.checkpoint import hf_writer
from v4jax.checkpoint.adapters import write_adapters
from v4jax.checkpoint.hf_folder import open_folder
from v4jax.checkpoint.leaves import name_leaves
from v4jax.checkpoint.orbax_store import Store
from v4jax.config import LayerKind, RouterKind, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.model import Transformer
from v4jax.model.weights import read_weights
from v4jax.quant import LowRank
from v4jax.training.export import export
from v4jax.training.trainer import load_trained

from . import model_worker

WORKER = Path(model_worker.__file__)
# Between processes a sum is made in another order than within one. Logits are below 1 here.
TOLERANCE = 1e-5


def write_checkpoint(folder: Path, kind: LayerKind, ratio: int) -> Path:
    """Writes a checkpoint with random weights, of one layer: little is to be compiled."""
    config = dataclasses.replace(
        load_model_config("tiny"),
        num_hidden_layers=1,
        num_nextn_predict_layers=0,
        compress_ratios=(ratio,),
        layer_types=(kind,),
        mlp_layer_types=(RouterKind.TOPK,),
    )
    made = Transformer(config, get_numerics("float32"), storage="float32", rngs=nnx.Rngs(2))
    v4jax.save(made, folder, format="transformers")
    return folder


def run_workers(*arguments: str) -> list[str]:
    """Returns what each of two workers printed last."""
    ended = run_two([str(WORKER), *arguments], devices=4)
    assert [status for status, _, _ in ended] == [0, 0], ended
    return [out.splitlines()[-1] for _, out, _ in ended]


@pytest.mark.slow
def test_prefill_and_decode(tmp_path):
    """Both read their own shares, and together compute what one process does."""
    folder = write_checkpoint(tmp_path / "model", LayerKind.CSA, 4)
    said = run_workers("serve", str(folder), str(tmp_path / "found.npz"))
    tensors = open_folder(folder).tensors.values()
    stored = sum(tensor.nbytes for tensor in tensors)
    experts = sum(tensor.nbytes for tensor in tensors if ".experts." in tensor.name)
    # `data` spans the processes and splits the experts; all else is whole on either.
    assert said == [f"read {stored - experts // 2} bytes of the checkpoint"] * 2
    found = np.load(tmp_path / "found.npz")
    for name, expected in model_worker.serve(str(folder)).items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=TOLERANCE, err_msg=name)
        assert np.abs(expected).max(initial=1.0) > 0.1


@pytest.mark.slow
def test_train_and_checkpoint(tmp_path):
    """One step of both, whose checkpoint one process reads, equals one step of one process."""
    folder = write_checkpoint(tmp_path / "model", LayerKind.WINDOW, 0)
    (tmp_path / "text.txt").write_text("One sentence follows another. " * 60)
    run = str(folder), str(tmp_path / "two"), "full"
    assert run_workers("train", *run) == ["trained"] * 2
    expected = model_worker.train(str(folder), str(tmp_path / "one"), "full").state
    for name, a in name_leaves(v4jax.load(tmp_path / "two" / "model")).items():
        b = name_leaves(v4jax.load(tmp_path / "one" / "model"))[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
    with Store(tmp_path / "two" / "checkpoints", read_only=True) as store:
        found, _ = store.restore(1, expected)
    before = v4jax.load(folder)
    assert not np.array_equal(found.weights["embed"], before.embed.get_value())
    for name, a in name_leaves(found).items():
        b = name_leaves(expected)[name]
        assert a.sharding == b.sharding, name
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "rounded"])
def test_what_a_run_of_two_exports(kind, tmp_path):
    """It is to the bit what one process makes of their checkpoint."""
    folder = write_checkpoint(tmp_path / "model", LayerKind.WINDOW, 0)
    if kind == "lora":  # beside a stored base
        v4jax.save(v4jax.load(folder), tmp_path / "stored", format="released")
        folder = tmp_path / "stored"
    (tmp_path / "text.txt").write_text("One sentence follows another. " * 60)
    run = str(folder), str(tmp_path / "two"), kind
    assert run_workers("train", *run) == ["trained"] * 2
    trained = load_trained(model_worker.configure(*run))
    export(trained, tmp_path / "one")
    assert read_files(tmp_path / "two" / "model") == read_files(tmp_path / "one")
    if kind == "lora":
        write_adapters(trained, tmp_path / "adapters")
        assert read_files(tmp_path / "two" / "adapters") == read_files(tmp_path / "adapters")
        moved = [v.up for v in read_weights(trained).values() if isinstance(v, LowRank)]
        assert len(moved) > 2 and all(np.any(up) for up in moved)


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns what the files of a folder hold."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_save(tmp_path):
    """Files are those of one process; an error of either is raised by both and leaves nothing."""
    write_checkpoint(tmp_path / "model", LayerKind.CSA, 4)
    assert run_workers("save", str(tmp_path / "model"), str(tmp_path)) == ["saved"] * 2
    again, alone = v4jax.load(tmp_path / "model"), tmp_path / "alone"
    for format in model_worker.SAVED:
        hf_writer.write_model(again, alone, format, shard_bytes=model_worker.SHARD_BYTES)
        expected, found = read_files(alone), read_files(tmp_path / format)
        assert len(expected) > 5 and found == expected
        if format == "released":
            prefix = "bucket\\released\\"
            in_bucket = {
                file.name.removeprefix(prefix): file.read_bytes()
                for file in (tmp_path / "bucket").iterdir()
            }
            assert in_bucket == expected  # and nothing of the folder that was refused
        shutil.rmtree(alone)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", "bucket", *model_worker.SAVED}
