"""The training step and its arguments as shapes with shardings: what a compiler asks for.

Nothing is allocated, so the step of a run is compiled before its machines exist.
"""

from typing import Any

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig, get_numerics
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.run import LoraConfig, OptimizerConfig, TrainConfig
from v4jax.model import abstract_transformer
from v4jax.model.parameters import Storage
from v4jax.parallel.layout import Layout
from v4jax.parallel.weights import place, weight_shardings
from v4jax.planning.compile import Program, with_shardings
from v4jax.planning.workload import Workload
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.optimizer import build_optimizer
from v4jax.training.placement import abstract_state, batch_sharding
from v4jax.training.step import build_step
from v4jax.training.trainable import split_trained


def planned_program(work: Workload, layout: Layout) -> Program:
    """Returns the step of a planned workload: that of a run with the defaults of `TrainConfig`."""
    adapts = work.training == "lora"
    planned = SourceConfig("text", paths=("planned",))
    config = TrainConfig(
        model="planned",
        output="planned",
        data=DataConfig(sources=(planned,), length=work.context, batch=work.batch),
        numerics=work.numerics.name,
        optimizer=OptimizerConfig(kind="adamw" if adapts else work.training),
        lora=LoraConfig(rank=work.lora_rank) if adapts else None,
        offload=work.offload,
    )
    return abstract_program(config, work.config, layout, work.storage)


def abstract_program(
    config: TrainConfig, model: ModelConfig, layout: Layout, storage: Storage = "released"
) -> Program:
    """Returns the step that most steps of a run are, and its arguments: frozen, state, batches.

    Args:
      config: of the run; its model and its mesh are the arguments beside it.
      layout: of the regime "train".
      storage: how the weights that are not trained are kept.
    """
    numerics = get_numerics(config.numerics)
    abstract = place(abstract_transformer(model, numerics, storage=storage), layout)
    abstract.layout = layout
    frozen, weights, biases = split_trained(abstract, config)
    frozen = with_shardings(frozen, weight_shardings(frozen, layout))
    optimizer = build_optimizer(config.optimizer, model, config.steps)
    state = abstract_state(frozen, weights, biases, optimizer)
    mode = Mode(config.remat, config.keep, config.offload, distill=config.indexer == "distill")
    step = build_step(config.loss, optimizer, mode, config.optimizer.clip_norm)
    return jax.jit(step, donate_argnums=1), (frozen, state, abstract_batches(config, layout))


def abstract_batches(config: TrainConfig, layout: Layout) -> Batch:
    """Returns the packed batches of one update."""
    shape = config.optimizer.accumulate, config.data.batch, config.data.length
    sharding = batch_sharding(layout)

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return Batch(array(jnp.int32), array(jnp.float32), array(jnp.int32))
