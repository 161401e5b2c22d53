"""From the frame of a conversation and a user's words to token ids, in two parts.

The prompt of a question to a document is one user turn: document, blank line, question. It is split
at the end of the document: the first part is the same for all questions and is read once.

    BOS [system] <｜User｜> document │ \\n\\n question <｜Assistant｜></think>
"""

from dataclasses import dataclass

from v4jax.config.inference import FrameConfig
from v4jax.errors import RequestError
from v4jax.tokenizer import PROFILES, Piece, encode_pieces, render_messages

_HERE = "here"  # in place of the user's words while the frame is rendered


@dataclass(frozen=True)
class Frame(FrameConfig):
    """A checked `FrameConfig`, which makes prompts. The engine completes its profile."""

    def __post_init__(self):
        if self.effort and not self.thinking:
            raise RequestError(f'effort "{self.effort}" needs thinking; switch thinking on')
        # Reports a bad effort now, not at the first document.
        known = sorted({effort for each in PROFILES.values() for effort in each.effort_prefixes})
        if self.effort is None or self.profile is not None:
            self._render()
        elif self.effort not in known:
            raise RequestError(f"effort must be one of {', '.join(known)}, got {self.effort!r}")

    @property
    def mode(self) -> str:
        """The mode by the tokenizer's name."""
        return "thinking" if self.thinking else "chat"

    def encode_document(self, tokenizer, text: str) -> list[int]:
        """Returns the ids up to the end of the document, the shared part of all its prompts."""
        before, _ = self._render()
        return encode_pieces(before, tokenizer) + tokenizer.encode(text, specials=False)

    def encode_question(self, tokenizer, text: str) -> list[int]:
        """Returns the ids from the end of the document to the beginning of the answer."""
        _, after = self._render()
        words = tokenizer.encode("\n\n" + text, specials=False)
        return words + encode_pieces(after, tokenizer)

    def encode_prompt(self, tokenizer, text: str) -> list[int]:
        """Returns the ids of a turn without a document."""
        before, after = self._render()
        return encode_pieces([*before, Piece(text), *after], tokenizer)

    def _render(self) -> tuple[list[Piece], list[Piece]]:
        """Returns what precedes and what follows the user's words."""
        if self.effort and self.profile is None:
            raise RequestError(
                f'effort "{self.effort}" is asked for by another text in each of the profiles '
                f"{', '.join(PROFILES)}; name the profile of the model"
            )
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": _HERE}]
        options = {"mode": self.mode, "effort": self.effort}
        options |= {"profile": self.profile} if self.profile else {}
        pieces = render_messages(messages, **options)
        place = len(pieces) - 1 - pieces[::-1].index(Piece(_HERE))  # the user's turn is the last
        return pieces[:place], pieces[place + 1 :]
