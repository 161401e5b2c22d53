"""The inventory of a configuration's model, for those who count before there are weights."""

import functools

from v4jax.config import ModelConfig
from v4jax.config.numerics import BFLOAT16
from v4jax.costs.inventory import Inventory, list_weights
from v4jax.model.parameters import Storage
from v4jax.model.transformer import abstract_transformer
from v4jax.model.weights import variables


@functools.lru_cache(maxsize=16)
def take_inventory(config: ModelConfig, storage: Storage = "released") -> Inventory:
    """Returns every weight of a configuration's model; allocates nothing.

    Args:
      storage: how the weights are kept: as released, or in one dtype.
    """
    model = abstract_transformer(config, BFLOAT16, storage=storage)  # numerics decide no shape
    return Inventory(config, list_weights(variables(model)))
