"""Values in place of those of a model's configuration: for all of it, or for single layers.

    override(config, {"index_topk": 64, "layers": {3: {"index_topk": 16, "rope_theta": 2e4}}})

What a single layer may have of its own are numbers that its modules alone compute with. Sizes of
weights and of caches are the model's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from v4jax.config.json_keys import brief, did_you_mean
from v4jax.config.model import LAYER_FIELDS, ModelConfig
from v4jax.config.ranges import check_range
from v4jax.errors import ConfigError

_FIELDS = tuple(
    field.name for field in dataclasses.fields(ModelConfig) if field.name != "layer_overrides"
)


def override(config: ModelConfig, overrides: Mapping[str, Any] | None) -> ModelConfig:
    """Returns the configuration with other values.

    Args:
      overrides: fields of `ModelConfig` by name; `layers` has {layer, from 0: fields of its own},
        which are those of `LAYER_FIELDS`.

    Raises:
      ConfigError: a name or a layer does not exist, or a value breaks a rule.
    """
    found, changes = dict(overrides or {}), dict(config.layer_overrides)
    layers = found.pop("layers", {})
    _check(found, _FIELDS, "overrides")
    if not isinstance(layers, Mapping):
        raise ConfigError(f"overrides.layers must be {{layer: {{field: value}}}}, got {layers!r}")
    for layer, values in layers.items():
        place, count = f"overrides.layers[{layer!r}]", config.num_hidden_layers
        if type(layer) is not int or not 0 <= layer < count:
            raise ConfigError(f"{place} must be a layer, 0 … {count - 1}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{place} must be {{field: value}}, got {brief(values)}")
        _check(values, LAYER_FIELDS, place)
        changes[layer] = tuple(sorted((dict(changes.get(layer, ())) | values).items()))
    try:
        made = dataclasses.replace(config, **found, layer_overrides=tuple(sorted(changes.items())))
        for layer in made.layers:
            layer.adjust(made)  # which checks the rules among a layer's own values
        return made
    except TypeError as error:  # a value that cannot even be compared
        raise ConfigError(
            f"overrides {brief(found)} do not fit the configuration: {error}"
        ) from error


def _check(values: Mapping, known: tuple[str, ...], place: str) -> None:
    """Raises where a name is unknown, or its number is out of range or no integer."""
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"{place} has no field {name!r}{did_you_mean(str(name), known)}; known: "
                f"{', '.join(known)}"
            )
        check_range(ModelConfig, name, value, f"{place}.")
        if ModelConfig.__dataclass_fields__[name].type is int and type(value) is not int:
            raise ConfigError(f"{place}.{name} must be an integer, got {brief(value)}")
