"""From an InferenceConfig to a model and an engine, for the verbs that answer."""

import dataclasses
import os
from typing import Any

from v4jax.config.inference import InferenceConfig

CHUNK_TOKENS = 4096  # read at once by one device
CHUNK_TOKENS_PER_DEVICE = 1024  # where a sequence is shared; as `v4jax plan` assumes


def build_sampling(config: InferenceConfig) -> Any:
    """Returns the SamplingOptions of a configuration, checked."""
    from v4jax.inference import SamplingOptions

    return SamplingOptions(**vars(config.sampling))


def complete(config: InferenceConfig) -> InferenceConfig:
    """Returns the configuration with what follows from the model: numerics, and prompt profile.

    A repository of the hub gets its commit, one for all. Every process of a job calls this, after
    they have joined.
    """
    from v4jax.config import choose_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.files import find_model
    from v4jax.parallel.agreement import on_all, share_json

    name = share_json(on_all(lambda: os.fspath(find_model(config.model))))
    # All of them read config.json, which may be missing on one.
    model = on_all(lambda: load_model_config(name))
    numerics = choose_numerics(config.numerics, model).name
    profile = config.frame.profile or model.profile
    frame = dataclasses.replace(config.frame, profile=profile)
    return dataclasses.replace(config, model=name, numerics=numerics, frame=frame)


def _check(config: InferenceConfig) -> Any:
    """Returns the configuration of the model, with which the flags have been compared.

    Raises:
      ConfigError: there is no such model, it has no weights, or it does not go so far.
      CheckpointError: the files of adapters are broken.
    """
    from v4jax.checkpoint.adapters import check_adapters
    from v4jax.checkpoint.api import check_weights
    from v4jax.config.loading import load_model_config
    from v4jax.errors import ConfigError

    model = load_model_config(config.model)
    check_weights(config.model)
    if config.adapters:
        check_adapters(config.adapters)
    most = model.max_position_embeddings
    for name, tokens in (
        ("max_tokens", config.max_tokens),
        ("max_new_tokens", config.sampling.max_new_tokens),
    ):
        if tokens is not None and tokens > most:
            raise ConfigError(
                f"{name} must be at most the model's max_position_embeddings {most:,}, got "
                f"{tokens:,}"
            )
    return model


def plan_engine(config: InferenceConfig, *, asks: bool = True) -> tuple[Any, Any]:
    """Returns the mesh over all devices, or None for one alone, and the EngineOptions for it.

    Args:
      config: as `complete` returned it.
      asks: whether questions to documents are answered, `questions_at_once` side by side.
    """
    from v4jax.config.loading import packaged_names
    from v4jax.inference import EngineOptions, Frame
    from v4jax.parallel.agreement import on_all
    from v4jax.parallel.mesh import choose_mesh

    frame, speculate = Frame(**vars(config.frame)), config.speculate
    model = on_all(lambda: _check(config))
    mesh = on_all(lambda: choose_mesh(config.mesh, model))
    sizes = {"data": 1, "expert": 1, "context": 1} if mesh is None else mesh.shape
    sharing = sizes["expert"] * sizes["context"]
    options = EngineOptions(
        frame=frame,
        chunk_tokens=config.chunk_tokens or max(CHUNK_TOKENS, CHUNK_TOKENS_PER_DEVICE * sharing),
        questions_at_once=config.questions_at_once if asks else sizes["data"],
        max_tokens=config.max_tokens,
        speculate=int(speculate) if speculate.isdecimal() else speculate,
    )
    options.check_data(sizes["data"])
    if config.model in packaged_names():  # of a folder the tensors say it, once they are read
        options.count_drafts(model.draft_tokens)
    return mesh, options


def load_engine(config: InferenceConfig, mesh: Any, options: Any) -> Any:
    """Returns the Engine of a configuration's model."""
    from v4jax.inference import Engine

    return Engine(load_model(config, mesh), options)


def load_model(config: InferenceConfig, mesh: Any) -> Any:
    """Returns the model of a completed configuration.

    The log says on which devices it is, how it rounds and is prompted, and if its weights are
    random.
    """
    import v4jax
    from v4jax import log
    from v4jax.checkpoint.adapters import read_adapters

    _say_mesh(config, mesh)
    _say_defaults(config)
    name = config.model
    with log.phase("model", f"loading {name}") as phase:
        model = v4jax.load(name, numerics=config.numerics, seed=config.weights_seed, mesh=mesh)
        phase.note(f"{name} is ready")
    if config.adapters:
        with log.phase("adapters", f"reading {config.adapters}") as phase:
            model = read_adapters(model, config.adapters)
            phase.note(f"{config.adapters} is beside the model")
    if model.folder is None:
        log.warning(
            f"{name} has random weights, no trained ones: its answers mean nothing. They show that "
            "the machinery works, and how fast"
        )
    return model


def identify_model(config: InferenceConfig, mesh: Any) -> str:
    """Returns a name for the model that does not depend on the working directory.

    Weights of a folder are the same on every mesh; random ones are others on a mesh.
    """
    from v4jax.config.loading import pretrained_names
    from v4jax.files import is_remote

    name = config.model
    if os.path.isdir(name):
        name = os.path.realpath(name)
    elif not is_remote(name):
        trained = name in pretrained_names() and config.weights_seed is None
        name = name if trained or mesh is None else f"{name} on a mesh"
    if not config.adapters:
        return name
    adapters = config.adapters
    return f"{name} with {adapters if is_remote(adapters) else os.path.realpath(adapters)}"


def _say_defaults(config: InferenceConfig) -> None:
    """Says what follows from the model's files."""
    from v4jax import log
    from v4jax.config import choose_numerics
    from v4jax.config.loading import load_model_config

    model = load_model_config(config.model)
    choose_numerics(config.numerics, model, says=True)
    if config.frame.thinking and config.frame.profile == model.profile:
        log.once(f"prompts: profile {model.profile}, as the model's files say")


def _say_mesh(config: InferenceConfig, mesh: Any) -> None:
    """Says which devices work, where there are several."""
    import jax

    from v4jax import log

    count = len(jax.devices())
    if mesh is None and count > 1:
        log.once(f"mesh: one device, as --mesh=data=1 says; {count} are here")
    elif mesh is not None:
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        one = "" if jax.process_count() > 1 else ", --mesh=data=1 takes one device"
        default = f"; --mesh names another{one}" if config.mesh is None else ""
        log.once(f"mesh: {sizes}, all {count} devices{default}")
