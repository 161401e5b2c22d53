"""Reads a JSON object key by key, so that no key goes unused and no value has the wrong type."""

import difflib
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from v4jax.errors import ConfigError
from v4jax.files import PathLike, read_regular

MOST_BYTES = 100_000_000  # of a file of JSON: what the format of the weights allows its headers
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 120, 120, 40
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 8

_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class JsonKeys:
    """A JSON object that remembers which keys were asked for and checks their types."""

    def __init__(self, raw: Mapping, path: str):
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{path} must be an object, got {brief(raw)}")
        self.raw, self.path, self.used = raw, path, set()

    def take(self, key: str, kind: type, default=...):
        """Returns the value of `key` as `kind`; absent or null gives `default`, or an error."""
        self.used.add(key)
        value = self.raw.get(key)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.path} lacks the key {key!r}; the model needs it")
            return default
        accepted = (int, float) if kind is float else kind
        wrong = isinstance(value, bool) and kind is not bool
        if wrong or not isinstance(value, accepted):
            raise ConfigError(f"{self.path}: {key} must be {_KINDS[kind]}, got {brief(value)}")
        if kind is float and not is_finite(value):
            raise ConfigError(f"{self.path}: {key} must be finite, got {brief(value)}")
        return float(value) if kind is float else value

    def check_fixed(self, fixed: Mapping[str, tuple]) -> None:
        """Raises where a key contradicts the only values that the code computes."""
        for key, accepted in fixed.items():
            self.used.add(key)
            value = self.raw.get(key)
            if value is not None and value not in accepted:
                wanted = " or ".join(map(repr, accepted))
                raise ConfigError(
                    f"{self.path}: {key} must be {wanted}, got {brief(value)}; v4jax computes "
                    "nothing else"
                )

    def check_all_used(self, known: Iterable[str] = ()) -> None:
        """Raises on the first key that nobody asked for and that is not `known`."""
        for key in self.raw:
            if key not in self.used and key not in known:
                raise ConfigError(
                    f"{self.path}: unknown key {brief(key)} (= {brief(self.raw[key])}) could "
                    f"change what the model computes{did_you_mean(key, self.used)}; remove it if "
                    "it does not"
                )

    def take_list(self, key: str, kind: type) -> list | None:
        """Returns the list of `kind` under `key`, or None."""
        items = self.take(key, list, None)
        for item in items or ():
            if not isinstance(item, kind) or isinstance(item, bool):
                raise ConfigError(
                    f"{self.path}: every entry of {key} must be {_KINDS[kind]}, got {brief(item)}"
                )
        return items

    def take_object(self, key: str, default=...) -> "JsonKeys | None":
        """Returns the object under `key` as another `JsonKeys`."""
        raw = self.take(key, dict, default)
        return None if raw is None else JsonKeys(raw, f"{self.path}: {key}")


def read_json(path: PathLike, most_bytes: int = MOST_BYTES) -> Any:
    """Returns what a file of JSON says. A byte-order mark is no content.

    Raises:
      OSError: it cannot be read, is no regular file, or is larger than `most_bytes`.
      ValueError: as `parse_json`, or it is not UTF-8.
    """
    return parse_json(read_regular(path, most_bytes).decode("utf-8-sig"))


def parse_json(text: str | bytes) -> Any:
    """Returns what a JSON text says.

    Raises:
      ValueError: it is no JSON, too deeply nested, or repeats a key in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{brief(key)} appears twice")
        result[key] = value
    return result


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float: no integer of 400 digits is."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def brief(value: Any) -> str:
    """Returns what a message shows of a value that may be as long as a file."""
    return _BRIEF.repr(value)


def brief_name(name: str) -> str:
    """Returns a name as a message shows it: bare, unless it would break or fill the line."""
    return name if name.isprintable() and len(name) <= _BRIEF.maxstring else brief(name)


def did_you_mean(name: str, known) -> str:
    """Returns `; did you mean 'x'?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
