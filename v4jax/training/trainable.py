"""What a run trains: the names of the weights, adapters among them, and what is rounded."""

from collections.abc import Iterable, Mapping

import jax
from flax import nnx

from v4jax.checkpoint.names import stored_formats
from v4jax.config import TrainConfig
from v4jax.config.model import ModelConfig
from v4jax.config.run import DraftTraining, LoraConfig, OptimizerConfig
from v4jax.errors import ConfigError
from v4jax.model import Transformer, abstract_transformer
from v4jax.model.draft import Drafter
from v4jax.model.parameters import Declare
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.weight_sharding import (
    annotate_shardings,
    init_sharded,
    is_variable,
    name_of,
    put_sharded,
)
from v4jax.quant import LowRank, Master, ScaledArray
from v4jax.training.lora import add_adapters, choose_targets
from v4jax.training.patterns import choose_named
from v4jax.training.state import Frozen, split_model, store

STORED = ("fp4", "fp8", "bfloat16")  # formats that a float32 weight is rounded to


def split_trained(model: Transformer, config: TrainConfig) -> tuple[Frozen, dict, dict]:
    """Returns what `split_model` returns for the weights that a run trains; shapes give shapes.

    With `config.lora`, a model without adapters gets some; those of a model with some are trained.
    With `config.draft.module`, the model gets a fresh draft module.

    Raises:
      ConfigError: what is to be trained does not exist or is frozen, or the mesh splits a weight
        inside the tiles that it is rounded in.
    """
    if config.draft:
        model = add_draft(model, config.draft, config.seed)
    names = choose_trained(model, config)
    if config.lora:
        if not choose_adapted(model):
            _check_lora(config)
            model = add_adapters(model, config.lora, config.seed, among=names)
        _check_adapters(model, config.lora, names)
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
    """Returns the names of the weights that a loss of the run reaches and that are not frozen.

    A weight that no loss reaches would only decay: those of the second and later MTP blocks, those
    of the first without the MTP loss, and those of a draft module. With `config.draft` the weights
    of the module are the only ones.
    """
    drafts = bool(config.loss.mtp_weight)

    def trains(name: str) -> bool:
        if config.draft:
            return name.startswith("drafter.")
        if name.startswith("drafter.") or (".indexer." in name and config.indexer == "frozen"):
            return False
        return not name.startswith("mtp.") or (drafts and name.startswith("mtp.0."))

    weights = list(read_weights(model))
    usual = OptimizerConfig.undecayed  # for every model, those without an indexer as well
    choose_named(config.optimizer.undecayed, weights, "optimizer.undecayed", known=usual)
    frozen = choose_named(config.frozen, weights, "frozen")
    chosen = [name for name in weights if trains(name) and name not in frozen]
    if not chosen:
        raise ConfigError(f"train.frozen = {list(config.frozen)} leaves no weight to be trained")
    return chosen


def add_draft(model: Transformer, draft: DraftTraining, seed: int = 0) -> Transformer:
    """Returns the model with the draft module that a run trains: a fresh one if it describes one.

    Shapes in place of arrays give shapes; on a mesh the module is made where it is held.

    Raises:
      ConfigError: as `DraftTraining.add_module`.
    """
    config, numerics, layout = draft.add_module(model.config), model.numerics, model.layout
    if draft.module is None:
        return model

    def build() -> Drafter:
        return Drafter(Declare(config, "float32", nnx.Rngs(seed)), config, numerics)

    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        fresh = jax.eval_shape(build)
        fresh = fresh if layout is None else annotate_shardings(fresh, layout)
    else:
        fresh = build() if layout is None else init_sharded(build, layout)
    held = variables(model) | {f"drafter.{name}": v for name, v in variables(fresh).items()}
    made = jax.tree_util.tree_map_with_path(
        lambda path, _: held[name_of(path)],
        abstract_transformer(config, numerics, target=model.target),
        is_leaf=is_variable,
    )
    made.layout, made.folder = layout, model.folder
    return made


def describe_heads(model: ModelConfig, config: TrainConfig, trained: Iterable[str]) -> str:
    """Returns what happens to the draft module or the MTP blocks of a model; "" without any.

    Args:
      trained: names of the arrays that the run trains.
    """
    if config.draft:
        return "the draft module alone is trained; everything else stays bit for bit as it is"
    if model.draft:
        return (
            "the draft module stays bit for bit as it is. It was trained for the model as it was: "
            "answers stay right, fewer drafts are accepted; train.draft trains it for the new one"
        )
    if not model.num_nextn_predict_layers:
        return ""
    if any(name.startswith("mtp.") for name in trained):
        return f"the first MTP block is trained too, by loss.mtp_weight = {config.loss.mtp_weight}"
    return "the MTP blocks stay bit for bit as they are (loss.mtp_weight = 0, or no adapters there)"


def choose_adapted(model: Transformer) -> list[str]:
    """Returns the names of the weights that have adapters."""
    return [name for name, value in read_weights(model).items() if isinstance(value, LowRank)]


def _check_adapters(model: Transformer, lora: LoraConfig, names: list[str]) -> None:
    """Raises unless a model's adapters are those that a configuration describes."""
    found, wanted = choose_adapted(model), choose_targets(model, lora, names)
    for name in sorted({*found} ^ {*wanted}):
        has, say = ("has", "do not name") if name in found else ("has no", "name")
        raise ConfigError(
            f"train.lora.targets {say} {name}, which {has} adapters in train.lora.start = "
            f"{lora.start!r}; give targets that name what has some"
        )
    for name in found:
        value = read_weights(model)[name]
        rank, scale = value.down.shape[-2], value.scale
        if (rank, scale) != (lora.rank, lora.alpha / lora.rank):
            raise ConfigError(
                f"train.lora.rank = {lora.rank} and alpha = {lora.alpha:g} must be those of the "
                f"adapters to go on from: give rank = {rank} and alpha = {rank * scale:g}"
            )


def _check_lora(config: TrainConfig) -> None:
    if config.indexer == "distill" and not any("indexer" in t for t in config.lora.targets):
        raise ConfigError(
            "train.indexer = 'distill' trains nothing with train.lora unless lora.targets names "
            "the indexer: add 'attention.indexer.query_up', or set train.indexer = 'frozen'"
        )
