"""From a trained model to the folder of a checkpoint."""

from v4jax.checkpoint.hf_writer import SHARD_BYTES, Format, write_model
from v4jax.files import PathLike
from v4jax.model import Transformer
from v4jax.training.lora import merge


def export(
    model: Transformer,
    folder: PathLike,
    format: Format = "released",
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a trained model as a checkpoint folder with its tokenizer; adapters are merged.

    Weights that came quantized and were not trained, and weights that were rounded while they
    trained, are written unchanged. Other trained weights are rounded to the format; the log says
    so, and how much of the adapters' change is lost.
    """
    merged = merge(model, requantize=format == "released")
    write_model(merged, folder, format, shard_bytes=shard_bytes)
