"""The control tokens of the V4 models, and what every vocabulary can do with them.

A control token is matched whole in trusted text and has one id. Anyone can type its literal;
documents from outside are therefore encoded with `specials=False`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from v4jax.errors import RequestError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"  # one token; the `<`, `</` and tag names around it are ordinary text
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
EXTRACTED_URL = "<｜extracted_url｜>"

# Tasks (quick instructions) → the token that requests each.
TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

# Control tokens of prompts and completions. A tokenizer.json has 1,250 more.
CONTROLS = (
    BOS,
    EOS,
    USER,
    ASSISTANT,
    LATEST_REMINDER,
    THINK_START,
    THINK_END,
    DSML,
    *TASKS.values(),
)


class Vocabulary:
    """The half of a tokenizer that does not depend on how text is split: from ids to text.

    Attributes:
      controls: literal → id of every control token.
      vocab_size: number of ids, and of rows of the embedding.
      bos_id, eos_id, pad_id: ids of `BOS`, `EOS` and `PAD`.
    """

    def __init__(self, controls: Mapping[str, int], vocab_size: int):
        self.controls = dict(controls)
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id, self.pad_id = (self.controls[text] for text in (BOS, EOS, PAD))
        self._control_ids = frozenset(self.controls.values())

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id, which are often part of a character."""
        raise NotImplementedError

    @cached_property
    def longest_bytes(self) -> int:
        """Bytes of the longest token, and thereby of a text for each of its tokens."""
        return max(len(self.token_bytes(token)) for token in range(self.vocab_size))

    def decode_bytes(self, tokens: Iterable[int], *, specials: bool = True) -> bytes:
        """Returns the bytes of `tokens`; `specials=False` leaves the control tokens out.

        Raises:
          RequestError: an id is outside the vocabulary.
        """
        kept = (t for t in tokens if specials or t not in self._control_ids)
        return b"".join(map(self.token_bytes, kept))

    def decode(self, tokens: Iterable[int], *, specials: bool = True) -> str:
        """Returns the text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens, specials=specials).decode("utf-8", errors="replace")

    def is_control(self, token: int) -> bool:
        """Says whether `token` is a control token."""
        return token in self._control_ids

    def find_control(self, text: str) -> int | None:
        """Returns the position of the first literal of a control token; None if there is none."""
        found = self._control_start.search(text)
        return None if found is None else found.start()

    @cached_property
    def _control_start(self) -> re.Pattern:
        # Grouped by the first two characters: in a text full of `<` few literals are tried.
        tails: dict[str, list[str]] = {}
        for literal in self.controls:
            tails.setdefault(literal[:2], []).append(re.escape(literal[2:]))
        branches = (f"{re.escape(head)}(?:{'|'.join(t)})" for head, t in tails.items())
        return re.compile("|".join(branches))

    def _check_id(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise RequestError(
                f"token id must be between 0 and {self.vocab_size - 1}, got {token}; "
                "was it produced with another tokenizer?"
            )

    @staticmethod
    def _check_text(text: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text must be valid Unicode, got the lone surrogate {text[error.start]!r} at "
                f"character {error.start}; remove it or replace it with U+FFFD"
            ) from error
