"""The range of a dataclass's field, stated beside it, and the one check of all ranges.

    hidden_size: int = within(1, 1 << 17)             no default
    swiglu_limit: float = within(1e-3, 1e9, 10.0)

A range says what is plausible, with room above everything published. A value beyond it is a damaged
file or a slip of the keyboard, and would end as an allocation of terabytes or a loop without end.
"""

import dataclasses
from typing import Any

from v4jax.config.json_keys import brief
from v4jax.errors import ConfigError, V4JaxError

MAX_SEED = 2**32 - 1
MOST_TOKENS = 1 << 28  # of a sequence, far above every model's


def within(least: float, most: float, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """Declares a dataclass's field whose numbers lie between `least` and `most`, both included.

    Args:
      default: of the field; without one the field has to be given. None may stand for a choice made
        later, and a tuple holds several such numbers.
      metadata: what else the field says about itself.
    """
    return dataclasses.field(default=default, metadata={"range": (least, most), **metadata})


def check_ranges(record: Any, name: str, error: type[V4JaxError] = ConfigError) -> None:
    """Raises on the first field of a dataclass whose number is out of its range.

    Args:
      name: how messages begin; the field's name follows it.

    Raises:
      error: a value is no number, is NaN, or lies outside.
    """
    for field in dataclasses.fields(record):
        check_range(type(record), field.name, getattr(record, field.name), name, error)


def check_range(
    record: type, field: str, value: Any, name: str, error: type[V4JaxError] = ConfigError
) -> None:
    """Raises where the value of one field is out of its range, as `check_ranges`."""
    bounds = record.__dataclass_fields__[field].metadata.get("range")
    if bounds is None or value is None:
        return
    least, most = bounds
    for number in value if isinstance(value, tuple) else (value,):
        fits = isinstance(number, int | float) and not isinstance(number, bool)
        if not (fits and least <= number <= most):
            raise error(f"{name}{field} must be between {least} and {most}, got {brief(value)}")
