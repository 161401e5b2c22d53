"""From a run to files: the trained model, and the folder it is written to."""

import pathlib

from v4jax.checkpoint.hf_writer import SHARD_BYTES, Format, write_model
from v4jax.files import RemotePath
from v4jax.model import Transformer
from v4jax.model.weights import write_weights
from v4jax.quant import LowRank, Master
from v4jax.training.lora import merge
from v4jax.training.step import TrainState
from v4jax.training.trainable import join_weights, store


def finish(frozen: Transformer, state: TrainState) -> Transformer:
    """Returns the trained model: weights in float32, or as they were rounded on the way; adapters.

    A weight that was rounded while it trained comes out in its stored format, exactly as the
    computation used it. Adapters stay beside their base: `lora.merge`, `write_adapters`.
    """
    values = {}
    for name, value in join_weights(frozen, state.weights).items():
        if isinstance(value, Master):
            value = store(value)
        elif not isinstance(value, LowRank):
            value = state.weights[name]
        values[name] = value
    return write_weights(frozen, values | state.biases)


def export(
    model: Transformer,
    folder: str | pathlib.Path | RemotePath,
    format: Format = "released",
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a trained model as a checkpoint folder, adapters merged; the tokenizer goes along.

    What came quantized and was not trained, and what was rounded while it trained, is written as it
    is. Other trained weights are rounded to the format here; the log says so, and by how much
    adapters lose.

    Raises:
      CheckpointError: as `write_model`.
    """
    merged = merge(model, requantize=format == "released")
    write_model(merged, folder, format, shard_bytes=shard_bytes)
