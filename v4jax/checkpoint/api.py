"""`load` and `save`: a model from a folder or a configuration's name, and back to a folder."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from v4jax import log
from v4jax.checkpoint.hf_reader import read_model
from v4jax.checkpoint.hf_writer import write_model
from v4jax.config import Numerics, choose_numerics, get_numerics
from v4jax.config.loading import PRETRAINED, load_model_config, packaged_names, pretrained_names
from v4jax.config.numerics import SMALL_PARAMETERS, count_most_parameters
from v4jax.config.overrides import override
from v4jax.config.ranges import MAX_SEED
from v4jax.errors import CheckpointError, ConfigError
from v4jax.files import PathLike, find_model, is_folder, is_remote, to_path
from v4jax.model import Transformer
from v4jax.parallel import ExpertExchange, Layout, WeightLayout, check_mesh
from v4jax.parallel.agreement import share_json
from v4jax.parallel.weight_sharding import init_sharded


def load(
    name_or_folder: PathLike,
    numerics: str | Numerics | None = None,
    *,
    seed: int | None = None,
    mesh: Mesh | None = None,
    weight_layout: WeightLayout = "serve",
    exchange: ExpertExchange | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Transformer:
    """Returns a model: read from a checkpoint folder, or of a packaged name.

    Args:
      name_or_folder: a folder in the released or the transformers layout (also in gs:// or s3://),
        a repository of the Hugging Face hub (`hf://org/name`, `hf://org/name@revision`, or
        `org/name` where there is no such folder), or the name (or file) of a configuration. "nano"
        has trained weights in the package (`v4jax/pretrained`); other configurations get random
        ones.
      numerics: `float32`, `bfloat16`, `released`, or a `Numerics`. It says how the model rounds; a
        folder's weights stay in their stored formats whatever it is. None: `released` for a large
        model, `float32` for a small one (`config.choose_numerics`).
      seed: makes random weights, also for a name with trained ones; None: 0 where there are none.
        A folder ignores it. The weights are the same on any mesh.
      mesh: devices to lie on (`parallel.make_mesh`); None: the default device.
      weight_layout: "serve", or "train", which splits weights further and gathers them where they
        are used. See `parallel/axes.py`.
      exchange: how tokens travel to their experts; None: `parallel.ExpertExchange()`.
      overrides: values in place of the configuration's, for all layers or for single ones:
        {"index_topk": 64, "layers": {3: {"index_topk": 16}}}. See `config.overrides`.

    Raises:
      ConfigError: the name, the numerics or the configuration is bad, or the mesh does not divide
        the model; the message then names axis, size and the sizes that would do.
      CheckpointError: the folder's files are.
    """
    if numerics is not None:
        numerics = get_numerics(numerics)  # a bad name is an error before a file is read
    if not isinstance(name_or_folder, PathLike):
        raise ConfigError(
            "load takes a checkpoint folder or the name of a configuration, got "
            f"{type(name_or_folder).__name__}; Transformer(config, …) makes a model of a config"
        )
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise ConfigError(f"seed must be an integer from 0 to {MAX_SEED} or None, got {seed!r}")
    if seed is None and name_or_folder in pretrained_names():
        name_or_folder = PRETRAINED / name_or_folder
    name_or_folder = find_model(name_or_folder)
    if mesh is not None:  # all hosts read the commit that the first one found
        name_or_folder = share_json(os.fspath(name_or_folder))
    path = to_path(name_or_folder)
    layout = None if mesh is None else Layout(mesh, weight_layout, exchange or ExpertExchange())
    found = is_folder(path)
    if is_remote(path) and not found:
        raise CheckpointError(f"{path} is no folder: nothing lies below it")
    if found:
        return read_model(path, numerics, layout=layout, overrides=overrides)
    config = override(load_model_config(name_or_folder), overrides)
    numerics = choose_numerics(numerics, config, says=numerics is None)
    if layout is not None:
        check_mesh(layout.mesh, config, layout.weight_layout)

    def build() -> Transformer:
        rngs = nnx.Rngs(seed or 0)
        return Transformer(config, numerics, storage=numerics.activation_dtype, rngs=rngs)

    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(build)))
    _check_random(name_or_folder, parameters)
    log.info(
        f"{name_or_folder}: random weights (seed {seed or 0}), {parameters / 1e6:.1f} M parameters"
    )
    if layout is None:
        return build()
    model = init_sharded(build, layout)
    model.layout = layout
    return model


def check_weights(name_or_folder: PathLike) -> None:
    """Raises where `load` would find no weights and too many for random ones; loads nothing.

    Raises:
      ConfigError: so it is, or there is no such model.
    """
    config, name = load_model_config(name_or_folder), str(name_or_folder)
    if name.endswith(".py") or name in {*packaged_names()} - {*pretrained_names()}:
        _check_random(name, count_most_parameters(config))


def _check_random(name: PathLike, parameters: int) -> None:
    if parameters > SMALL_PARAMETERS:
        raise ConfigError(
            f"{name} has {parameters / 1e9:.0f} billion parameters, too many for random "
            "weights; give the folder of its checkpoint, or a small configuration such as nano"
        )


def save(model: Transformer, folder: PathLike, format: str = "released") -> None:
    """Writes a checkpoint folder that `load` reads back, on a disk or in gs:// or s3://.

    Every process of a job calls this. A disk is written by process 0.

    Args:
      format: "released" (the published names, FP8 and FP4; weights that came so are written back
        byte for byte), "bfloat16" (the published names, plain), or "transformers".

    Raises:
      CheckpointError: the format is unknown, or the folder is not empty or cannot be written.
      UnsupportedError: the library for the folder's bucket is not installed.
    """
    if not isinstance(model, Transformer):
        raise CheckpointError(f"save takes a model that load returned, got {type(model).__name__}")
    write_model(model, folder, format)
