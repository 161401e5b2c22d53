"""Configuration files → frozen dataclasses. The only place that knows ml_collections.

    load_model_config("v4_flash")            a packaged configuration (`config/models`)
    load_model_config("my_model.py")         a file with get_config()
    load_model_config("/models/V4-Flash")    a folder with config.json, or hf://…

Below this floor there is no `ConfigDict` and no `.get`: every value is typed and checked.
"""

import dataclasses
import enum
import importlib.util
import pathlib
import traceback
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from v4jax.config.folder import read_folder_config
from v4jax.config.from_hf import layer_kinds, router_kinds
from v4jax.config.json_keys import brief, did_you_mean, is_finite
from v4jax.config.model import ModelConfig
from v4jax.config.ranges import check_range
from v4jax.config.run import TrainConfig
from v4jax.errors import ConfigError
from v4jax.files import find_model, is_folder, to_path

MODELS = pathlib.Path(__file__).with_name("models")  # files with get_config()
PRETRAINED = MODELS.parents[1] / "pretrained"  # checkpoint folders of packaged weights


def load_model_config(name_or_folder: str | pathlib.Path) -> ModelConfig:
    """Returns a model's configuration from a packaged name, a Python file, or a checkpoint folder.

    A file's `get_config()` returns a `ConfigDict` or a `ModelConfig`. One that describes a run
    gives the run's `model`.

    Raises:
      ConfigError: nothing of that name exists, or the configuration breaks a rule.
      CheckpointError: the hub has no such repository, or cannot be reached.
    """
    name, path = str(name_or_folder), to_path(find_model(name_or_folder))
    if name in pretrained_names():
        path = PRETRAINED / name
    elif name in packaged_names():
        path = MODELS / f"{name}.py"
    if is_folder(path):
        return read_folder_config(path)[1]
    if path.suffix != ".py" or not path.is_file():
        known = packaged_names()
        raise ConfigError(
            f"model must be one of {known}, a Python file with get_config(), or a folder with "
            f"config.json; got {name!r}{did_you_mean(name, known)}"
        )
    config = _run_file(path)
    if isinstance(config, Mapping | ml_collections.ConfigDict):
        config = config.get("model", config)
    elif not isinstance(config, ModelConfig):
        raise ConfigError(
            f"{name}: get_config() must return a ConfigDict, got {type(config).__name__}"
        )
    if isinstance(config, str):  # of a run: a name or a folder
        return load_model_config(config)
    return build(ModelConfig, config, "model")


def load_run_model(config: TrainConfig) -> ModelConfig:
    """Returns the configuration of the model that a run trains: with its fresh draft module.

    Raises:
      ConfigError: as `load_model_config`, or the run's module is missing or does not fit.
    """
    model = load_model_config(config.model)
    return config.draft.add_module(model) if config.draft else model


def load_run(
    dataclass_type: type,
    path: str | pathlib.Path | None,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """Returns the run that a Python file's `get_config()` describes, as a `dataclass_type`.

    Args:
      path: None for a run that `changes` describe alone.
      changes: values to put in place of the file's, by dotted path, such as {"data.batch": 8}.

    Raises:
      ConfigError: no such file, a path that leads nowhere, or a broken rule.
    """
    file = pathlib.Path(path) if path else None
    if file and (file.suffix != ".py" or not file.is_file()):
        raise ConfigError(f"config must be a Python file with get_config(), got {str(path)!r}")
    config = _run_file(file) if file else ml_collections.ConfigDict()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{path}: get_config() must return a ConfigDict, got {config!r}")
    with config.unlocked():
        for name, value in (changes or {}).items():
            *parents, field = name.split(".")
            place = config
            for parent in parents:
                if parent not in place:
                    place[parent] = ml_collections.ConfigDict()
                place = place[parent]
                if not isinstance(place, ml_collections.ConfigDict):
                    raise ConfigError(f"{name} cannot be set: {parent} holds a value, no fields")
            if field in place:
                del place[field]  # a ConfigDict would insist on the old value's type
            place[field] = value
    return build(dataclass_type, config)


def packaged_names() -> list[str]:
    """Returns the names of the packaged model configurations."""
    files = (path.stem for path in MODELS.glob("[a-z]*.py"))
    return sorted({*files, *pretrained_names()})


def pretrained_names() -> list[str]:
    """Returns the names of the configurations whose trained weights are packaged."""
    return sorted(config.parent.name for config in PRETRAINED.glob("*/config.json"))


def build(dataclass_type: type, config_dict, path: str = "") -> Any:
    """Returns a `dataclass_type` filled from a ConfigDict or mapping, nested ones included.

    Integers are accepted for floats, lists for tuples, a member's value or name for enums. A model
    may give `compress_ratios` without `layer_types` and `num_hash_layers` for `mlp_layer_types`.

    Args:
      dataclass_type: frozen dataclass; its annotations are the rules.
      config_dict: a ConfigDict, a mapping, or already a `dataclass_type`.
      path: prefix of the names in messages, such as `model`.

    Raises:
      ConfigError: unknown field, missing field or wrong type; the message starts with the field's
        path and names the nearest field.
    """
    if isinstance(config_dict, dataclass_type):
        return config_dict
    if not isinstance(config_dict, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{path or 'config'} must be a ConfigDict, got {brief(config_dict)}")
    values = {str(key): config_dict[key] for key in config_dict}
    if dataclass_type is ModelConfig:
        values = _expand_layers(values, path)
    fields = {field.name: field for field in dataclasses.fields(dataclass_type) if field.init}
    for name in values:
        if name not in fields:
            instead = getattr(dataclass_type, "REPLACED", {}).get(name)
            hint = f"; give {instead}" if instead else did_you_mean(name, fields)
            raise ConfigError(f"{_join(path, name)} is no field of {dataclass_type.__name__}{hint}")
    for name, field in fields.items():
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise ConfigError(f"{_join(path, name)} is missing; {dataclass_type.__name__} needs it")
    hints = typing.get_type_hints(dataclass_type)
    return dataclass_type(
        **{name: _convert(hints[name], value, _join(path, name)) for name, value in values.items()}
    )


def _expand_layers(values: dict, path: str) -> dict:
    """Completes the per-layer fields of a model from the two short forms."""
    values = dict(values)
    ratios = values.get("compress_ratios")
    if ratios is not None and "layer_types" not in values:
        ratios = _convert(tuple[int, ...], ratios, _join(path, "compress_ratios"))
        values["layer_types"] = layer_kinds(ratios)
    if "num_hash_layers" in values and "mlp_layer_types" not in values:
        hash_layers = _convert(int, values.pop("num_hash_layers"), _join(path, "num_hash_layers"))
        layers = _convert(int, values.get("num_hidden_layers"), _join(path, "num_hidden_layers"))
        check_range(ModelConfig, "num_hidden_layers", layers, f"{path}." if path else "")
        values["mlp_layer_types"] = router_kinds(hash_layers, layers)
    return values


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as the annotation `hint` wants it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, ml_collections.FieldReference):
        value = value.get()
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert_first([a for a in arguments if a is not type(None)], value, path)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{path} must be one of {list(arguments)}, got {brief(value)}")
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if value in (member, member.value, member.name):
                return member
        raise ConfigError(f"{path} must be one of {[m.value for m in hint]}, got {brief(value)}")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not is_finite(value):
            raise ConfigError(f"{path} must be finite, got {brief(value)}")
        return float(value)
    fits = isinstance(hint, type) and isinstance(value, hint)
    if fits and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{path} must be {getattr(hint, '__name__', hint)}, got {brief(value)}")


def _convert_first(hints: list, value: Any, path: str) -> Any:
    """Returns the first conversion that succeeds; a single candidate raises its own message."""
    if len(hints) == 1:
        return _convert(hints[0], value, path)
    for hint in hints:
        try:
            return _convert(hint, value, path)
        except ConfigError:
            continue
    names = ", ".join(getattr(hint, "__name__", str(hint)) for hint in hints)
    raise ConfigError(f"{path} must be one of the types {names}, got {brief(value)}")


def _convert_tuple(arguments: tuple, value: Any, path: str) -> tuple:
    if not isinstance(value, tuple | list):
        raise ConfigError(f"{path} must be a tuple, got {brief(value)}")
    if len(arguments) == 2 and arguments[1] is ...:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ConfigError(f"{path} must have {len(arguments)} entries, got {brief(value)}")
    return tuple(
        _convert(hint, item, f"{path}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _run_file(path: pathlib.Path) -> Any:
    """Returns what a file's get_config() returns; whatever it raises is a bad configuration."""
    spec = importlib.util.spec_from_file_location(f"v4jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, "get_config", None)
        if callable(found):
            return found()
    except (Exception, SystemExit) as error:
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if step.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{path}, line {line}," if line else f"{path}"
        what = "exits" if isinstance(error, SystemExit) else f"raises {type(error).__name__}"
        text = " ".join(str(error).split()) or "no message"
        raise ConfigError(f"{place} {what}: {text}") from error
    raise ConfigError(f"{path} must define get_config()")
