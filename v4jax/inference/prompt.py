"""From a conversation's frame and a user's words to token ids, in two parts.

The prompt of a question to a document is one user turn: document, blank line, question. It is split
where the document ends: everything before is the same for all questions and is read once.

    BOS [system] <｜User｜> document │ \\n\\n question <｜Assistant｜></think>
"""

from dataclasses import dataclass

from v4jax.errors import RequestError
from v4jax.tokenizer import encode_messages

_HERE = "\x00here\x00"  # stands for the user's words while the frame is rendered


@dataclass(frozen=True)
class Frame:
    """What surrounds the user's words.

    Attributes:
      system: the system message; its text is trusted and may hold control tokens.
      thinking: lets the model reason before it answers.
      effort: how long to reason (`"max"`: as long as it takes); only with `thinking`.
      profile: the generation of checkpoints, which says what an effort means; a key of
        `tokenizer.PROFILES`.
    """

    system: str | None = None
    thinking: bool = False
    effort: str | None = None
    profile: str = "preview"

    def __post_init__(self):
        if self.effort and not self.thinking:
            raise RequestError(f'effort "{self.effort}" needs thinking; switch thinking on')
        if self.system and _HERE in self.system:
            raise RequestError("system must not hold NUL characters")
        self._render()  # complains about a bad effort now, not at the first document

    @property
    def mode(self) -> str:
        """The mode, as the tokenizer's functions call it."""
        return "thinking" if self.thinking else "chat"

    def encode_document(self, tokenizer, text: str) -> list[int]:
        """Returns the ids up to the end of the document, the shared part of all its prompts."""
        before, _ = self._render()
        return tokenizer.encode(before) + tokenizer.encode(text, specials=False)

    def encode_question(self, tokenizer, text: str) -> list[int]:
        """Returns the ids from the end of the document to where the answer begins."""
        _, after = self._render()
        return tokenizer.encode("\n\n" + text, specials=False) + tokenizer.encode(after)

    def encode_prompt(self, tokenizer, text: str) -> list[int]:
        """Returns the ids of a turn without a document."""
        before, after = self._render()
        words = tokenizer.encode(text, specials=False)
        return tokenizer.encode(before) + words + tokenizer.encode(after)

    def _render(self) -> tuple[str, str]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": _HERE}]
        prompt = encode_messages(messages, mode=self.mode, effort=self.effort, profile=self.profile)
        before, after = prompt.split(_HERE)
        return before, after
