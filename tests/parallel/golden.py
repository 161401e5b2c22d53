"""What a compiled step sends, kept as text: an unintended collective shows in a diff."""

import pathlib

import jax
import pytest

from v4jax.planning.collectives import count_collectives

VERSION = "0.10.2"
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "golden" / "collectives"


def check_collectives(text: str, name: str) -> None:
    """Compares kinds, numbers and bytes of the collectives in a program's text with those kept.

    Where a change is meant, delete the file and run the test, which then writes it and fails once.
    """
    lines = [f"{c.kind:20}{c.count:6}{c.result_bytes:12,} bytes" for c in count_collectives(text)]
    found = "\n".join(lines) + "\n"
    path = FOLDER / f"{name}.txt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
        pytest.fail(f"wrote {path}: read it, and keep it if it is meant")
    assert found == path.read_text()


def skip_other_versions() -> None:
    """Skips where another compiler than that of the kept files runs."""
    if jax.__version__ != VERSION:
        pytest.skip(f"how collectives are merged is the compiler's choice, here {VERSION}'s")
