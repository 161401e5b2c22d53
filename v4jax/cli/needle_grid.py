"""Needle accuracy by length and depth: which codes hidden in long texts a model finds.

A text has as many needles as distractors, more in longer ones. Every code is a question, counted in
the cell of its text's length and its own depth, until the cell is full.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from v4jax.files import to_path
from v4jax.pictures import make_figure, save_figure

NEEDLES = 8  # in the shortest text …
BYTES_PER_NEEDLE = 2048  # … and one for each of these in longer ones, up to
MOST_NEEDLES = 96
MAX_NEW_TOKENS = 8  # five digits, the end, and room to be wrong
MISSING = '--plot needs matplotlib: pip install "v4jax[plots]"; without it the table is printed'


@dataclasses.dataclass(frozen=True)
class Cell:
    """Questions about needles of one length of text (bytes) and one fifth (or so) of its depth.

    written: tokens of the answers but for the first of each, which reading gives. passes: passes of
    the model that wrote them; fewer, where tokens are drafted.
    """

    length: int
    depth: int
    asked: int = 0
    right: int = 0
    written: int = 0
    passes: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of the answers that are exactly the code; None without questions."""
        return self.right / self.asked if self.asked else None


@dataclasses.dataclass(frozen=True)
class Text:
    """One haystack and what is asked about it: (name, code, depth group)."""

    length: int
    text: str
    asked: tuple[tuple[str, str, int], ...]


def draw_texts(
    lengths: Sequence[int],
    depths: int,
    questions: Callable[[int], int],
    seed: int,
    folder: str | None = None,
) -> list[Text]:
    """Returns the texts of a grid, shortest first; the same for the same arguments.

    Args:
      depths: groups of equal depth.
      questions: length → questions in each cell.
      folder: of the surrounding text (`Needles.folder`).
    """
    from v4jax.training.data import needles

    found = []
    for length in sorted(lengths):
        count = min(max(NEEDLES, length // BYTES_PER_NEEDLE), MOST_NEEDLES)
        settings = needles.Needles(
            tokens=(length, length),
            needles=(count, count),
            distractors=(count, count),
            split="test",
            folder=folder,
        )
        room, index = [questions(length)] * depths, 0
        while any(room):
            haystack = needles.hide(np.random.default_rng((seed, length, index)), settings)
            index += 1
            asked = []
            for name, code in haystack.codes.items():
                group = min(int(haystack.depths[name] * depths), depths - 1)
                if room[group]:
                    room[group] -= 1
                    asked.append((name, code, group))
            if asked:
                found.append(Text(length, haystack.text, tuple(asked)))
    return found


def ask_texts(
    engine: Any,
    texts: Sequence[Text],
    depths: int,
    on_text: Callable[[Text, list[tuple[str, str, str]]], None],
    on_tokens: Callable[[int], None],
) -> list[Cell]:
    """Returns the cells, each question answered greedily by the engine.

    Args:
      on_text: told after each text its (name, code, answer)s.
      on_tokens: told after each chunk how many tokens were read.

    Raises:
      NonFiniteError: the model computed NaN or infinity, which is no wrong answer.
    """
    from v4jax.errors import NonFiniteError
    from v4jax.inference import Document, Question, SamplingOptions
    from v4jax.training.data import needles

    cells = {
        (text.length, group): Cell(text.length, group) for text in texts for group in range(depths)
    }
    sampling = SamplingOptions(max_new_tokens=MAX_NEW_TOKENS)
    for text in texts:
        questions = tuple(Question(needles.ask(name), sampling) for name, _, _ in text.asked)
        encoded = engine.encode(Document(text.text, questions))
        given = []
        try:
            state = engine.read(encoded, on_chunk=on_tokens)
            for group in encoded.groups(engine.options):
                given += engine.answer(encoded, state, group)
            for answer in given:
                if answer.error:
                    raise NonFiniteError(answer.error)
        except NonFiniteError as error:
            raise NonFiniteError(f"in a text of {text.length:,} bytes, {error}") from error
        answers = []
        for (name, code, depth), answer in zip(text.asked, given, strict=True):
            cell = cells[text.length, depth]
            cells[text.length, depth] = dataclasses.replace(
                cell,
                asked=cell.asked + 1,
                right=cell.right + (answer.text.strip() == code),
                written=cell.written + max(answer.answer_tokens - 1, 0),
                passes=cell.passes + answer.passes,
            )
            answers.append((name, code, answer.text.strip()))
        on_text(text, answers)
    return list(cells.values())


def plot_cells(cells: Sequence[Cell], depths: int, title: str, path: str) -> None:
    """Writes the grid as a PNG: lengths from left to right, depths from top to bottom.

    Raises:
      UnsupportedError: matplotlib is not installed.
    """
    lengths = sorted({cell.length for cell in cells})
    share = np.full((depths, len(lengths)), np.nan)
    for cell in cells:
        if cell.asked:
            share[cell.depth, lengths.index(cell.length)] = 100 * cell.accuracy
    size = 1.6 + 1.1 * len(lengths), 1.4 + 0.6 * depths
    figure = make_figure(MISSING, figsize=size, layout="tight")
    axes = figure.subplots()
    picture = axes.imshow(share, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for (row, column), value in np.ndenumerate(share):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [name_length(length) for length in lengths])
    axes.set_yticks(range(depths), [name_depth(group, depths) for group in range(depths)])
    axes.set_xlabel("bytes of text")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title)
    figure.colorbar(picture, label="answers right, %")
    save_figure(figure, to_path(path), dpi=120)


def name_length(length: int) -> str:
    """Returns a length as people say it: 4 K, 1 M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit} {name}"
    return f"{length:,}"


def name_depth(group: int, depths: int) -> str:
    """Returns a depth group as its range in percent."""
    return f"{100 * group // depths}–{100 * (group + 1) // depths} %"
