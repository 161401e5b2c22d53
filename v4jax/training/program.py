"""The training step of a run and its arguments, as shapes with shardings.

Nothing is allocated: a plan counts the bytes of these arguments, and a compiler compiles the step
before the machines of the run exist.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig, TrainConfig, get_numerics
from v4jax.kernels import Target
from v4jax.model import abstract_transformer
from v4jax.model.parameters import Storage
from v4jax.parallel.layout import Layout
from v4jax.parallel.program import Program, with_shardings
from v4jax.parallel.weight_sharding import annotate_shardings
from v4jax.training.batch import Batch, batch_sharding
from v4jax.training.forward import Mode
from v4jax.training.optimizer import build_optimizer, build_schedule
from v4jax.training.state import Frozen, TrainState, abstract_state
from v4jax.training.step import build_step
from v4jax.training.trainable import split_trained


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a step is given, every array a `jax.ShapeDtypeStruct` with its sharding.

    frozen: arrays that are not trained. state: trained weights or adapters in float32,
    biases, and what the optimizer keeps, by the names of the weights. batches: those of one update.
    """

    frozen: Frozen
    state: TrainState
    batches: Batch


def abstract_arguments(
    config: TrainConfig,
    model: ModelConfig,
    layout: Layout,
    target: Target,
    storage: Storage = "released",
) -> Arguments:
    """Returns the arguments of a step of a run.

    Args:
      config: the run; its model and its mesh are the arguments beside it.
      layout: with `weight_layout` "train".
      target: the devices that the step is made for.
      storage: how the weights that are not trained are kept.

    Raises:
      ConfigError: a mesh axis does not divide what the code computes on.
    """
    numerics = get_numerics(config.numerics)
    abstract = annotate_shardings(abstract_transformer(model, numerics, storage=storage), layout)
    abstract.layout, abstract.target = layout, target
    frozen, weights, biases = split_trained(abstract, config)
    shardings = {k: v for k, v in frozen.shardings().items() if k in frozen.arrays}
    frozen = dataclasses.replace(frozen, arrays=with_shardings(frozen.arrays, shardings))
    optimizer = build_optimizer(config.optimizer, model)
    state = abstract_state(frozen, weights, biases, optimizer)
    return Arguments(frozen, state, abstract_batches(config, layout))


def abstract_program(
    config: TrainConfig,
    model: ModelConfig,
    layout: Layout,
    target: Target,
    storage: Storage = "released",
) -> Program:
    """Returns the step that most steps of a run are, with `abstract_arguments` in their order."""
    arguments = abstract_arguments(config, model, layout, target, storage)
    optimizer = build_optimizer(config.optimizer, model)
    mode = Mode(config.remat, config.keep, config.offload, distill=config.indexer == "distill")
    rate, clip_norm = build_schedule(config.optimizer, config.steps), config.optimizer.clip_norm
    step = build_step(config.loss, optimizer, rate, mode, clip_norm, config.draft)
    frozen, state, batches = arguments.frozen, arguments.state, arguments.batches
    return jax.jit(step, donate_argnums=1), (frozen, state, batches)


def abstract_batches(config: TrainConfig, layout: Layout) -> Batch:
    """Returns the packed batches of one update."""
    shape = config.optimizer.accumulate, config.data.batch, config.data.length
    sharding = batch_sharding(layout, len(shape))

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(array(jnp.int32), array(jnp.float32), array(jnp.int32))
