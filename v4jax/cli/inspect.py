"""`v4jax inspect`: what a model consists of, from shapes alone."""

import dataclasses
import json
import os
from typing import Any, Literal

SUMMARY = "lists a model's parameters: shape, format, bytes, logical axes, totals"
USAGE = """
Allocates nothing and reads headers only; it therefore works for any size on any machine. A repeated
block appears once, with its repeats as the leading axis "layers". Totals count weights, without
scales and routing tables.

  v4jax inspect v4_flash
  v4jax inspect /models/v4-flash --json
  v4jax inspect nano --storage=float32
"""
PLAIN_WIDTH = 160  # columns where the output is no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax inspect` is told.

    Attributes:
      model: Checkpoint folder, hf://org/name, or the name of a packaged configuration. Required;
        "--model=" may be left out.
      storage: How a configuration's parameters are kept; a folder's are kept as its files are.
      json: Print JSON instead of a table.
    """

    model: str = dataclasses.field(metadata={"positional": True})
    storage: Literal["released", "float32", "bfloat16"] = "released"
    json: bool = False


def run(flags: Flags) -> int:
    """Prints the table."""
    from v4jax.checkpoint import census, read_abstract, total
    from v4jax.config import get_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.files import find_model, is_remote
    from v4jax.model import abstract_transformer

    name = find_model(flags.model)
    if is_remote(name) or os.path.isdir(name):
        model = read_abstract(name)
    else:
        config = load_model_config(name)
        model = abstract_transformer(config, get_numerics("released"), storage=flags.storage)
    entries = census(model)
    totals = total(entries)
    if flags.json:
        rows = [dataclasses.asdict(entry) for entry in entries]
        print(json.dumps({"parameters": rows, "totals": dataclasses.asdict(totals)}, indent=2))
    else:
        _print_table(flags.model, entries, totals)
    return 0


def _print_table(name: str, entries: list, totals: Any) -> None:
    import rich.box
    import rich.console
    import rich.table

    from v4jax import log

    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=PLAIN_WIDTH)
    table = rich.table.Table(title=name, box=rich.box.SIMPLE_HEAD)
    for column, justify in (
        *(("path", "left"), ("shape", "right"), ("format", "left")),
        *(("bytes", "right"), ("logical axes", "left")),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for entry in entries:
        shape = "×".join(map(str, entry.shape))
        size = log.format_bytes(entry.memory_bytes)
        table.add_row(entry.path, shape, entry.fmt, size, " ".join(map(str, entry.axes)))
    console.print(table)
    for line in _describe_totals(totals):
        console.print(line, highlight=False, soft_wrap=True)


def _describe_totals(totals: Any) -> list[str]:
    from v4jax import log

    formats = ", ".join(
        f"{fmt} {log.format_bytes(size)}" for fmt, size in totals.memory_bytes_by_format.items()
    )
    return [
        f"parameters       {totals.parameters:,}"
        f" ({totals.parameters_without_drafts:,} without the blocks that draft)",
        f"stored elements  {totals.stored_elements:,}"
        " (packed FP4 as bytes; scales and routing tables included)",
        f"memory           {totals.memory_bytes:,} bytes"
        f" = {log.format_bytes(totals.memory_bytes)} ({formats})",
        f"files            {totals.file_bytes:,} bytes in {totals.tensors:,} tensors"
        " (routing tables as int64)",
    ]
