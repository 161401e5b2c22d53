"""Patterns in a configuration that name weights: whole words of a name in a row, `*` within a word.

"indexer" and "moe.experts" name all weights below, "attention.query_up" those projections, and
"*norm" all norms. A pattern that names nothing is an error.
"""

import re
from collections.abc import Iterable, Sequence

from v4jax.config.json_keys import did_you_mean
from v4jax.errors import ConfigError


def find_named(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a pattern names."""
    words = re.escape(pattern).replace(r"\*", "[^.]*")
    found = re.compile(rf"(?:^|\.){words}(?:\.|$)")
    return [name for name in names if found.search(name)]


def choose_named(
    patterns: Iterable[str],
    names: Sequence[str],
    field: str,
    *,
    known: Sequence[str] = (),
    what: str = "weight of the model",
) -> set[str]:
    """Returns the names that any of the patterns names.

    Args:
      field: where the patterns are from, and `what`: what they name, for the message.
      known: patterns that may name nothing, because they are the default for all models.

    Raises:
      ConfigError: a pattern names nothing; the message has the nearest part of a name.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = find_named(pattern, names)
        if not found and pattern not in known:
            count = len(pattern.split("."))
            parts = sorted({part for name in names for part in _parts(name, count)})
            raise ConfigError(
                f"train.{field}: {pattern!r} names no {what}"
                f"{did_you_mean(pattern, parts) or f'; there are {_list(names)}'}"
            )
        chosen.update(found)
    return chosen


def _parts(name: str, count: int) -> list[str]:
    """Returns the parts of a name that are `count` words long."""
    words = name.split(".")
    return [".".join(words[i : i + count]) for i in range(len(words) - count + 1)]


def _list(names: Sequence[str]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in names}))
