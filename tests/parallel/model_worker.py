"""One model over all devices of a job.

python model_worker.py serve FOLDER OUTPUT    reads, prefills, decodes; process 0 writes the logits
python model_worker.py train FOLDER RUN KIND  one step, a checkpoint that is read again, a model
python model_worker.py save FOLDER OUTPUT     reads and writes every format, to disk and to s3://

Which process this is say the variables V4JAX_…. Every process makes the same calls; `serve` and
`train` are also what a single process with as many devices does.
"""

import sys
from pathlib import Path

import folder_bucket
import jax
import numpy as np

import v4jax
from v4jax.checkpoint import hf_writer, safetensors_file
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.run import LoraConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from v4jax.errors import CheckpointError
from v4jax.parallel import make_mesh
from v4jax.parallel.hosts import find_hosts, start_hosts
from v4jax.training.trainer import Trainer

MESH = dict(data=2, expert=2, context=2)  # of two processes with four devices, `data` spans both
CALLS = ((512, (512, 389)), (1, (1, 1)), (1, (1, 0)))  # tokens of a call, real ones per sequence
SHARD_BYTES = 100_000
SAVED = ("released", "transformers")
REFUSED = "s3://bucket/refused"
# What a run trains: all weights, adapters beside them, or weights that are rounded on the way.
KINDS = {
    "full": {},
    "lora": dict(lora=LoraConfig(rank=2, targets=("attention.query_up", "moe.experts"))),
    "rounded": dict(quantization_aware=True),
}
IDS = np.random.RandomState(0).randint(0, 256, (2, 600))


def serve(folder: str) -> dict[str, np.ndarray]:
    """Returns the logits of every call's real tokens, by call and sequence."""
    from jax.experimental import multihost_utils

    model = v4jax.load(folder, mesh=make_mesh(**MESH))
    cache, done, found = model.init_cache(2, 1024), np.zeros(2, int), {}
    for number, (width, counts) in enumerate(CALLS):
        tokens = np.zeros((2, width), np.int32)
        for slot, count in enumerate(counts):
            tokens[slot, :count] = IDS[slot, done[slot] : done[slot] + count]
        logits, cache = model.extend(tokens, cache, np.array(counts), donate=True)
        logits = multihost_utils.process_allgather(logits, tiled=True)
        found |= {f"{number}.{slot}": logits[slot, :count] for slot, count in enumerate(counts)}
        done += counts
    return found


def configure(folder: str, run: str, kind: str) -> TrainConfig:
    """Returns a run of one step on the text beside the model's folder."""
    text = Path(folder).with_name("text.txt")
    source = SourceConfig("text", (str(text),))
    # The text is read once by the host of row 0; the other has padding.
    epochs = 1 if kind == "lora" else None
    return TrainConfig(
        model=folder,
        output=run,
        data=DataConfig((source,), length=256, batch=2, shuffle=False, epochs=epochs),
        steps=1,
        numerics="float32",
        # A large epsilon: the first step of Adam is else the sign of each gradient, however small.
        optimizer=OptimizerConfig(kind="adamw", warmup_steps=0, epsilon=0.01),
        loss=LossConfig(mtp_weight=0.0),
        remat="none",
        mesh=MeshConfig(**MESH),
        **KINDS[kind],
    )


def train(folder: str, run: str, kind: str) -> Trainer:
    """Returns the trainer after one step, whose checkpoint gives the same state again."""
    config = configure(folder, run, kind)
    trainer = Trainer(config)
    trainer.run()
    trainer.close()
    again = Trainer(config)
    assert again.step == 1
    for a, b in zip(jax.tree.leaves(trainer.state), jax.tree.leaves(again.state), strict=True):
        for share, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.array_equal(share.data, other.data)
    again.export()
    again.close()
    return trainer


def save(folder: str, output: str) -> None:
    """Writes the model of a folder to OUTPUT/FORMAT, and into the bucket that is OUTPUT/bucket."""
    model = v4jax.load(folder, mesh=make_mesh(**MESH))
    for format in SAVED:
        hf_writer.write_model(model, Path(output, format), format, shard_bytes=SHARD_BYTES)
    hf_writer.write_model(model, "s3://bucket/released", shard_bytes=SHARD_BYTES)
    for taken, error in ((Path(output, "released"), "is not empty"), (REFUSED, "403 Forbidden")):
        try:
            hf_writer.write_model(model, taken, shard_bytes=SHARD_BYTES)
        except CheckpointError as found:
            assert error in str(found), found
        else:
            raise AssertionError(f"{taken} was written")


def refuse_some(bucket: type) -> None:
    """Makes one process' writing to a folder of the bucket fail."""
    real = bucket.pipe_file

    def pipe_file(self, path, value, **options):
        if "refused" in path and "safetensors" in path and jax.process_index() == 1:
            raise RuntimeError("403 Forbidden")
        real(self, path, value, **options)

    bucket.pipe_file = pipe_file


def main() -> None:
    """Joins the others, and does what the command line says."""
    start_hosts(find_hosts(), timeout_seconds=60)
    read, read_bytes = 0, safetensors_file.read_bytes

    def count(file, offset, out):
        nonlocal read
        read += len(out)
        read_bytes(file, offset, out)

    safetensors_file.read_bytes = count
    what, folder, output, *kind = sys.argv[1:]
    if what == "save":
        folder_bucket.install(Path(output, "bucket"))
        refuse_some(folder_bucket.FolderBucket)
        save(folder, output)
        print("saved")
        return
    if what == "train":
        train(folder, output, *kind)
        print("trained")
        return
    found = serve(folder)
    print(f"read {read} bytes of the checkpoint")
    if jax.process_index() == 0:
        np.savez(output, **found)


if __name__ == "__main__":
    main()
