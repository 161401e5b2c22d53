"""`v4jax inspect`: what a model consists of, from shapes alone."""

import dataclasses
import json
import os
from typing import Any

SUMMARY = "lists a model's parameters: shape, format, bytes, logical axes, totals"
USAGE = """
Allocates nothing and reads headers only, so it works for any size on any machine. A repeated block
appears once, with its repeats as the leading axis "layers". Totals count weights alone, neither
scales nor routing tables.

  v4jax inspect --model=v4_flash
  v4jax inspect --model=/models/v4-flash --json
  v4jax inspect --model=nano --storage=float32
"""
STORAGES = ("released", "float32", "bfloat16")
PLAIN_WIDTH = 160  # columns where the output is no terminal


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "model",
        None,
        "Checkpoint folder, or the name of a packaged configuration. Required.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "storage",
        "released",
        STORAGES,
        "How a configuration's parameters are kept; a folder's are kept as its files are.",
        flag_values=values,
    )
    flags.DEFINE_boolean("json", False, "Print JSON instead of a table.", flag_values=values)


def run(values: Any, positional: list[str]) -> int:
    """Prints the table."""
    from v4jax.checkpoint import census, read_abstract, total
    from v4jax.cli import model_flags
    from v4jax.config import get_numerics
    from v4jax.config.loading import load_model_config
    from v4jax.errors import RequestError
    from v4jax.files import is_remote
    from v4jax.model import abstract_transformer

    model_flags.require(values, "model")
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; the model is --model=…")
    if is_remote(values.model) or os.path.isdir(values.model):
        model = read_abstract(values.model)
    else:
        config = load_model_config(values.model)
        model = abstract_transformer(config, get_numerics("released"), storage=values.storage)
    entries = census(model)
    totals = total(entries)
    if values.json:
        rows = [dataclasses.asdict(entry) for entry in entries]
        print(json.dumps({"parameters": rows, "totals": dataclasses.asdict(totals)}, indent=2))
    else:
        _print_table(values.model, entries, totals)
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
        f" ({totals.parameters_without_mtp:,} without MTP blocks)",
        f"stored elements  {totals.stored_elements:,}"
        " (packed FP4 as bytes; scales and routing tables included)",
        f"memory           {totals.memory_bytes:,} bytes"
        f" = {log.format_bytes(totals.memory_bytes)} ({formats})",
        f"files            {totals.file_bytes:,} bytes in {totals.tensors:,} tensors"
        " (routing tables as int64)",
    ]
