"""What a run trains: the names of the weights, adapters among them, and what is rounded."""

from collections.abc import Mapping

import jax

from v4jax.checkpoint.names import stored_formats
from v4jax.config import TrainConfig
from v4jax.errors import ConfigError
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.weight_sharding import annotate_shardings, put_sharded
from v4jax.quant import LowRank, Master, ScaledArray
from v4jax.training.lora import add_adapters
from v4jax.training.state import Frozen, split_model, store

STORED = ("fp4", "fp8", "bfloat16")  # formats that a float32 weight is rounded to


def split_trained(model: Transformer, config: TrainConfig) -> tuple[Frozen, dict, dict]:
    """Returns what `split_model` returns for the weights that a run trains; shapes give shapes.

    With `config.lora`, a model without adapters gets some; those of a model with some are trained.

    Raises:
      ConfigError: what is to be trained does not exist or is frozen, or the mesh splits a weight
        inside the tiles that it is rounded in.
    """
    names = choose_trained(model, config)
    if config.lora:
        if not choose_adapted(model):
            _check_lora(config)
            model = add_adapters(model, config.lora, config.seed, among=names)
        return split_model(model, choose_adapted(model))
    if not config.quantization_aware:
        return split_model(model, names)
    formats = {k: v for k, v in stored_formats(model.config).items() if v in STORED}
    model = round_weights(model, {k: v for k, v in formats.items() if k not in names})
    return split_model(model, names, {name: formats[name] for name in names if name in formats})


def round_weights(model: Transformer, formats: Mapping[str, str]) -> Transformer:
    """Returns the model with these weights in their stored formats, if they are not in them yet."""
    held, rounded = variables(model), {}
    for name, fmt in formats.items():
        value = held[name].get_value()
        if isinstance(value, ScaledArray) or str(value.dtype) == fmt:
            continue
        master = Master(value, fmt, "float32", rounds_inputs=False)
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        rounded[name] = jax.eval_shape(Master.store, master) if abstract else store(master)
    model = write_weights(model, rounded)
    if model.layout is None or not rounded:
        return model
    # Anew, because no tile may be split.
    if abstract:
        return annotate_shardings(model, model.layout)
    return put_sharded(model, model.layout)


def choose_trained(model: Transformer, config: TrainConfig) -> list[str]:
    """Returns the names of the weights that a loss of the run reaches, except a frozen indexer's.

    A weight that no loss reaches would only decay: those of the second and later MTP blocks, those
    of the first without the MTP loss, and those of a draft module.
    """
    drafts = bool(config.loss.mtp_weight)

    def trains(name: str) -> bool:
        if name.startswith("drafter.") or (".indexer." in name and config.indexer == "frozen"):
            return False
        return not name.startswith("mtp.") or (drafts and name.startswith("mtp.0."))

    return [name for name in read_weights(model) if trains(name)]


def choose_adapted(model: Transformer) -> list[str]:
    """Returns the names of the weights that have adapters."""
    return [name for name, value in read_weights(model).items() if isinstance(value, LowRank)]


def _check_lora(config: TrainConfig) -> None:
    if config.indexer == "distill" and not any("indexer" in t for t in config.lora.targets):
        raise ConfigError(
            "train.indexer = 'distill' trains nothing with train.lora unless lora.targets names "
            "the indexer: add 'attention.indexer.query_up', or set train.indexer = 'frozen'"
        )
