"""Reading text that arrives in pieces, cut anywhere, as if it were whole.

The grammar of a completion (`stream.py`, `tools.py`) is written as generators over a `Scanner`.
They yield events as soon as these are certain and `NEED_MORE` when only more text can tell.
"""

import re
from collections.abc import Generator
from typing import NoReturn

from v4jax.errors import CompletionError
from v4jax.tokenizer.vocabulary import DSML

NEED_MORE = object()


class Markers:
    """A set of literals to stop at."""

    def __init__(self, *literals: str):
        self.literals = frozenset(literals)
        # A proper prefix counts at the very end only: there the next piece may complete it.
        prefixes = {text[:n] for text in literals for n in range(1, len(text))}
        whole = map(re.escape, literals)
        partial = (re.escape(text) + r"\Z" for text in sorted(prefixes, key=len, reverse=True))
        self.pattern = re.compile("|".join((*whole, *partial)))


class Scanner:
    """The text received and not yet consumed, and where it stands in the completion.

    Attributes:
      pending: text not yet consumed.
      place: what is being read, for error messages; the grammar sets it.
    """

    def __init__(self, *, tolerant: bool):
        self.tolerant = tolerant
        self.pending = ""
        self.place = "completion"
        self._consumed = 0
        self._held = ""  # the start of a tag with doubled bars, perhaps

    def push(self, text: str) -> None:
        """Appends a piece; a tolerant scanner makes doubled bars of tags single."""
        if not self.tolerant:
            self.pending += text
            return
        text = self._held + text
        tail = _DOUBLED_TAIL.search(text)
        end = tail.start() if tail else len(text)
        self.pending += _DOUBLED.sub(rf"\1{DSML}", text[:end])
        self._held = text[end:]

    def release(self) -> None:
        """Makes the held-back tail pending: no more text will come."""
        self.pending += self._held
        self._held = ""

    def take(self, count: int) -> str:
        """Consumes the next `count` characters."""
        text, self.pending = self.pending[:count], self.pending[count:]
        self._consumed += count
        return text

    def take_until(self, markers: Markers) -> tuple[str, str | None]:
        """Consumes text up to the earliest marker, and the marker; `None` if it has not come yet.

        The end of the text stays pending while it may be the beginning of a marker.
        """
        found = markers.pattern.search(self.pending)
        if found is None:
            return self.take(len(self.pending)), None
        text = self.take(found.start())
        return text, self.take(len(found[0])) if found[0] in markers.literals else None

    def skip_space(self) -> Generator[object, None, None]:
        """Consumes whitespace until something else is pending."""
        while not self.pending.strip():
            self.take(len(self.pending))
            yield NEED_MORE
        self.take(len(self.pending) - len(self.pending.lstrip()))

    def expect(self, *options: str) -> Generator[object, None, str]:
        """Consumes the one of `options` that comes next and returns it.

        Raises:
          CompletionError: something else comes; raised at the first character that fits none.
        """
        while True:
            for option in options:
                if self.pending.startswith(option):
                    return self.take(len(option))
            if not any(option.startswith(self.pending) for option in options):
                starts = (self.pending[:n] for n in range(1, len(self.pending) + 1))
                got = next(s for s in starts if not any(o.startswith(s) for o in options))
                self.fail(f"expected {' or '.join(map(quote, options))}, got {quote(got)}")
            yield NEED_MORE

    def fail(self, message: str, *, back: int = 0) -> NoReturn:
        """Raises CompletionError with the place and the position, `back` characters ago."""
        raise CompletionError(f"{self.place}, character {self._consumed - back}: {message}")


def quote(text: str) -> str:
    """Returns `text` between double quotes, with newlines visible."""
    return '"' + text.replace("\\", "\\\\").replace("\n", "\\n") + '"'


_DOUBLED = re.compile("(</?)｜｜DSML｜｜")
_DOUBLED_TAIL = re.compile(
    "|".join(f"</?{'｜｜DSML｜｜'[:n]}\\Z" for n in reversed(range(len("｜｜DSML｜｜"))))
)
