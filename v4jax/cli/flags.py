"""Flags from frozen dataclasses, and dataclasses from flags: the only module that defines a flag.

A field becomes a flag with its name, type and default; the help is its text in the docstring's
`Attributes`. A field that is a dataclass contributes its own fields as flags. An `InferenceConfig`
also contributes `--config=FILE.py`, whose values the flags replace. Metadata of a field:

    without      fields of the dataclass that are not flags here
    repeated     a tuple whose flag is given once for every entry
    positional   takes the words that are not flags
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from absl import flags

from v4jax.config.inference import InferenceConfig
from v4jax.config.ranges import check_range
from v4jax.config.run import MeshConfig, parse_mesh
from v4jax.errors import RequestError

CONFIG_HELP = (
    "Python file whose get_config() describes model and answers; see configs/inference. Flags "
    "replace its values."
)
SYSTEM = "system"  # the one text that may be empty: a system message


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A field that is a flag: its name, the dotted path to it, and what the field says."""

    name: str
    path: str
    hint: Any
    default: Any
    help: str
    repeated: bool
    record: type

    @property
    def required(self) -> bool:
        """Whether there is no work without it."""
        return self.default is dataclasses.MISSING


def define(record: type, values: flags.FlagValues) -> None:
    """Defines the flags of a dataclass."""
    for field in dataclasses.fields(record):
        if field.type is InferenceConfig:
            flags.DEFINE_string("config", None, CONFIG_HELP, flag_values=values)
        for leaf in _leaves(record, field):
            _define_leaf(leaf, values)


def read(record: type, values: flags.FlagValues, words: list[str], hint: str) -> Any:
    """Returns the dataclass that the parsed flags describe.

    Args:
      words: what is no flag.
      hint: what to do about a word too many.

    Raises:
      RequestError: a word too many, a flag without a value, or one that is no number.
      ConfigError: the file of --config is bad.
    """
    found = {}
    for field in dataclasses.fields(record):
        leaves = list(_leaves(record, field))
        if words and field.metadata.get("positional") and values[field.name].value is None:
            values[field.name].value = words.pop(0)
        file = values.config if field.type is InferenceConfig else None
        if file == "":
            raise RequestError("--config must not be empty; leave it out, or name a file")
        for leaf in leaves:
            if leaf.required and not values[leaf.name].value and file is None:
                raise RequestError(f"--{leaf.name} is required; --help shows examples")
        for leaf in leaves:
            _check_text(leaf, values)
        if not dataclasses.is_dataclass(field.type):
            (leaf,) = leaves
            found[field.name] = _value(leaf, values)
            check_range(record, field.name, found[field.name], "--", RequestError)
            continue
        given = [leaf for leaf in leaves if values[leaf.name].present]
        for leaf in given:
            check_range(leaf.record, leaf.name, _value(leaf, values), "--", RequestError)
        changes = {leaf.path.partition(".")[2]: _value(leaf, values) for leaf in given}
        from v4jax.config.loading import load_run  # ml_collections: not for --help

        found[field.name] = load_run(field.type, file, changes)
    if words:
        raise RequestError(f"unexpected argument {words[0]!r}; {hint}")
    return record(**found)


def as_dict(record: Any) -> dict[str, Any]:
    """Returns the values of all flags of a dataclass, by name, as JSON can express them."""
    found = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        values = as_dict(value) if dataclasses.is_dataclass(value) else value
        found |= values if dataclasses.is_dataclass(field.type) else {field.name: values}
    return found


def _leaves(record: type, field: dataclasses.Field, path: str = "") -> Iterator[_Leaf]:
    """Yields the flags of a field."""
    path += field.name
    if dataclasses.is_dataclass(field.type):
        for inner in dataclasses.fields(field.type):
            if inner.name not in field.metadata.get("without", ()):
                yield from _leaves(field.type, inner, f"{path}.")
    else:
        text = _attributes(record)[field.name]
        repeated = field.metadata.get("repeated", False)
        yield _Leaf(field.name, path, field.type, field.default, text, repeated, record)


def _attributes(record: type) -> dict[str, str]:
    """Returns the texts of a docstring's `Attributes`, by field."""
    _, _, section = inspect.getdoc(record).partition("Attributes:\n")
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _define_leaf(leaf: _Leaf, values: flags.FlagValues) -> None:
    hint, default = _without_none(leaf.hint), None if leaf.required else leaf.default
    settings = {"name": leaf.name, "default": default, "help": leaf.help, "flag_values": values}
    if typing.get_origin(hint) is Literal:
        flags.DEFINE_enum(enum_values=typing.get_args(hint), **settings)
    elif typing.get_origin(hint) is tuple:
        define = flags.DEFINE_multi_string if leaf.repeated else flags.DEFINE_list
        define(**settings | {"default": [str(item) for item in default]})
    else:
        {
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
            MeshConfig: flags.DEFINE_string,
        }[hint](**settings)


def _value(leaf: _Leaf, values: flags.FlagValues) -> Any:
    """Returns a flag's value as the field wants it."""
    value, hint = values[leaf.name].value, _without_none(leaf.hint)
    if hint is MeshConfig:
        return None if value is None else parse_mesh(value)
    if typing.get_origin(hint) is not tuple:
        return value
    if typing.get_args(hint)[0] is not int:
        return tuple(value)
    try:
        return tuple(int(item) for item in value)
    except ValueError as error:
        raise RequestError(f"--{leaf.name} takes whole numbers, got {value}") from error


def _check_text(leaf: _Leaf, values: flags.FlagValues) -> None:
    """Raises where a flag was given and says nothing, as a variable that is not set makes it."""
    flag = values[leaf.name]
    if flag.present and _without_none(leaf.hint) is str and leaf.name != SYSTEM and not flag.value:
        raise RequestError(f"--{leaf.name} must not be empty; leave it out, or name something")


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint
