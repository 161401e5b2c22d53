"""What layers let others see while they run: `record` here, `collecting` where somebody looks.

    with observe.collecting() as seen:      # inside the traced function
        streams, memory = block(streams, context, memory)
    load = count(seen["router_ids"])

Training measures routers and indexers so. Where nobody collects, nothing is kept.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

_open: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("open", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Any]]:
    """Yields the dictionary that `record` fills meanwhile; its arrays belong to this trace."""
    found: dict[str, Any] = {}
    token = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(token)


def record(**values: Any) -> None:
    """Shows values to whoever collects."""
    found = _open.get()
    if found is not None:
        found.update(values)
