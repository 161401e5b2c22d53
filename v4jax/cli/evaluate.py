"""`v4jax evaluate`: does the model find what a long text says?"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from v4jax.cli import host_flags, model_flags

SUMMARY = "needle accuracy by length and depth, as a table and a picture"
USAGE = """
Hides sentences such as "The code of amber-falcon is 40917." in real text, among as many that look
like them, asks for each code, and counts the answers that are exactly right, by the length of the
text and the depth of the sentence in it. The names were never seen in training.

  v4jax evaluate --model=nano
  v4jax evaluate --model=nano --lengths=4096,65536,1048576 --questions=20,20,10 --plot=needles.png
  v4jax evaluate --model=out/nano/model --lengths=4096 --answers=answers.jsonl

The same seed gives the same texts and questions. A text is read once for all its questions.
"""


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    model_flags.define_model_flags(flags, values)
    flags.DEFINE_list(
        "lengths", ["4096", "16384"], "Bytes of text, one column each.", flag_values=values
    )
    flags.DEFINE_list(
        "questions",
        ["20"],
        "Questions in a cell; one number for all lengths, or one for each.",
        flag_values=values,
    )
    flags.DEFINE_integer("depths", 5, "Groups of equal depth, one row each.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of texts and questions.", flag_values=values)
    flags.DEFINE_string(
        "folder",
        None,
        "Text files to hide the sentences in; by default documentation and sources of Python.",
        flag_values=values,
    )
    flags.DEFINE_integer("questions_at_once", 4, "Answered side by side.", flag_values=values)
    flags.DEFINE_string("answers", None, "File for every answer, as JSONL.", flag_values=values)
    flags.DEFINE_string("plot", None, "File for the grid as PNG.", flag_values=values)
    flags.DEFINE_boolean("json", False, "Print JSON instead of a table.", flag_values=values)
    host_flags.define_host_flags(flags, values)


def run(values: Any, positional: list[str]) -> int:
    """Prints the grid."""
    from v4jax.errors import RequestError
    from v4jax.inference import run_together

    model_flags.require(values, "model")
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; see v4jax evaluate --help")
    lengths = _numbers(values, "lengths", least=512)
    questions = _numbers(values, "questions", least=1)
    if len(questions) not in (1, len(lengths)):
        raise RequestError(
            f"--questions takes one number, or one for each of {len(lengths)} lengths, got "
            f"{len(questions)}"
        )
    per_length = dict(zip(lengths, questions * len(lengths), strict=False))
    if values.depths < 1:
        raise RequestError(f"--depths must be at least 1, got {values.depths}")
    host_flags.start_serving(values)
    mesh, options = model_flags.plan_engine(values, values.questions_at_once)
    return run_together(
        lambda: model_flags.load_engine(values, mesh, options),
        lambda load_engine: _evaluate(values, lengths, per_length, load_engine),
    )


def _evaluate(
    values: Any, lengths: list[int], per_length: dict[int, int], load_engine: Callable[[], Any]
) -> int:
    from v4jax import log
    from v4jax.cli import needle_grid
    from v4jax.pictures import make_figure

    # All of this is said before anything is read, which may take long.
    for name in ("answers", "plot"):
        if getattr(values, name):
            model_flags.check_writable(name, getattr(values, name))
    if values.plot:
        make_figure(needle_grid.MISSING)
    texts = needle_grid.draw_texts(
        lengths, values.depths, per_length.__getitem__, values.seed, values.folder
    )

    engine = load_engine()
    written = []
    with log.Progress("evaluate", sum(text.length for text in texts), "bytes") as progress:

        def on_text(text: Any, answers: list[tuple[str, str, str]]) -> None:
            for name, code, answer in answers:
                line = {"length": text.length, "name": name, "code": code, "answer": answer}
                written.append(json.dumps(line, ensure_ascii=False) + "\n")
            if values.answers:  # after each text: reading the next may take long
                _write(values.answers, "".join(written))

        cells = needle_grid.ask_texts(engine, texts, values.depths, on_text, progress.advance)
    if values.json:
        rows = [dataclasses.asdict(cell) | {"accuracy": cell.accuracy} for cell in cells]
        print(json.dumps({"model": values.model, "depths": values.depths, "cells": rows}, indent=2))
    else:
        _print_table(values.model, cells, values.depths)
    if values.plot:
        title = f"{values.model}: codes found"
        needle_grid.plot_cells(cells, values.depths, title, values.plot)
        log.info(f"evaluate: wrote {values.plot}")
    return 0


def _write(path: str, text: str) -> None:
    from v4jax.errors import V4JaxError
    from v4jax.files import to_path

    try:
        to_path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise V4JaxError(f"cannot write {path}: {error.strerror or error}") from error


def _numbers(values: Any, flag: str, *, least: int) -> list[int]:
    from v4jax.errors import RequestError

    try:
        numbers = [int(text) for text in getattr(values, flag)]
    except ValueError as error:
        raise RequestError(f"--{flag} takes whole numbers, got {getattr(values, flag)}") from error
    if not numbers or min(numbers) < least:
        raise RequestError(f"--{flag} must be at least {least}, got {numbers}")
    return numbers


def _print_table(model: str, cells: list, depths: int) -> None:
    import rich.box
    import rich.console
    import rich.table

    from v4jax.cli.needle_grid import name_depth, name_length

    lengths = sorted({cell.length for cell in cells})
    table = rich.table.Table(
        title=f"{model}: codes found, % (right / asked)", box=rich.box.SIMPLE_HEAD
    )
    table.add_column("depth")
    for length in lengths:
        table.add_column(name_length(length), justify="right")
    by_place = {(cell.length, cell.depth): cell for cell in cells}
    for group in range(depths):
        row = [by_place[length, group] for length in lengths]
        table.add_row(name_depth(group, depths), *map(_describe, row))
    totals = [
        [cell for cell in cells if cell.length == length and cell.asked] for length in lengths
    ]
    table.add_section()
    table.add_row(
        "all",
        *(
            _describe(
                dataclasses.replace(
                    column[0],
                    asked=sum(cell.asked for cell in column),
                    right=sum(cell.right for cell in column),
                )
            )
            for column in totals
        ),
    )
    rich.console.Console().print(table)


def _describe(cell: Any) -> str:
    if cell.accuracy is None:
        return "-"
    return f"{100 * cell.accuracy:.0f} ({cell.right}/{cell.asked})"
