"""Figures for people to look at; matplotlib is asked for only when one is drawn."""

import io
from typing import Any

from v4jax.errors import UnsupportedError


def make_figure(missing: str, **options: Any) -> Any:
    """Returns an empty `matplotlib.figure.Figure`, which belongs to no window.

    Args:
      missing: the message where matplotlib is not installed: what needs it, and the way without.
      options: of the figure, such as `figsize`.

    Raises:
      UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UnsupportedError(missing) from error
    return matplotlib.figure.Figure(**options)


def save_figure(figure: Any, path: Any, *, dpi: int) -> None:
    """Writes a figure as PNG to what `files.to_path` returned.

    Raises:
      OSError: it cannot be written.
    """
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format="png")
    path.write_bytes(data.getvalue())
