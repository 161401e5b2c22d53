"""`v4jax evaluate`: does the model find what a long text says?"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from v4jax.cli import outputs
from v4jax.cli.hosts import HostFlags, start_serving
from v4jax.config.inference import InferenceConfig
from v4jax.config.ranges import MAX_SEED, MOST_TOKENS, within
from v4jax.errors import RequestError

SUMMARY = "needle accuracy by length and depth, as a table and a picture"
USAGE = """
Hides sentences such as "The code of amber-falcon is 40917." in real text, among as many similar
sentences, and asks for each code. Counts the answers that are exactly right, by the length of the
text and the depth of the sentence in it. nano's training never used these names.

  v4jax evaluate --model=nano
  v4jax evaluate --model=nano --lengths=4096,65536,1048576 --questions=20,20,10 --plot=needles.png
  v4jax evaluate --model=out/nano/model --lengths=4096 --answers=answers.jsonl

Where tokens are drafted, the last line says how many a pass of the model wrote (the accepted
length); --speculate=off writes the same answers one by one.

The same seed gives the same texts and questions. A text is read once for all its questions.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax evaluate` is told.

    Attributes:
      lengths: Lengths of the texts in bytes; each is a column.
      questions: Questions in a cell; one number for all lengths, or one for each.
      depths: Number of depth groups; each is a row.
      seed: Seed of texts and questions.
      folder: Text files to hide the sentences in; by default documentation and sources of Python.
      answers: File for every answer, as JSONL.
      plot: File for the grid as PNG.
      json: Print JSON instead of a table.
    """

    config: InferenceConfig = dataclasses.field(metadata={"without": ("sampling",)})
    lengths: tuple[int, ...] = within(512, MOST_TOKENS, (4096, 16384))
    questions: tuple[int, ...] = within(1, 10_000, (20,))
    depths: int = within(1, 100, 5)
    seed: int = within(0, MAX_SEED, 0)
    folder: str | None = None
    answers: str | None = None
    plot: str | None = None
    json: bool = False
    hosts: HostFlags

    def __post_init__(self):
        if not (self.lengths and self.questions):
            raise RequestError("--lengths and --questions must name at least one number each")
        if len(self.questions) not in (1, len(self.lengths)):
            raise RequestError(
                f"--questions takes one number, or one for each of {len(self.lengths)} lengths, "
                f"got {len(self.questions)}"
            )
        if self.folder and not os.path.isdir(self.folder):
            raise RequestError(f"--folder must be a folder of text files, got {self.folder!r}")
        outputs.check_ending("plot", self.plot, ".png")
        outputs.check_apart(answers=self.answers, plot=self.plot)


def run(flags: Flags) -> int:
    """Prints the grid."""
    from v4jax.cli import engine
    from v4jax.inference import run_together

    start_serving(flags)
    config = engine.complete(flags.config)
    mesh, options = engine.plan_engine(config)
    return run_together(
        lambda: engine.load_engine(config, mesh, options),
        lambda load_engine: _evaluate(flags, load_engine),
    )


def _evaluate(flags: Flags, load_engine: Callable[[], Any]) -> int:
    from v4jax import log
    from v4jax.cli import needle_grid
    from v4jax.pictures import make_figure

    # All of this is said before anything is read, which may take long.
    for name in ("answers", "plot"):
        if getattr(flags, name):
            outputs.check_writable(name, getattr(flags, name))
    if flags.plot:
        make_figure(needle_grid.MISSING)
    per_length = dict(zip(flags.lengths, flags.questions * len(flags.lengths), strict=False))
    texts = needle_grid.draw_texts(
        flags.lengths, flags.depths, per_length.__getitem__, flags.seed, flags.folder
    )

    engine = load_engine()
    written = []
    with log.Progress("evaluate", sum(text.length for text in texts), "bytes") as progress:

        def on_text(text: Any, answers: list[tuple[str, str, str]]) -> None:
            for name, code, answer in answers:
                line = {"length": text.length, "name": name, "code": code, "answer": answer}
                written.append(json.dumps(line, ensure_ascii=False) + "\n")
            if flags.answers:  # after each text: reading the next may take long
                outputs.write(flags.answers, "".join(written))

        cells = needle_grid.ask_texts(engine, texts, flags.depths, on_text, progress.advance)
    model = flags.config.model
    if flags.json:
        rows = [dataclasses.asdict(cell) | {"accuracy": cell.accuracy} for cell in cells]
        print(json.dumps({"model": model, "depths": flags.depths, "cells": rows}, indent=2))
    else:
        _print_table(model, cells, flags.depths)
    if flags.plot:
        needle_grid.plot_cells(cells, flags.depths, f"{model}: codes found", flags.plot)
        log.info(f"evaluate: wrote {flags.plot}")
    return 0


def _print_table(model: str, cells: list, depths: int) -> None:
    import rich.box
    import rich.console
    import rich.table

    from v4jax.cli.needle_grid import name_depth, name_length

    lengths = sorted({cell.length for cell in cells})
    title = f"{model}: codes found, % (right / asked)"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("depth")
    for length in lengths:
        table.add_column(name_length(length), justify="right")
    for name, groups in (
        *((name_depth(group, depths), {group}) for group in range(depths)),
        ("all", set(range(depths))),
    ):
        if name == "all":
            table.add_section()
        columns = (
            [cell for cell in cells if cell.length == length and cell.depth in groups]
            for length in lengths
        )
        table.add_row(name, *map(_describe, columns))
    if any(cell.passes < cell.written for cell in cells):
        table.add_section()
        columns = ([cell for cell in cells if cell.length == length] for length in lengths)
        table.add_row("tokens a pass", *map(_count_tokens, columns))
    rich.console.Console().print(table)


def _count_tokens(cells: list) -> str:
    """Returns how many tokens a pass of the model wrote on average: the accepted length."""
    passes = sum(cell.passes for cell in cells)
    return f"{sum(cell.written for cell in cells) / passes:.2f}" if passes else "–"


def _describe(cells: list) -> str:
    """Returns the share of right answers in some cells."""
    right, asked = (sum(getattr(cell, name) for cell in cells) for name in ("right", "asked"))
    return f"{100 * right / asked:.0f} ({right}/{asked})" if asked else "-"
