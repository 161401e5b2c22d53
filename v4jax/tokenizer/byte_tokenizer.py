"""The tokenizer of the small packaged configurations: one id per byte, and the control tokens.

    0–255      the byte of that value
    256–258    BOS, EOS, PAD
    259, 260   User, Assistant
    261, 262   <think>, </think>
    263        ｜DSML｜
    264        latest_reminder
    265–270    tasks: action, query, authority, domain, title, read_url
    271        extracted_url
    272–274    fim hole, begin, end
    275–319    reserved

Ids never change; a new control token takes the first reserved row.
"""

import re

from v4jax.tokenizer import vocabulary as v
from v4jax.tokenizer.vocabulary import Vocabulary

BYTE_VOCAB_SIZE = 320

_NAMED = (
    *(v.BOS, v.EOS, v.PAD, v.USER, v.ASSISTANT, v.THINK_START, v.THINK_END, v.DSML),
    *(v.LATEST_REMINDER, *v.TASKS.values(), v.EXTRACTED_URL),
    *(v.FIM_HOLE, v.FIM_BEGIN, v.FIM_END),
)
# Reserved rows have literals too, because a model with random weights emits them.
_RESERVED = tuple(f"<｜reserved▁{i}｜>" for i in range(256 + len(_NAMED), BYTE_VOCAB_SIZE))


class ByteTokenizer(Vocabulary):
    """Encodes UTF-8 byte by byte. Decoding gives back any text and any bytes exactly."""

    def __init__(self):
        literals = (*_NAMED, *_RESERVED)
        super().__init__(
            dict(zip(literals, range(256, BYTE_VOCAB_SIZE), strict=True)), BYTE_VOCAB_SIZE
        )
        self._bytes = (*(bytes([b]) for b in range(256)), *(text.encode() for text in literals))
        # Reserved rows are decoded and never encoded: they mean nothing in a prompt.
        self._named = re.compile(f"({'|'.join(map(re.escape, _NAMED))})")

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Returns the ids of `text`.

        Args:
          specials: matches control tokens; `False`, for untrusted text, yields byte ids only.

        Raises:
          RequestError: `text` holds a lone surrogate.
        """
        self._check_text(text)
        if not specials:
            return list(text.encode())
        tokens: list[int] = []
        for i, piece in enumerate(self._named.split(text)):  # text, control, text, control, …, text
            tokens.extend([self.controls[piece]] if i % 2 else piece.encode())
        return tokens

    def encode_bytes(self, data: bytes) -> list[int]:
        """Returns the ids of arbitrary bytes."""
        return list(data)

    def token_bytes(self, token: int) -> bytes:
        self._check_id(token)
        return self._bytes[token]
