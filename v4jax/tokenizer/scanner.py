"""Reads text that arrives in pieces, cut anywhere, as if it were whole.

The grammar of a completion (`stream.py`, `tools.py`) consists of generators over a `Scanner`. They
yield an event as soon as it is certain, and `NEED_MORE` where only more text can decide.
"""

import re
from collections.abc import Generator
from typing import NoReturn

from v4jax.errors import CompletionError
from v4jax.tokenizer.events import Departure
from v4jax.tokenizer.vocabulary import DSML

NEED_MORE = object()


class Markers:
    """Literals at which a scanner stops."""

    def __init__(self, *literals: str):
        self.literals = frozenset(literals)
        # A proper prefix counts at the end of the text only, where the next piece may complete it.
        prefixes = {text[:n] for text in literals for n in range(1, len(text))}
        whole = map(re.escape, literals)
        partial = (re.escape(text) + r"\Z" for text in sorted(prefixes, key=len, reverse=True))
        self.pattern = re.compile("|".join((*whole, *partial)))


class Scanner:
    """The text that was received and not yet consumed, and its place in the completion.

    Attributes:
      pending: text not yet consumed.
      place: what is being read, for error messages; the grammar sets it.
      position: number of characters consumed.
    """

    def __init__(self, *, tolerant: bool):
        self.tolerant = tolerant
        self.pending = ""
        self.place = "completion"
        self.position = 0
        self._text: list[str] = []  # text that `hold_until` consumed
        self._held = ""  # possibly the start of a tag with doubled bars

    def push(self, text: str) -> None:
        """Appends a piece; a tolerant scanner turns doubled bars of tags into single ones."""
        if not self.tolerant:
            self.pending += text
            return
        text = self._held + text
        tail = _DOUBLED_TAIL.search(text)
        end = tail.start() if tail else len(text)
        self.pending += _DOUBLED.sub(rf"\1{DSML}", text[:end])
        self._held = text[end:]

    def release(self) -> None:
        """Makes the held-back tail pending, because no more text will come."""
        self.pending += self._held
        self._held = ""

    def take(self, count: int) -> str:
        """Consumes the next `count` characters."""
        text, self.pending = self.pending[:count], self.pending[count:]
        self.position += count
        return text

    def take_until(self, markers: Markers) -> tuple[str, str | None]:
        """Consumes the text before the first marker, and the marker; `None` if there is none yet.

        The end of the text stays pending while it may be the beginning of a marker.
        """
        found = markers.pattern.search(self.pending)
        if found is None:
            return self.take(len(self.pending)), None
        text = self.take(found.start())
        return text, self.take(len(found[0])) if found[0] in markers.literals else None

    def hold_until(self, markers: Markers) -> Generator[object, None, str]:
        """Consumes text through the first marker and returns it; `take_held` has the text."""
        while True:
            text, marker = self.take_until(markers)
            self._text.append(text)
            if marker is not None:
                return marker
            yield NEED_MORE

    def take_held(self) -> str:
        """Returns the text that `hold_until` consumed, and forgets it."""
        text = "".join(self._text)
        self._text.clear()
        return text

    def depart(self, message: str, *, back: int = 0) -> Departure:
        """Returns the event that says how the completion leaves the format.

        Raises:
          CompletionError: the scanner is strict.
        """
        self.insist(message, back=back)
        return Departure(self._locate(message, back))

    def insist(self, message: str, *, back: int = 0) -> None:
        """Raises CompletionError if the scanner is strict; a tolerant one accepts it silently.

        Args:
          back: number of characters since then.
        """
        if not self.tolerant:
            self.fail(message, back=back)

    def fail(self, message: str, *, back: int = 0) -> NoReturn:
        """Raises CompletionError with the place and the position, `back` characters ago."""
        raise CompletionError(self._locate(message, back))

    def _locate(self, message: str, back: int) -> str:
        return f"{self.place}, character {self.position - back}: {message}"


def quote(text: str) -> str:
    """Returns `text` between double quotes, with newlines visible."""
    return '"' + text.replace("\\", "\\\\").replace("\n", "\\n") + '"'


_DOUBLED = re.compile("(</?)｜｜DSML｜｜")
_DOUBLED_TAIL = re.compile(
    "|".join(f"</?{'｜｜DSML｜｜'[:n]}\\Z" for n in reversed(range(len("｜｜DSML｜｜"))))
)
