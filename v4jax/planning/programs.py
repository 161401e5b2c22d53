"""The program of a workload: the step that would run, and its arguments as shapes with shardings.

Decode and prefill are what `Transformer.extend` compiles, training is the step of `training`. The
mesh may be abstract: then the program can be traced, and its bytes counted, without any device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from v4jax.cache import HybridCache, init_cache
from v4jax.cache.hybrid import cache_axes
from v4jax.config import ModelConfig, Numerics
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.run import LoraConfig, OptimizerConfig, TrainConfig
from v4jax.costs.inventory import Weight, list_weights
from v4jax.model import Transformer, abstract_transformer, passes
from v4jax.model.parameters import Storage
from v4jax.model.weights import variables
from v4jax.parallel.layout import Layout
from v4jax.parallel.program import Program, with_shardings
from v4jax.parallel.shard import entry_shards
from v4jax.parallel.weight_sharding import annotate_shardings, weight_shardings
from v4jax.planning.workload import Workload
from v4jax.training.program import abstract_arguments, abstract_program
from v4jax.training.state import TrainState


def build_program(work: Workload, layout: Layout) -> Program:
    """Returns the step of a workload: a jitted function and its arguments.

    Args:
      layout: of the workload's mesh, with real or described devices or without any.
    """
    if work.regime == "train":
        return abstract_program(run_config(work), work.config, layout, work.target, work.storage)
    cache = abstract_cache(work, layout)
    tokens = _array((work.batch, work.chunk), work, layout, "batch", "tokens")
    lengths = _array((work.batch,), work, layout, "batch")
    # The very function that `Transformer.extend(…, donate=True)` calls after checking arguments.
    arguments = abstract_model(work, layout), tokens, cache, lengths, "last"
    return passes.extend_donating, arguments


def abstract_model(work: Workload, layout: Layout) -> Transformer:
    """Returns the model as the computation reads it, every array with its sharding.

    Raises:
      ConfigError: a mesh axis does not divide what the code computes on.
    """
    model = _unsharded_model(work.config, work.numerics, work.storage)
    model = annotate_shardings(model, layout)
    model.layout, model.target = layout, work.target
    return with_shardings(model, weight_shardings(model, layout))


@functools.lru_cache(maxsize=8)
def _unsharded_model(config: ModelConfig, numerics: Numerics, storage: Storage) -> Transformer:
    return abstract_transformer(config, numerics, storage=storage)


def abstract_cache(work: Workload, layout: Layout) -> HybridCache:
    """Returns the cache of all sequences at the full context, every array with its sharding."""
    sizes = work.batch, work.context, entry_shards(layout)
    cache = _unsharded_cache(work.config, work.numerics, *sizes)
    shardings = jax.tree.map(lambda axes: _sharding(work, layout, *axes), cache_axes(cache))
    return with_shardings(cache, shardings)


@functools.lru_cache(maxsize=8)
def _unsharded_cache(config: ModelConfig, numerics: Numerics, *sizes: int) -> HybridCache:
    return jax.eval_shape(lambda: init_cache(config, numerics, *sizes))


def _array(shape: tuple[int, ...], work: Workload, layout: Layout, *axes: str):
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=_sharding(work, layout, *axes))


def _sharding(work: Workload, layout: Layout, *axes: str | None) -> NamedSharding:
    return NamedSharding(layout.mesh, layout.array_spec(*axes, tokens=work.tokens))


@functools.lru_cache(maxsize=64)
def sharded_weights(work: Workload) -> tuple[Weight, ...]:
    """Returns the weights as the computation reads them; `device_bytes` says what a device has.

    Raises:
      ConfigError: as `abstract_model`.
    """
    return list_weights(variables(abstract_model(work, work.layout)))


@functools.lru_cache(maxsize=64)
def train_state(work: Workload) -> TrainState:
    """Returns what a training step changes: trained weights and the optimizer's moments."""
    config = run_config(work)
    return abstract_arguments(config, work.config, work.layout, work.target, work.storage).state


def run_config(work: Workload) -> TrainConfig:
    """Returns the training run that a workload plans: with the defaults of `TrainConfig`."""
    adapts = work.training == "lora"
    planned = SourceConfig("text", paths=("planned",))
    return TrainConfig(
        model="planned",
        output="planned",
        data=DataConfig(sources=(planned,), length=work.context, batch=work.batch),
        steps=1000,
        numerics=work.numerics.name,
        optimizer=OptimizerConfig(kind="adamw" if adapts else work.training),
        lora=LoraConfig(rank=work.lora_rank) if adapts else None,
        offload=work.offload,
    )
